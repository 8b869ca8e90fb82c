"""The budget itself: honest formulations stay far from its bounds, and known faults do not pass.

``python -m tests.test_budget`` prints how far each stays, over many more draws than the tests take.
"""

import argparse
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from tests.budget import assert_within_budget, error_bounds, half_ulps, rounded_scale

LOG2_E = 1.4426950408889634
VOCAB_SIZE = 512


# --- losses and gradients of rows ---


def exact_loss(logits, targets):
    """Return the loss of each row in fp64, as log1p of what the others weigh beside the target."""
    logits = logits.double()
    weights = torch.exp(logits - logits.gather(1, targets[:, None]))
    return torch.log1p(weights.scatter_(1, targets[:, None], 0).sum(1))


def exact_gradient(logits, targets):
    """Return the gradient of the losses' sum in fp64; at the target, where 1 is taken off, by the others' weight."""
    softmax = torch.softmax(logits.double(), 1)
    others = softmax.scatter(1, targets[:, None], 0).sum(1, keepdim=True)
    return softmax.scatter_(1, targets[:, None], -others)


def eager_loss(logits, targets):
    return F.cross_entropy(logits.float(), targets, reduction="none")


def eager_gradient(logits, targets):
    wide = logits.float().detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(wide, targets, reduction="sum"), wide)
    return grad.to(logits.dtype)


def _parts(logits, targets):
    """Return exponentials, sum (in another order than PyTorch's) and the target's logit, all from the maximum on."""
    shifted = logits.float() - logits.float().amax(1, keepdim=True)
    exponentials = torch.exp2(shifted * LOG2_E)
    total = exponentials.flip(1).unflatten(1, (-1, min(8, logits.shape[1]))).sum(2).sum(1, keepdim=True)
    return exponentials, total, shifted.gather(1, targets[:, None])


def honest_loss(logits, targets):
    _, total, target = _parts(logits, targets)
    return (total.log() - target).squeeze(1)


def log1p_loss(logits, targets):
    wide = logits.float()
    largest, where = wide.max(1, keepdim=True)
    others = torch.exp(wide - largest).scatter_(1, where, 0).sum(1, keepdim=True)
    return (torch.log1p(others) - (wide.gather(1, targets[:, None]) - largest)).squeeze(1)


def loss_from_lse(logits, targets):
    wide = logits.float()
    largest = wide.amax(1, keepdim=True)
    lse = largest + torch.exp(wide - largest).sum(1, keepdim=True).log()
    return (lse - wide.gather(1, targets[:, None])).squeeze(1)


def honest_gradient(logits, targets):
    exponentials, total, _ = _parts(logits, targets)
    return _minus_one(exponentials / total, targets).to(logits.dtype)


def gradient_from_lse(logits, targets):
    wide = logits.float()
    return _minus_one(torch.exp(wide - torch.logsumexp(wide, 1, keepdim=True)), targets).to(logits.dtype)


def gradient_rounded_twice(logits, targets):
    """Round the softmax to the dtype, and then the gradient for an upstream of 0.7."""
    return (honest_gradient(logits, targets).float() * 0.7).to(logits.dtype)


def _minus_one(softmax, targets):
    return softmax.scatter_add(1, targets[:, None], -torch.ones_like(softmax[:, :1]))


def make_rows(num_rows, offset, dtype=torch.float32, vocab_size=VOCAB_SIZE):
    logits = (3 * torch.randn(num_rows, vocab_size) + offset).to(dtype)
    return logits, torch.randint(vocab_size, (num_rows,))


# --- means and sums ---


def eager_mean(rows):
    return rows.float().mean(1).to(rows.dtype)


def honest_mean(rows):
    total = torch.zeros_like(rows[:, 0], dtype=torch.float32)
    for slot in reversed(range(rows.shape[1])):
        total += rows[:, slot]
    return (total * (1 / rows.shape[1])).to(rows.dtype)


