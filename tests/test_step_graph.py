"""The step as a graph: what it decides, on a stand-in for CUDA's side; test_step_graph_gpu.py has the real one."""

import copy

import pytest
import torch
from torch import nn

import npp_kernels.step_graph
from npp_kernels import StepGraph


class Graph:
    """Stands in for a CUDA graph: replaying runs the function on the static inputs, and fills the static outputs."""

    def __init__(self, function, outputs):
        self.function, self.outputs = function, outputs

    def replay(self):
        self.outputs.copy_(self.function())


class Recorder:
    """Stands in for CUDA's side on the CPU: `record` computes nothing that lasts, as a capture does not."""

    device = torch.device("cpu")

    def __init__(self, state):
        self.state, self.waits, self.error, self.pools = state, [], None, 1
        self.log = []

    def renew_pool(self):
        self.pools += 1

    def run(self, function, *, watched):
        self.log.append("watched" if watched else "run")
        return function().clone(), self.waits if watched else []

    def record(self, function):
        if self.error:
            raise self.error
        self.log.append("record")
        before = [tensor.clone() for tensor in self.state]
        outputs = function()
        for tensor, value in zip(self.state, before, strict=True):
            tensor.copy_(value)
        return Graph(function, outputs), outputs


def graph_of(step, state, **options):
    """Return a `StepGraph` that captures on the stand-in."""
    graph = StepGraph(step, device="cpu", **options)
    recorder = Recorder(state)
    graph._recorder = recorder
    graph._captures_on = lambda device: True
    return graph, recorder


def adder():
    """Return a step that adds its batch to a sum, scaled by its option, and the sum."""
    total = torch.zeros(3)

    def step(x, *, patch=1):
        total.add_(x.sum(0), alpha=patch)
        return total.sum()

    return step, total


def test_only_cuda_is_captured():
    devices = {kind: torch.device(kind) for kind in ("cpu", "cuda", "mps", "xpu")} | {"none": None}
    train = StepGraph(lambda x: x)
    assert [kind for kind, device in devices.items() if train._captures_on(device)] == ["cuda"]


def test_every_call_trains_once_on_its_own_batch():
    step, total = adder()
    train, recorder = graph_of(step, [total])
    expected_step, expected_total = adder()
    results, expected = [], []
    for call in range(12):
        batch, patch = torch.randn(4, 3), 2 if call < 6 else 1
        results.append(train(batch, patch=patch))
        expected.append(expected_step(batch, patch=patch).clone())
        assert torch.equal(total, expected_total), call
    assert torch.equal(torch.stack(results), torch.stack(expected))  # a later call overwrites none of them
    assert recorder.log == ["run", "run", "watched", "record"] * 2
    assert train.captured == [{"patch": 2}, {"patch": 1}]


def test_stages_differ_by_options_shapes_and_dtypes():
    step, total = adder()
    train, _ = graph_of(step, [total], warmup=2, max_graphs=3)
    for batch in (torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 3, dtype=torch.float64)):
        for _ in range(4):
            train(batch)
    assert total.tolist() == [40.0] * 3
    assert len(train.captured) == 3
    with pytest.raises(RuntimeError, match=r"max_graphs: expected at most 3 .*shapes \[\(1, 3\)\].*drop_last=True"):
        train(torch.ones(1, 3))
    assert total.tolist() == [40.0] * 3


def test_release():
    step, total = adder()
    train, recorder = graph_of(step, [total])
    for patch in (4, 2):
        for _ in range(4):
            train(torch.ones(1, 3), patch=patch)
    train.release(patch=4)
    assert train.captured == [{"patch": 2}]
    assert recorder.pools == 1  # it is still in use
    train.release()
    assert train.captured == []
    assert recorder.pools == 2
    train(torch.ones(1, 3), patch=2)
    assert total.tolist() == [26.0] * 3
    assert recorder.log[-1] == "run"


def test_stages_that_follow_each_other_are_released():
    step, total = adder()
    train, _ = graph_of(step, [total], release_past=True)
    for patch in (4, 2, 1):
        for _ in range(5):
            train(torch.ones(1, 3), patch=patch)
            train(torch.ones(2, 3), patch=patch)  # another shape of the same stage stays
        assert train.captured == [{"patch": patch}] * 2
    assert total.tolist() == [7.0 * 15] * 3


