"""Training with LlamaGen's patched forward: accumulated, compiled, on two processes, as a graph, in official stages."""

import json

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from npp_kernels import PatchSchedule, StepGraph
from npp_kernels.integrations.llamagen import apply, coarse_rotary_table, official_schedule
from tests.llamagen_models import assert_same_gradients, batch_of, both, coarse, gradients, model_of
from tests.processes import run_in


def test_accumulation_is_the_whole_batch():
    tokens, labels = batch_of(images=6)
    with apply(model_of()) as patched:
        model = patched.model
        whole = gradients(model, model(tokens, labels, targets=tokens, p=2)[1])
        for part in range(3):
            images = slice(2 * part, 2 * part + 2)
            (model(tokens[images], labels[images], targets=tokens[images], p=2)[1] / 3).backward()
        assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, whole, rtol=1e-4, atol=1e-6)


def test_autocast():
    tokens, labels = batch_of()
    model = model_of()
    for p in (1, 2):
        with torch.autocast("cpu", torch.bfloat16):
            (ours, our_gradients), (theirs, their_gradients) = both(
                model, idx=tokens, cond_idx=labels, targets=tokens, **coarse(model, p)
            )
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)
        assert_same_gradients(our_gradients, their_gradients, rtol=0.05, atol=2e-3)


# Dynamo looks at .grad of all that goes into a compiled block, activations too.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiles_without_a_break_over_all_stages():
    tokens, labels = batch_of()
    model = model_of()
    apply(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for p in (8, 4, 2, 1):
        loss, expected = compiled(tokens, labels, targets=tokens, p=p)[1], model(tokens, labels, targets=tokens, p=p)[1]
        torch.testing.assert_close(loss, expected)
        assert_same_gradients(gradients(model, loss), gradients(model, expected), rtol=1e-4, atol=1e-6)


def train(model, steps, *, p, table=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        tokens, labels = batch_of(step, images=4)
        loss = model(idx=tokens, cond_idx=labels, targets=tokens, p=p, patch_size=p**2, freqs_cis=table)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("p", [1, 4])
def test_two_hundred_steps_agree(p):
    """Patched and not, the weights stay together for as long as rounding lets them."""
    model = model_of()
    apply(model)
    ours = train(model, 200, p=p)
    own = model_of()
    theirs = train(own, 200, p=p, table=coarse_rotary_table(own, p))
    assert ours[-1] < ours[0] - 0.2
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[:20] == pytest.approx(theirs[:20], rel=1e-5)


RANKS = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tests.llamagen_models import batch_of, model_of
from npp_kernels.integrations.llamagen import apply, coarse_rotary_table

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))


def wrapped(model, kind):
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def losses_of(kind, patched):
    model = model_of()
    if patched:
        apply(model)
    model = wrapped(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(8):
        p = 2 if step < 4 else 1
        tokens, labels = batch_of(step, images=4)
        part = slice(2 * rank, 2 * rank + 2)
        options = dict(targets=tokens[part], p=p, patch_size=p * p, freqs_cis=coarse_rotary_table(model_of(), p))
        loss = model(idx=tokens[part], cond_idx=labels[part], **options)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    dist.all_reduce(losses)
    return losses / 2


expected = losses_of("ddp", False)
for kind in ("ddp", "fsdp1", "fsdp2"):
    torch.testing.assert_close(losses_of(kind, True), expected, rtol=1e-5, atol=0, msg=lambda text: f"{kind}: {text}")
dist.destroy_process_group()
print("equal", expected.tolist())
"""


def test_two_ranks(tmp_path):
    """Averaged over two processes, sharded or not, the losses are the official formulation's, and the whole batch's."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    result = run_in(2, script)
    assert result.stdout.count("equal") == 2
    expected = json.loads(result.stdout.partition("equal ")[2].splitlines()[0])

    model = model_of()
    apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, loss_on_two in enumerate(expected):
        tokens, labels = batch_of(step, images=4)
        loss = model(tokens, labels, targets=tokens, p=2 if step < 4 else 1)[1]
        assert loss.item() == pytest.approx(loss_on_two, rel=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("arguments", "boundaries"),
    [
        ((2, 9, 10), ((2, 40), (1, 90))),
        ((3, 300, 5004), ((4, 75 * 5004), (2, 150 * 5004), (1, 300 * 5004))),
        ((4, 3, 7), ((2, 7), (1, 21))),  # patches 8 and 4 have no whole epoch
        ((1, 3, 7), ((1, 21),)),
        ((2, 10, 3, 0.75), ((2, 21), (1, 30))),
    ],
)
def test_official_stages_end_with_whole_epochs(arguments, boundaries):
    schedule = official_schedule(*arguments)
    assert schedule == PatchSchedule(boundaries)
    for name, wrong in (("levels", (5, 9, 10)), ("epochs", (2, 0, 10)), ("rate", (2, 9, 10, 1.0))):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            official_schedule(*wrong)


@pytest.mark.gpu
def test_on_a_graph():
    """Their training step, with the patched model, as a graph for each patch: the steps without."""
    results = []
    for enabled in (True, False):
        model = model_of(dropout=0.1).cuda()
        apply(model)
        lr = torch.tensor(1e-3, device="cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr, fused=True, capturable=True)

        def step(tokens, labels, *, patch, model=model, optimizer=optimizer):
            # Attention whose backward adds in the same order every time.
            with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                _, loss = model(idx=tokens, cond_idx=labels, targets=tokens, p=patch)
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        train = StepGraph(step, optimizers=optimizer, enabled=enabled)
        torch.cuda.manual_seed(0)
        batches = [tuple(tensor.cuda() for tensor in batch_of(number)) for number in range(24)]
        losses = [train(*batch, patch=(4, 2, 1)[number // 8]) for number, batch in enumerate(batches)]
        results.append(torch.stack([*losses, model.output.weight.sum()]))
        assert len(train.captured) == (3 if enabled else 0)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
