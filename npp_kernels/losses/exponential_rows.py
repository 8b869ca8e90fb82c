"""One row of exponentials after the other: what its targets make of it, between the products that `exponentials` runs.

Where one target t has more than half of S, its loss and F_pt are differences of nearly equal numbers. There they come
from R_p = Σ_{v≠t} E_pv, which is exact however small it is:

    lse_p − z_pt = log1p(R_p / E_pt)
    F_pt = ((Σ_{j: t_pj ≠ t} c_pj + 2 λ lse_p) E_pt − Σ_{j: t_pj = t} c_pj R_p) / (Σ_j c_pj + 2 λ lse_p)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import launch, next_power_of_2
from npp_kernels._triton_math import LN_2, LOG2_E, log1p
from npp_kernels.losses.scores import Scores, score_targets
from npp_kernels.losses.target_math import find_weights, gradient_terms, load_totals, sum_equal_weights
from npp_kernels.losses.targets import Targets

MAX_TOTAL = tl.constexpr(2.0**90)  # of a row's exponentials: above it the row is computed again
SCORE_HIDDEN = 1024
SCORE_ELEMENTS = 512  # of the weight, that one warp multiplies by its row at a time
TARGET_UNROLL = 3
SCORE_VOCAB = 32


@triton.jit
def _row_logits(hidden_row, weight_ptr, ids, mask, hidden_size, BLOCK_HIDDEN: tl.constexpr, UNROLL: tl.constexpr):
    """Return the logits of one row at some ids, 0 where masked, to the last places of fp32."""
    total = tl.zeros([ids.shape[0], BLOCK_HIDDEN], tl.float32)
    for first in tl.range(0, hidden_size, BLOCK_HIDDEN, loop_unroll_factor=UNROLL):
        columns = first + tl.arange(0, BLOCK_HIDDEN)
        in_row = columns < hidden_size
        hidden = tl.load(hidden_row + columns, mask=in_row, other=0.0).to(tl.float32)
        pointers = weight_ptr + ids[:, None] * hidden_size + columns[None, :]
        weight = tl.load(pointers, mask=mask[:, None] & in_row[None, :], other=0.0)
        total += weight.to(tl.float32) * hidden[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _recompute_row(
    exponentials_row, hidden_row, weight_ptr, sums, vocab_size, hidden_size,
    TILE: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Store a row's exponentials for an offset that is right; return it, and their sums by tile."""
    partials = tl.arange(0, sums.shape[0])
    maximum = tl.full([BLOCK_VOCAB], float("-inf"), tl.float32)
    for first in range(0, vocab_size, BLOCK_VOCAB):
        ids = first + tl.arange(0, BLOCK_VOCAB).to(tl.int64)
        logits = _row_logits(hidden_row, weight_ptr, ids, ids < vocab_size, hidden_size, BLOCK_HIDDEN, 1)
        maximum = tl.maximum(maximum, tl.where(ids < vocab_size, logits, float("-inf")))
    offset = tl.ceil(tl.max(maximum, axis=0) * LOG2_E)
    sums = tl.zeros_like(sums)
    for first in range(0, vocab_size, BLOCK_VOCAB):
        ids = first + tl.arange(0, BLOCK_VOCAB).to(tl.int64)
        mask = ids < vocab_size
        logits = _row_logits(hidden_row, weight_ptr, ids, mask, hidden_size, BLOCK_HIDDEN, 1)
        exponentials = tl.where(mask, tl.exp2(logits * LOG2_E - offset), 0.0)
        tl.store(exponentials_row + ids, exponentials.to(exponentials_row.dtype.element_ty), mask=mask)
        sums += tl.where(partials == first // TILE, tl.sum(exponentials, axis=0), 0.0)
    tl.debug_barrier()  # the stores above come before those at the targets, from other threads
    return offset, sums


@triton.jit
def _sum_of_rest(exponentials_row, sums, top, vocab_size, TILE: tl.constexpr):
    """Return the sum of a row's exponentials without that of the id `top`, whose tile is read for it."""
    tile = top // TILE
    ids = tile * TILE + tl.arange(0, TILE)
    others = tl.load(exponentials_row + ids, mask=(ids < vocab_size) & (ids != top), other=0.0).to(tl.float32)
    other_tiles = tl.where(tl.arange(0, sums.shape[0]) == tile, 0.0, sums)
    return tl.sum(others, axis=0) + tl.sum(other_tiles, axis=0)


@triton.jit
def _fitted_factor(exact, rounded):
    """Return what rounded values are to be multiplied by to come nearest to the exact ones, by least squares.

    A row's gradient is mostly that of its targets. Rounded to bf16 they would be half of its error; what multiplies the
    row anyway takes a single one back to where it was, and of several the part that they have in common.
    """
    largest = tl.max(tl.abs(rounded), axis=0)
    exact = exact / largest  # whose squares might not be finite
    rounded = rounded / largest
    factor = tl.sum(exact * rounded, axis=0) / tl.sum(rounded * rounded, axis=0)
    return tl.where(tl.abs(factor - 1.0) < 0.01, factor, 1.0)  # no target, or a NaN: none


@triton.jit(do_not_specialize=["ignore_index", "rows_stride"])
def _score_exponentials_kernel(
    exponentials_ptr,  # [num_rows, vocab_size] in and out: E becomes F
    sums_ptr,  # [num_rows, NUM_SUMS]
    offsets_ptr,  # [num_rows]
    hidden_ptr,  # [num_rows, hidden_size]
    weight_ptr,  # [vocab_size, hidden_size]
    groups_ptr,  # [num_rows, GROUP_SIZE]
    slot_scale_ptr,  # [GROUP_SIZE] or None
    class_weight_ptr,  # [vocab_size + 1] or None
    totals_ptr,  # [2, NUM_PARTIALS] or None
    rows_ptr,  # [3, num_rows] out: see `Scores`, as for the next
    probabilities_ptr,  # [num_rows, GROUP_SIZE] out or None
    scales_ptr,  # [num_rows] out: q
    scaled_ptr,  # [num_rows, hidden_size] out: q ⊙ hidden
    rows_stride, vocab_size, hidden_size, ignore_index, z_loss,
    exponentials_stride,  # None where rows have no pad
    NORMALIZE: tl.constexpr, NUM_SUMS: tl.constexpr, BLOCK_SUMS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, TARGET_HIDDEN: tl.constexpr, TARGET_UNROLL: tl.constexpr,
    VOCAB_HIDDEN: tl.constexpr, OVERLAP: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr, NUM_PARTIALS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr,
):  # fmt: skip
    """One program scores one row, and finds all that its gradient needs beside the exponentials."""
    row = tl.program_id(0).to(tl.int64)
    if exponentials_stride is None:
        exponentials_row = exponentials_ptr + row * vocab_size
    else:
        exponentials_row = exponentials_ptr + row * exponentials_stride
    groups_row = groups_ptr + row * GROUP_SIZE
    hidden_row = hidden_ptr + row * hidden_size
    slots = tl.arange(0, BLOCK_SLOTS)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    targets = tl.load(groups_row + slots, mask=slots < GROUP_SIZE, other=0).to(tl.int64)
    weights, class_weights, counted, in_range = find_weights(
        targets, slots, slot_scale_ptr, class_weight_ptr, vocab_size, ignore_index, GROUP_SIZE
    )
    partials = tl.arange(0, BLOCK_SUMS)
    sums = tl.load(sums_ptr + row * NUM_SUMS + partials, mask=partials < NUM_SUMS, other=0.0)
    offset = tl.load(offsets_ptr + row)
    stored = tl.load(exponentials_row + targets, mask=in_range, other=0.0).to(tl.float32)
    # Exponentials are rounded, and 0 far below the maximum; a target's own logit has to be better than that.
    target_logits = _row_logits(hidden_row, weight_ptr, targets, in_range, hidden_size, TARGET_HIDDEN, TARGET_UNROLL)
    total = tl.sum(sums, axis=0)
    if total > MAX_TOTAL:  # the sample was no guide to this row, or a logit is infinite; NaN stays as it is
        offset, sums = _recompute_row(
            exponentials_row, hidden_row, weight_ptr, sums, vocab_size, hidden_size, TILE, BLOCK_VOCAB, VOCAB_HIDDEN
        )
        total = tl.sum(sums, axis=0)
        stored = tl.load(exponentials_row + targets, mask=in_range, other=0.0).to(tl.float32)

    # lse = maximum + log_total: from the logarithm of the total, or, where one target has more than half of it, exact.
    maximum = (offset + tl.log2(total) - 1.0) * LN_2
    rest = tl.full([], 1.0, tl.float32)
    log_total = tl.full([], 1.0, tl.float32) * LN_2
    rest_total = total
    top_exponential = total * 0.0
    top = tl.max(tl.where(in_range & (2.0 * stored > total), targets, -1), axis=0)
    if top >= 0:
        maximum = tl.max(tl.where(targets == top, target_logits, float("-inf")), axis=0)
        top_exponential = tl.exp2(maximum * LOG2_E - offset)
        rest_total = _sum_of_rest(exponentials_row, sums, top, vocab_size, TILE)
        rest = rest_total / top_exponential
        log_total = log1p(rest)
        total = top_exponential + rest_total
    place = (row, tl.cast(rows_stride, tl.int64), slots)
    weights, divisor, _, slope = score_targets(
        (rows_ptr, None, probabilities_ptr), place, (maximum, rest, log_total, 0.0, 0.0),
        (maximum - target_logits, weights, class_weights, counted, in_range),
        load_totals(totals_ptr, NUM_PARTIALS, BLOCK_PARTIALS), (None, z_loss, class_weight_ptr, vocab_size), NORMALIZE,
        GROUP_SIZE,
    )  # fmt: skip
    softmax_weight, surplus, _, _ = gradient_terms(
        weights, class_weights, divisor, slope, None, class_weight_ptr, vocab_size
    )
    weights *= class_weights
    equal_weights = sum_equal_weights(groups_row, targets, weights, slots, GROUP_SIZE, BLOCK_SLOTS, BLOCK_OTHERS)
    # F = E - c / q has no value where the two terms of q add up to 0; 2^-20 of their size in its place is no error.
    least = tl.sum(tl.abs(weights), axis=0) / divisor * 9.5367431640625e-07
    softmax_weight = tl.where(tl.abs(softmax_weight) < least, least, softmax_weight)
    scale = softmax_weight / total
    coefficients = tl.div_rn(equal_weights, divisor)
    target_gradients = tl.exp2(target_logits * LOG2_E - offset) - coefficients / scale
    others = tl.div_rn(tl.sum(tl.where(targets == top, 0.0, weights), axis=0), divisor)
    at_top = ((others + surplus) * top_exponential - coefficients * rest_total) / softmax_weight
    target_gradients = tl.where(targets == top, at_top, target_gradients)
    rounded = target_gradients.to(exponentials_ptr.dtype.element_ty)
    scale *= _fitted_factor(tl.where(in_range, target_gradients, 0.0), tl.where(in_range, rounded.to(tl.float32), 0.0))
    tl.store(scales_ptr + row, scale)
    idle = softmax_weight == 0
    if idle == 0:
        tl.store(exponentials_row + targets, rounded, mask=in_range)
    for first in range(0, hidden_size, BLOCK_HIDDEN):
        columns = first + tl.arange(0, BLOCK_HIDDEN)
        in_row = columns < hidden_size
        hidden = tl.load(hidden_row + columns, mask=in_row, other=0.0).to(tl.float32)
        scaled = tl.where(idle, 0.0, hidden * scale)
        tl.store(scaled_ptr + row * hidden_size + columns, scaled.to(scaled_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def _scale_rows_kernel(
    products_ptr,  # [num_rows, hidden_size]
    scales_ptr,  # [num_rows]
    grad_ptr,  # [num_rows, hidden_size] out
    hidden_size,
    BLOCK_HIDDEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program multiplies one row by its scale."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales_ptr + row)
    for first in range(0, hidden_size, BLOCK_HIDDEN):
        columns = first + tl.arange(0, BLOCK_HIDDEN)
        mask = columns < hidden_size
        product = tl.load(products_ptr + row * hidden_size + columns, mask=mask, other=0.0)
        grad = tl.where(scale == 0, 0.0, product * scale)
        tl.store(grad_ptr + row * hidden_size + columns, grad.to(grad_ptr.dtype.element_ty), mask=mask)


class ScaledGradient(NamedTuple):
    """The gradient of a chunk of logits as ``row_scale ⊙ matrix``, and what its products take for the hidden states."""

    matrix: Tensor  # [N, V]
    row_scale: Tensor  # [N], fp32
    hidden: Tensor  # [N, D]: row_scale ⊙ hidden


def _score_options(hidden_size: int, group_size: int) -> dict[str, int]:
    """Return the tiling of a row's vectors, and of the rows of the weight that are multiplied by one row."""
    block_hidden = min(next_power_of_2(hidden_size), SCORE_HIDDEN)
    num_warps = min(max(group_size // 4, 1), 4)  # one warp needs no barrier, and many rows are under way then
    elements = SCORE_ELEMENTS * num_warps
    return {
        "BLOCK_HIDDEN": block_hidden,
        "TARGET_HIDDEN": min(block_hidden, max(elements // next_power_of_2(group_size), 16)),
        "TARGET_UNROLL": TARGET_UNROLL,
        "BLOCK_VOCAB": SCORE_VOCAB,
        "VOCAB_HIDDEN": elements // SCORE_VOCAB,
        "num_warps": num_warps,
    }


def score_exponentials(
    hidden: Tensor, weight: Tensor, offsets: Tensor, tiles: tuple[Tensor, Tensor, int], targets: Targets, scores: Scores
) -> ScaledGradient:
    """Fill ``scores`` from the exponentials, which become the gradient of the logits.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``.
        offsets: ``[N]``.
        tiles: the exponentials ``[N, V]``, their sums by tile ``[N, tiles]``, and the ids of a tile.
        targets: of these rows.
        scores: see `Scores`.
    """
    num_rows, hidden_size = hidden.shape
    exponentials, sums, tile = tiles
    stride = exponentials.stride(0)
    scales = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    scaled = torch.empty_like(hidden)
    launch(
        _score_exponentials_kernel,
        (num_rows,),
        exponentials,
        sums,
        offsets,
        hidden,
        weight,
        targets.groups,
        targets.slot_scale,
        targets.class_weight,
        targets.totals,
        scores.rows,
        scores.probabilities,
        scales,
        scaled,
        scores.rows.stride(0),
        weight.shape[0],
        hidden_size,
        targets.settings.ignore_index,
        targets.settings.z_loss,
        None if stride == weight.shape[0] else stride,
        NUM_SUMS=sums.shape[1],
        BLOCK_SUMS=next_power_of_2(sums.shape[1]),
        TILE=tile,
        early=True,
        **_score_options(hidden_size, targets.groups.shape[1]),
        **targets.constants(),
    )
    return ScaledGradient(exponentials, scales, scaled)


def scale_rows(products: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write ``products [N, D]`` times ``scales [N]`` into ``out``, in its dtype."""
    num_rows, hidden_size = products.shape
    launch(
        _scale_rows_kernel,
        (num_rows,),
        products,
        scales,
        out,
        hidden_size,
        BLOCK_HIDDEN=min(next_power_of_2(hidden_size), SCORE_HIDDEN),
        early=True,
    )
