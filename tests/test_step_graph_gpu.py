"""The step as a CUDA graph, on a GPU: N calls are N steps, with whatever else a training step has."""

import copy
import gc
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from npp_kernels import StepGraph, group_mean, group_tokens, linear_patch_cross_entropy
from tests.processes import ROOT

VOCAB_SIZE, HIDDEN_SIZE, GRID = 64, 32, (8, 8)


class Model(nn.Module):
    """A small model on patches, with dropout, and its loss."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        wide = 4 * HIDDEN_SIZE
        layers = nn.Linear(HIDDEN_SIZE, wide), nn.GELU(), nn.Dropout(dropout), nn.Linear(wide, HIDDEN_SIZE)
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)

    def forward(self, tokens, patch):
        groups = group_tokens(tokens, patch, grid=GRID)
        hidden = self.body(group_mean(self.embedding.weight, groups[:, :-1]))
        return linear_patch_cross_entropy(hidden, self.head.weight, groups[:, 1:])


class Trainer:
    """A model, its optimizer and moving average, and its step in several ways."""

    def __init__(
        self, *, dropout=0.0, fused=True, micro_batches=1, autocast=False, how="end", compile=False, **options
    ):
        torch.manual_seed(1)
        self.model = Model(dropout).cuda()
        self.forward = torch.compile(self.model) if compile else self.model
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.lr = torch.tensor(1e-2, device="cuda")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), self.lr, weight_decay=0.1, fused=fused, capturable=True
        )
        self.micro_batches, self.autocast, self.how = micro_batches, autocast, how
        self.train = StepGraph(self.step, optimizers=self.optimizer, **options)

    def step(self, tokens, *, patch, update=True):
        if self.how == "start":
            self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part in tokens.chunk(self.micro_batches):
            with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
                loss = self.forward(part, patch) / self.micro_batches
            loss.backward()
            losses.append(loss.detach())
        result = {"loss": torch.stack(losses).sum()}
        if update:
            result["norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
            torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 0.1)
            if self.how != "start":
                self.optimizer.zero_grad(set_to_none=self.how == "end")
        return result

    def run(self, steps, patches=(4, 2)):
        """Train steps by number; return the losses."""
        torch.cuda.manual_seed(steps.start)
        return [self.train(batch_of(step), patch=patches[step * len(patches) // 20])["loss"] for step in steps]

    def weights(self):
        return [*(parameter.detach() for parameter in self.model.parameters()), *self.average]


def batch_of(step, images=6):
    return torch.randint(VOCAB_SIZE, (images, 64), generator=torch.Generator().manual_seed(step)).cuda()


def assert_same(one, other):
    assert torch.equal(torch.stack(one[0]), torch.stack(other[0]))
    for ours, theirs in zip(one[1].weights(), other[1].weights(), strict=True):
        assert torch.equal(ours, theirs)


def trained(steps=range(20), patches=(4, 2), **options):
    trainer = Trainer(**options)
    return trainer.run(steps, patches), trainer


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused": False},
        {"how": "start"},
        {"how": "keep"},  # gradients that are set to zero, not to None
        {"autocast": True},
        {"micro_batches": 3},
        {"dropout": 0.5},
        {"dropout": 0.5, "release_past": True},
        {"warmup": 2},
    ],
    ids=str,
)
def test_twenty_calls_are_twenty_steps(options):
    graph = trained(**options)
    assert len(graph[1].train.captured) == (1 if options.get("release_past") else 2)
    assert_same(graph, trained(**options, enabled=False))


@pytest.mark.gpu
def test_patches_in_turn():
    patches = tuple((4, 2, 1)[step % 3] for step in range(20))
    graph = trained(patches=patches)
    assert len(graph[1].train.captured) == 3
    assert_same(graph, trained(patches=patches, enabled=False))


@pytest.mark.gpu
def test_dropout_differs_from_step_to_step():
    trainer = Trainer(dropout=0.5)
    trainer.lr.fill_(0.0)
    tokens = batch_of(0)
    losses = [trainer.train(tokens, patch=2)["loss"].item() for _ in range(10)]
    assert len(set(losses)) == 10


@pytest.mark.gpu
def test_another_generator_counts_on():
    generator = torch.Generator("cuda").manual_seed(3)
    other = torch.Generator("cuda").manual_seed(3)
    total, expected = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")

    def step(x):
        total.add_(x * torch.rand(4, device="cuda", generator=generator))
        return total.clone()

    train, x = StepGraph(step, generators=[generator]), torch.ones(4, device="cuda")
    for _ in range(8):
        result = train(x)
        expected.add_(torch.rand(4, device="cuda", generator=other))
        assert torch.equal(result, expected)


@pytest.mark.gpu
def test_a_resumed_run_equals_one_that_was_not_stopped():
    whole = Trainer(dropout=0.5)
    losses = whole.run(range(14))
    state = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict(), whole.average))
    random = torch.cuda.get_rng_state()
    losses = [whole.train(batch_of(step), patch=2)["loss"] for step in range(14, 20)]

    resumed = Trainer(dropout=0.5)
    resumed.model.load_state_dict(state[0])
    resumed.optimizer.load_state_dict(state[1])
    resumed.average = state[2]
    torch.cuda.set_rng_state(random)
    rest = [resumed.train(batch_of(step), patch=2)["loss"] for step in range(14, 20)]
    assert_same((losses, whole), (rest, resumed))


@pytest.mark.gpu
def test_state_that_is_loaded_after_the_capture_is_what_is_trained():
    results = []
    for enabled in (True, False):
        trainer = Trainer(enabled=enabled)
        trainer.run(range(8))
        state = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))
        trainer.run(range(8, 12))
        trainer.model.load_state_dict(state[0])
        trainer.optimizer.load_state_dict(state[1])
        results.append((trainer.run(range(12, 20)), trainer))
    assert_same(*results)


@pytest.mark.gpu
def test_a_scheduler_between_the_calls():
    results = []
    for enabled in (True, False):
        trainer = Trainer(enabled=enabled)
        scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1 / (1 + step))
        losses = []
        for step in range(12):
            losses.append(trainer.train(batch_of(step), patch=2)["loss"])
            scheduler.step()
        results.append((losses, trainer))
    assert_same(*results)


@pytest.mark.gpu
def test_graphs_that_add_and_a_graph_that_updates():
    results = []
    for enabled in (True, False):
        trainer = Trainer(how="keep", enabled=enabled)
        losses = [trainer.train(batch_of(s), patch=2, update=s % 3 == 2)["loss"] for s in range(24)]
        results.append((losses, trainer))
    assert len(results[0][1].train.captured) == 2
    assert_same(*results)


@pytest.mark.gpu
def test_an_averaged_model_outside_of_the_step():
    averages = []
    for enabled in (True, False):
        trainer = Trainer(enabled=enabled)
        averaged = AveragedModel(trainer.model)
        for step in range(8):
            trainer.train(batch_of(step), patch=2)
            averaged.update_parameters(trainer.model)
        averages.append(list(averaged.parameters()))
    for ours, theirs in zip(*averages, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_shapes_that_change():
    trainer, plain = Trainer(max_graphs=2), Trainer(enabled=False)
    for step in range(14):
        tokens = batch_of(step, images=6 if step % 2 else 3)
        assert torch.equal(trainer.train(tokens, patch=2)["loss"], plain.train(tokens, patch=2)["loss"])
    with pytest.raises(RuntimeError, match=r"max_graphs: expected at most 2 .*got another"):
        trainer.train(batch_of(0, images=5), patch=2)
    assert torch.equal(trainer.train(batch_of(1), patch=2)["loss"], plain.train(batch_of(1), patch=2)["loss"])


@pytest.mark.gpu
def test_batches_from_the_host():
    trainer, plain = Trainer(), Trainer(enabled=False)
    for step in range(8):
        tokens = batch_of(step).cpu()
        loss = trainer.train(tokens.pin_memory() if step % 2 else tokens, patch=2)["loss"]
        assert torch.equal(loss, plain.train(tokens.cuda(), patch=2)["loss"])


@pytest.mark.gpu
# Dynamo looks at .grad of all that goes into a compiled block, activations too.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_step_that_is_compiled():
    torch.compiler.reset()
    graph = trained(compile=True)
    plain = trained(enabled=False)
    torch.testing.assert_close(torch.stack(graph[0]), torch.stack(plain[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_gradient_scaler_with_a_fused_optimizer():
    results = []
    for enabled in (True, False):
        trainer = Trainer()
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=5)  # too large: the first steps skip

        def step(tokens, trainer=trainer, scaler=scaler):
            with torch.autocast("cuda", torch.float16):
                loss = trainer.model(tokens, 2)
            scaler.scale(loss).backward()
            scaler.step(trainer.optimizer)
            scaler.update()
            trainer.optimizer.zero_grad(set_to_none=True)
            return loss, scaler._scale.clone()

        train = StepGraph(step, optimizers=trainer.optimizer, enabled=enabled)
        results.append([train(batch_of(number)) for number in range(40)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert results[0][-1][1] < 2.0**40


@pytest.mark.gpu
def test_a_gradient_scaler_that_reads():
    trainer, scaler = Trainer(fused=False), torch.amp.GradScaler("cuda")

    def step(tokens):
        scaler.scale(trainer.model(tokens, 2)).backward()
        scaler.step(trainer.optimizer)
        scaler.update()
        trainer.optimizer.zero_grad(set_to_none=True)

    train = StepGraph(step, optimizers=trainer.optimizer)
    with pytest.raises(RuntimeError, match=r"step: expected no wait.*grad_scaler\.py:\d+.*GradScaler"):
        [train(batch_of(0)) for _ in range(5)]


@pytest.mark.gpu
def test_a_step_that_waits_is_told_where():
    trainer, plain = Trainer(), Trainer(enabled=False)

    def step(tokens):
        loss = trainer.step(tokens, patch=2)["loss"]
        if loss.item() < 0:  # the line
            raise AssertionError
        return loss

    train = StepGraph(step, optimizers=trainer.optimizer)
    train(batch_of(0))
    train(batch_of(1))
    with pytest.raises(RuntimeError, match=r"step: expected no wait for the GPU.*test_step_graph_gpu\.py:\d+"):
        train(batch_of(2))
    for number in range(3):
        plain.train(batch_of(number), patch=2)
    assert all(torch.equal(a, b) for a, b in zip(trainer.weights(), plain.weights(), strict=True))
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.gpu
def test_optimizers_that_a_graph_would_freeze():
    parameter = nn.Parameter(torch.zeros(3, device="cuda"))
    x = torch.ones(3, device="cuda")
    lr = torch.tensor(0.1, device="cuda")
    for optimizer, words in (
        (torch.optim.AdamW([parameter], lr), "capturable=True"),
        (
            torch.optim.AdamW([parameter], 0.1, capturable=True),
            r"the number 0\.1 .*torch\.tensor\(0\.1, device=\"cuda\"\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"optimizers: expected .*{words}"):
            StepGraph(lambda x: x, optimizers=optimizer)(x)


@pytest.mark.gpu
def test_an_optimizer_that_nobody_named_is_refused_as_it_steps():
    parameter = nn.Parameter(torch.zeros(3, device="cuda"))
    optimizer = torch.optim.AdamW([parameter], 0.1)

    def step(x):
        (parameter * x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    train, x = StepGraph(step), torch.ones(3, device="cuda")
    with pytest.raises(ValueError, match="optimizers: expected capturable=True, got capturable=False"):
        train(x)
    assert not parameter.any()
    optimizer.zero_grad()
    train.enabled = False
    train(x)
    assert parameter.all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cuda", "python"])
def test_after_a_failed_capture_the_process_goes_on(kind):
    """The capture itself fails: its watched warm-up saw nothing of what only happens there."""
    trainer, plain = Trainer(dropout=0.5), Trainer(dropout=0.5, enabled=False)
    fails = True

    def step(tokens):
        result = trainer.step(tokens, patch=2)
        if fails and torch.cuda.is_current_stream_capturing():
            if kind == "python":
                raise RuntimeError("the step's own")
            result["loss"].item()
        return result

    train = StepGraph(step, optimizers=trainer.optimizer)
    torch.cuda.manual_seed(5)
    for number in range(3):
        train(batch_of(number))
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    random = torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError, match=r"step: expected one that a CUDA graph can hold.*Nothing was computed"):
        train(batch_of(3))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.equal(torch.cuda.get_rng_state(), random)
    torch.cuda.synchronize()
    gc.collect()  # the exception's frames hold what the capture made
    assert torch.cuda.memory_allocated() <= allocated + 2**20
    assert torch.rand(5, device="cuda").max() <= 1
    torch.cuda.set_rng_state(random)

    fails = False
    for number in range(3, 12):
        train(batch_of(number))
    assert train.captured == [{}]
    torch.cuda.manual_seed(5)
    for number in range(12):
        plain.train(batch_of(number), patch=2)
    assert all(torch.equal(a, b) for a, b in zip(trainer.weights(), plain.weights(), strict=True))


def wide_step(layers, x, *, patch):
    """Compute something whose activations are far larger than all else, 64 MiB each."""
    hidden = x
    for layer in layers:
        hidden = torch.tanh(hidden * layer)
    hidden.sum().backward()
    gradients = torch.stack([layer.grad.sum() for layer in layers])
    for layer in layers:
        layer.grad = None
    return gradients.sum() * patch


@pytest.mark.gpu
def test_stages_share_their_memory_and_give_it_back():
    layers = [nn.Parameter(torch.ones((), device="cuda")) for _ in range(8)]
    x = torch.ones(16, 2**20, device="cuda")
    train = StepGraph(lambda x, *, patch: wide_step(layers, x, patch=patch))

    def reserved():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() / 2**20

    before = reserved()
    after = []
    for patch in (4, 2, 1):
        for _ in range(5):
            train(x, patch=patch)
        after.append(reserved())
    assert after[0] - before > 8 * 64
    # Each stage adds its copy of the batch, 64 MiB, and none of the activations.
    assert after[2] - after[0] < 3 * 64
    train.release(patch=4)
    assert len(train.captured) == 2
    train.release()
    assert reserved() - before < 64
    assert train(x, patch=4).isfinite()


@pytest.mark.gpu
def test_stages_that_follow_each_other_hold_the_memory_of_one():
    layers = [nn.Parameter(torch.ones((), device="cuda")) for _ in range(8)]
    train = StepGraph(lambda x, *, patch: wide_step(layers, x, patch=patch), release_past=True)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for patch, rows in ((4, 16), (2, 1)):
        x = torch.ones(rows, 2**20, device="cuda")
        for _ in range(5):
            train(x, patch=patch)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 3 * 64 * 2**20  # the second stage's; the first had 8 times 64 MiB


@pytest.mark.gpu
def test_autocast_around_the_call_is_refused():
    train = Trainer().train
    with (
        torch.autocast("cuda", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"autocast: expected .*inside the step"),
    ):
        train(batch_of(0), patch=2)


DDP_SCRIPT = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from npp_kernels import StepGraph
from tests.test_step_graph_gpu import Trainer, assert_same, batch_of

dist.init_process_group("nccl", init_method="file://{path}", rank=0, world_size=1, device_id=torch.device("cuda", 0))
results = []
for enabled in (True, False):
    trainer = Trainer(enabled=enabled)
    with torch.cuda.stream(trainer.train.stream):
        trainer.forward = DistributedDataParallel(trainer.model, device_ids=[0])
    torch.cuda.synchronize()
    losses = [trainer.train(batch_of(step), patch=4 if step < 20 else 2)["loss"] for step in range(40)]
    assert trainer.train.captured == ([{{"patch": 4}}, {{"patch": 2}}] if enabled else []), trainer.train.captured
    results.append((losses, trainer))
assert_same(*results)
torch.cuda.synchronize()
for _, trainer in results:
    trainer.train.release()
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.gpu
def test_one_rank_of_ddp(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    command = [sys.executable, "-c", DDP_SCRIPT.format(path=tmp_path / "store")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "equal" in result.stdout


@pytest.mark.gpu
def test_the_losses_kernels_agree_with_plain_pytorch_inside_a_graph():
    """One step of the graph against autograd on expanded logits: the graph trains on the right thing at all."""
    trainer = Trainer(warmup=2)
    plain = Trainer(enabled=False).model
    for _ in range(2):
        trainer.train(batch_of(0), patch=2)
    plain.load_state_dict(trainer.model.state_dict())
    tokens = batch_of(7)
    groups = group_tokens(tokens, 2, grid=GRID)
    logits = plain.head(plain.body(plain.embedding(groups[:, :-1]).mean(2)))
    expected = F.cross_entropy(logits.unsqueeze(2).expand(-1, -1, 4, -1).flatten(0, 2), groups[:, 1:].flatten())
    torch.testing.assert_close(trainer.train(tokens, patch=2)["loss"], expected.detach(), rtol=1e-4, atol=1e-4)
