"""The kernels of the losses: one row of logits against the K targets of a group, and their launchers.

    loss    = Σ_pj c_pj · (lse_p − z_p[t_pj])                            lse_p = logsumexp_v z_pv
    dz_pv   = (Σ_j c_pj) · softmax(z_p)_v − Σ_{j: t_pj = v} c_pj

A kernel forms ``c_pj = scale_p · slot_scale_j · [t_pj counts]`` from a few numbers; see `LossSettings.normalize`.

A row of up to `MAX_BLOCK_BYTES` stays in registers between its statistics and its gradient. A wider one is
read twice by the program that owns it, the second time backwards, so that what was read last is still in the L2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import can_overlap, cdiv, launch, next_power_of_2, num_multiprocessors
from npp_kernels._triton_math import cap_derivative, capped, divide, exp

# H100, 2026-11-24, bf16; docs/tuning.md has what else was tried.
# V = 16,384 in 16 warps runs at the copy rate (0.357 ms for 16,384 rows; 32 warps 0.525); V = 32,768 in 16 warps
# (0.397 ms for 8,192 rows) beats reading it twice (0.444). V = 65,536 would spill.
MAX_BLOCK_BYTES = 65536
WARP_BYTES = 2048
# Label smoothing, a softcap and the statistics each keep a few values more for every logit.
MAX_OPTIONS_BYTES = 16384
# Blocks of 8,192 gradients, 8 programs a multiprocessor: 0.154 ms for 4,096 rows; 4,096 gradients 0.165.
GRADIENT_BLOCK = 8192
GRADIENT_PROGRAMS = 8
# Up to so many rows the last program adds up the loss: 0.024 ms against 0.028 for 256 rows of 16,384, forward and
# backward. More rows queue up for the one counter: 0.416 against 0.390 for 16,384.
MAX_TICKETS = 1024
COUNT_BLOCK = 2048
MAX_PARTIALS = 32  # no more than a warp has threads: they are summed without a barrier
DUPLICATE_SLOTS = 16


class LossSettings(NamedTuple):
    """The options of a loss that its kernels take as plain numbers; None where an option is off."""

    ignore_index: int
    normalize: str
    """What the kernels divide a target's weight by: ``"target"`` (the first total), ``"row"`` (the row's weight and
    the second total) or ``"none"``."""
    label_smoothing: float | None
    z_loss: float | None
    softcap: float | None


@triton.jit(do_not_specialize=["ignore_index"])
def _count_targets_kernel(
    groups_ptr,  # [num_rows, GROUP_SIZE]
    slot_weights_ptr,  # [GROUP_SIZE] or None
    totals_ptr,  # [2, num_programs] out: the weight of the targets that count, and the rows that have one
    ticket_ptr,  # [1] out: 0, for `_loss_kernel` to count its programs in
    num_rows,
    ignore_index,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program counts every num_programs-th block of BLOCK_ROWS rows.

    With OVERLAP it lets `_loss_kernel` start at once. It must not be launched early itself: when it runs, all before it
    must have ended, the logits among it, which `_loss_kernel` reads without waiting.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    slots = tl.arange(0, BLOCK_SLOTS)
    slot_mask = slots < GROUP_SIZE
    weights = tl.full([BLOCK_SLOTS], 1.0, tl.float32)
    if slot_weights_ptr is not None:
        weights = tl.load(slot_weights_ptr + slots, mask=slot_mask, other=0.0)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    rows_with_target = tl.zeros([BLOCK_ROWS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (rows < num_rows)[:, None] & slot_mask[None, :]
        targets = tl.load(groups_ptr + rows[:, None] * GROUP_SIZE + slots[None, :], mask=mask, other=0)
        counted = tl.where(mask & (targets != ignore_index), 1.0, 0.0)
        total += tl.sum(counted * weights[None, :], axis=1)
        rows_with_target += tl.max(counted, axis=1)
    tl.store(totals_ptr + tl.program_id(0), tl.sum(total, axis=0))
    tl.store(totals_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(rows_with_target, axis=0))
    if tl.program_id(0) == 0:
        tl.store(ticket_ptr, 0)


@triton.jit
def _load_total(totals_ptr, which, NUM_PARTIALS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr):
    """Return a total of the counts, and 1 for 0, so that what has no target divides by something."""
    partials = tl.arange(0, BLOCK_PARTIALS)
    counts = tl.load(totals_ptr + which * NUM_PARTIALS + partials, mask=partials < NUM_PARTIALS, other=0.0)
    total = tl.sum(counts, axis=0)
    return tl.where(total == 0, 1.0, total)


@triton.jit
def _find_weights(targets, slots, slot_scale_ptr, vocab_size, ignore_index, GROUP_SIZE: tl.constexpr):
    """Return the weights of a row's targets, 0 where ignored and NaN where out of range; who counts; who is valid.

    The kernels load the targets themselves: torch.compile takes a pointer that goes into a function from which an
    address comes out for one that is written to.
    """
    slot_mask = slots < GROUP_SIZE
    counted = slot_mask & (targets != ignore_index)
    in_range = counted & (targets >= 0) & (targets < vocab_size)
    weights = tl.where(counted, 1.0, 0.0)
    if slot_scale_ptr is not None:
        scale = tl.load(slot_scale_ptr + slots, mask=slot_mask, other=0.0)
        weights = tl.where(counted, scale, 0.0)
    return tl.where(counted & (in_range == 0), float("nan"), weights), counted, in_range


@triton.jit
def _find_divisor(
    row_weight, totals_ptr, NORMALIZE: tl.constexpr, NUM_PARTIALS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr
):
    """Return what a row's weights are divided by to become its coefficients."""
    divisor = tl.full([], 1.0, tl.float32)
    if NORMALIZE == "target":
        divisor = _load_total(totals_ptr, 0, NUM_PARTIALS, BLOCK_PARTIALS)
    elif NORMALIZE == "row":
        rows_with_target = _load_total(totals_ptr, 1, NUM_PARTIALS, BLOCK_PARTIALS)
        divisor = tl.where(row_weight == 0, 1.0, row_weight) * rows_with_target
    return divisor


