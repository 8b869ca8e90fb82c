"""The kernels of `group_mean`: a gather forward, and a gather backward.

Bytes forward: the table rows in use once, the output once, the ids once; each row is read K·P/V times, from the L2
while the table fits there. Bytes backward: the gradient once (K times from the L2), the table's gradient once.

The backward is a gather too: `find_segments` lists the positions of every id in a stable order, and each row of the
table's gradient sums its own segment, in fp32 and always in that order, so that the result is the same bit for bit at
every run. A row with few ids is summed by one warp. A frequent id would keep that warp busy for long, so the order is
cut into chunks: a chunk that is all one id is summed by a warp of its own, and `_frequent_rows_kernel` adds those up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import cdiv, launch, next_power_of_2
from npp_kernels.embeddings.segments import Segments, find_segments

# H100, 2026-11-24, bf16, V = 16,384, 256 images of 16×16 tokens; docs/tuning.md has what else was tried.
# A tile of 8,192 embeddings, 256 columns wide, 4 slots at a time: 15 µs at D = 768, K = 16 on real tokens (4,096 and 8
# slots: 18; 512 columns: 17).
BLOCK_ELEMENTS = 8192
MAX_BLOCK_HIDDEN = 256
UNROLLED_SLOTS = 4
# Backward, at D = 768, K = 4: 65 µs on uniform tokens and 84 on real ones; two rows at a time 70 and 92, 256 columns 73
# and 88, chunks of 128 ids 71 and 95.
CHUNK_SIZE = 64
WARP_ROWS = 1
WARP_HIDDEN = 512
WARP_UNROLL = 4
FREQUENT_SPAN = 4
FREQUENT_ROWS = 32
FREQUENT_HIDDEN = 64


@triton.jit
def _added(total, lost, rows, PRECISE: tl.constexpr):
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
        total, lost = _added(total, lost, rows, table_ptr.dtype.element_ty == tl.float32)
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


@triton.jit
def _sum_positions(
    grad_ptr, order_ptr, counts_ptr, first, last, again, end, columns, column_mask, hidden_size,
    GROUP_SIZE: tl.constexpr, HAS_IGNORED: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of the groups at ``order[first:last]`` and ``order[again:end]``, ROWS at a time."""
    total = tl.zeros([ROWS, columns.shape[0]], tl.float32)
    lost = tl.zeros_like(total)
    length = last - first
    for base in tl.range(0, length + (end - again), ROWS, loop_unroll_factor=UNROLL):
        places = base + tl.arange(0, ROWS)
        place_mask = places < length + (end - again)
        places += tl.where(places < length, first, again - length)
        group = tl.load(order_ptr + places, mask=place_mask, other=0).to(tl.int64) // GROUP_SIZE
        rows = tl.load(
            grad_ptr + group[:, None] * hidden_size + columns[None, :],
            mask=place_mask[:, None] & column_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_IGNORED:
            rows = tl.div_rn(rows, tl.load(counts_ptr + group, mask=place_mask, other=1.0)[:, None])
        total, lost = _added(total, lost, rows, grad_ptr.dtype.element_ty == tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _store_row(
    grad_table_ptr, row, total, columns, column_mask, hidden_size, GROUP_SIZE: tl.constexpr, HAS_IGNORED: tl.constexpr
):
    """Store one row of the table's gradient; where every group has all its ids, the mean is divided here, once."""
    if not HAS_IGNORED:
        total = total * (1.0 / GROUP_SIZE)
    tl.store(
        grad_table_ptr + row.to(tl.int64) * hidden_size + columns,
        total.to(grad_table_ptr.dtype.element_ty),
        mask=column_mask,
    )


@triton.jit
def _segment_sums_kernel(
    grad_ptr,  # [num_groups, hidden_size]
    keys_ptr,  # [num_ids]
    order_ptr,  # [num_ids]
    starts_ptr,  # [vocab_size + 1]
    counts_ptr,  # [num_groups]
    sums_ptr,  # [num_chunks, hidden_size] out, fp32: the chunks that are all one id
    grad_table_ptr,  # [vocab_size, hidden_size] out: the rows whose segment has no whole chunk
    num_chunks,
    vocab_size,
    hidden_size,
    GROUP_SIZE: tl.constexpr,
    HAS_IGNORED: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program, one warp, sums BLOCK_HIDDEN columns of one chunk or of one row; the chunks, longer, come first."""
    task = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    column_mask = columns < hidden_size
    row = task - num_chunks
    if task < num_chunks:
        first = task * CHUNK
        last = first + CHUNK
        key = tl.load(keys_ptr + first)
        mine = (key == tl.load(keys_ptr + last - 1)) & (key < vocab_size)
    else:
        first = tl.load(starts_ptr + row)
        last = tl.load(starts_ptr + row + 1)
        mine = tl.cdiv(first, CHUNK) >= last // CHUNK
    if mine:
        total = _sum_positions(
            grad_ptr, order_ptr, counts_ptr, first, last, last, last, columns, column_mask, hidden_size,
            GROUP_SIZE, HAS_IGNORED, ROWS, UNROLL,
        )  # fmt: skip
        if task < num_chunks:
            tl.store(sums_ptr + task.to(tl.int64) * hidden_size + columns, total, mask=column_mask)
        else:
            _store_row(grad_table_ptr, row, total, columns, column_mask, hidden_size, GROUP_SIZE, HAS_IGNORED)


@triton.jit
def _frequent_rows_kernel(
    grad_ptr,  # [num_groups, hidden_size]
    keys_ptr,  # [num_ids]
    order_ptr,  # [num_ids]
    starts_ptr,  # [vocab_size + 1]
    counts_ptr,  # [num_groups]
    sums_ptr,  # [num_chunks, hidden_size]
    grad_table_ptr,  # [vocab_size, hidden_size] out: the rows whose segment has a whole chunk
    num_chunks,
    vocab_size,
    hidden_size,
    GROUP_SIZE: tl.constexpr,
    HAS_IGNORED: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """One program writes BLOCK_HIDDEN columns of the rows whose first whole chunk is one of its SPAN."""
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    column_mask = columns < hidden_size
    chunks = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    mask = chunks < num_chunks
    keys = tl.load(keys_ptr + chunks * CHUNK, mask=mask, other=vocab_size)
    whole = (keys == tl.load(keys_ptr + chunks * CHUNK + CHUNK - 1, mask=mask, other=-1)) & (keys < vocab_size)
    leads = whole & (tl.load(starts_ptr + keys, mask=whole, other=0) > (chunks - 1) * CHUNK)
    for offset in range(SPAN):
        if tl.max(tl.where(chunks == tl.program_id(0) * SPAN + offset, leads.to(tl.int32), 0), axis=0) > 0:
            chunk = tl.program_id(0) * SPAN + offset
            key = tl.load(keys_ptr + chunk * CHUNK)
            first = tl.load(starts_ptr + key)
            last = tl.load(starts_ptr + key + 1)
            last_chunk = last // CHUNK
            partial = tl.zeros([ROWS, BLOCK_HIDDEN], tl.float32)
            for base in tl.range(chunk, last_chunk, ROWS, loop_unroll_factor=2):
                others = (base + tl.arange(0, ROWS)).to(tl.int64)
                partial += tl.load(
                    sums_ptr + others[:, None] * hidden_size + columns[None, :],
                    mask=(others < last_chunk)[:, None] & column_mask[None, :],
                    other=0.0,
                )
            total = tl.sum(partial, axis=0)
            total += _sum_positions(
                grad_ptr, order_ptr, counts_ptr, first, chunk * CHUNK, last_chunk * CHUNK, last, columns, column_mask,
                hidden_size, GROUP_SIZE, HAS_IGNORED, ROWS, 1,
            )  # fmt: skip
            _store_row(grad_table_ptr, key, total, columns, column_mask, hidden_size, GROUP_SIZE, HAS_IGNORED)


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


def launch_table_gradient(
    grad: Tensor,
    groups: Tensor,
    counts: Tensor | None,
    ignore_index: int | None,
    vocab_size: int,
    dtype: torch.dtype,
    segments: Segments | None = None,
) -> Tensor:
    """Return the table's gradient ``[V, D]`` from the means' gradient ``[P, D]``; without ``segments``, find them."""
    group_size, hidden_size = groups.shape[1], grad.shape[1]
    grad_table = torch.empty((vocab_size, hidden_size), dtype=dtype, device=grad.device)
    if groups.numel() == 0 or grad_table.numel() == 0:
        return grad_table.zero_()
    num_chunks = groups.numel() // CHUNK_SIZE
    sums = torch.empty((num_chunks, hidden_size), dtype=torch.float32, device=grad.device)
    keys, order, starts = segments or find_segments(groups, vocab_size, ignore_index)
    arguments = (grad, keys, order, starts, counts, sums, grad_table, num_chunks, vocab_size, hidden_size)
    options: dict[str, Any] = {"GROUP_SIZE": group_size, "HAS_IGNORED": counts is not None, "CHUNK": CHUNK_SIZE}
    block_hidden = min(next_power_of_2(hidden_size), WARP_HIDDEN)
    launch(
        _segment_sums_kernel,
        (num_chunks + vocab_size, cdiv(hidden_size, block_hidden)),
        *arguments,
        ROWS=WARP_ROWS,
        BLOCK_HIDDEN=block_hidden,
        UNROLL=WARP_UNROLL,
        num_warps=1,
        **options,
    )
    if num_chunks:
        block_hidden = min(next_power_of_2(hidden_size), FREQUENT_HIDDEN)
        launch(
            _frequent_rows_kernel,
            (cdiv(num_chunks, FREQUENT_SPAN), cdiv(hidden_size, block_hidden)),
            *arguments,
            SPAN=FREQUENT_SPAN,
            ROWS=FREQUENT_ROWS,
            BLOCK_HIDDEN=block_hidden,
            num_warps=4,
            **options,
        )
    return grad_table
