"""What the means, the functions on ids and the segments must return for a case.

test_fuzz.py calls it for each case that fuzz_cases.py makes up.
"""

import math
from unittest import mock

import torch

import npp_kernels
import reference.ops as reference
from npp_kernels.embeddings import segments
from tests.fuzz_cases import laid_out, make_ids, make_values
from tests.fuzz_compare import compare


def check_group_mean(case, device):
    """Check `group_mean` on a case."""
    torch.manual_seed(case.seed)
    vocab_size, hidden_size, group_size = case.sizes
    table = make_values(case.values, (vocab_size, hidden_size))
    if case.ignore_index == 0:
        groups = make_ids(
            "skewed" if case.ids == "all ignored" else case.ids, (*case.leading, group_size), vocab_size, None
        )
        groups = torch.where(torch.rand(groups.shape) < 0.3, 0, groups) if case.ids != "all ignored" else groups * 0
    else:
        groups = make_ids(case.ids, (*case.leading, group_size), vocab_size, case.ignore_index)
    out_dtype = case.out_dtype or case.dtype
    upstream = make_values("ordinary" if case.values != "with nan" else "with nan", (*case.leading, hidden_size))
    table = laid_out(table.to(case.dtype).to(device), case.layouts[0])
    groups = laid_out(
        (groups.int() if case.small_ids else groups).to(device), case.layouts[1] if groups.ndim > 1 else "contiguous"
    )
    upstream = laid_out(upstream.to(out_dtype).to(device), case.layouts[2] if upstream.ndim > 1 else "contiguous")
    options = {"ignore_index": case.ignore_index}

    def run(function, dtype, absolute=False, **more):
        leaf = table.detach() if dtype is None else table.detach().to(dtype)
        leaf = (leaf.abs() if absolute else leaf).requires_grad_()
        out = function(leaf, groups if dtype is None else groups.long(), **options, **more)
        gradient = upstream.abs() if absolute else upstream
        (grad,) = torch.autograd.grad(out, leaf, gradient.to(out.dtype))
        return out.detach(), grad

    actual = run(npp_kernels.group_mean, None, out_dtype=case.out_dtype)
    order = npp_kernels.order_groups(groups, vocab_size, ignore_index=case.ignore_index)
    ordered = run(npp_kernels.group_mean, None, out_dtype=case.out_dtype, order=order)
    torch.testing.assert_close(ordered, actual, rtol=0, atol=0, equal_nan=True)
    wide = torch.promote_types(case.dtype, torch.float32)
    eager = run(reference.group_mean, wide)
    oracle, terms = (run(reference.group_mean, torch.float64, absolute) for absolute in (False, True))
    eager = eager[0].to(out_dtype), eager[1].to(case.dtype)
    for what, *three, scale in zip(("means", "gradient"), actual, eager, oracle, terms, strict=True):
        compare(*three, what=what, scale=scale if what == "gradient" else scale * max(1.0, _coarser(wide, out_dtype)))


def _coarser(wide, out_dtype):
    """Return how many roundings of the result's dtype one of the sum's is: float64 has none of float32's."""
    accumulated, counted = torch.finfo(wide).eps, torch.finfo(torch.promote_types(out_dtype, torch.float32)).eps
    return accumulated / counted


def check_patch_mean(case, device):
    """Check `patch_mean`, `group_tokens` and `ungroup_tokens` on a case."""
    torch.manual_seed(case.seed)
    grid = tuple(count * step for count, step in zip(case.counts, case.patch, strict=True))
    values = make_values(case.values, (*case.batch, *grid, case.hidden_size)).to(case.dtype).to(device)
    tokens = torch.randint(1000, (*case.batch, *grid), device=device)
    grouped = npp_kernels.group_tokens(
        laid_out(tokens, case.layouts[0] if tokens.ndim > 1 else "contiguous"), case.patch
    )
    tokens = laid_out(tokens, case.layouts[0] if tokens.ndim > 1 else "contiguous")
    assert torch.equal(npp_kernels.ungroup_tokens(grouped, case.patch, grid=grid), tokens)
    values = laid_out(values, case.layouts[0])
    if case.flat:
        values = values.reshape(*case.batch, -1 if values.numel() else math.prod(grid), case.hidden_size)
    options = {"grid": grid} if case.flat else {}
    shape = (*case.batch, math.prod(case.counts), case.hidden_size)
    upstream = laid_out(torch.randn(shape).to(case.dtype).to(device), case.layouts[1])

    def run(cast, absolute=False):
        leaf = values.detach() if cast is None else values.detach().to(cast)
        leaf = (leaf.abs() if absolute else leaf).requires_grad_()
        if cast is None:
            out = npp_kernels.patch_mean(leaf, case.patch, **options)
        else:
            groups = group_axes(leaf.reshape(*case.batch, *grid, case.hidden_size), case.patch, len(case.batch))
            out = groups.mean(-2)
        gradient = upstream.abs() if absolute else upstream
        (grad,) = torch.autograd.grad(out, leaf, gradient.to(out.dtype))
        return out.detach(), grad

    actual = run(None)
    eager = [tensor.to(case.dtype) for tensor in run(torch.promote_types(case.dtype, torch.float32))]
    oracle, terms = run(torch.float64), run(torch.float64, absolute=True)
    for what, *three, scale in zip(("means", "gradient"), actual, eager, oracle, terms, strict=True):
        compare(*three, what=what, scale=scale)


def group_axes(values, patch, first):
    """Return ``[..., P, K, D]`` of values on a grid, by views and one permutation."""
    rank = len(patch)
    shape = list(values.shape[:first])
    for size, step in zip(values.shape[first : first + rank], patch, strict=True):
        shape += [size // step, step]
    boxes = values.reshape(*shape, values.shape[-1])
    axes = [*range(first), *range(first, first + 2 * rank, 2), *range(first + 1, first + 2 * rank, 2), boxes.ndim - 1]
    coarse = math.prod(size // step for size, step in zip(values.shape[first : first + rank], patch, strict=True))
    return boxes.permute(axes).reshape(*values.shape[:first], coarse, math.prod(patch), values.shape[-1])


def check_segments(case, device):
    """Check `find_segments` on a case, exactly: the order inside each segment is part of the contract."""
    torch.manual_seed(case.seed)
    ids = make_ids("skewed" if case.ids == "out of range" else case.ids, (case.num_ids,), case.vocab_size, None)
    ids = ids.to(device)
    if case.ids == "out of range":
        ids[::7] = -100
        ids[::11] = case.vocab_size
        ids[-1] = 2**31 - 1 if case.small_ids else 2**40
    ids = ids.int() if case.small_ids else ids
    ignore_index = case.vocab_size // 2 if case.ignored else None
    with mock.patch.object(segments, "RANK_SORT_LIMIT", 0 if case.radix else segments.RANK_SORT_LIMIT):
        found = segments.find_segments(ids, case.vocab_size, ignore_index)
    keys = ids.long()
    counted = (keys >= 0) & (keys < case.vocab_size)
    if ignore_index is not None:
        counted &= keys != ignore_index
    expected, order = torch.sort(torch.where(counted, keys, case.vocab_size), stable=True)
    starts = torch.searchsorted(expected, torch.arange(case.vocab_size + 1, device=device))
    for name, values in (("keys", expected), ("order", order), ("starts", starts)):
        assert torch.equal(getattr(found, name).long(), values), name
