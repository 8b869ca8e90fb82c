"""The forward kernels of a loss whose vocabulary is shared out: what each rank measures, and what follows from it.

    m_p     = max over the ranks of m_rp                                   m_rp: the largest logit of a slice
    R_p     = Σ_r rest_rp + (Σ_r holders_rp − 1)                           see `Measures`, in `scores`
    d_pj    = Σ_r [t_pj in the slice of r] · (m_p − z_p[t_pj])

A slice of logits is read once, by `_measure_kernel`, which takes its sums below the slice's own maximum. When that of
all ranks is known, `_sum_kernel` moves the sums to it, and when those are added up, `_score_kernel` forms the losses.
Both touch a few numbers a row. The gradient is that of `gradient_kernels`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import cdiv, launch, next_power_of_2
from npp_kernels._triton_math import capped, exp, log1p
from npp_kernels.losses.scores import (
    BEFORE_CAP,
    CHECKSUM,
    MAXIMUM_LOGIT,
    Measures,
    Scores,
    score_targets,
    store_statistics,
)
from npp_kernels.losses.target_math import find_weights, load_totals
from npp_kernels.losses.targets import Targets
from npp_kernels.losses.wide_rows import find_lanes, sum_of_rest
from npp_kernels.vocabulary_shard import (
    CHECKSUM_FACTOR,
    CHECKSUM_MASK,
    VocabularyShard,
)

# Chosen on paper, not measured yet: as `row_kernels` does for wide rows, but half a block in half the warps, two of
# which a multiprocessor holds; 64 KiB in 32 warps would spill.
MEASURE_BYTES = 32768
MEASURE_OPTIONS_BYTES = 16384
MEASURE_WARP_BYTES = 2048
MAX_MEASURE_WARPS = 16
SUM_ROWS = 128

FACTOR = tl.constexpr(CHECKSUM_FACTOR)  # see `row_checksums`
MASK = tl.constexpr(CHECKSUM_MASK)


@triton.jit
def _find_maximum(logits_row, slice_size, softcap, BLOCK_VOCAB: tl.constexpr, LANES: tl.constexpr):
    """Return the largest logit of a row, capped; 0 where all are -inf."""
    tile = tl.arange(0, BLOCK_VOCAB // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    maximum = tl.full([LANES], float("-inf"), tl.float32)
    for first in range(0, slice_size, BLOCK_VOCAB):
        mask = first + tile < slice_size
        logits = tl.load(logits_row + first + tile, mask=mask, other=float("-inf")).to(tl.float32)
        maximum = tl.maximum(maximum, tl.max(tl.where(mask, capped(logits, softcap), float("-inf")), axis=0))
    largest = tl.max(maximum, axis=0)
    return tl.where(largest > float("-inf"), largest, 0.0)


@triton.jit(do_not_specialize=["ignore_index", "first_id", "rows_stride"])
def _measure_kernel(
    logits_ptr,  # [num_rows, slice_size]
    groups_ptr,  # [num_rows, GROUP_SIZE]
    class_weight_ptr,  # [slice_size] or None: of the ids of the slice
    maximum_ptr,  # [num_rows] out: see `Measures`, as for the next six
    checksum_ptr,  # [2, rows_stride] out
    before_cap_ptr,  # [num_rows] out or None
    rest_ptr,  # [num_rows] out
    distances_ptr,  # [GROUP_SIZE, rows_stride] out: as yet the logits of the targets that are here
    shortfall_ptr,  # [num_rows] out or None
    weighted_sum_ptr,  # [num_rows] out or None
    predictions_ptr,  # [num_rows] out, or None: without statistics
    logits_stride, rows_stride, slice_size, first_id, ignore_index, softcap,
    GROUP_SIZE: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program measures one row of a slice, a block at a time; everything below the maximum of the slice."""
    PRECISE: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    SMOOTHED: tl.constexpr = shortfall_ptr is not None
    WITH_STATS: tl.constexpr = predictions_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    stride = tl.cast(rows_stride, tl.int64)
    logits_row = logits_ptr + row * logits_stride
    slots = tl.arange(0, BLOCK_SLOTS)
    targets = tl.load(groups_ptr + row * GROUP_SIZE + slots, mask=slots < GROUP_SIZE, other=ignore_index).to(tl.int64)
    terms = tl.where(slots < GROUP_SIZE, targets * (2 * slots + 1) * FACTOR, 0)
    checksum = (tl.sum(terms, axis=0) & MASK).to(tl.float32)
    tl.store(checksum_ptr + row, checksum)
    tl.store(checksum_ptr + stride + row, -checksum)
    local = targets - first_id
    mine = (targets != ignore_index) & (local >= 0) & (local < slice_size)
    target_logits = capped(tl.load(logits_row + local, mask=mine, other=0.0).to(tl.float32), softcap)
    tl.store(distances_ptr + slots * stride + row, target_logits, mask=slots < GROUP_SIZE)
    anchor = 0.0
    if SMOOTHED:  # which must be near the maximum, so that the sum does not depend on an offset
        anchor = _find_maximum(logits_row, slice_size, softcap, BLOCK_VOCAB, LANES)
    lane_maximum, lane_total, lane_shortfall, others = find_lanes(
        logits_row, slice_size, softcap, anchor, class_weight_ptr, SMOOTHED, WITH_STATS, PRECISE, BLOCK_VOCAB, LANES
    )
    maximum = tl.max(lane_maximum, axis=0)
    below = lane_maximum - maximum
    lane_share = lane_total * exp(below, PRECISE)
    total = tl.sum(lane_share, axis=0)
    rest = total - 1.0
    if total < 2.0:  # also 0, of a row that is -inf throughout
        rest = sum_of_rest(logits_row, slice_size, softcap, maximum, lane_maximum, lane_share, PRECISE, LANES)
    tl.store(maximum_ptr + row, tl.where(total == 0, float("-inf"), maximum))
    tl.store(rest_ptr + row, rest)
    if SMOOTHED:
        tl.store(shortfall_ptr + row, tl.sum(lane_shortfall, axis=0))
    if WITH_STATS:
        lane_weighted, lane_best, lane_arg = others
        shifted = tl.where(lane_total > 0, exp(below, PRECISE) * (lane_weighted + below * lane_total), 0.0)
        best = tl.max(lane_best, axis=0)
        arg_max = tl.min(tl.where(lane_best == best, lane_arg, slice_size), axis=0)
        tl.store(weighted_sum_ptr + row, tl.sum(shifted, axis=0))
        tl.store(before_cap_ptr + row, best)
        arg_max = tl.where(arg_max == slice_size, 0, arg_max)  # of a row that is NaN, or -inf throughout
        tl.store(predictions_ptr + row, arg_max.to(tl.int64) + first_id)


