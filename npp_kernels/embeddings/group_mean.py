"""Gather-mean of token embeddings, and its reproducible backward.

    out[p] = 1/n_p · Σ_j table[g[p, j]]                    n_p: the ids of group p that are not ignored
    grad_table[v] = Σ_{p, j: g[p, j] = v} grad[p] / n_p

`mean_kernels`, `table_gradient` and `torch_path` compute that; here are a call's checks, its autograd function, and
slices of a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npp_kernels._autograd import as_rows, first_order_only, in_dtype, refuse_transforms, wants_backward
from npp_kernels._checks import (
    FLOATING_DTYPES,
    check_floating,
    check_groups,
    check_id_range,
    check_same_device,
)
from npp_kernels._dispatch import runs_kernels
from npp_kernels.embeddings.group_order import GroupOrder, as_segments, check_order
from npp_kernels.embeddings.mean_kernels import launch_means
from npp_kernels.embeddings.segments import Segments
from npp_kernels.embeddings.table_gradient import launch_table_gradient
from npp_kernels.embeddings.torch_path import torch_means, torch_table_gradient
from npp_kernels.vocabulary_shard import (
    VocabularyShard,
    check_same_rows,
    find_vocab_size,
    is_dtensor,
    local_slice,
    sum_over_ranks,
)

ELSEWHERE = -1  # the row of an id that another rank holds, or that is ignored


def _local_groups(groups: Tensor, ignore_index: int | None, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Return the groups as rows of this rank's table, `ELSEWHERE` for those of others; and how many ids count.

    An id of nobody's becomes one that is out of range here too, so that its group is NaN.
    """
    here = (groups >= shard.start) & (groups < shard.stop)
    nobodys = (groups < 0) | (groups >= shard.vocab_size)
    counts = torch.full_like(groups[:, 0], groups.shape[1])
    if ignore_index is not None:
        counted = groups != ignore_index
        counts, here, nobodys = counted.sum(1), here & counted, nobodys & counted
    local = torch.where(here, groups - shard.start, torch.where(nobodys, shard.size, ELSEWHERE))
    return local.to(groups.dtype), counts


class _GroupMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        groups: Tensor,
        ignore_index: int | None,
        out_dtype: torch.dtype,
        shard: VocabularyShard | None,
        *segments: Tensor,
    ) -> Tensor:
        forward = launch_means if runs_kernels(table) else torch_means
        if shard is None:
            out, counts = forward(table, groups, ignore_index, out_dtype)
        else:
            wide = torch.promote_types(table.dtype, torch.float32)
            groups, counts = _local_groups(groups, ignore_index, shard)
            counts = counts.to(wide)
            ignore_index = ELSEWHERE
            sums = sum_over_ranks(forward(table, groups, ignore_index, wide, divide=False)[0], shard)
            out = in_dtype(sums / counts.clamp(min=1).unsqueeze(1), out_dtype)
        ctx.save_for_backward(groups, counts, *segments)
        ctx.ignore_index = ignore_index
        ctx.vocab_size = table.shape[0]
        ctx.table_dtype = table.dtype
        return out

    @staticmethod
    @first_order_only("group_mean")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        groups, counts, *parts = ctx.saved_tensors
        segments = Segments(*parts) if parts else None
        # float64 takes the PyTorch path, whichever of the two has it: see `runs_kernels`.
        on_kernels = runs_kernels(grad) and ctx.table_dtype != torch.float64
        backward = launch_table_gradient if on_kernels else torch_table_gradient
        grad_table = backward(
            grad.contiguous(), groups, counts, ctx.ignore_index, ctx.vocab_size, ctx.table_dtype, segments
        )
        return grad_table, None, None, None, None, *(None for _ in parts)