def mean_in_the_dtype(rows):
    total = torch.zeros_like(rows[:, 0])
    for slot in range(rows.shape[1]):
        total += rows[:, slot]
    return total / rows.shape[1]


def mean_of_a_rounded_sum(rows):
    return rows.sum(1, dtype=torch.float32).to(rows.dtype) / rows.shape[1]


def share(bound):
    """Return how much of a bound was used: above 1 it is broken."""
    return max(bound.value, 0.0) / max(bound.allowed, 1e-300)


def loss_cases():
    """Yield a name, whether it is honest, and a function that draws: the result, eager's, the oracle, the scale."""

    def case(ours, eager, exact, num_rows, offset, dtype=torch.float32, upstream=1.0):
        def draw():
            logits, targets = make_rows(num_rows, offset, dtype)
            theirs = eager(logits, targets)
            if upstream != 1.0:
                theirs = (eager(logits.float(), targets) * upstream).to(dtype)
            scale = None if eager is eager_loss else upstream
            return ours(logits, targets), theirs, exact(logits, targets) * upstream, scale

        return draw

    for offset in (0.0, 100.0, 1000.0):
        for num_rows in (1, 23, 1024):
            at = f"{num_rows} rows at {offset:+g}"
            yield f"loss, {at}", True, case(honest_loss, eager_loss, exact_loss, num_rows, offset)
            yield f"loss by log1p, {at}", True, case(log1p_loss, eager_loss, exact_loss, num_rows, offset)
            yield f"gradient, {at}", True, case(honest_gradient, eager_gradient, exact_gradient, num_rows, offset)
        if offset:
            at = f"1024 rows at {offset:+g}"
            yield f"FAULT loss from the lse, {at}", False, case(loss_from_lse, eager_loss, exact_loss, 1024, offset)
            wrong = case(gradient_from_lse, eager_gradient, exact_gradient, 1024, offset)
            yield f"FAULT gradient from the lse, {at}", False, wrong
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield f"gradient {name}", True, case(honest_gradient, eager_gradient, exact_gradient, 64, 0.0, dtype)
        twice = case(gradient_rounded_twice, eager_gradient, exact_gradient, 64, 0.0, dtype, upstream=0.7)
        yield f"FAULT gradient {name}, rounded twice", False, twice


def mean_cases():
    """As `loss_cases`, for means of K embeddings."""

    def case(ours, dtype, group_size):
        def draw():
            rows = torch.randn(50, group_size, 32).to(dtype)
            exact = rows.double()
            return ours(rows), eager_mean(rows), exact.mean(1), exact.abs().mean(1)

        return draw

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for group_size in (3, 16):
            name = f"{str(dtype).removeprefix('torch.')}, K={group_size}"
            yield f"mean {name}", True, case(honest_mean, dtype, group_size)
            if dtype != torch.float32:
                yield f"FAULT mean in the dtype, {name}", False, case(mean_in_the_dtype, dtype, group_size)
        if dtype != torch.float32:
            name = f"{str(dtype).removeprefix('torch.')}, K=3"
            yield f"FAULT mean of a rounded sum, {name}", False, case(mean_of_a_rounded_sum, dtype, 3)


CASES = {name: (honest, draw) for name, honest, draw in (*loss_cases(), *mean_cases())}
HONEST = [name for name, (honest, _) in CASES.items() if honest]
FAULTS = [name for name, (honest, _) in CASES.items() if not honest]


def draws_of(name):
    """Return how many draws a test takes: as many as some seconds allow."""
    return 10 if "1024" in name else 300