@triton.jit(do_not_specialize=["ignore_index", "first_id", "num_rows", "slice_size"])
def _sum_kernel(
    own_ptr,  # [num_rows]: the maxima of this rank
    maxima_ptr,  # [num_rows]: of all ranks, as the next
    checksum_ptr,  # [2, num_rows]
    groups_ptr,  # [num_rows, GROUP_SIZE]
    slice_weight_ptr,  # [] or None: of the ids of the slice together
    rest_ptr,  # [num_rows] in and out: see `Measures`, as for the next four
    holders_ptr,  # [num_rows] out
    distances_ptr,  # [GROUP_SIZE, num_rows] in and out
    shortfall_ptr,  # [num_rows] in and out, or None
    weighted_sum_ptr,  # [num_rows] in and out, or None
    num_rows, slice_size, first_id, ignore_index,
    GROUP_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program moves the sums of BLOCK_ROWS rows from the maxima of this rank to those of all."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = rows < num_rows
    own = tl.load(own_ptr + rows, mask=mask, other=0.0)
    maximum = tl.load(maxima_ptr + rows, mask=mask, other=0.0)
    rest = tl.load(rest_ptr + rows, mask=mask, other=0.0)
    below = own - maximum
    share = exp(below, True)
    total = (1.0 + rest) * share
    holds = own == maximum
    # Where the maximum is infinite or NaN, so is what comes of it; and where ranks have other targets.
    new_rest = tl.where(holds, rest, total) + (maximum - maximum)
    checksum = tl.load(checksum_ptr + rows, mask=mask, other=0.0)
    minus_checksum = tl.load(checksum_ptr + num_rows + rows, mask=mask, other=0.0)
    new_rest = tl.where(checksum == -minus_checksum, new_rest, float("nan"))
    tl.store(rest_ptr + rows, new_rest, mask=mask)
    tl.store(holders_ptr + rows, tl.where(holds, 1.0, 0.0), mask=mask)
    if weighted_sum_ptr is not None:
        weighted = tl.load(weighted_sum_ptr + rows, mask=mask, other=0.0)
        shifted = share * weighted + below * total
        tl.store(weighted_sum_ptr + rows, tl.where(share > 0, shifted, 0.0), mask=mask)
    if shortfall_ptr is not None:
        slice_weight = tl.cast(slice_size, tl.float32)
        if slice_weight_ptr is not None:
            slice_weight = tl.load(slice_weight_ptr)
        shortfall = tl.load(shortfall_ptr + rows, mask=mask, other=0.0)
        tl.store(shortfall_ptr + rows, shortfall - below * slice_weight, mask=mask)
    for slot in range(GROUP_SIZE):
        pointers = distances_ptr + tl.cast(slot, tl.int64) * num_rows + rows
        target = tl.load(groups_ptr + rows * GROUP_SIZE + slot, mask=mask, other=ignore_index).to(tl.int64)
        local = target - first_id
        mine = (target != ignore_index) & (local >= 0) & (local < slice_size)
        distance = maximum - tl.load(pointers, mask=mask, other=0.0)
        tl.store(pointers, tl.where(mine, distance, 0.0), mask=mask)


@triton.jit(do_not_specialize=["ignore_index", "rows_stride", "num_rows", "vocab_size"])
def _score_kernel(
    maxima_ptr,  # [num_rows]
    rest_ptr,  # [num_rows]: see `Measures`, as for the next four; all are sums over the ranks
    holders_ptr,  # [num_rows]
    distances_ptr,  # [GROUP_SIZE, num_rows]
    shortfall_ptr,  # [num_rows] or None
    weighted_sum_ptr,  # [num_rows] or None
    best_ids_ptr,  # [num_rows] or None
    groups_ptr,  # [num_rows, GROUP_SIZE]
    slot_scale_ptr,  # [GROUP_SIZE] or None
    class_weight_ptr,  # [vocab_size + 1] or None
    totals_ptr,  # [2, NUM_PARTIALS] or None
    rows_ptr,  # [3, rows_stride] out, or [6, rows_stride] with statistics: see `Scores`, as for the next three
    losses_ptr,  # [num_rows, GROUP_SIZE] out or None
    probabilities_ptr,  # [num_rows, GROUP_SIZE] out or None
    predictions_ptr,  # [num_rows] out, or None: without statistics
    rows_stride, num_rows, vocab_size, ignore_index, label_smoothing, z_loss,
    NORMALIZE: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    NUM_PARTIALS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr,
):  # fmt: skip
    """One program scores one row from what all ranks measured."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK_SLOTS)
    slot_mask = slots < GROUP_SIZE
    targets = tl.load(groups_ptr + row * GROUP_SIZE + slots, mask=slot_mask, other=0).to(tl.int64)
    weights, class_weights, counted, in_range = find_weights(
        targets, slots, slot_scale_ptr, class_weight_ptr, vocab_size, ignore_index, GROUP_SIZE
    )
    maximum = tl.load(maxima_ptr + row)
    rest = tl.load(rest_ptr + row) + (tl.load(holders_ptr + row) - 1.0)
    log_total = tl.log(1.0 + rest)
    if rest < 1.0:
        log_total = log1p(rest)
    shortfall = 0.0
    if label_smoothing is not None:
        shortfall = tl.load(shortfall_ptr + row)
    distances = tl.load(distances_ptr + slots * tl.cast(num_rows, tl.int64) + row, mask=slot_mask, other=0.0)
    place = (row, tl.cast(rows_stride, tl.int64), slots)
    statistics = (maximum, rest, log_total, maximum, shortfall)
    score_targets(
        (rows_ptr, losses_ptr, probabilities_ptr), place, statistics,
        (distances, weights, class_weights, counted, in_range), load_totals(totals_ptr, NUM_PARTIALS, BLOCK_PARTIALS),
        (label_smoothing, z_loss, class_weight_ptr, vocab_size), NORMALIZE, GROUP_SIZE,
    )  # fmt: skip
    if predictions_ptr is not None:
        weighted_sum = tl.load(weighted_sum_ptr + row)
        best_id = tl.load(best_ids_ptr + row)
        store_statistics(
            (rows_ptr, predictions_ptr), place, statistics, weighted_sum, best_id, (targets, in_range, vocab_size)
        )


def measure_options(slice_size: int, itemsize: int, with_options: bool) -> dict[str, Any]:
    """Return the tiling of a row, where options may keep a few values more for every logit."""
    limit = (MEASURE_OPTIONS_BYTES if with_options else MEASURE_BYTES) // itemsize
    block_vocab = min(max(next_power_of_2(slice_size), 32), limit)
    num_warps = min(max(block_vocab * itemsize // MEASURE_WARP_BYTES, 1), MAX_MEASURE_WARPS)
    return {"BLOCK_VOCAB": block_vocab, "LANES": min(block_vocab, num_warps * 256), "num_warps": num_warps}


def launch_measures(logits: Tensor, targets: Targets, shard: VocabularyShard, measures: Measures) -> None:
    """Measure a slice of ``logits [N, V_r]``: fill the ``measures``, below the maxima of this rank."""
    num_rows, slice_size = logits.shape
    softcap = targets.settings.softcap
    with_options = softcap is not None or measures.shortfall is not None or measures.predictions is not None
    constants = targets.constants()
    launch(
        _measure_kernel,
        (num_rows,),
        logits,
        targets.groups,
        None if measures.shortfall is None else targets.weights_by_id(),
        measures.maxima[MAXIMUM_LOGIT],
        measures.maxima[CHECKSUM:],
        None if measures.predictions is None else measures.maxima[BEFORE_CAP],
        measures.rest,
        measures.distances,
        measures.shortfall,
        measures.weighted_sum,
        measures.predictions,
        logits.stride(0),
        num_rows,
        slice_size,
        shard.start,
        targets.settings.ignore_index,
        softcap,
        GROUP_SIZE=constants["GROUP_SIZE"],
        BLOCK_SLOTS=constants["BLOCK_SLOTS"],
        **measure_options(slice_size, logits.element_size(), with_options),
    )


def launch_sums(targets: Targets, shard: VocabularyShard, own: Tensor, measures: Measures) -> None:
    """Move the sums of the ``measures`` from this rank's ``own [.., N]`` maxima to those of all ranks."""
    num_rows, group_size = targets.groups.shape
    weights = None if measures.shortfall is None else targets.weights_by_id()
    launch(
        _sum_kernel,
        (cdiv(num_rows, SUM_ROWS),),
        own[MAXIMUM_LOGIT],
        measures.maxima[MAXIMUM_LOGIT],
        measures.maxima[CHECKSUM:],
        targets.groups,
        None if weights is None else weights.sum(),
        measures.rest,
        measures.holders,
        measures.distances,
        measures.shortfall,
        measures.weighted_sum,
        num_rows,
        shard.size,
        shard.start,
        targets.settings.ignore_index,
        GROUP_SIZE=group_size,
        BLOCK_ROWS=SUM_ROWS,
    )


def launch_scores(targets: Targets, shard: VocabularyShard, measures: Measures, scores: Scores) -> None:
    """Fill the ``scores`` from the ``measures`` of all ranks together."""
    num_rows = targets.groups.shape[0]
    settings = targets.settings
    launch(
        _score_kernel,
        (num_rows,),
        measures.maxima[MAXIMUM_LOGIT],
        measures.rest,
        measures.holders,
        measures.distances,
        measures.shortfall,
        measures.weighted_sum,
        measures.predictions,
        targets.groups,
        targets.slot_scale,
        targets.class_weight,
        targets.totals,
        *scores,
        scores.rows.stride(0),
        num_rows,
        shard.vocab_size,
        settings.ignore_index,
        settings.label_smoothing,
        settings.z_loss,
        num_warps=1,
        **targets.constants(),
    )
