"""The error budget: how far a result may be from the fp64 oracle.

A fused operation may be no worse than the plain PyTorch formulation, element by element and in the mean. Eager is the
reference on inputs upcast to fp32, its results rounded to the dtype: the best that plain PyTorch can do.
"""

import torch

# The largest of some hundred errors varies from one order of summation to the next, and so does, less, their mean.
MAX_SLACK = 1.5
MEAN_SLACK = 1.2
MEAN_SAMPLE = 64

# Roundings that an element may have of its own, in halves of a last place. Eager's error can be 0 by luck. What is
# accumulated in fp32 and rounded to 16 bits has one; fp32 itself, whose last place every step touches, a few.
ROUNDINGS = {torch.float32: 4, torch.float16: 1.01, torch.bfloat16: 1.01}


def assert_within_budget(actual, eager, oracle, *, what="result"):
    """Assert that ``actual`` is as near to ``oracle`` (fp64) as ``eager``, which has the same dtype, is."""
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, eager has {eager.dtype}"
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, oracle has {tuple(oracle.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    if not actual.numel():
        return
    oracle = oracle.detach().double()
    error = (actual.detach().double() - oracle).abs()
    eager_error = (eager.detach().double() - oracle).abs()
    info = torch.finfo(actual.dtype)
    rounding = (oracle.abs() * info.eps / 2).clamp(min=info.tiny * info.eps / 2) * ROUNDINGS[actual.dtype]
    excess = (error - rounding).max().item()
    assert excess <= MAX_SLACK * eager_error.max().item(), (
        f"{what}: largest error {error.max().item():.3g}, eager {eager_error.max().item():.3g}"
    )
    if error.numel() >= MEAN_SAMPLE:
        allowed = MEAN_SLACK * max(eager_error.mean().item(), rounding.mean().item() / 2)
        assert error.mean().item() <= allowed, f"{what}: mean error {error.mean().item():.3g}, allowed {allowed:.3g}"
