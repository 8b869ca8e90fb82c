"""The forward kernels of the losses: one row of logits against the K targets of a group, and its gradient where asked.

    dz_pv   = (Σ_j c_pj) · softmax(z_p)_v − Σ_{j: t_pj = v} c_pj          softmax(z_p)_v = exp(z_pv − m_p) / (1 + R_p)

`scores` has the loss, and m and R. A row of up to `MAX_BLOCK_BYTES` stays in registers between its statistics and its
gradient. A wider one is read twice by the program that owns it, the second time backwards, so that what was read last
is still in the L2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import launch, next_power_of_2, num_multiprocessors
from npp_kernels._triton_math import capped, divide, exp, log1p
from npp_kernels.losses.row_layout import align, find_aligned_part, find_edges, is_ragged
from npp_kernels.losses.scores import Scores, add_up_losses, find_anchor, score_targets, store_statistics
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
from npp_kernels.losses.targets import Targets
from npp_kernels.losses.wide_rows import _wide_row_kernel

# H100, 2026-11-24, bf16; docs/tuning.md has what else was tried.
# V = 16,384 in 16 warps runs at the copy rate (0.357 ms for 16,384 rows; 32 warps 0.525); V = 32,768 in 16 warps
# (0.397 ms for 8,192 rows) beats reading it twice (0.444). V = 65,536 would spill.
MAX_BLOCK_BYTES = 65536
WARP_BYTES = 2048
# A softcap and the statistics each keep a few values more for every logit; smoothing by class weights keeps these
# besides.
MAX_OPTIONS_BYTES = 16384
MAX_SMOOTHED_BYTES = 4096
SMOOTHED_WARP_BYTES = 256
# By estimate, not measured: of two bytes an element, NVIDIA's compiler takes 77 registers for ragged rows in blocks of
# this size, so that one program runs at a time in place of two. Up to so many targets it keeps to 64 without spills.
LIMITED_BLOCK = 16384
LIMITED_SLOTS = 64
MAX_REGISTERS = 64
# Rows from which on programs run half a row apart, see `wide_rows.wait_for_half`. Off until it is measured: on paper
# rows of 512 KiB go from 0.76 of the limit to between 0.85 and 0.91.
STAGGERED_BYTES: int | None = None
# Up to so many rows the last program adds up the loss: 0.024 ms against 0.028 for 256 rows of 16,384, forward and
# backward. More rows queue up for the one counter: 0.416 against 0.390 for 16,384.
MAX_TICKETS = 1024


@triton.jit(do_not_specialize=["ignore_index", "rows_stride"])
def _register_row_kernel(
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
    NORMALIZE: tl.constexpr, OVERLAP: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr, NUM_PARTIALS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
    LANES: tl.constexpr, EVEN: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One program scores one row, which it keeps in its registers, and, where asked, writes the row's gradient.

    What does not wait for other loads is loaded first, and what the counts decide comes last: with OVERLAP they may
    still be counted while the row is read.
    """
    PRECISE: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    groups_row = groups_ptr + row * GROUP_SIZE
    slots = tl.arange(0, BLOCK_SLOTS)
    offsets = tl.arange(0, BLOCK_VOCAB // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    tile_row, tile_size, ids = logits_row, vocab_size, offsets
    if RAGGED:  # see `row_layout`: the tile has the aligned part, and the edges are a tile of their own
        VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
        head, tile_size = find_aligned_part(row * logits_stride, vocab_size, VECTOR)
        tile_row = logits_ptr + align(row * logits_stride, VECTOR)
        ids = offsets + head
        edge_ids, edge_mask = find_edges(head, tile_size, vocab_size, VECTOR)
        raw_edges = tl.load(logits_row + edge_ids, mask=edge_mask, other=float("-inf")).to(tl.float32)
        edges = tl.where(edge_mask, capped(raw_edges, softcap), float("-inf"))
    mask = offsets < tile_size
    if EVEN:  # the compiler drops a mask that it knows to be true; instructions, not bytes, are the limit here
        mask = tl.full(offsets.shape, True, tl.int1)
    raw = tl.load(tile_row + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    targets = tl.load(groups_row + slots, mask=slots < GROUP_SIZE, other=0).to(tl.int64)
    weights, class_weights, counted, in_range = find_weights(
        targets, slots, slot_scale_ptr, class_weight_ptr, vocab_size, ignore_index, GROUP_SIZE
    )
    target_logits = capped(tl.load(logits_row + targets, mask=in_range, other=0.0).to(tl.float32), softcap)
    # Found while the row is on its way, where there are registers to spare for the rest of the time.
    EARLY: tl.constexpr = not PRECISE and probabilities_ptr is None
    if EARLY and grad_ptr is not None:
        equal_weights = sum_equal_weights(
            groups_row, targets, weights * class_weights, slots, GROUP_SIZE, BLOCK_SLOTS, BLOCK_OTHERS
        )
    logits = raw
    if softcap is not None:
        logits = tl.where(mask, capped(raw, softcap), float("-inf"))
    anchor = 0.0
    shortfall = 0.0
    if label_smoothing is not None:
        anchor = find_anchor(target_logits, in_range)
        below = times_class_weights(tl.where(mask, anchor - logits, 0.0), class_weight_ptr, ids, mask)
        shortfall = tl.sum(tl.sum(below, axis=0), axis=0)
        if RAGGED:
            below = tl.where(edge_mask, anchor - edges, 0.0)
            shortfall += tl.sum(times_class_weights(below, class_weight_ptr, edge_ids, edge_mask), axis=0)
    maximum = tl.max(tl.max(logits, axis=0), axis=0)
    if RAGGED:
        maximum = tl.maximum(maximum, tl.max(edges, axis=0))
        edge_exponentials = exp(edges - maximum, PRECISE)
    exponentials = exp(logits - maximum, PRECISE)
    total = tl.sum(tl.sum(exponentials, axis=0), axis=0)
    if RAGGED:
        total += tl.sum(edge_exponentials, axis=0)
    rest = total - 1.0
    log_total = tl.log(total)
    if total < 2.0:  # one logit has more than half, beside which the others must not be rounded away
        rest = tl.sum(tl.sum(tl.where(exponentials < 1.0, exponentials, 0.0), axis=0), axis=0)
        if RAGGED:
            rest += tl.sum(tl.where(edge_exponentials < 1.0, edge_exponentials, 0.0), axis=0)
        log_total = log1p(rest)
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
        weighted = tl.where(exponentials > 0, exponentials * (logits - maximum), 0.0)
        best = tl.max(tl.max(raw, axis=0), axis=0)
        if RAGGED:
            best = tl.maximum(best, tl.max(raw_edges, axis=0))
        arg_max = tl.min(tl.min(tl.where(raw == best, ids, vocab_size), axis=0), axis=0)
        weighted_sum = tl.sum(tl.sum(weighted, axis=0), axis=0)
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
        by_id = spread
        if label_smoothing is not None:
            by_id = times_class_weights(spread, class_weight_ptr, ids, mask)
        weighted_softmax = exponentials * divide(softmax_weight, total)
        gradient = gradient_away_from_targets(weighted_softmax, logits, by_id, idle, softcap)
        grad_row = grad_ptr + row * grad_stride
        tile_row = grad_row
        if RAGGED:
            tile_row = grad_ptr + align(row * grad_stride, VECTOR)
        tl.store(tile_row + offsets, gradient.to(grad_ptr.dtype.element_ty), mask=mask)
        if RAGGED:
            by_id = spread
            if label_smoothing is not None:
                by_id = times_class_weights(spread, class_weight_ptr, edge_ids, edge_mask)
            weighted_softmax = edge_exponentials * divide(softmax_weight, total)
            gradient = gradient_away_from_targets(weighted_softmax, edges, by_id, idle, softcap)
            tl.store(grad_row + edge_ids, gradient.to(grad_ptr.dtype.element_ty), mask=edge_mask)
        weights *= class_weights
        if not EARLY:
            equal_weights = sum_equal_weights(
                groups_row, targets, weights, slots, GROUP_SIZE, BLOCK_SLOTS, BLOCK_OTHERS
            )
        gradient = gradient_at_targets(
            (distances, in_range, weights, equal_weights, class_weights),
            (divisor, softmax_weight, surplus, spread, smoothing_rest, rest), target_logits, softcap, PRECISE,
        )  # fmt: skip
        store_at_targets(grad_row, targets, gradient, in_range, idle)
    if ticket_ptr is not None:
        add_up_losses(rows_ptr, ticket_ptr, loss_ptr, LANES)


def _row_options(vocab_size: int, itemsize: int, max_bytes: int, ragged: bool = False) -> tuple[bool, dict[str, Any]]:
    """Return whether a row stays in registers, and its tiling, where these hold so many bytes of logits at a time."""
    limit = max_bytes // itemsize
    in_registers = vocab_size <= limit
    block_vocab = max(next_power_of_2(vocab_size), 32) if in_registers else limit
    warp_bytes = SMOOTHED_WARP_BYTES if max_bytes == MAX_SMOOTHED_BYTES else WARP_BYTES
    num_warps = min(max(block_vocab * itemsize // warp_bytes, 1), 16 if in_registers else 32)
    even = {"EVEN": vocab_size == block_vocab and not ragged} if in_registers else {}
    staggered = {} if in_registers else {"started_ptr": None, "first_wave": None}
    return in_registers, {
        **staggered,
        **even,
        "BLOCK_VOCAB": block_vocab,
        "LANES": min(block_vocab, num_warps * 256),
        "RAGGED": ragged,
        "num_warps": num_warps,
    }


def _max_bytes(row_bytes: int, targets: Targets, scores: Scores) -> int:
    """Return how many bytes of logits the registers hold beside what the options keep there."""
    settings = targets.settings
    smoothed = settings.label_smoothing is not None
    if smoothed and targets.class_weight is not None:
        return MAX_SMOOTHED_BYTES
    if (
        scores.predictions is not None
        or settings.softcap is not None
        or (smoothed and row_bytes > MAX_BLOCK_BYTES // 2)
    ):
        return MAX_OPTIONS_BYTES
    return MAX_BLOCK_BYTES


def _max_registers(row_options: dict[str, Any], itemsize: int, targets: Targets, scores: Scores) -> int | None:
    """Return how many registers a thread may have, where the compiler is not to decide that."""
    settings = targets.settings
    options = (settings.label_smoothing, settings.softcap, targets.class_weight, scores.predictions)
    limited = (
        row_options["RAGGED"]
        and itemsize == 2
        and row_options["BLOCK_VOCAB"] == LIMITED_BLOCK
        and targets.groups.shape[1] <= LIMITED_SLOTS
        and all(option is None for option in options)
    )
    return MAX_REGISTERS if limited else None


def launch_loss(
    logits: Tensor, grad: Tensor | None, targets: Targets, scores: Scores, ticket: Tensor | None = None
) -> Tensor | None:
    """Score ``logits [N, V]``: fill ``scores``, and ``grad [N, V]``, where given, for an upstream of 1.

    ``grad`` may be ``logits``. The ``ticket`` is one from `find_targets` after which nothing was launched: the counting
    and this may overlap.

    Returns:
        The sum of the rows' losses, where the kernel could find it on its way.
    """
    num_rows, vocab_size = logits.shape
    settings = targets.settings
    counted_just_now = ticket is not None
    loss = None
    if num_rows > MAX_TICKETS:
        ticket = None
    elif ticket is not None:
        loss = torch.empty((), dtype=torch.float32, device=logits.device)
    itemsize = logits.element_size()
    max_bytes = _max_bytes(vocab_size * itemsize, targets, scores)
    in_registers, row_options = _row_options(vocab_size, itemsize, max_bytes, is_ragged(logits, grad))
    staggers = STAGGERED_BYTES is not None and vocab_size * itemsize >= STAGGERED_BYTES
    if staggers and not in_registers and grad is not None:
        first_wave = num_multiprocessors(logits)
        if num_rows >= 2 * first_wave:
            started = torch.zeros(1, dtype=torch.int32, device=logits.device)
            row_options |= {"started_ptr": started, "first_wave": first_wave}
            counted_just_now = False  # another kernel was launched since
    launch(
        _register_row_kernel if in_registers else _wide_row_kernel,
        (num_rows,),
        logits,
        grad,
        targets.groups,
        targets.slot_scale,
        targets.class_weight,
        targets.totals,
        *scores,
        ticket,
        loss,
        logits.stride(0),
        0 if grad is None else grad.stride(0),
        scores.rows.stride(0),
        vocab_size,
        settings.ignore_index,
        settings.label_smoothing,
        settings.z_loss,
        settings.softcap,
        early=counted_just_now,
        max_registers=_max_registers(row_options, itemsize, targets, scores),
        **targets.constants(),
        **row_options,
    )
    return loss
