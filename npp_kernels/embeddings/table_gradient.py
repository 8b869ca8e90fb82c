"""The backward kernels of `group_mean`: a gather too, so that the result is the same bit for bit at every run.

Bytes: the gradient once (K times from the L2), the table's gradient once.

Each row of the table's gradient sums the positions of its own id, in fp32 and always in ascending order. For a few ids
one launch does it all: a warp for each row looks through them. For more, `find_segments` lists the positions of every
id first. A row with few of them is summed by one warp. A frequent id would keep that warp busy for long, so the order
is cut into chunks: a chunk that is all one id is summed by a warp of its own, and `_frequent_rows_kernel` adds up what
chunks gave.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import cdiv, launch, next_power_of_2
from npp_kernels.embeddings.mean_kernels import added
from npp_kernels.embeddings.segments import Segments, find_segments

# By estimate, not measured: up to so many ids, to look through them (4 KB for each row of the table, from the L1) costs
# less than the three or four launches of the other way, on the host and on the GPU; an id that is all of them keeps one
# warp busy for some 50 µs.
FEW_IDS = 512
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
        total, lost = added(total, lost, rows, grad_ptr.dtype.element_ty == tl.float32)
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
def _few_ids_kernel(
    grad_ptr,  # [num_groups, hidden_size]
    groups_ptr,  # [num_groups, GROUP_SIZE]
    counts_ptr,  # [num_groups]
    grad_table_ptr,  # [vocab_size, hidden_size] out
    num_ids,
    hidden_size,
    ignore_index,
    GROUP_SIZE: tl.constexpr,
    HAS_IGNORED: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """One program, one warp, looks for its row's id among all ids, and sums BLOCK_HIDDEN columns where it stands."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    column_mask = columns < hidden_size
    positions = tl.arange(0, BLOCK_IDS)
    mine = tl.load(groups_ptr + positions, mask=positions < num_ids, other=-1) == row
    if HAS_IGNORED:
        mine = mine & (row != ignore_index)
    total = tl.zeros([BLOCK_HIDDEN], tl.float32)
    lost = tl.zeros_like(total)
    position = -1
    for _ in range(tl.sum(mine.to(tl.int32), axis=0)):
        position = tl.min(tl.where(mine & (positions > position), positions, BLOCK_IDS), axis=0)
        group = position // GROUP_SIZE
        values = tl.load(grad_ptr + group.to(tl.int64) * hidden_size + columns, mask=column_mask, other=0.0)
        values = values.to(tl.float32)
        if HAS_IGNORED:
            values = tl.div_rn(values, tl.zeros_like(values) + tl.load(counts_ptr + group))
        total, lost = added(total, lost, values, grad_ptr.dtype.element_ty == tl.float32)
    _store_row(grad_table_ptr, row, total, columns, column_mask, hidden_size, GROUP_SIZE, HAS_IGNORED)


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


def _launch_few_ids(
    grad: Tensor, groups: Tensor, counts: Tensor | None, ignore_index: int | None, grad_table: Tensor
) -> None:
    vocab_size, hidden_size = grad_table.shape
    block_hidden = min(next_power_of_2(hidden_size), WARP_HIDDEN)
    launch(
        _few_ids_kernel,
        (vocab_size, cdiv(hidden_size, block_hidden)),
        grad,
        groups,
        counts,
        grad_table,
        groups.numel(),
        hidden_size,
        -1 if ignore_index is None else ignore_index,
        GROUP_SIZE=groups.shape[1],
        HAS_IGNORED=counts is not None,
        BLOCK_IDS=FEW_IDS,  # not their number: code compiled for any number would be compiled again
        BLOCK_HIDDEN=block_hidden,
        num_warps=1,
    )


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
    if groups.numel() <= FEW_IDS:
        _launch_few_ids(grad, groups, counts, ignore_index, grad_table)
        return grad_table
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
