"""LlamaGen's and the official NPP forward, patched: on a stand-in with their surface, against its expanded logits."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.llamagen_model import PlainTransformer, Transformer
from npp_kernels import PatchSchedule, StepGraph, group_tokens
from npp_kernels.integrations.llamagen import (
    apply,
    coarse_rotary_table,
    official_schedule,
    patch_inputs,
    patch_loss,
)
from tests.processes import run_in

SIDE, VOCAB_SIZE, DIM = 8, 50, 16
SIZE = {"vocab_size": VOCAB_SIZE, "block_size": SIDE**2, "dim": DIM, "n_layer": 2, "n_head": 2}


def model_of(kind=Transformer, **options):
    torch.manual_seed(0)
    model = kind(**SIZE, **options)
    nn.init.normal_(model.output.weight, std=0.3)  # at zero the gradient of all else would be zero
    return model.train()


def batch_of(step=0, images=3):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB_SIZE, (images, SIDE**2), generator=generator)
    return tokens, torch.randint(10, (images,), generator=generator)


def coarse(model, p):
    """Return the arguments of the official script at a patch."""
    return {"p": p, "patch_size": p**2, "freqs_cis": coarse_rotary_table(model_of(), p)}


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return dict(zip(names, grads, strict=True))


def assert_same_gradients(ours, theirs, **tolerance):
    for name, grad in theirs.items():
        if grad is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], grad, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


def both(model, *arguments, seed=1, **options):
    """Return loss and gradients of the patched model, and of itself."""
    results = []
    for patched in (True, False):
        undo = apply(model).undo if patched else (lambda: None)
        torch.manual_seed(seed)
        logits, loss = model(*arguments, **options)
        undo()
        assert (logits is None) == patched
        results.append((loss.detach(), gradients(model, loss)))
    return results


def assert_equal(results):
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    assert_same_gradients(our_gradients, their_gradients, rtol=1e-4, atol=8e-7)


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_is_the_official_formulation(p, dropout):
    tokens, labels = batch_of()
    model = model_of(dropout=dropout, class_dropout=dropout)
    assert_equal(both(model, idx=tokens, cond_idx=labels, targets=tokens, **coarse(model, p)))


@pytest.mark.parametrize("p", [1, 4])
def test_the_table_may_be_left_out(p):
    tokens, labels = batch_of()
    model = model_of()
    with apply(model):
        given = model(tokens, labels, targets=tokens, **coarse(model, p))[1]
        assert model(tokens, labels, targets=tokens, p=p)[1] == given


def test_captions():
    model = model_of(model_type="t2i", cls_token_num=5, class_dropout=0.5)
    tokens, _ = batch_of()
    captions = torch.randn(3, 5, 24)
    for p in (1, 2):
        table = coarse_rotary_table(model, p)
        options = {"p": p, "patch_size": p**2, "freqs_cis": table}
        assert_equal(both(model, idx=tokens, cond_idx=captions, targets=tokens, **options))
        model = model_of(model_type="t2i", cls_token_num=5, class_dropout=0.5)  # its forward has kept the coarse table


@pytest.mark.parametrize("valid", [(1, 0, 1), (0, 0, 0), (1.0, 0.25, 0.5), (0.001, 0.0, 0.0)])
@pytest.mark.parametrize("kind", [Transformer, PlainTransformer])
def test_valid(kind, valid):
    tokens, labels = batch_of()
    inputs = tokens if kind is Transformer else tokens[:, :-1]
    results = both(model_of(kind), idx=inputs, cond_idx=labels, targets=tokens, valid=torch.tensor(valid))
    assert_equal(results)


def test_valid_at_a_coarse_patch():
    """There the official code has no loss: by the images that count, one by one."""
    tokens, labels = batch_of()
    model = model_of()
    with apply(model):
        single = [model(tokens[i : i + 1], labels[i : i + 1], targets=tokens[i : i + 1], p=2)[1] for i in range(3)]
        weights = torch.tensor([1.0, 0.0, 0.5])
        loss = model(tokens, labels, targets=tokens, valid=weights, p=2)[1]
    torch.testing.assert_close(loss, (single[0] + 0.5 * single[2]) / 1.5)


def test_a_model_without_patches_and_its_own_caller():
    tokens, labels = batch_of()
    model = model_of(PlainTransformer, dropout=0.2)
    assert_equal(both(model, idx=tokens[:, :-1], cond_idx=labels, targets=tokens))
    npp = model_of()
    for p in (1, 2, 8):  # and on patches it is what NPP's forward is, with or without the last token
        expected = npp(idx=tokens, cond_idx=labels, targets=tokens, **coarse(npp, p))[1]
        with apply(model_of(PlainTransformer)) as patched:
            for inputs in (tokens, tokens[:, :-1]):
                torch.testing.assert_close(patched.model(inputs, labels, targets=tokens, p=p)[1], expected)


def test_masks_of_texts():
    model = model_of(PlainTransformer, model_type="t2i", cls_token_num=5)
    tokens, captions = batch_of()[0], torch.randn(3, 5, 24)
    mask = torch.ones(5 + SIDE**2 - 1, 5 + SIDE**2 - 1, dtype=torch.bool).tril().repeat(3, 1, 1, 1)
    mask[0, :, :, :2] = mask[0, :, :, :2] & torch.eye(mask.shape[-1], dtype=torch.bool)[:, :2]
    mask = mask.view(3, 1, *mask.shape[-2:])
    assert_equal(both(model, idx=tokens[:, :-1], cond_idx=captions, targets=tokens, mask=mask))
    with apply(model):
        with pytest.raises(ValueError, match=r"mask: expected \[\.\.\., 20, 20\] for patch 2, got \(3, 1, 68, 68\)"):
            model(tokens, captions, targets=tokens, mask=mask, p=2)
        assert model(tokens, captions, targets=tokens, mask=mask[..., :20, :20], p=2)[1].isfinite()


def test_evaluation_is_training_without_dropout():
    tokens, labels = batch_of()
    model, plain = model_of(dropout=0.5, class_dropout=0.5), model_of()
    apply(model.eval())
    for p in (1, 4):
        expected = plain(idx=tokens, cond_idx=labels, targets=tokens, **coarse(plain, p))[1]
        torch.testing.assert_close(model(tokens, labels, targets=tokens, p=p)[1], expected)
    # As LlamaGen's own forward has it, with positions given.
    own = model_of(PlainTransformer).eval()
    positions = torch.arange(SIDE**2)
    expected = own(tokens[:, :-1], labels, positions, tokens)[1]
    with apply(own):
        torch.testing.assert_close(own(tokens[:, :-1], labels, positions, tokens)[1], expected)


@torch.no_grad()
def generate(model, labels, *, cache):
    """Sample greedily, as LlamaGen's `generate` calls the model."""
    model.eval().setup_caches(len(labels), SIDE**2 + 1)
    position = torch.arange(1)
    token = model(None, labels, position)[0][:, -1].argmax(-1, keepdim=True)
    tokens = [token]
    for step in range(1, 10):
        token = model(token, None, torch.tensor([step]))[0][:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
    for layer in model.layers:
        layer.attention.kv_cache = None
    return torch.cat(tokens, 1)


def test_sampling_and_checkpoints_do_not_change():
    labels = torch.tensor([1, 2])
    model = model_of()
    expected, keys = generate(model, labels, cache=True), list(model.state_dict())
    with apply(model):
        assert torch.equal(generate(model, labels, cache=True), expected)
        assert list(model.state_dict()) == keys
        model_of().load_state_dict(model.state_dict())
        logits, loss = model.train()(batch_of()[0], batch_of()[1])  # without targets: the model's own
        assert loss is None
        assert logits.shape == (3, SIDE**2, VOCAB_SIZE)
        model.eval().setup_caches(3, SIDE**2 + 1)
        with pytest.raises(ValueError, match="model: expected no cache beside targets"):
            model(*batch_of(), targets=batch_of()[0])


def test_undo_and_copies():
    tokens, labels = batch_of()
    model = model_of()
    patched = apply(model)
    with pytest.raises(ValueError, match="model: expected one that this was not applied to"):
        apply(model)
    average = copy.deepcopy(model)  # as an EMA is made
    nn.init.zeros_(average.output.weight)
    assert average(tokens, labels, targets=tokens, p=2)[1].item() == pytest.approx(torch.tensor(50.0).log().item())
    assert model(tokens, labels, targets=tokens, p=2)[1].item() != pytest.approx(torch.tensor(50.0).log().item())
    restored = pickle.loads(pickle.dumps(model))
    assert restored(tokens, labels, targets=tokens, p=2)[1] == model(tokens, labels, targets=tokens, p=2)[1]
    patched.undo()
    assert "forward" not in vars(model)
    assert model(tokens, labels, targets=tokens)[0] is not None


def test_undo_restores_a_forward_that_was_put_there():
    model = model_of()
    calls = []
    own = model.forward

    def counting(*arguments, **options):
        calls.append(1)
        return own(*arguments, **options)

    # A forward that takes anything is asked for the model's own loss without p, so it is given one that has it.
    counting.__signature__ = __import__("inspect").signature(own)
    model.forward = counting
    apply(model).undo()
    assert model.forward is counting
    assert len(calls) == 1  # the comparison


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
from tests.test_llamagen import batch_of, model_of
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


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 8 * super().forward(ids)


class Adapted(nn.Linear):
    """A head with a low-rank adapter, as LoRA has it."""

    def __init__(self):
        super().__init__(DIM, VOCAB_SIZE, bias=False)
        self.down, self.up = nn.Linear(DIM, 2, bias=False), nn.Linear(2, VOCAB_SIZE, bias=False)

    def forward(self, hidden):
        return super().forward(hidden) + self.up(self.down(hidden))


def hooked(module, scale):
    module.register_forward_hook(lambda module, arguments, result: result * scale)
    return module


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("output", Adapted),
        ("output", lambda: hooked(nn.Linear(DIM, VOCAB_SIZE), 0.5)),
        ("output", lambda: nn.Linear(DIM, VOCAB_SIZE)),  # with a bias
        ("tok_embeddings", lambda: Scaled(VOCAB_SIZE, DIM)),
        ("tok_embeddings", lambda: hooked(nn.Embedding(VOCAB_SIZE, DIM), 3.0)),
        ("tok_embeddings", lambda: nn.Embedding(VOCAB_SIZE, DIM, max_norm=0.5)),
        ("tok_embeddings", lambda: nn.Embedding(VOCAB_SIZE, DIM, padding_idx=3)),
        ("tok_embeddings", lambda: nn.Embedding(VOCAB_SIZE, DIM, scale_grad_by_freq=True)),
    ],
)
@pytest.mark.parametrize("p", [1, 2])
def test_layers_that_do_more_are_called(name, layer, p):
    tokens, labels = batch_of()
    model = model_of()
    setattr(model, name, layer())
    results = both(model, idx=tokens, cond_idx=labels, targets=tokens, **coarse(model, p))
    assert_equal(results)
    if name == "output" and layer is Adapted:
        assert all(results[0][1][f"output.{part}.weight"].abs().max() > 0 for part in ("down", "up"))


