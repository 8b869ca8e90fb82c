"""The training step: accumulated, in low precision, compiled, as a graph, against the official one, and its state."""

import doctest
import functools

import pytest
import torch
from torch._dynamo.utils import counters

import reference.training.config
import reference.training.optimizer
import reference.training.step
from npp_kernels import group_tokens
from reference.network.model import ModelConfig
from reference.tokens.batches import Batches
from reference.tokens.codes import load_dataset
from reference.training.optimizer import AdamWConfig
from reference.training.step import StepConfig, TrainStep
from tests.training_cases import CONFIG, FP32, assert_same_weights, batch_of, model_of, train_steps


@pytest.mark.parametrize("module", [reference.training.config, reference.training.optimizer, reference.training.step])
def test_docstrings_run(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_accumulated_parts_are_the_whole_batch(precision):
    whole, losses = train_steps(StepConfig(precision=precision, compile=False))
    parts, part_losses = train_steps(StepConfig(precision=precision, compile=False, accumulate=3))
    tolerance = 1e-5 if precision == "fp32" else 2e-3
    assert part_losses == pytest.approx(losses, rel=tolerance)
    if precision == "fp32":
        assert_same_weights(parts, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_low_precision_follows_fp32(precision):
    _, expected = train_steps(FP32)
    step, losses = train_steps(StepConfig(precision=precision, compile=False))
    assert losses == pytest.approx(expected, rel=1e-2)
    assert all(weight.dtype == torch.float32 for weight in step.optimizer.state()["model"].values())


def test_both_formulations_train_alike():
    fast, losses = train_steps(FP32, patches=(2, 4, 2, 1))
    official = StepConfig(precision="fp32", compile=False, official=True)
    other, official_losses = train_steps(official, patches=(2, 4, 2, 1))
    assert losses == pytest.approx(official_losses, rel=1e-5)
    assert_same_weights(fast, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("official", [False, True])
def test_state_goes_on_where_it_was(official):
    config = StepConfig(precision="fp32", compile=False, official=official)
    adamw = AdamWConfig(ema=0.9)
    whole, losses = train_steps(config, adamw, patches=(2, 2, 1, 1))
    half, _ = train_steps(config, adamw, patches=(2, 2))
    state = {part: dict(value) if isinstance(value, dict) else value for part, value in half.state().items()}
    resumed = TrainStep(model_of(fast=not official), config, adamw, batch_size=6)
    resumed.load(state)
    rest = []
    for number in (2, 3):
        resumed.run(*batch_of(number), patch=1, lr=1e-2 / (number + 1))
        rest.append(resumed.report().loss)
    assert rest == losses[2:]
    assert_same_weights(resumed, whole, rtol=0, atol=0)


def test_state_of_another_model_is_refused():
    step, _ = train_steps(FP32, patches=())
    other = TrainStep(model_of(ModelConfig(**{**vars(CONFIG), "dim": 32})), FP32, AdamWConfig(), batch_size=6)
    with pytest.raises(ValueError, match=r"state\['model'\]\[.*\]: expected \(.*\), got"):
        other.load(step.state())
    with pytest.raises(ValueError, match="state: expected 'ema'"):
        TrainStep(model_of(), FP32, AdamWConfig(ema=0.9), batch_size=6).load(step.state())


# Dynamo looks at .grad of all that goes into a compiled block, activations too.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_all_layers_share_what_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = ModelConfig(**{**vars(CONFIG), "num_layers": 5, "drop_path": 0.2})
    torch.compiler.reset()
    before = counters["stats"]["unique_graphs"]
    train_steps(StepConfig(precision="fp32"), patches=(2, 1, 2), model=model_of(config))
    assert counters["stats"]["unique_graphs"] - before == 2  # one for each patch


def test_loss_compiles_without_a_break():
    model = model_of().eval()
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True, dynamic=False)
    tokens, labels = batch_of(0)
    for patch in (1, 2):
        groups = group_tokens(tokens, patch)
        torch.testing.assert_close(compiled(groups, labels, patch), model.loss(groups, labels, patch))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("precision", lambda: StepConfig(precision="fp8")),
        ("precision", lambda: StepConfig(precision="bf16", official=True)),
        ("accumulate", lambda: StepConfig(accumulate=0)),
        ("batch_size", lambda: TrainStep(model_of(), StepConfig(accumulate=4), AdamWConfig(), batch_size=6)),
        ("tokens", lambda: TrainStep(model_of(), FP32, AdamWConfig(), batch_size=3).run(*batch_of(0), patch=2, lr=0.1)),
        ("batch_size", lambda: Batches(load_dataset("embedded", "test"), 401, seed=0)),
        ("batch_size", lambda: Batches(load_dataset("embedded", "test"), 9, seed=0, processes=2)),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()


@pytest.mark.gpu
# Dynamo looks at .grad of all that goes into a compiled block, activations too. It hides the warning by replacing
# warnings.showwarning, which a warning that is an error never reaches.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_graph_computes_what_ordinary_steps_compute(compile, accumulate):
    config = ModelConfig(**{**vars(CONFIG), "dim": 64, "vocab_size": 64})
    patches = (2,) * 6 + (1,) * 6
    results = []
    for graph, how in ((False, False), (True, compile)):
        torch.compiler.reset()
        step_config = StepConfig(precision="bf16", compile=how, graph=graph, accumulate=accumulate)
        results.append(train_steps(step_config, patches=patches, device="cuda", model=model_of(config, device="cuda")))
    assert results[1][1] == pytest.approx(results[0][1], rel=2e-2)


@pytest.mark.gpu
def test_a_graph_draws_new_dropout_in_every_step():
    config = ModelConfig(**{**vars(CONFIG), "dropout": 0.5, "token_dropout": 0.5})
    step = TrainStep(model_of(config, device="cuda"), StepConfig(compile=False), AdamWConfig(), batch_size=6)
    losses = []
    for _ in range(8):
        step.run(*batch_of(0), patch=1, lr=0.0)
        losses.append(step.report().loss)
    assert len(set(losses)) == len(losses)
