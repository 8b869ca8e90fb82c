"""The error budget: how far a result may be from the fp64 oracle, beside the plain PyTorch formulation (eager).

Eager is the reference on inputs upcast to fp32, its results rounded to the dtype: the best that plain PyTorch can do.
An error is counted beyond what nobody can avoid, half of the last place that the oracle's value has in the dtype.

**The largest.** Each element's error, beyond its own rounding, is at most twice eager's largest plus `ROUNDINGS`
roundings in fp32 of the scale of what was summed. What is accumulated in fp32 and rounded to 16 bits once leaves eager
nothing beyond the rounding, so that this comes down to those few roundings in fp32, a thousandth of a last place: a
second rounding to 16 bits, which is off by up to half of one, has no chance. The second term is what an honest sum may
lose where eager is exact by luck, as it often is in a single number; it bounds rounding errors, not their spread.

**The mean.** The mean error is at most twice the larger of eager's and that of one rounding, times ``1 + SAMPLING/√n``.
The factor of 2 is for two orders of summation, the other for the sampling error of two means, where n counts rows: the
elements of one share a logsumexp, and a few rows may have nearly all of the error, ``n = (Σ e)² / Σ e²``. The mean of
fewer than `MEAN_ROWS` says nothing that the largest does not.

**False alarms.** ``python -m tests.test_budget`` measures which share of each bound honest formulations use, and
prolongs the tail of the shares, as an exponential, to one draw in 10⁹. Over 1,000 draws of each, in other orders of
summation than PyTorch's and with exponentials of another base, and 300 with each of the CPU's instruction sets, none
used more than half of a bound; prolonged, gradients of 23 rows come to 0.7 to 1.1, all others to 0.75 and less. With
some 500 comparisons in the suite, few of them of that kind, that is a false alarm in a million runs and more. The least
that a known fault used of the bound that it breaks was 12 (a gradient formed from its lse at +1000), 26 (a loss formed
so), 3.4 (the same at +100), 160 (anything rounded twice).
"""

from typing import NamedTuple

import torch

from bench.cases.exact import half_ulps

LARGEST_SLACK = 2.0
MEAN_SLACK = 2.0
SAMPLING = 4.0
MEAN_ROWS = 16
ROUNDINGS = 12.0


class Bound(NamedTuple):
    """What was measured, and the most that it may be."""

    name: str
    value: float
    allowed: float


def effective_rows(error):
    """Return how many equal rows would average as well as these: all, where they are alike, 1, where one dominates."""
    rows = error.reshape(-1, error.shape[-1]).sum(1) if error.ndim > 1 else error.flatten()
    square = rows.square().sum().item()
    return rows.sum().item() ** 2 / square if square else float(len(rows))


def error_bounds(actual, eager, oracle, scale=None):
    """Return the budget's bounds, on the largest and on the mean error; see `assert_within_budget`."""
    oracle = oracle.detach().double()
    error = (actual.detach().double() - oracle).abs()
    eager_error = (eager.detach().double() - oracle).abs()
    rounding = half_ulps(oracle, actual.dtype)
    if scale is None:
        scale = oracle.abs().max()
    accumulation = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps / 2
    beyond = (error - rounding).flatten()
    eager_beyond = (eager_error - rounding).max().clamp(min=0)
    allowed = (LARGEST_SLACK * eager_beyond + ROUNDINGS * accumulation * scale).expand_as(error).flatten()
    worst = (beyond - allowed).argmax() if (beyond > allowed).any() else (beyond / allowed).argmax()
    bounds = [Bound("largest error beyond its rounding", beyond[worst].item(), allowed[worst].item())]
    rows = effective_rows(torch.maximum(error, eager_error))
    if rows >= MEAN_ROWS:
        typical = max(eager_error.mean().item(), rounding.mean().item() / 2)
        bounds.append(Bound("mean error", error.mean().item(), MEAN_SLACK * (1 + SAMPLING / rows**0.5) * typical))
    return bounds


def rounded_scale(values, dtype):
    """Return the ``scale`` of a result on whose way ``values`` were rounded to ``dtype``: it allows for one rounding.

    Logits that are products in another order of summation may fall on the other side of a tie, each by a whole last
    place; a mean over few of them has that error whole, and eager may have none.
    """
    largest = values.detach().double().abs().max()
    return half_ulps(largest, dtype) / (ROUNDINGS * torch.finfo(torch.float32).eps / 2)


def assert_within_budget(actual, eager, oracle, *, what="result", scale=None):
    """Assert that ``actual`` is as near to ``oracle`` (fp64) as ``eager``, which has the same dtype, is.

    Args:
        actual: the result.
        eager: plain PyTorch's, of the same dtype and shape.
        oracle: the exact result.
        what: its name in messages.
        scale: how large what was summed is, a number or a tensor that broadcasts to the result: ``Σ |terms|``; for the
            gradient of a softmax what its row is multiplied by, since it is a difference of that size even where it is
            small; 1 for the loss of a row that is sure of its target, a logarithm of 1 and a little. For what was
            rounded to 16 bits on the way see `rounded_scale`. Where None, the largest of the oracle's values.
    """
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, eager has {eager.dtype}"
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, oracle has {tuple(oracle.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    if not actual.numel():
        return
    for bound in error_bounds(actual, eager, oracle, scale):
        assert bound.value <= bound.allowed, f"{what}: {bound.name} {bound.value:.3g}, allowed {bound.allowed:.3g}"