def test_a_sparse_embedding_keeps_its_sparse_gradient():
    tokens, labels = batch_of()
    model = model_of()
    model.tok_embeddings = nn.Embedding(VOCAB_SIZE, DIM, sparse=True)
    (_, ours), (_, theirs) = both(model, idx=tokens, cond_idx=labels, targets=tokens, **coarse(model, 2))
    assert ours["tok_embeddings.weight"].is_sparse
    ours, theirs = (grads["tok_embeddings.weight"].to_dense() for grads in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_the_two_lines_refuse_or_do_right():
    groups = group_tokens(batch_of()[0], 2, grid=(SIDE, SIDE))
    with pytest.raises(
        TypeError, match=r"embedding: expected a plain torch.nn.Embedding, got a .*Scaled with a forward"
    ):
        patch_inputs(Scaled(VOCAB_SIZE, DIM), groups)
    head, hidden = Adapted(), torch.randn(3, 16, DIM)
    expanded = head(hidden).unsqueeze(2).expand(-1, -1, 4, -1).flatten(0, 2)
    torch.testing.assert_close(patch_loss(hidden, head, groups), F.cross_entropy(expanded, groups.flatten()))


class ScaledLogits(Transformer):
    def finish(self, *arguments):
        self.norm.weight.data.mul_(2)
        try:
            return super().finish(*arguments)
        finally:
            self.norm.weight.data.div_(2)


def test_a_model_that_computes_something_else_is_refused():
    model = model_of(ScaledLogits)
    before = model.output.weight.clone()
    with pytest.raises(ValueError, match=r"model: expected the loss of LlamaGen's forward at patch 1, .* from its own"):
        apply(model)
    assert torch.equal(model.output.weight, before)
    assert "forward" not in vars(model)
    apply(model, check=False)


def test_the_comparison_leaves_no_trace():
    model = model_of(dropout=0.5)
    before, table = copy.deepcopy(model.state_dict()), model.freqs_cis
    torch.manual_seed(3)
    random = torch.get_rng_state()
    apply(model.eval())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert model.freqs_cis is table
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_gets_its_weights_later():
    tokens, labels = batch_of()
    with torch.device("meta"):
        model = Transformer(**SIZE)
    model.freqs_cis = model_of().freqs_cis
    with pytest.raises(ValueError, match="model: expected weights to compare with, got a model on meta"):
        apply(model)
    apply(model, check=False)
    model.to_empty(device="cpu").load_state_dict(model_of().state_dict())
    with apply(model_of()) as patched:
        assert model(tokens, labels, targets=tokens, p=2)[1] == patched.model(tokens, labels, targets=tokens, p=2)[1]


def test_errors_name_the_argument():
    tokens, labels = batch_of()
    model = model_of()
    with pytest.raises(TypeError, match="model: expected LlamaGen's Transformer, got Linear without block_size"):
        apply(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected the model itself, got .*: apply to model._orig_mod"):
        apply(torch.compile(model))
    fine = coarse_rotary_table(model, 1)
    with apply(model):
        with pytest.raises(ValueError, match=r"freqs_cis: expected the 17 rows .* at patch 2, got 65"):
            model(tokens, labels, targets=tokens, p=2, freqs_cis=fine)
        with pytest.raises(ValueError, match="p: expected a patch that divides the grid of 8 by 8 tokens, got 3"):
            model(tokens, labels, targets=tokens, p=3)
        with pytest.raises(ValueError, match="patch_size: expected p² = 4, got 2"):
            model(tokens, labels, targets=tokens, p=2, patch_size=2)
        with pytest.raises(ValueError, match="idx: expected 64 tokens of an image, or all but the last, got 60"):
            model(tokens[:, :60], labels, targets=tokens, p=2)
    model.freqs_cis = coarse_rotary_table(model, 2)
    with pytest.raises(ValueError, match=r"model.freqs_cis: expected the 65 rows .* at patch 1, got 17"):
        coarse_rotary_table(model, 2)
    with apply(model_of(PlainTransformer)) as patched, pytest.raises(ValueError, match="p: expected 1 without targets"):
        patched.model(tokens, labels, p=2)


def test_the_coarse_table_is_that_of_a_coarse_grid():
    from examples.llamagen_model import rotary_table

    for conditions in (1, 5):
        model = model_of(model_type="t2i", cls_token_num=conditions)
        for p in (1, 2, 4, 8):
            assert torch.equal(coarse_rotary_table(model, p), rotary_table(SIDE // p, DIM // 2, conditions))


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