def test_a_step_that_waits_is_told_where_before_the_capture():
    step, total = adder()
    train, recorder = graph_of(step, [total])
    recorder.waits = ["one at train.py:7"]
    for _ in range(2):
        train(torch.ones(1, 3))
    with pytest.raises(RuntimeError, match=r"step: expected no wait for the GPU.*train.py:7.*trained on its batch"):
        train(torch.ones(1, 3))
    assert total.tolist() == [3.0] * 3
    recorder.waits = []
    train(torch.ones(1, 3))
    assert train.captured == []
    train(torch.ones(1, 3))
    assert train.captured == [{}]
    assert total.tolist() == [5.0] * 3


def test_a_capture_that_fails_computes_nothing_and_leaves_the_gradients():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], torch.tensor(1.0))
    step, total = adder()
    train, recorder = graph_of(step, [total], optimizers=optimizer, warmup=2)
    for _ in range(2):
        train(torch.ones(1, 3), patch=2)
    gradient = parameter.grad = torch.ones(3)
    recorder.error = RuntimeError("CUDA error: operation not permitted\nand more")
    words = r"for \{'patch': 2\}, got RuntimeError: CUDA error: operation not permitted\. Usual: .*Nothing was computed"
    with pytest.raises(RuntimeError, match=words):
        train(torch.ones(1, 3), patch=2)
    assert parameter.grad is gradient
    recorder.error = ValueError("the step's own")
    for _ in range(2):
        train(torch.ones(1, 3), patch=2)
    with pytest.raises(ValueError, match="the step's own"):
        train(torch.ones(1, 3), patch=2)
    recorder.error = None
    for _ in range(4):
        train(torch.ones(1, 3), patch=2)
    assert total.tolist() == [16.0] * 3


def trained_by(optimizer, parameter, **options):
    def step(x):
        (parameter * x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return parameter.detach().sum()

    train, _ = graph_of(step, [parameter.data], optimizers=optimizer, **options)
    for _ in range(5):
        train(torch.ones(3))
    return train


def test_a_learning_rate_in_a_tensor_may_change_and_other_numbers_may_not():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], torch.tensor(1.0))
    train = trained_by(optimizer, parameter)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    train(torch.ones(3))
    assert parameter.tolist() == [-5.5] * 3
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(RuntimeError, match=r"optimizers: expected weight_decay of group 0 as it was .*, 0, got 0.1"):
        train(torch.ones(3))
    optimizer.param_groups[0]["weight_decay"] = 0
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    with pytest.raises(RuntimeError, match=r"optimizers: expected lr of group 0 as it was .*lr.fill_\(value\)"):
        train(torch.ones(3))
    train.release()
    train(torch.ones(3))
    assert parameter.tolist() == [-6.0] * 3


def test_loading_the_optimizer_makes_the_graphs_anew():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], torch.tensor(1.0), momentum=0.5)
    train = trained_by(optimizer, parameter)
    assert len(train.captured) == 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(torch.ones(3))
    assert train.captured == []
    for _ in range(3):
        train(torch.ones(3))
    assert len(train.captured) == 1
    parameter.data = parameter.data.clone()  # other memory, which no graph knows
    train(torch.ones(3))
    assert train.captured == []


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (
            lambda p: torch.optim.AdamW([p], torch.tensor(0.1)),
            "capturable=True, got capturable=False in group 0 of AdamW",
        ),
        (
            lambda p: torch.optim.SGD([p], 0.1),
            r"a tensor on cuda.*got the number 0.1 in group 0 of SGD: SGD\(\.\.\., lr=",
        ),
        (lambda p: torch.optim.SGD([p], torch.tensor(0.1)), r"a tensor on cuda.*got a tensor on cpu"),
    ],
)
def test_an_optimizer_that_a_graph_would_freeze(optimizer, words, monkeypatch):
    monkeypatch.setattr(npp_kernels.step_graph, "with_index", lambda device: torch.device("cuda", 0))
    train = StepGraph(lambda x: x, optimizers=optimizer(nn.Parameter(torch.zeros(3))))
    with pytest.raises(ValueError, match=f"optimizers: expected .*{words}"):
        train._check_optimizers(torch.device("cuda", 0), train.optimizers)