def group_mean(
    table: Tensor,
    groups: Tensor,
    *,
    ignore_index: int | None = None,
    out_dtype: torch.dtype | None = None,
    shard: VocabularyShard | None = None,
    order: GroupOrder | None = None,
) -> Tensor:
    """Average the embeddings of each group of ids: ``table [V, D], groups [..., K] -> [..., D]``.

    >>> import torch, npp_kernels
    >>> table = torch.tensor([[0.0, 0.0], [2.0, 4.0], [4.0, 8.0]], requires_grad=True)
    >>> means = npp_kernels.group_mean(table, torch.tensor([[1, 2], [1, 1]]))
    >>> means.tolist()
    [[3.0, 6.0], [2.0, 4.0]]
    >>> means.sum().backward()
    >>> table.grad.tolist()
    [[0.0, 0.0], [1.5, 1.5], [0.5, 0.5]]

    ``out_p = 1/n_p · Σ_j table[g_pj]`` over the ids that are not ignored; a group with none left is zero.

    Args:
        table: ``[V, D]``, float32, bfloat16, float16 or float64.
        groups: ``[..., K]``, int32 or int64, ids in ``[0, V)`` or ``ignore_index``; usually from `group_tokens`.
        ignore_index: an id that is left out of the sum and of the divisor; None where every id counts.
        out_dtype: the dtype of the result; the table's where None.
        shard: this rank's slice of the vocabulary, where a process group shares it out. ``table`` is then ``[V_r, D]``;
            ``groups`` are the same on every rank, with ids of the whole vocabulary. Every rank gets all means, and the
            gradient of its own rows. A `DTensor` with the placement ``Shard(0)`` needs none.
        order: what `order_groups` made of these groups, so that the backward need not sort. (For a few hundred ids it
            does not sort anyway.) That it belongs to these groups, and not to others of the same shape, is checked
            only with `check_ids` on. Not together with a shard.

    Returns:
        ``[..., D]`` of ``out_dtype``.

    Raises:
        TypeError: a tensor of another dtype, or a `DTensor` that is placed otherwise.
        ValueError: shapes or devices that do not match, an ``order`` of other groups, or, with `check_ids` on, a bad
            id on a GPU.
        IndexError: an id out of range, on the CPU. On a GPU the group's mean is NaN and its ids get no gradient.
        RuntimeError: a double backward, or a transform of `torch.func`.

    Numerics:
        Sums in fp32 (fp64 for float64), rounded once. ``K = 1`` is `F.embedding`, bit for bit. The gradient of the
        table accumulates in fp32, and is rounded once to the table's dtype. It is the same bit for bit from run to run,
        with ``order`` and without. Over a shard the sums of all ranks are added in fp32 before they are divided and
        rounded; a -0.0 becomes 0.0.

    Memory:
        Forward: the result alone; over a shard the sums in fp32, too. Backward: the table's gradient, about 20 bytes
        for every id (none with ``order``), and ``D/16`` bytes for every id, for the sums of frequent ids.

    Source:
        NPP (arXiv 2412.15321), section 3.2; ``tensor_patchify`` after the embedding in the official code.
    """
    if is_dtensor(table):
        table, shard = local_slice("table", table, 0, shard)
    check_floating("table", table, ndim=2)
    check_groups(groups)
    check_same_device("groups", groups, "table", table)
    if out_dtype is not None and out_dtype not in FLOATING_DTYPES:
        raise TypeError(f"out_dtype: expected float32, bfloat16, float16, float64 or None, got {out_dtype!r}")
    refuse_transforms("group_mean")
    check_id_range(groups, find_vocab_size("table", table, 0, shard), ignore_index)
    if order is not None:
        if shard is not None:
            raise ValueError(
                "order: expected None over a shard of the vocabulary, where each rank sorts the ids of its own rows, "
                "got a GroupOrder"
            )
        check_order(order, groups, table.shape[0], ignore_index)
    flat = as_rows(groups).contiguous()
    if shard is not None:
        check_same_rows(flat, shard)
    rows = table if table.stride(-1) == 1 else table.contiguous()
    wanted_dtype = table.dtype if out_dtype is None else out_dtype
    if runs_kernels(table) or wants_backward(table) or shard is not None:
        segments = () if order is None else as_segments(order)
        out: Tensor = _GroupMean.apply(rows, flat, ignore_index, wanted_dtype, shard, *segments)
    else:
        out, _ = torch_means(rows, flat, ignore_index, wanted_dtype)
    return out.view(*groups.shape[:-1], table.shape[1])
