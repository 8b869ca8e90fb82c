"""The comparison of one fuzzed result: with fp64, by the error budget, infinities and NaN included.

fuzz_losses.py, fuzz_linear.py and fuzz_means.py end with it.
"""

import torch

from tests.budget import error_bounds

EPS = torch.finfo(torch.float32).eps


def compare(actual, eager, oracle, *, what, scale, rows_differ=True):
    """Compare with the oracle: its infinities and NaN are to be there, numbers out of the dtype's range infinite."""
    actual, eager, oracle = actual.detach(), eager.detach(), oracle.detach()
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, expected {eager.dtype}"
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    limit = torch.finfo(actual.dtype).max
    large = oracle.abs() > 0.98 * limit  # infinite ones too
    assert torch.equal(actual.isnan(), oracle.isnan()), f"{what}: NaN in other places"
    assert (actual[large].abs() > 0.95 * limit).all(), f"{what}: finite where it is out of range"
    assert torch.equal(actual[large].sign(), oracle[large].sign().to(actual.dtype)), f"{what}: an infinity's sign"
    left_out = large | oracle.isnan()
    actual, eager, oracle = (tensor.masked_fill(left_out, 0) for tensor in (actual, eager, oracle))
    if torch.is_tensor(scale):
        scale = scale.nan_to_num(0, 0, 0)
    if actual.dtype == torch.float64:  # the oracle has roundings of its own
        allowed = 64 * torch.finfo(torch.float64).eps * torch.maximum(torch.as_tensor(scale), oracle.abs())
        assert ((actual - oracle).abs() <= allowed).all(), f"{what}: {(actual - oracle).abs().max():.3g} in float64"
        return
    assert actual.isfinite().all(), f"{what}: not finite"
    if not actual.numel():
        return
    largest, *means = error_bounds(actual, eager, oracle, scale)
    assert largest.value <= largest.allowed, (
        f"{what}: {largest.name} {largest.value:.3g}, allowed {largest.allowed:.3g}"
    )
    # Where terms cancel to nothing, as for logits that are all alike, eager's mean error is 0 by luck.
    lucky = EPS * torch.as_tensor(scale, dtype=torch.float64).mean().item()
    for mean in means if rows_differ else ():
        assert mean.value <= max(mean.allowed, lucky), (
            f"{what}: {mean.name} {mean.value:.3g}, allowed {mean.allowed:.3g}"
        )
