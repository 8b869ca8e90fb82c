"""The backward kernels of the losses: the logits' gradient from what the forward kept, and a scaling in place.

    dz_pv   = u · ((Σ_j c_pj) · softmax(z_p)_v − Σ_{j: t_pj = v} c_pj)          u the upstream gradient

With ``reduction="none"`` u belongs to each target, and stands in the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import cdiv, launch, next_power_of_2, num_multiprocessors
from npp_kernels._triton_math import capped, divide, exp, log1p
from npp_kernels.losses.row_layout import ALIGNMENT, align, find_aligned_part, find_edges, is_ragged
from npp_kernels.losses.scores import MAXIMUM, Scores
from npp_kernels.losses.target_math import (
    find_divisor,
    find_penalty,
    find_weights,
    gradient_at_targets,
    gradient_away_from_targets,
    gradient_terms,
    load_totals,
    store_at_targets,
    sum_equal_weights,
    times_class_weights,
)
from npp_kernels.losses.targets import Targets

# H100, bf16; docs/tuning.md has what else was tried. Blocks of 8,192 gradients 0.154 ms for 4,096 rows, of 4,096
# gradients 0.165. With 64 programs a multiprocessor 0.358 ms for 16,384 rows, with 8 0.371; but where an upstream of 1
# leaves nothing to do, they are launched for nothing.
GRADIENT_BLOCK = 8192
GRADIENT_PROGRAMS = 64
IDLE_PROGRAMS = 8
# Left to itself NVIDIA's compiler takes 80 registers for 16 and 64 targets, so that three programs run at a time in
# place of four: 27.4 µs in place of 23.7 for 1,024 rows, K = 16. For more targets 64 are too few, for fewer no gain.
LIMITED_SLOTS = range(5, 65)
LIMITED_RAGGED_SLOTS = range(2, 5)  # by estimate: ragged rows would take 73 registers, where others take 64
MAX_REGISTERS = 64


@triton.jit
def _at_targets(
    groups_row, targets, maximum, row, target_logits, slots, softcap, PRECISE: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    """Return dz at the targets, of which are given: the ids, which of them are in the block, and what they weigh."""
    ids, in_block, weights, class_weights = targets
    equal_weights = sum_equal_weights(groups_row, ids, weights, slots, GROUP_SIZE, BLOCK_SLOTS, BLOCK_OTHERS)
    return gradient_at_targets(
        (maximum - target_logits, in_block, weights, equal_weights, class_weights), row, target_logits, softcap, PRECISE
    )


@triton.jit(do_not_specialize=["ignore_index", "num_rows", "rows_stride", "first_id", "num_ids"])
def _gradient_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    grad_ptr,  # [num_rows, vocab_size] out; may be logits_ptr
    groups_ptr,  # [num_rows, GROUP_SIZE]
    slot_scale_ptr,  # [GROUP_SIZE] or None
    class_weight_ptr,  # [vocab_size + 1] or None
    totals_ptr,  # [2, NUM_PARTIALS] or None
    rows_ptr,  # [2, num_rows]: the maximum, and the sum of exponentials without it
    upstream_ptr,  # [] or None
    target_upstream_ptr,  # [num_rows, GROUP_SIZE] or None
    num_rows, logits_stride, grad_stride, rows_stride, vocab_size, ignore_index, label_smoothing, z_loss, softcap,
    first_id, num_ids,  # of a slice of the vocabulary, and of the whole; None where the whole is here
    NORMALIZE: tl.constexpr, SKIP_UNIT: tl.constexpr, OVERLAP: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_OTHERS: tl.constexpr, NUM_PARTIALS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr, EVEN: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One program writes every num_programs-th block of BLOCK_VOCAB gradients.

    With SKIP_UNIT the gradient for an upstream of 1 is there already, and there is nothing to do if it is 1. Where the
    logits are a slice of the vocabulary, their number is ``vocab_size``; targets and class weights have ids of the
    whole.
    """
    PRECISE: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    # Where registers are left for it, logits are asked for before all else, and what happens at the targets is found
    # out while they are on their way; otherwise when the rest of the gradient has been stored.
    EARLY: tl.constexpr = BLOCK_SLOTS <= 16
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    blocks = tl.cdiv(vocab_size, BLOCK_VOCAB)
    num_tasks = tl.cast(num_rows, tl.int64) * blocks
    upstream = 1.0
    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr).to(tl.float32)
        if SKIP_UNIT:
            num_tasks = tl.where(upstream == 1.0, 0, num_tasks)
    for task in range(tl.program_id(0).to(tl.int64), num_tasks, tl.num_programs(0)):
        row = task // blocks
        first = (task % blocks).to(tl.int32) * BLOCK_VOCAB
        logits_row = logits_ptr + row * logits_stride
        grad_row = grad_ptr + row * grad_stride
        groups_row = groups_ptr + row * GROUP_SIZE
        slots = tl.arange(0, BLOCK_SLOTS)
        offsets = first + tl.arange(0, BLOCK_VOCAB)
        tile_row, tile_grad, tile_size = logits_row, grad_row, vocab_size
        if RAGGED:  # see `row_layout`: blocks have the aligned part; the edges belong to the first
            VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
            head, tile_size = find_aligned_part(row * logits_stride, vocab_size, VECTOR)
            tile_row = logits_ptr + align(row * logits_stride, VECTOR)
            tile_grad = grad_ptr + align(row * grad_stride, VECTOR)
            edge_ids, edge_mask = find_edges(head, tile_size, vocab_size, VECTOR)
            edge_mask = edge_mask & (edge_ids < tl.where(first == 0, vocab_size, 0))
            raw_edges = tl.load(logits_row + edge_ids, mask=edge_mask, other=float("-inf"))
        mask = offsets < tile_size
        if EVEN:  # the compiler drops a mask that it knows to be true
            mask = tl.full(offsets.shape, True, tl.int1)
        if EARLY:
            raw = tl.load(tile_row + offsets, mask=mask, other=float("-inf"))
        targets = tl.load(groups_row + slots, mask=slots < GROUP_SIZE, other=0).to(tl.int64)
        whole_size = vocab_size
        if num_ids is not None:
            whole_size = num_ids
        weights, class_weights, counted, in_range = find_weights(
            targets, slots, slot_scale_ptr, class_weight_ptr, whole_size, ignore_index, GROUP_SIZE
        )
        totals = load_totals(totals_ptr, NUM_PARTIALS, BLOCK_PARTIALS)
        divisor = find_divisor(tl.sum(weights * class_weights, axis=0), totals, NORMALIZE)
        if target_upstream_ptr is not None:
            per_target = tl.load(target_upstream_ptr + row * GROUP_SIZE + slots, mask=counted, other=0.0)
            weights = tl.where(counted, weights * per_target.to(tl.float32), 0.0)
        weights = tl.where(counted, weights * upstream, 0.0)
        # Unequal upstream gradients can cancel in the sum; a row is idle only where every weight is 0.
        idle = tl.sum(tl.where(weights != 0, 1, 0), axis=0) == 0
        maximum = tl.load(rows_ptr + row)
        rest = tl.load(rows_ptr + (row + rows_stride))
        slope = 0.0
        if z_loss is not None:
            penalty = find_penalty(counted, totals, z_loss) * upstream
            idle = idle & (penalty == 0)
            log_total = tl.where(rest < 1.0, log1p(rest), tl.log(1.0 + rest))
            slope = tl.where(penalty == 0, 0.0, 2.0 * penalty * (maximum + log_total))
        softmax_weight, surplus, spread, smoothing_rest = gradient_terms(
            weights, class_weights, divisor, slope, label_smoothing, class_weight_ptr, whole_size
        )
        weights *= class_weights

        # Targets of this block only; the others belong to programs of their own, or to other ranks.
        columns = targets
        if first_id is not None:
            columns -= first_id
            in_range = in_range & (columns >= 0) & (columns < vocab_size)
        places = columns
        if RAGGED:
            places = tl.where((columns >= head) & (columns < head + tile_size), columns - head, 0)
        in_block = in_range & (places >= first) & (places < first + BLOCK_VOCAB)
        target_logits = capped(tl.load(logits_row + columns, mask=in_block, other=0.0).to(tl.float32), softcap)
        at_targets = tl.zeros([BLOCK_SLOTS], tl.float32)
        row_terms = (divisor, softmax_weight, surplus, spread, smoothing_rest, rest)
        if EARLY:
            at_targets = _at_targets(
                groups_row, (targets, in_block, weights, class_weights), maximum, row_terms, target_logits,
                slots, softcap, PRECISE, GROUP_SIZE, BLOCK_SLOTS, BLOCK_OTHERS,
            )  # fmt: skip
        if not EARLY:
            raw = tl.load(tile_row + offsets, mask=mask, other=float("-inf"))
        tl.debug_barrier()  # in place, a target's logit is read before its neighbours' gradients are written
        logits = capped(raw.to(tl.float32), softcap)
        by_id = spread
        if label_smoothing is not None:
            ids = offsets
            if RAGGED:
                ids += head
            if first_id is not None:
                ids += first_id
            by_id = times_class_weights(spread, class_weight_ptr, ids, mask)
        weighted_softmax = exp(logits - maximum, PRECISE) * divide(softmax_weight, 1.0 + rest)
        gradient = gradient_away_from_targets(weighted_softmax, logits, by_id, idle, softcap)
        tl.store(tile_grad + offsets, gradient.to(grad_ptr.dtype.element_ty), mask=mask)
        if RAGGED:
            edges = capped(raw_edges.to(tl.float32), softcap)
            by_id = spread
            if label_smoothing is not None:
                ids = edge_ids
                if first_id is not None:
                    ids += first_id
                by_id = times_class_weights(spread, class_weight_ptr, ids, edge_mask)
            weighted_softmax = exp(edges - maximum, PRECISE) * divide(softmax_weight, 1.0 + rest)
            gradient = gradient_away_from_targets(weighted_softmax, edges, by_id, idle, softcap)
            tl.store(grad_row + edge_ids, gradient.to(grad_ptr.dtype.element_ty), mask=edge_mask)
        if not EARLY:
            at_targets = _at_targets(
                groups_row, (targets, in_block, weights, class_weights), maximum, row_terms, target_logits,
                slots, softcap, PRECISE, GROUP_SIZE, BLOCK_SLOTS, BLOCK_OTHERS,
            )  # fmt: skip
        store_at_targets(grad_row, columns, at_targets, in_block, idle)


