"""Rows that are wider than a program's registers, a block at a time: the statistics of lanes, and the kernel.

The program that owns a row reads it twice, the second time backwards, so that what was read last is still in the L2.
"""

import torch
import triton
import triton.language as tl

from npp_kernels._triton_math import capped, divide, exp, log1p
from npp_kernels.losses.row_layout import align, find_aligned_part, find_edges
from npp_kernels.losses.scores import add_up_losses, find_anchor, score_targets, store_statistics
from npp_kernels.losses.target_math import (
    find_weights,
    gradient_at_targets,
    gradient_away_from_targets,
    gradient_terms,
    has_no_target,
    load_totals,
    store_at_targets,
    sum_equal_weights,
    times_class_weights,
)

MAX_LOOKS = tl.constexpr(256)  # of a program that waits; each takes half a microsecond or more
LANE_SPAN = tl.constexpr(32)  # logits of one lane that are read at a time
FLOOR = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def find_lanes(
    logits_row, vocab_size, softcap, anchor, class_weight_ptr,
    SMOOTHED: tl.constexpr, WITH_STATS: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Read a row and return the statistics of its lanes: lane i has the logits i, i + LANES, and so on.

    Returns:
        The maximum; the sum of exponentials below it; for label smoothing Σ_v w_v (anchor − z_v); and the sum of the
        exponentials times (z − maximum), the largest logit before a softcap, and its id.
    """
    depth = tl.arange(0, BLOCK_VOCAB // LANES)[:, None] * LANES
    lanes = tl.arange(0, LANES)[None, :]
    # The floor is the least finite number: a lane that has seen only -inf must not compute inf - inf.
    maximum = tl.full([LANES], FLOOR, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    shortfall = tl.zeros([LANES], tl.float32)
    weighted_sum = tl.zeros([LANES], tl.float32)
    best = tl.full([LANES], float("-inf"), tl.float32)
    arg = tl.zeros([LANES], tl.int32) + vocab_size
    for first in range(0, vocab_size, BLOCK_VOCAB):
        offsets = first + depth + lanes
        mask = offsets < vocab_size
        raw = tl.load(logits_row + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        logits = tl.where(mask, capped(raw, softcap), float("-inf"))
        if SMOOTHED:
            below = times_class_weights(tl.where(mask, anchor - logits, 0.0), class_weight_ptr, offsets, mask)
            shortfall += tl.sum(below, axis=0)
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=0))
        rescale = exp(maximum - new_maximum, PRECISE)
        exponentials = exp(logits - new_maximum[None, :], PRECISE)
        if WITH_STATS:
            weighted = tl.where(exponentials > 0, exponentials * (logits - new_maximum[None, :]), 0.0)
            shifted = weighted_sum + (maximum - new_maximum) * total
            weighted_sum = rescale * shifted + tl.sum(weighted, axis=0)
            tile_best = tl.max(raw, axis=0)
            tile_arg = tl.min(tl.where(raw == tile_best[None, :], offsets, vocab_size), axis=0)
            arg = tl.where(tile_best > best, tile_arg, arg)
            best = tl.maximum(best, tile_best)
        total = total * rescale + tl.sum(exponentials, axis=0)
        maximum = new_maximum
    return maximum, total, shortfall, (weighted_sum, best, arg)


@triton.jit
def sum_of_rest(
    logits_row, vocab_size, softcap, maximum, lane_maximum, lane_total, PRECISE: tl.constexpr, LANES: tl.constexpr
):
    """Return a row's sum of exponentials without its maximum, the only logit with more than half of the softmax.

    Only its own lane has added the maximum to what may be smaller by far; that lane is read once more.
    """
    rest = tl.sum(tl.where(lane_maximum < maximum, lane_total, 0.0), axis=0)
    lane = tl.min(tl.where(lane_maximum == maximum, tl.arange(0, LANES), LANES - 1), axis=0)
    for first in range(0, vocab_size, LANE_SPAN * LANES):
        offsets = first + tl.arange(0, LANE_SPAN) * LANES + lane
        raw = tl.load(logits_row + offsets, mask=offsets < vocab_size, other=float("-inf")).to(tl.float32)
        logits = tl.where(offsets < vocab_size, capped(raw, softcap), float("-inf"))
        rest += tl.sum(tl.where(logits < maximum, exp(logits - maximum, PRECISE), 0.0), axis=0)
    return rest


@triton.jit
def wait_for_half(started_ptr, first_wave):
    """Wait, in every second of the programs that start together, until half of the others have read their rows once.

    Programs that start together would all have read their rows at the same time, when the L2 cannot hold them; half a
    row apart they need half of that. The wait has an end, for nothing but time depends on it.
    """
    program = tl.program_id(0)
    if (program % 2 == 1) & (program < first_wave):
        looks = 0
        while (tl.atomic_add(started_ptr, 0) * 4 < first_wave - 1) & (looks < MAX_LOOKS):
            looks += 1


@triton.jit
def tell_half(started_ptr, first_wave):
    """Tell those that wait that this program has read its row once."""
    program = tl.program_id(0)
    if (program % 2 == 0) & (program < first_wave):
        tl.debug_barrier()
        tl.atomic_add(started_ptr, 1)


@triton.jit(do_not_specialize=["ignore_index", "rows_stride", "first_wave"])
def _wide_row_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    grad_ptr,  # [num_rows, vocab_size] out or None; may be logits_ptr
    groups_ptr,  # [num_rows, GROUP_SIZE]
    slot_scale_ptr,  # [GROUP_SIZE] or None
    class_weight_ptr,  # [vocab_size + 1] or None
    totals_ptr,  # [2, NUM_PARTIALS] or None
    rows_ptr,  # [3, num_rows] out, or [6, num_rows] with statistics: see `Scores`, as for the next three
    losses_ptr,  # [num_rows, GROUP_SIZE] out or None
    probabilities_ptr,  # [num_rows, GROUP_SIZE] out or None
    predictions_ptr,  # [num_rows] out, or None: without statistics
    ticket_ptr,  # [1] in and out, or None: 0 before, num_rows after
    loss_ptr,  # [] out, if there is a ticket: the sum of the rows' losses
    logits_stride, grad_stride, rows_stride, vocab_size, ignore_index, label_smoothing, z_loss, softcap,
    started_ptr,  # [1] in and out: 0 before; None unless programs are to be half a row apart: see `wait_for_half`
    first_wave,  # how many programs start together; None likewise
    NORMALIZE: tl.constexpr, OVERLAP: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr, NUM_PARTIALS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
    LANES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One program scores one row, a block at a time, and, where asked, reads it once more for the row's gradient."""
    PRECISE: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    groups_row = groups_ptr + row * GROUP_SIZE
    slots = tl.arange(0, BLOCK_SLOTS)
    targets = tl.load(groups_row + slots, mask=slots < GROUP_SIZE, other=0).to(tl.int64)
    weights, class_weights, counted, in_range = find_weights(
        targets, slots, slot_scale_ptr, class_weight_ptr, vocab_size, ignore_index, GROUP_SIZE
    )
    target_logits = capped(tl.load(logits_row + targets, mask=in_range, other=0.0).to(tl.float32), softcap)
    anchor = 0.0
    shortfall = 0.0
    if label_smoothing is not None:
        anchor = find_anchor(target_logits, in_range)
    tile_row, tile_size, tile_weight_ptr = logits_row, vocab_size, class_weight_ptr
    if RAGGED:  # see `row_layout`: blocks have the aligned part, and the edges are a tile of their own
        VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
        head, tile_size = find_aligned_part(row * logits_stride, vocab_size, VECTOR)
        tile_row = logits_ptr + align(row * logits_stride, VECTOR)
        if class_weight_ptr is not None:
            tile_weight_ptr = class_weight_ptr + head
        edge_ids, edge_mask = find_edges(head, tile_size, vocab_size, VECTOR)
        raw_edges = tl.load(logits_row + edge_ids, mask=edge_mask, other=float("-inf")).to(tl.float32)
        edges = tl.where(edge_mask, capped(raw_edges, softcap), float("-inf"))
    if started_ptr is not None:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()  # for the 0
        wait_for_half(started_ptr, first_wave)
    lane_maximum, lane_total, lane_shortfall, others = find_lanes(
        tile_row, tile_size, softcap, anchor, tile_weight_ptr, label_smoothing is not None,
        predictions_ptr is not None, PRECISE, BLOCK_VOCAB, LANES,
    )  # fmt: skip
    if started_ptr is not None:
        tell_half(started_ptr, first_wave)
    maximum = tl.max(lane_maximum, axis=0)
    if RAGGED:
        tile_maximum = maximum
        maximum = tl.maximum(maximum, tl.max(edges, axis=0))
        edge_exponentials = exp(edges - maximum, PRECISE)
    below = lane_maximum - maximum
    lane_share = lane_total * exp(below, PRECISE)
    total = tl.sum(lane_share, axis=0)
    if RAGGED:
        total += tl.sum(edge_exponentials, axis=0)
    total = tl.where(total == 0, float("nan"), total)  # of a row that is -inf throughout
    rest = total - 1.0
    log_total = tl.log(total)
    if total < 2.0:
        if not RAGGED:
            rest = sum_of_rest(tile_row, tile_size, softcap, maximum, lane_maximum, lane_share, PRECISE, LANES)
        else:
            rest = tl.sum(lane_share, axis=0)
            if tile_maximum == maximum:
                rest = sum_of_rest(tile_row, tile_size, softcap, maximum, lane_maximum, lane_share, PRECISE, LANES)
            rest += tl.sum(tl.where(edges < maximum, edge_exponentials, 0.0), axis=0)
        log_total = log1p(rest)
    if label_smoothing is not None:
        shortfall = tl.sum(lane_shortfall, axis=0)
        if RAGGED:
            edges_below = tl.where(edge_mask, anchor - edges, 0.0)
            shortfall += tl.sum(times_class_weights(edges_below, class_weight_ptr, edge_ids, edge_mask), axis=0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # until the launch before has counted the targets; nothing is stored until here
    place = (row, tl.cast(rows_stride, tl.int64), slots)
    statistics = (maximum, rest, log_total, anchor, shortfall)
    distances = maximum - target_logits
    weights, divisor, penalty, slope = score_targets(
        (rows_ptr, losses_ptr, probabilities_ptr), place, statistics,
        (distances, weights, class_weights, counted, in_range), load_totals(totals_ptr, NUM_PARTIALS, BLOCK_PARTIALS),
        (label_smoothing, z_loss, class_weight_ptr, vocab_size), NORMALIZE, GROUP_SIZE,
    )  # fmt: skip
    if predictions_ptr is not None:
        lane_weighted, lane_best, lane_arg = others
        shifted = tl.where(lane_total > 0, exp(below, PRECISE) * (lane_weighted + below * lane_total), 0.0)
        best = tl.max(lane_best, axis=0)
        if RAGGED:
            best = tl.maximum(best, tl.max(raw_edges, axis=0))
            lane_arg = tl.where(lane_arg < tile_size, lane_arg + head, vocab_size)
        arg_max = tl.min(tl.where(lane_best == best, lane_arg, vocab_size), axis=0)
        weighted_sum = tl.sum(shifted, axis=0)
        if RAGGED:
            arg_max = tl.minimum(arg_max, tl.min(tl.where(raw_edges == best, edge_ids, vocab_size), axis=0))
            weighted = tl.where(edge_exponentials > 0, edge_exponentials * (edges - maximum), 0.0)
            weighted_sum += tl.sum(weighted, axis=0)
        store_statistics(
            (rows_ptr, predictions_ptr), place, statistics, weighted_sum, arg_max, (targets, in_range, vocab_size)
        )
    if grad_ptr is not None:
        softmax_weight, surplus, spread, smoothing_rest = gradient_terms(
            weights, class_weights, divisor, slope, label_smoothing, class_weight_ptr, vocab_size
        )
        idle = has_no_target(weights, penalty, z_loss)
        scale = divide(softmax_weight, total)
        grad_row = grad_ptr + row * grad_stride
        tile_grad = grad_row
        if RAGGED:
            tile_grad = grad_ptr + align(row * grad_stride, VECTOR)
        num_blocks = tl.cdiv(tile_size, BLOCK_VOCAB)
        for block in range(num_blocks):
            offsets = (num_blocks - 1 - block) * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
            mask = offsets < tile_size
            # Neither these logits nor their gradients are read again here: they must not drive out of the L2 what
            # other programs are about to read for the second time.
            raw = tl.load(tile_row + offsets, mask=mask, other=float("-inf"), eviction_policy="evict_first")
            logits = tl.where(mask, capped(raw.to(tl.float32), softcap), float("-inf"))
            by_id = spread
            if label_smoothing is not None:
                by_id = times_class_weights(spread, tile_weight_ptr, offsets, mask)
            gradient = gradient_away_from_targets(exp(logits - maximum, PRECISE) * scale, logits, by_id, idle, softcap)
            gradient = gradient.to(grad_ptr.dtype.element_ty)
            tl.store(tile_grad + offsets, gradient, mask=mask, eviction_policy="evict_first")
        if RAGGED:
            by_id = spread
            if label_smoothing is not None:
                by_id = times_class_weights(spread, class_weight_ptr, edge_ids, edge_mask)
            gradient = gradient_away_from_targets(edge_exponentials * scale, edges, by_id, idle, softcap)
            tl.store(grad_row + edge_ids, gradient.to(grad_ptr.dtype.element_ty), mask=edge_mask)
        weights *= class_weights
        equal_weights = sum_equal_weights(groups_row, targets, weights, slots, GROUP_SIZE, BLOCK_SLOTS, BLOCK_OTHERS)
        gradient = gradient_at_targets(
            (distances, in_range, weights, equal_weights, class_weights),
            (divisor, softmax_weight, surplus, spread, smoothing_rest, rest), target_logits, softcap, PRECISE,
        )  # fmt: skip
        store_at_targets(grad_row, targets, gradient, in_range, idle)
    if ticket_ptr is not None:
        add_up_losses(rows_ptr, ticket_ptr, loss_ptr, LANES)