@pytest.mark.parametrize("name", HONEST)
def test_honest_formulations_pass(name):
    for _ in range(draws_of(name)):
        actual, eager, oracle, scale = CASES[name][1]()
        assert_within_budget(actual, eager, oracle, scale=scale)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_rejected_at_every_draw(name):
    for _ in range(draws_of(name) // 10):
        actual, eager, oracle, scale = CASES[name][1]()
        with pytest.raises(AssertionError, match="error"):
            assert_within_budget(actual, eager, oracle, scale=scale)


def test_a_confident_row():
    """`[[20, 6]]` has a loss of 8.3e-7: one number, which is not 0, judged by the scale of 1 that its sum has."""
    logits, target = torch.tensor([[20.0, 6.0]]), torch.tensor([0])
    exact, eager = exact_loss(logits, target), eager_loss(logits, target)
    for honest in (honest_loss, log1p_loss):
        assert_within_budget(honest(logits, target), eager, exact, scale=1.0)
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_budget(loss_from_lse(logits, target), eager, exact, scale=1.0)
    grad, theirs, wrong = exact_gradient(logits, target), eager_gradient(logits, target), torch.zeros(1, 2)
    wrong[0, 1] = grad[0, 1]
    assert_within_budget(honest_gradient(logits, target), theirs, grad, scale=1.0)
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_budget(wrong, theirs, grad, scale=1.0)


def test_one_number_is_judged_by_its_roundings():
    """A scalar may be a few roundings off where eager is exact, and no more."""
    exact = torch.tensor(6.0, dtype=torch.float64)
    eager = exact.float()
    step = torch.finfo(torch.float32).eps * 4
    for steps in range(-2, 3):
        assert_within_budget(eager + steps * step, eager, exact)
    for steps in (-12, 12):
        with pytest.raises(AssertionError, match=r"largest error"):
            assert_within_budget(eager + steps * step, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_number_of_rounded_logits(dtype):
    """A mean loss of few rows, whose logits two orders of summation may round to two neighbours; and one too far."""
    for _ in range(1000):
        hidden, weight = torch.randn(12, 32).to(dtype).float(), (torch.randn(64, 32) / 2).to(dtype).float()
        targets = torch.randint(64, (12,))
        exact = exact_loss(hidden.double() @ weight.double().t(), targets).mean()
        eager = eager_loss((hidden @ weight.t()).to(dtype), targets).mean()
        products = hidden[:, None] * weight
        logits = sum(products.unbind(2)).to(dtype)
        scale = rounded_scale(logits, dtype)
        assert_within_budget(honest_loss(logits, targets).mean(), eager, exact, scale=scale)
        far = exact.float() + 4 * half_ulps(logits.double().abs().max(), dtype).float()
        with pytest.raises(AssertionError, match="largest error"):
            assert_within_budget(far, exact.float(), exact, scale=scale)


def test_shape_dtype_and_nan():
    ones = torch.ones(3)
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_budget(ones.half(), ones, ones)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(ones[:2], ones[:2], ones)
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(ones / 0, ones, ones)
    assert_within_budget(ones[:0], ones[:0], ones[:0])


def measure(draws):
    """Print the share of its bounds that each case uses, over many draws: honest ones below 1, faults above."""
    print("case, bound: least | median | one in 100 | most | prolonged to one in 1e9")
    for name, (_, draw) in CASES.items():
        shares = defaultdict(list)
        for seed in range(max(draws // 20, 1) if "1024" in name else draws):
            torch.manual_seed(seed)
            for bound in error_bounds(*draw()):
                shares[bound.name].append(share(bound))
        for what, values in shares.items():
            found = torch.tensor(values, dtype=torch.float64)
            tenth, hundredth = (found.quantile(1 - part).item() for part in (0.1, 0.01))
            rare = hundredth + 7 * (hundredth - tenth)
            figures = found.min().item(), found.median().item(), hundredth, found.max().item(), rare
            print(f"{name}, {what}: " + " | ".join(f"{figure:.3g}" for figure in figures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How far honest formulations and known faults are from the budget.")
    parser.add_argument("--draws", type=int, default=1000, help="how many seeds; a twentieth of it for many rows")
    measure(parser.parse_args().draws)
