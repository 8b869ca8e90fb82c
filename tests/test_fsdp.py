"""The recipe of `docs/distributed.md` for sharded modules of one's own: its code, in two processes, against one.

And what `StepGraph` does with such a model.
"""

import re
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.tensor import DTensor

from npp_kernels import StepGraph
from tests.processes import ROOT, run_in
from tests.test_step_graph import graph_of

PAGE = (ROOT / "docs" / "distributed.md").read_text()
RECIPE = {"__name__": "recipe"}
for snippet in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
    exec(compile(snippet, "docs/distributed.md", "exec"), RECIPE)
VOCAB_SIZE, DIM = 50, 16
KINDS = ("tied", "untied", "apart")


def model_of(kind):
    torch.manual_seed(0)
    return RECIPE["Apart"](VOCAB_SIZE, DIM) if kind == "apart" else RECIPE["Model"](VOCAB_SIZE, DIM, kind == "tied")


def batch_of(step, kind):
    """Return 4 sequences of 6 groups of 3 tokens; most targets of the first half are ignored, but for ``apart``."""
    groups = torch.randint(VOCAB_SIZE, (4, 6, 3), generator=torch.Generator().manual_seed(step))
    if kind != "apart":  # whose embedding has no id to leave out
        groups[:2, 2:] = -100
    return groups


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(kind, shard, train_step, part=slice(None)):
    """Train for three steps; return the losses, the first gradients, the weights, and the model."""
    model = shard(model_of(kind))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gradients = {}

    def keep(optimizer, *_):
        for name, parameter in model.named_parameters():
            gradients.setdefault(name, whole(parameter.grad).clone())

    optimizer.register_step_pre_hook(keep)
    losses = [train_step(model, batch_of(step, kind)[part], optimizer) for step in range(3)]
    return losses, gradients, {name: whole(parameter) for name, parameter in model.state_dict().items()}, model


def step_of_one(model, groups, optimizer):
    loss = model(groups)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def compare(folder):
    """Compare both processes' results with those of one; what the command of the test runs."""
    part = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for kind in KINDS:
        expected_losses, expected_gradients, expected, _ = trained(kind, lambda model: model, step_of_one)
        losses, gradients, weights, model = trained(kind, RECIPE["shard"], RECIPE["train_step"], part)
        losses = torch.stack(losses)
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / 2, torch.stack(expected_losses), rtol=1e-5, atol=0)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7, msg=f"{kind}: {name}")
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6, msg=f"{kind}: {name}")

        # Outside of the model's forward the weight looks like one of a vocabulary that the ranks share out.
        groups = torch.full((1, 3), dist.get_rank())
        with pytest.raises(ValueError, match=r"groups: expected the same rows .* in the forward of the module"):
            RECIPE["linear_patch_cross_entropy"](torch.randn(1, DIM), model.head.weight, groups)
        torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id=f"{folder}/{kind}")
        other = RECIPE["shard"](model_of(kind))
        state = other.state_dict()
        torch.distributed.checkpoint.load(state, checkpoint_id=f"{folder}/{kind}")
        other.load_state_dict(state)
        for name, weight in other.state_dict().items():
            assert torch.equal(whole(weight), weights[name]), f"{kind}: {name}"
        check_step_graph(kind, part, weights)
    print("equal", flush=True)


def check_step_graph(kind, part, expected):
    """Check that `StepGraph` runs the step as it is on a CPU, and names what it refuses where it would capture."""
    model = RECIPE["shard"](model_of(kind))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def step(groups):
        return RECIPE["train_step"](model, groups, optimizer)

    for optimizers in (optimizer, ()):  # named, or found as it steps
        train, _ = graph_of(step, [], optimizers=optimizers)
        with pytest.raises(
            ValueError, match=r"optimizers: expected parameters .* got a DTensor in group 0 of SGD: .*FSDP2"
        ):
            train(batch_of(0, kind)[part])
        optimizer.zero_grad()
    train = StepGraph(step, optimizers=optimizer)
    for number in range(3):
        train(batch_of(number, kind)[part])
    for name, weight in model.state_dict().items():
        assert torch.equal(whole(weight), expected[name]), f"{kind}: {name}"  # nothing was trained before


def test_the_recipe_in_two_processes_is_one(tmp_path):
    assert run_in(2, "tests.test_fsdp", tmp_path).stdout.count("equal") == 2


if __name__ == "__main__":
    dist.init_process_group("gloo")
    compare(sys.argv[1])
    dist.barrier()  # one that leaves while the others still talk to it aborts them
    dist.destroy_process_group()
