"""Gather-mean of token embeddings, and its reproducible backward.

    out[p] = 1/n_p · Σ_j table[g[p, j]]                    n_p: the ids of group p that are not ignored
    grad_table[v] = Σ_{p, j: g[p, j] = v} grad[p] / n_p

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
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._autograd import first_order_only, refuse_transforms, wants_backward
from npp_kernels._checks import (
    FLOATING_DTYPES,
    check_floating,
    check_groups,
    check_id_range,
    check_same_device,
)
from npp_kernels._dispatch import cdiv, launch, next_power_of_2, runs_kernels
from npp_kernels.embeddings.segments import find_segments
from npp_kernels.vocabulary_shard import (
    VocabularyShard,
    check_same_rows,
    find_vocab_size,
    is_dtensor,
    local_slice,
    sum_over_ranks,
)

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

ELSEWHERE = -1  # the row of an id that another rank holds, or that is ignored


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


def _launch_forward(
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


def _launch_backward(
    grad: Tensor, groups: Tensor, counts: Tensor | None, ignore_index: int | None, vocab_size: int, dtype: torch.dtype
) -> Tensor:
    """Return the table's gradient ``[V, D]`` from the means' gradient ``[P, D]``."""
    group_size, hidden_size = groups.shape[1], grad.shape[1]
    grad_table = torch.empty((vocab_size, hidden_size), dtype=dtype, device=grad.device)
    if groups.numel() == 0 or grad_table.numel() == 0:
        return grad_table.zero_()
    num_chunks = groups.numel() // CHUNK_SIZE
    sums = torch.empty((num_chunks, hidden_size), dtype=torch.float32, device=grad.device)
    keys, order, starts = find_segments(groups, vocab_size, ignore_index)
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


def _torch_forward(
    table: Tensor, groups: Tensor, ignore_index: int | None, out_dtype: torch.dtype, *, divide: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`_launch_forward` in PyTorch: one slot of all groups at a time where no operation serves the whole."""
    num_groups, group_size = groups.shape
    if group_size == 1 and ignore_index is None:
        return F.embedding(groups[:, 0], table).to(out_dtype), None
    wide = torch.promote_types(table.dtype, torch.float32)
    # On 16 bit the operation rounds the sum before it divides, and some of its paths every partial sum.
    if ignore_index is None and out_dtype == table.dtype == wide and num_groups:
        # Its mean takes longer than its sum and a division.
        return F.embedding_bag(groups, table, mode="sum").div_(group_size), None
    ignored = None if ignore_index is None else groups == ignore_index

    def load_rows(slot: int) -> Tensor:
        if ignored is None:
            return F.embedding(groups[:, slot], table)
        rows = F.embedding(groups[:, slot].masked_fill(ignored[:, slot], 0), table)
        return rows.masked_fill_(ignored[:, slot].unsqueeze(1), 0)

    total = load_rows(0).to(wide)
    for slot in range(1, group_size):
        total += load_rows(slot)
    if not divide:
        return total.to(out_dtype), None
    if ignored is None:
        return total.div_(group_size).to(out_dtype), None
    counts = (~ignored).sum(1).to(wide)
    return total.div_(counts.clamp(min=1).unsqueeze(1)).to(out_dtype), counts