@triton.jit(do_not_specialize=["num_rows"])
def _scale_kernel(
    grad_ptr,  # [num_rows, row_size] in and out
    upstream_ptr,  # []
    num_rows,
    grad_stride,
    row_size,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program multiplies every num_programs-th block by the upstream gradient; nothing to do if that is 1."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    upstream = tl.load(upstream_ptr).to(tl.float32)
    blocks = tl.cdiv(row_size, BLOCK)
    num_tasks = tl.where(upstream == 1.0, 0, tl.cast(num_rows, tl.int64) * blocks)
    for task in range(tl.program_id(0).to(tl.int64), num_tasks, tl.num_programs(0)):
        offsets = (task % blocks) * BLOCK + tl.arange(0, BLOCK)
        pointers = grad_ptr + (task // blocks) * grad_stride + offsets
        mask = offsets < row_size
        scaled = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * upstream
        tl.store(pointers, scaled.to(grad_ptr.dtype.element_ty), mask=mask)


def _gradient_blocks(rows: Tensor, programs: int) -> tuple[tuple[int], int]:
    """Return the grid of at most so many programs a multiprocessor for ``rows [N, M]``, and the size of a block."""
    num_rows, row_size = rows.shape
    block = min(max(next_power_of_2(row_size), 32), GRADIENT_BLOCK)
    return (min(num_rows * cdiv(row_size, block), programs * num_multiprocessors(rows)),), block


def launch_gradient(
    logits: Tensor, grad: Tensor, targets: Targets, scores: Scores, upstream: Tensor, *, skip_unit: bool = False
) -> None:
    """Write the gradient of ``logits`` from the kept ``scores``, for an upstream ``[]`` or ``[N, K]``.

    With ``skip_unit``, ``grad`` holds the gradient for an upstream of 1 already. ``grad`` may be ``logits``.
    """
    num_rows, vocab_size = logits.shape
    grid, block_vocab = _gradient_blocks(logits, IDLE_PROGRAMS if skip_unit else GRADIENT_PROGRAMS)
    rows = scores.rows[MAXIMUM:]
    scalar, per_target = scores.split_upstream(upstream)
    settings, shard = targets.settings, targets.shard
    ragged = is_ragged(logits, grad)
    even = vocab_size % block_vocab == 0 and not ragged
    limited_slots = LIMITED_RAGGED_SLOTS if ragged else LIMITED_SLOTS if even else ()
    limited = logits.element_size() == 2 and targets.groups.shape[1] in limited_slots and targets.is_plain
    launch(
        _gradient_kernel,
        grid,
        logits,
        grad,
        targets.groups,
        targets.slot_scale,
        targets.class_weight,
        targets.totals,
        rows,
        scalar,
        per_target,
        num_rows,
        logits.stride(0),
        grad.stride(0),
        rows.stride(0),
        vocab_size,
        settings.ignore_index,
        settings.label_smoothing,
        settings.z_loss,
        settings.softcap,
        None if shard is None else shard.start,
        None if shard is None else shard.vocab_size,
        SKIP_UNIT=skip_unit,
        early=True,
        max_registers=MAX_REGISTERS if limited else None,
        BLOCK_VOCAB=block_vocab,
        EVEN=even,
        RAGGED=ragged,
        num_warps=min(max(block_vocab // 512, 1), 8),
        **targets.constants(),
    )


def launch_scale(grad: Tensor, upstream: Tensor) -> None:
    """Multiply ``grad [N, M]`` by a scalar ``upstream`` in place, unless that is 1."""
    if grad.shape[1] % ALIGNMENT and grad.is_contiguous() and grad.numel() % ALIGNMENT == 0:
        grad = grad.view(1, -1)  # where rows start does not matter here
    num_rows, row_size = grad.shape
    grid, block = _gradient_blocks(grad, IDLE_PROGRAMS)
    launch(
        _scale_kernel,
        grid,
        grad,
        upstream,
        num_rows,
        grad.stride(0),
        row_size,
        BLOCK=block,
        early=True,
    )