@triton.jit
def _sum_equal_weights(
    groups_row, targets, weights, slots,
    GROUP_SIZE: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    """Return for every target the weight of all targets of the row that equal it, itself included."""
    total = tl.zeros([BLOCK_SLOTS], tl.float32)
    for first in tl.static_range(0, BLOCK_SLOTS, BLOCK_OTHERS):
        others = first + tl.arange(0, BLOCK_OTHERS)
        other_targets = tl.load(groups_row + others, mask=others < GROUP_SIZE, other=-1).to(tl.int64)
        # Weights live in registers by slot; picking them by a one-hot sum keeps them there.
        picked = tl.sum(tl.where(slots[:, None] == others[None, :], weights[:, None], 0.0), axis=0)
        equal = (targets[:, None] == other_targets[None, :]) & (others < GROUP_SIZE)[None, :]
        total += tl.sum(tl.where(equal, picked[None, :], 0.0), axis=1)
    return total


@triton.jit
def _penalty_scale(totals_ptr, counted, z_loss, NUM_PARTIALS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr):
    """Return what multiplies the squared lse of a row; 0 for a row without a target."""
    scale = tl.where(tl.max(counted.to(tl.int32), axis=0) > 0, 1.0, 0.0)
    if z_loss is None:
        scale = scale * 0.0
    else:
        scale = scale * tl.cast(z_loss, tl.float32)
        if totals_ptr is not None:
            scale = scale / _load_total(totals_ptr, 1, NUM_PARTIALS, BLOCK_PARTIALS)
    return scale


@triton.jit
def _gradient_away_from_targets(weighted_softmax, logits, spread, idle, softcap):
    """Return dz where no target is; a row without any target is 0, never NaN."""
    gradient = weighted_softmax - spread
    if softcap is not None:
        gradient = gradient * cap_derivative(logits, softcap)
    return tl.where(idle, 0.0, gradient)


@triton.jit
def _smoothing_terms(label_smoothing, row_coefficient, vocab_size):
    """Return what is left for the targets, 1 − ε, and what every logit of the row gets of the rest, ε Σ_j c_j / V."""
    rest = 1.0
    spread = 0.0
    if label_smoothing is not None:
        smoothing = tl.cast(label_smoothing, tl.float32)  # torch.compile passes Python numbers as fp64
        rest = 1.0 - smoothing
        spread = smoothing * row_coefficient / vocab_size
    return rest, spread


@triton.jit
def _store_target_gradients(
    grad_row, targets, in_range, target_logits, lse, softmax_weight, coefficients, spread, smoothing_rest, softcap,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """Overwrite a row's gradient at its targets, after the rest of it is written.

    Equal targets all store the same value: the coefficients are those of all their equals, so the order of the stores
    does not matter.
    """
    gradient = softmax_weight * exp(target_logits - lse, PRECISE) - spread - smoothing_rest * coefficients
    if softcap is not None:
        gradient = gradient * cap_derivative(target_logits, softcap)
    tl.store(grad_row + targets, gradient.to(grad_row.dtype.element_ty), mask=in_range)


@triton.jit
def _add_up_losses(rows_ptr, ticket_ptr, loss_ptr, BLOCK: tl.constexpr):
    """Store the sum of the rows' losses, in the last program to get here: always in the same order, in no launch."""
    tl.debug_barrier()  # this row's loss is stored before its ticket is drawn
    num_rows = tl.num_programs(0)
    if tl.atomic_add(ticket_ptr, 1) == num_rows - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, num_rows, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            # Other programs wrote these; the L1 might hold what was there before.
            total += tl.load(rows_ptr + rows, mask=rows < num_rows, other=0.0, cache_modifier=".cg")
        tl.store(loss_ptr, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["ignore_index", "rows_stride"])
def _loss_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    grad_ptr,  # [num_rows, vocab_size] out or None; may be logits_ptr
    groups_ptr,  # [num_rows, GROUP_SIZE]
    slot_scale_ptr,  # [GROUP_SIZE] or None
    totals_ptr,  # [2, NUM_PARTIALS] or None
    losses_ptr,  # [num_rows, GROUP_SIZE] out or None: the loss of every target, without coefficients
    rows_ptr,  # [4, num_rows] out: loss, lse, accuracy, entropy (the last two with WITH_STATS)
    ticket_ptr,  # [1] in and out, or None: 0 before, num_rows after
    loss_ptr,  # [] out, if there is a ticket: the sum of the rows' losses
    logits_stride,
    grad_stride,
    rows_stride,
    vocab_size,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    NORMALIZE: tl.constexpr,
    WITH_STATS: tl.constexpr,
    OVERLAP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program scores one row against its targets and, where asked, writes the row's gradient.

    What does not wait for other loads is loaded first, and what the counts decide comes last: with OVERLAP they may
    still be counted while the row is read.
    """
    PRECISE: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    groups_row = groups_ptr + row * GROUP_SIZE
    slots = tl.arange(0, BLOCK_SLOTS)
    # One tile [BLOCK_VOCAB / LANES, LANES] at a time: a lane's running statistics stay in one thread.
    depth = tl.arange(0, BLOCK_VOCAB // LANES)[:, None] * LANES
    lanes = tl.arange(0, LANES)[None, :]
    if ONE_BLOCK:
        offsets = depth + lanes
        mask = offsets < vocab_size
        raw = tl.load(logits_row + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    targets = tl.load(groups_row + slots, mask=slots < GROUP_SIZE, other=0).to(tl.int64)
    weights, counted, in_range = _find_weights(targets, slots, slot_scale_ptr, vocab_size, ignore_index, GROUP_SIZE)
    target_logits = capped(tl.load(logits_row + targets, mask=in_range, other=0.0).to(tl.float32), softcap)
    # Found while the row is on its way, where there are registers to spare for the rest of the time.
    EARLY: tl.constexpr = ONE_BLOCK and not PRECISE
    if ONE_BLOCK:
        if EARLY and grad_ptr is not None:
            equal_weights = _sum_equal_weights(
                groups_row, targets, weights, slots, GROUP_SIZE, BLOCK_SLOTS, BLOCK_OTHERS
            )
        logits = tl.where(mask, capped(raw, softcap), float("-inf"))
        maximum = tl.max(tl.max(logits, axis=0), axis=0)
        exponentials = exp(logits - maximum, PRECISE)
        total = tl.sum(tl.sum(exponentials, axis=0), axis=0)
        if label_smoothing is not None:
            logit_sum = tl.sum(tl.sum(tl.where(mask, logits, 0.0), axis=0), axis=0)
        if WITH_STATS:
            weighted = tl.where(exponentials > 0, exponentials * (logits - maximum), 0.0)
            weighted_sum = tl.sum(tl.sum(weighted, axis=0), axis=0)
            best = tl.max(tl.max(raw, axis=0), axis=0)
            arg_max = tl.min(tl.min(tl.where(raw == best, offsets, vocab_size), axis=0), axis=0)
    else:
        # The floor is finite: a lane that has seen only -inf must not compute inf - inf.
        lane_max = tl.full([LANES], -3.0e38, tl.float32)
        lane_total = tl.zeros([LANES], tl.float32)
        lane_sum = tl.zeros([LANES], tl.float32)
        lane_weighted = tl.zeros([LANES], tl.float32)
        lane_best = tl.full([LANES], float("-inf"), tl.float32)
        lane_arg = tl.zeros([LANES], tl.int32) + vocab_size
        for first in range(0, vocab_size, BLOCK_VOCAB):
            offsets = first + depth + lanes
            mask = offsets < vocab_size
            raw = tl.load(logits_row + offsets, mask=mask, other=float("-inf")).to(tl.float32)
            logits = tl.where(mask, capped(raw, softcap), float("-inf"))
            new_max = tl.maximum(lane_max, tl.max(logits, axis=0))
            rescale = exp(lane_max - new_max, PRECISE)
            exponentials = exp(logits - new_max[None, :], PRECISE)
            if WITH_STATS:
                weighted = tl.where(exponentials > 0, exponentials * (logits - new_max[None, :]), 0.0)
                shifted = lane_weighted + (lane_max - new_max) * lane_total
                lane_weighted = rescale * shifted + tl.sum(weighted, axis=0)
                tile_best = tl.max(raw, axis=0)
                tile_arg = tl.min(tl.where(raw == tile_best[None, :], offsets, vocab_size), axis=0)
                lane_arg = tl.where(tile_best > lane_best, tile_arg, lane_arg)
                lane_best = tl.maximum(lane_best, tile_best)
            lane_total = lane_total * rescale + tl.sum(exponentials, axis=0)
            lane_max = new_max
            if label_smoothing is not None:
                lane_sum += tl.sum(tl.where(mask, logits, 0.0), axis=0)
        maximum = tl.max(lane_max, axis=0)
        total = tl.sum(lane_total * exp(lane_max - maximum, PRECISE), axis=0)
        logit_sum = tl.sum(lane_sum, axis=0)
        if WITH_STATS:
            shifted = lane_weighted + (lane_max - maximum) * lane_total
            weighted_sum = tl.sum(tl.where(lane_total > 0, exp(lane_max - maximum, PRECISE) * shifted, 0.0), axis=0)
            best = tl.max(lane_best, axis=0)
            arg_max = tl.min(tl.where(lane_best == best, lane_arg, vocab_size), axis=0)

    lse = maximum + tl.log(total)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # for `_count_targets_kernel`, which comes before; nothing is stored until here
    row_weight = tl.sum(weights, axis=0)
    divisor = _find_divisor(row_weight, totals_ptr, NORMALIZE, NUM_PARTIALS, BLOCK_PARTIALS)
    row_coefficient = tl.div_rn(row_weight, divisor)
    penalty = _penalty_scale(totals_ptr, counted, z_loss, NUM_PARTIALS, BLOCK_PARTIALS)
    smoothing_rest, spread = _smoothing_terms(label_smoothing, row_coefficient, vocab_size)
    target_losses = lse - target_logits
    if label_smoothing is not None:
        smoothing = tl.cast(label_smoothing, tl.float32)
        target_losses = smoothing_rest * target_losses + smoothing * (lse - logit_sum / vocab_size)
    target_losses = tl.where(counted, target_losses, 0.0)
    loss = tl.div_rn(tl.sum(tl.where(counted, weights * target_losses, 0.0), axis=0), divisor)
    if z_loss is not None:
        loss += tl.where(penalty == 0, 0.0, penalty * lse * lse)
    tl.store(rows_ptr + row, loss)
    tl.store(rows_ptr + rows_stride + row, lse)
    if losses_ptr is not None:
        target_losses = tl.where(counted & (in_range == 0), float("nan"), target_losses)
        tl.store(losses_ptr + row * GROUP_SIZE + slots, target_losses, mask=slots < GROUP_SIZE)
    if WITH_STATS:
        hit = tl.max((in_range & (targets == arg_max)).to(tl.float32), axis=0)
        tl.store(rows_ptr + 2 * rows_stride + row, hit)
        tl.store(rows_ptr + 3 * rows_stride + row, tl.log(total) - weighted_sum / total)

    if grad_ptr is not None:
        grad_row = grad_ptr + row * grad_stride
        # dz = (Σ_j c_j + 2 λ lse) · softmax − ε Σ_j c_j / V, and less at the targets. A row without any is 0, not NaN.
        softmax_weight = row_coefficient + 2.0 * penalty * lse
        idle = (row_coefficient == 0) & (penalty == 0)
        if ONE_BLOCK:
            weighted_softmax = exponentials * divide(softmax_weight, total)
            gradient = _gradient_away_from_targets(weighted_softmax, logits, spread, idle, softcap)
            tl.store(grad_row + offsets, gradient.to(grad_ptr.dtype.element_ty), mask=mask)
        else:
            num_blocks = tl.cdiv(vocab_size, BLOCK_VOCAB)
            for block in range(num_blocks):
                offsets = (num_blocks - 1 - block) * BLOCK_VOCAB + depth + lanes
                mask = offsets < vocab_size
                # Neither these logits nor their gradients are read again here: they must not drive out of the L2 what
                # other programs are about to read for the second time.
                raw = tl.load(
                    logits_row + offsets, mask=mask, other=float("-inf"), eviction_policy="evict_first"
                ).to(tl.float32)  # fmt: skip
                logits = tl.where(mask, capped(raw, softcap), float("-inf"))
                weighted_softmax = softmax_weight * exp(logits - lse, PRECISE)
                gradient = _gradient_away_from_targets(weighted_softmax, logits, spread, idle, softcap)
                tl.store(
                    grad_row + offsets, gradient.to(grad_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first"
                )
        if not EARLY:
            equal_weights = _sum_equal_weights(
                groups_row, targets, weights, slots, GROUP_SIZE, BLOCK_SLOTS, BLOCK_OTHERS
            )
        tl.debug_barrier()  # the stores above come before those at the targets, from other threads
        if idle == 0:
            _store_target_gradients(
                grad_row, targets, in_range, target_logits, lse, softmax_weight, tl.div_rn(equal_weights, divisor),
                spread, smoothing_rest, softcap, PRECISE,
            )  # fmt: skip
    if ticket_ptr is not None:
        _add_up_losses(rows_ptr, ticket_ptr, loss_ptr, LANES)


@triton.jit(do_not_specialize=["ignore_index", "num_rows", "rows_stride"])
def _gradient_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    grad_ptr,  # [num_rows, vocab_size] out; may be logits_ptr
    groups_ptr,  # [num_rows, GROUP_SIZE]
    slot_scale_ptr,  # [GROUP_SIZE] or None
    totals_ptr,  # [2, NUM_PARTIALS] or None
    rows_ptr,  # [4, num_rows]: lse in row 1
    upstream_ptr,  # [] or, with PER_TARGET, [num_rows, GROUP_SIZE]
    num_rows,
    logits_stride,
    grad_stride,
    rows_stride,
    vocab_size,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    NORMALIZE: tl.constexpr,
    PER_TARGET: tl.constexpr,
    SKIP_UNIT: tl.constexpr,
    OVERLAP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
):
    """One program writes every num_programs-th block of BLOCK_VOCAB gradients, from the lse of the forward.

    With SKIP_UNIT the gradient for an upstream of 1 is there already, and there is nothing to do if it is 1.
    """
    PRECISE: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    EARLY: tl.constexpr = BLOCK_SLOTS <= 16  # logits are asked for before all else, where registers are left for it
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    blocks = tl.cdiv(vocab_size, BLOCK_VOCAB)
    num_tasks = tl.cast(num_rows, tl.int64) * blocks
    upstream = 1.0
    if not PER_TARGET:
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
        if EARLY:
            offsets = first + tl.arange(0, BLOCK_VOCAB)
            mask = offsets < vocab_size
            raw = tl.load(logits_row + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        targets = tl.load(groups_row + slots, mask=slots < GROUP_SIZE, other=0).to(tl.int64)
        weights, counted, in_range = _find_weights(targets, slots, slot_scale_ptr, vocab_size, ignore_index, GROUP_SIZE)
        divisor = _find_divisor(tl.sum(weights, axis=0), totals_ptr, NORMALIZE, NUM_PARTIALS, BLOCK_PARTIALS)
        if PER_TARGET:
            per_target = tl.load(upstream_ptr + row * GROUP_SIZE + slots, mask=counted, other=0.0).to(tl.float32)
            weights = tl.where(counted, weights * per_target, 0.0)
        lse = tl.load(rows_ptr + rows_stride + row)
        penalty = _penalty_scale(totals_ptr, counted, z_loss, NUM_PARTIALS, BLOCK_PARTIALS) * upstream
        row_coefficient = tl.div_rn(tl.sum(weights, axis=0), divisor) * upstream
        softmax_weight = row_coefficient + 2.0 * penalty * lse
        smoothing_rest, spread = _smoothing_terms(label_smoothing, row_coefficient, vocab_size)
        equal_weights = _sum_equal_weights(groups_row, targets, weights, slots, GROUP_SIZE, BLOCK_SLOTS, BLOCK_OTHERS)

        # Targets of this block only; the others belong to programs of their own.
        in_block = in_range & (targets >= first) & (targets < first + BLOCK_VOCAB)
        target_logits = capped(tl.load(logits_row + targets, mask=in_block, other=0.0).to(tl.float32), softcap)
        if not EARLY:
            offsets = first + tl.arange(0, BLOCK_VOCAB)
            mask = offsets < vocab_size
            raw = tl.load(logits_row + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        tl.debug_barrier()  # in place, a target's logit is read before its neighbours' gradients are written
        logits = capped(raw, softcap)
        # Unequal upstream gradients can cancel in the sum; a row is idle only where every weight is 0.
        idle = ((tl.sum(tl.where(weights != 0, 1, 0), axis=0) == 0) | (upstream == 0)) & (penalty == 0)
        weighted_softmax = softmax_weight * exp(logits - lse, PRECISE)
        gradient = _gradient_away_from_targets(weighted_softmax, logits, spread, idle, softcap)
        tl.store(grad_row + offsets, gradient.to(grad_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the stores above come before those at the targets, from other threads
        if idle == 0:
            _store_target_gradients(
                grad_row, targets, in_block, target_logits, lse, softmax_weight,
                tl.div_rn(equal_weights, divisor) * upstream, spread, smoothing_rest, softcap, PRECISE,
            )  # fmt: skip


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


def _slot_options(group_size: int, totals: Tensor | None) -> dict[str, int]:
    """Return the constants that describe a group and the partial totals."""
    block_slots = next_power_of_2(group_size)
    num_partials = 1 if totals is None else totals.shape[1]
    return {
        "GROUP_SIZE": group_size,
        "BLOCK_SLOTS": block_slots,
        "BLOCK_OTHERS": min(block_slots, DUPLICATE_SLOTS),
        "NUM_PARTIALS": num_partials,
        "BLOCK_PARTIALS": next_power_of_2(num_partials),
    }


def _row_options(vocab_size: int, itemsize: int, many_values: bool) -> dict[str, Any]:
    """Return the tiling of a row of logits; ``many_values`` where an option keeps more than the logits in registers."""
    limit = (MAX_OPTIONS_BYTES if many_values else MAX_BLOCK_BYTES) // itemsize
    one_block = vocab_size <= limit
    block_vocab = max(next_power_of_2(vocab_size), 32) if one_block else limit
    max_warps = 8 if many_values else 16 if one_block else 32
    num_warps = min(max(block_vocab * itemsize // WARP_BYTES, 1), max_warps)
    return {
        "ONE_BLOCK": one_block,
        "BLOCK_VOCAB": block_vocab,
        "LANES": min(block_vocab, num_warps * 256),
        "num_warps": num_warps,
    }


def _gradient_blocks(rows: Tensor) -> tuple[tuple[int], int]:
    """Return the grid of programs that share the blocks of ``rows [N, M]``, and the size of a block."""
    num_rows, row_size = rows.shape
    block = min(max(next_power_of_2(row_size), 32), GRADIENT_BLOCK)
    return (min(num_rows * cdiv(row_size, block), GRADIENT_PROGRAMS * num_multiprocessors(rows)),), block


def count_targets(groups: Tensor, slot_weights: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return partial totals ``[2, n]`` over ``groups [N, K]``: the weight of its targets, and its rows with one.

    The second result is a fresh ticket for `launch_loss`, if that is the next to be launched.
    """
    num_rows, group_size = groups.shape
    block_slots = next_power_of_2(group_size)
    block_rows = max(COUNT_BLOCK // block_slots, 1)
    programs = max(min(cdiv(num_rows, block_rows), MAX_PARTIALS), 1)
    totals = torch.empty((2, programs), dtype=torch.float32, device=groups.device)
    ticket = torch.empty(1, dtype=torch.int32, device=groups.device)
    launch(
        _count_targets_kernel,
        (programs,),
        groups,
        slot_weights,
        totals,
        ticket,
        num_rows,
        ignore_index,
        GROUP_SIZE=group_size,
        BLOCK_SLOTS=block_slots,
        BLOCK_ROWS=block_rows,
        OVERLAP=can_overlap(groups),
    )
    return totals, ticket


def launch_loss(
    logits: Tensor,
    grad: Tensor | None,
    groups: Tensor,
    slot_scale: Tensor | None,
    totals: Tensor | None,
    losses: Tensor | None,
    rows: Tensor,
    settings: LossSettings,
    stats: bool,
    ticket: Tensor | None = None,
) -> Tensor | None:
    """Score ``logits [N, V]`` against ``groups [N, K]``.

    Writes ``rows [4, N]`` (loss, lse and, with ``stats``, accuracy and entropy), and the unweighted ``losses [N, K]``
    and the gradient ``grad [N, V]`` for an upstream of 1, where those are given. ``grad`` may be ``logits``. The
    ``ticket`` is one from `count_targets` after which nothing was launched: the counting and this may overlap.

    Returns:
        The sum of the rows' losses, where the kernel could find it on its way.
    """
    num_rows, vocab_size = logits.shape
    counted_just_now = ticket is not None
    loss = None
    if num_rows > MAX_TICKETS:
        ticket = None
    elif ticket is not None:
        loss = torch.empty((), dtype=torch.float32, device=logits.device)
    many_values = stats or settings.label_smoothing is not None or settings.softcap is not None
    launch(
        _loss_kernel,
        (num_rows,),
        logits,
        grad,
        groups,
        slot_scale,
        totals,
        losses,
        rows,
        ticket,
        loss,
        logits.stride(0),
        0 if grad is None else grad.stride(0),
        rows.stride(0),
        vocab_size,
        settings.ignore_index,
        settings.label_smoothing,
        settings.z_loss,
        settings.softcap,
        NORMALIZE=settings.normalize,
        WITH_STATS=stats,
        early=counted_just_now,
        **_slot_options(groups.shape[1], totals),
        **_row_options(vocab_size, logits.element_size(), many_values),
    )
    return loss


def launch_gradient(
    logits: Tensor,
    grad: Tensor,
    groups: Tensor,
    slot_scale: Tensor | None,
    totals: Tensor | None,
    rows: Tensor,
    upstream: Tensor,
    settings: LossSettings,
    skip_unit: bool,
) -> None:
    """Write the gradient of ``logits`` from the lse in ``rows``, for an upstream ``[]`` or ``[N, K]``.

    With ``skip_unit``, ``grad`` holds the gradient for an upstream of 1 already. ``grad`` may be ``logits``.
    """
    num_rows, vocab_size = logits.shape
    grid, block_vocab = _gradient_blocks(logits)
    launch(
        _gradient_kernel,
        grid,
        logits,
        grad,
        groups,
        slot_scale,
        totals,
        rows,
        upstream,
        num_rows,
        logits.stride(0),
        grad.stride(0),
        rows.stride(0),
        vocab_size,
        settings.ignore_index,
        settings.label_smoothing,
        settings.z_loss,
        settings.softcap,
        NORMALIZE=settings.normalize,
        PER_TARGET=upstream.ndim > 0,
        SKIP_UNIT=skip_unit,
        early=True,
        BLOCK_VOCAB=block_vocab,
        num_warps=min(max(block_vocab // 512, 1), 8),
        **_slot_options(groups.shape[1], totals),
    )


def launch_scale(grad: Tensor, upstream: Tensor) -> None:
    """Multiply ``grad [N, M]`` by a scalar ``upstream`` in place, unless that is 1."""
    num_rows, row_size = grad.shape
    grid, block = _gradient_blocks(grad)
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