def test_an_optimizer_that_nobody_named_is_found_before_it_steps():
    parameter = nn.Parameter(torch.zeros(3))
    optimizers = [torch.optim.SGD([parameter], lr) for lr in (0.1, torch.tensor(0.1))]

    def step(x, *, which):
        (parameter * x).sum().backward()
        optimizers[which].step()
        optimizers[which].zero_grad()
        return parameter.detach().sum()

    train, _ = graph_of(step, [parameter.data])
    with pytest.raises(ValueError, match=r"optimizers: expected a learning rate that is a tensor.*the number 0\.1"):
        train(torch.ones(3), which=0)
    assert parameter.tolist() == [0.0] * 3
    parameter.grad = None
    for _ in range(4):
        train(torch.ones(3), which=1)
    assert train.optimizers == (optimizers[1],)
    optimizers[0].step()  # outside of the step nobody looks
    optimizers[1].param_groups[0]["momentum"] = 0.5
    with pytest.raises(RuntimeError, match="optimizers: expected momentum of group 0 as it was"):
        train(torch.ones(3), which=1)


def test_a_stage_that_only_adds_knows_no_optimizer():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], torch.tensor(1.0))
    parameter.grad = torch.zeros(3)

    def step(x, *, update):
        parameter.grad.add_(x)
        if update:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return parameter.detach().sum()

    train, _ = graph_of(step, [parameter.data, parameter.grad], warmup=2)
    for number in range(16):
        train(torch.ones(3), update=number % 4 == 3)
    assert parameter.tolist() == [-16.0] * 3
    assert len(train.captured) == 2
    optimizer.param_groups[0]["weight_decay"] = 0.5
    train(torch.ones(3), update=False)
    with pytest.raises(RuntimeError, match="optimizers: expected weight_decay of group 0 as it was"):
        train(torch.ones(3), update=True)


def test_a_learning_rate_that_the_step_sets():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], torch.tensor(1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(x):
        (parameter * x).sum().backward()
        optimizer.step()
        scheduler.step()
        return parameter.detach().sum()

    train, _ = graph_of(step, [], optimizers=optimizer)
    with pytest.raises(RuntimeError, match="a learning rate that is set between the calls"):
        train(torch.ones(3))


def test_without_a_gpu_the_function_runs_as_it_is():
    calls = []

    def step(x, y, *, patch):
        calls.append((x, y, patch))
        return {"loss": (x * y).sum().requires_grad_(), "nothing": None}

    train = StepGraph(step)
    x, y = torch.ones(3), torch.ones(3)
    for _ in range(5):
        result = train(x, y, patch=(2, 2))
    assert result["loss"] == 3
    assert not result["loss"].requires_grad
    assert result["nothing"] is None
    assert all(call[0] is x and call[1] is y and call[2] == (2, 2) for call in calls)
    assert train.captured == []
    train.release(patch=2)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "warmup: expected at least 2, got 1", lambda: StepGraph(abs, warmup=1)),
        (ValueError, "max_graphs: expected at least 1, got 0", lambda: StepGraph(abs, max_graphs=0)),
        (TypeError, "optimizers: expected torch.optim.Optimizer, got int", lambda: StepGraph(abs, optimizers=[1])),
        (TypeError, "optimizers: .* got Linear", lambda: StepGraph(abs, optimizers=torch.nn.Linear(2, 2))),
        (TypeError, "argument 1: expected a tensor, got int", lambda: StepGraph(abs)(torch.ones(1), 2)),
        (
            ValueError,
            "argument 0: expected a tensor without requires_grad",
            lambda: StepGraph(abs)(torch.ones(1, requires_grad=True)),
        ),
        (ValueError, "argument 0: .*requires_grad", lambda: StepGraph(abs)(torch.ones(1, requires_grad=True))),
        (TypeError, "tensors to be returned, got float", lambda: StepGraph(torch.Tensor.item)(torch.ones(1))),
        (TypeError, "values that can be hashed", lambda: graph_of(abs, [])[0](torch.ones(1), patch=[2])),
    ],
)
def test_errors_name_the_argument(error, words, call):
    with pytest.raises(error, match=words):
        call()