def _torch_backward(
    grad: Tensor, groups: Tensor, counts: Tensor | None, ignore_index: int | None, vocab_size: int, dtype: torch.dtype
) -> Tensor:
    """`_launch_backward` in PyTorch: each id sums its own segment of one stable order, as there."""
    group_size = groups.shape[1]
    if not groups.numel():
        return torch.zeros((vocab_size, grad.shape[1]), dtype=dtype, device=grad.device)
    wide = torch.promote_types(dtype, torch.float32)
    scaled = grad.to(wide)
    if counts is not None:
        scaled = scaled / counts.to(wide).clamp(min=1).unsqueeze(1)
    elif group_size > 1:
        scaled = scaled / group_size
    ids = groups.flatten()
    num_segments = vocab_size
    if ignore_index is not None:
        ids = ids.masked_fill(ids == ignore_index, vocab_size)
        num_segments += 1  # the last, of what is ignored, is dropped
    order = torch.sort(ids, stable=True).indices
    numbers = torch.zeros(num_segments, dtype=torch.int64, device=ids.device)
    numbers.scatter_add_(0, ids.long(), torch.ones_like(order))
    starts = numbers.cumsum(0) - numbers
    sums = F.embedding_bag(order // group_size, scaled, starts, mode="sum")
    return sums[:vocab_size].to(dtype)


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
    def forward(ctx, table, groups, ignore_index, out_dtype, shard):
        forward = _launch_forward if runs_kernels(table) else _torch_forward
        if shard is None:
            out, counts = forward(table, groups, ignore_index, out_dtype)
        else:
            wide = torch.promote_types(table.dtype, torch.float32)
            groups, counts = _local_groups(groups, ignore_index, shard)
            counts = counts.to(wide)
            ignore_index = ELSEWHERE
            sums = sum_over_ranks(forward(table, groups, ignore_index, wide, divide=False)[0], shard)
            out = (sums / counts.clamp(min=1).unsqueeze(1)).to(out_dtype)
        ctx.save_for_backward(groups, counts)
        ctx.ignore_index = ignore_index
        ctx.vocab_size = table.shape[0]
        ctx.table_dtype = table.dtype
        return out

    @staticmethod
    @first_order_only("group_mean")
    def backward(ctx, grad):
        groups, counts = ctx.saved_tensors
        # float64 takes the PyTorch path, whichever of the two has it: see `runs_kernels`.
        on_kernels = runs_kernels(grad) and ctx.table_dtype != torch.float64
        backward = _launch_backward if on_kernels else _torch_backward
        grad_table = backward(grad.contiguous(), groups, counts, ctx.ignore_index, ctx.vocab_size, ctx.table_dtype)
        return grad_table, None, None, None, None


def group_mean(
    table: Tensor,
    groups: Tensor,
    *,
    ignore_index: int | None = None,
    out_dtype: torch.dtype | None = None,
    shard: VocabularyShard | None = None,
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
        shard: which ids the rows of ``table`` are, where a process group shares out the vocabulary: ``table [V_r, D]``
            then, and on every rank the same ``groups``, with ids of the whole vocabulary. Every rank gets all means,
            and the gradient of its own rows. A `DTensor` with the placement ``Shard(0)`` needs none.

    Returns:
        ``[..., D]`` of ``out_dtype``.

    Raises:
        TypeError: a tensor of another dtype, or a `DTensor` that is placed otherwise.
        ValueError: shapes or devices that do not match, or, with `check_ids` on, a bad id on a GPU.
        IndexError: an id out of range, on the CPU. On a GPU the group's mean is NaN and its ids get no gradient.
        RuntimeError: a double backward, or a transform of `torch.func`.

    Numerics:
        Sums in fp32 (fp64 for float64), rounded once. ``K = 1`` is `F.embedding`, bit for bit. The gradient of the
        table accumulates in fp32, rounds once to the table's dtype, and is bitwise reproducible from run to run. Over a
        shard the sums of all ranks are added in fp32 before they are divided and rounded; only a -0.0 becomes 0.0.

    Memory:
        Forward: the result alone; over a shard the sums in fp32, too. Backward: the table's gradient, about 20 bytes
        for every id, and ``D/16`` bytes for every id, for the sums of frequent ids.

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
    flat = groups.reshape(-1, groups.shape[-1]).contiguous()
    if shard is not None:
        check_same_rows(flat, shard)
    rows = table if table.stride(-1) == 1 else table.contiguous()
    wanted_dtype = table.dtype if out_dtype is None else out_dtype
    if runs_kernels(table) or wants_backward(table) or shard is not None:
        out = _GroupMean.apply(rows, flat, ignore_index, wanted_dtype, shard)
    else:
        out, _ = _torch_forward(rows, flat, ignore_index, wanted_dtype)
    return out.view(*groups.shape[:-1], table.shape[1])
