"""The forward kernel of `group_mean`: a gather.

Bytes: the table rows in use once, the output once, the ids once; each row is read K·P/V times, from the L2 while the
table fits there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import cdiv, launch, next_power_of_2

# H100, 2026-11-24, bf16, V = 16,384, 256 images of 16×16 tokens; docs/tuning.md has what else was tried.
# A tile of 8,192 embeddings, 256 columns wide, 4 slots at a time: 15 µs at D = 768, K = 16 on real tokens (4,096 and 8
# slots: 18; 512 columns: 17).
BLOCK_ELEMENTS = 8192
MAX_BLOCK_HIDDEN = 256
UNROLLED_SLOTS = 4


@triton.jit
def added(total, lost, rows, PRECISE: tl.constexpr):
    """Return ``total + rows`` and what it lost to rounding.

    With PRECISE it is compensated (Kahan): in fp32 nothing is rounded off at the end that would hide the sum's error.
    A sum that has become infinite has lost nothing that could be given back: what is left is inf - inf, a NaN.
    """
    if PRECISE:
        corrected = rows - lost
        new_total = total + corrected
        lost = (new_total - total) - corrected
        lost = tl.where(tl.abs(lost) < float("inf"), lost, 0.0)
        total = new_total
    else:
        total += rows
    return total, lost


@triton.jit
def _load_rows(
    table_ptr, groups_ptr, group, slot, columns, group_mask, column_mask, vocab_size, ignore_index, row_stride,
    GROUP_SIZE: tl.constexpr, HAS_IGNORED: tl.constexpr,
):  # fmt: skip
    """Load the embeddings of one slot of each group, zero where it is ignored and NaN where its id is out of range."""
    ids = tl.load(groups_ptr + group * GROUP_SIZE + slot, mask=group_mask, other=0).to(tl.int64)
    in_range = (ids >= 0) & (ids < vocab_size)
    if HAS_IGNORED:
        ignored = ids == ignore_index
        in_range = in_range & (ids != ignore_index)
        absent = tl.where(ignored, 0.0, float("nan"))
        counted = tl.where(ignored, 0.0, 1.0)
    else:
        absent = tl.full(ids.shape, float("nan"), tl.float32)
        counted = tl.full(ids.shape, 1.0, tl.float32)
    absent = absent.to(table_ptr.dtype.element_ty)
    rows = tl.load(
        table_ptr + ids[:, None] * row_stride + columns[None, :],
        mask=(in_range & group_mask)[:, None] & column_mask[None, :],
        other=absent[:, None],
    )
    return rows.to(tl.float32), counted


@triton.jit
def _group_mean_kernel(
    table_ptr,  # [vocab_size, hidden_size]
    groups_ptr,  # [num_groups, GROUP_SIZE]
    out_ptr,  # [num_groups, hidden_size] out
    counts_ptr,  # [num_groups] out: ids that count, if HAS_IGNORED and DIVIDE
    num_groups,
    vocab_size,
    hidden_size,
    row_stride,
    ignore_index,
    GROUP_SIZE: tl.constexpr,
    HAS_IGNORED: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    UNROLL: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    """One program averages, or with DIVIDE off adds up, BLOCK_HIDDEN columns of BLOCK_GROUPS groups, in fp32."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    group_mask = group < num_groups
    column_mask = columns < hidden_size

    # The sum starts at the first row, not at zero: 0 + (-0.0) is 0.0, and K = 1 must return the row bit for bit.
    total, count = _load_rows(
        table_ptr, groups_ptr, group, 0, columns, group_mask, column_mask, vocab_size, ignore_index, row_stride,
        GROUP_SIZE, HAS_IGNORED,
    )  # fmt: skip
    lost = tl.zeros_like(total)
    for slot in tl.range(1, GROUP_SIZE, loop_unroll_factor=UNROLL):
        rows, counted = _load_rows(
            table_ptr, groups_ptr, group, slot, columns, group_mask, column_mask, vocab_size, ignore_index, row_stride,
            GROUP_SIZE, HAS_IGNORED,
        )  # fmt: skip
        total, lost = added(total, lost, rows, table_ptr.dtype.element_ty == tl.float32)
        count += counted

    if not DIVIDE:
        mean = total
    elif HAS_IGNORED:
        mean = tl.div_rn(total, tl.maximum(count, 1.0)[:, None])
        if tl.program_id(1) == 0:
            tl.store(counts_ptr + group, count, mask=group_mask)
    elif (GROUP_SIZE & (GROUP_SIZE - 1)) == 0:
        mean = total * (1.0 / GROUP_SIZE)
    else:
        mean = tl.div_rn(total, tl.full(total.shape, GROUP_SIZE, tl.float32))
    tl.store(
        out_ptr + group[:, None] * hidden_size + columns[None, :],
        mean.to(out_ptr.dtype.element_ty),
        mask=group_mask[:, None] & column_mask[None, :],
    )


def launch_means(
    table: Tensor, groups: Tensor, ignore_index: int | None, out_dtype: torch.dtype, *, divide: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the means ``[P, D]`` of ``groups [P, K]`` and, where ids may be ignored, the counts ``[P]``.

    Without ``divide`` the sums, and no counts.
    """
    num_groups, group_size = groups.shape
    vocab_size, hidden_size = table.shape
    out = torch.empty((num_groups, hidden_size), dtype=out_dtype, device=table.device)
    counts = None
    if ignore_index is not None and divide:
        counts = torch.empty(num_groups, dtype=torch.float32, device=table.device)
    if out.numel() == 0:
        return out, counts
    block_hidden = min(next_power_of_2(hidden_size), MAX_BLOCK_HIDDEN)
    block_groups = max(BLOCK_ELEMENTS // (block_hidden * min(next_power_of_2(group_size), UNROLLED_SLOTS)), 1)
    launch(
        _group_mean_kernel,
        (cdiv(num_groups, block_groups), cdiv(hidden_size, block_hidden)),
        table,
        groups,
        out,
        counts,
        num_groups,
        vocab_size,
        hidden_size,
        table.stride(0),
        -1 if ignore_index is None else ignore_index,
        GROUP_SIZE=group_size,
        HAS_IGNORED=ignore_index is not None,
        BLOCK_GROUPS=block_groups,
        BLOCK_HIDDEN=block_hidden,
        UNROLL=UNROLLED_SLOTS,
        DIVIDE=divide,
    )
    return out, counts
