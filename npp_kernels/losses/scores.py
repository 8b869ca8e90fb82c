"""What a loss finds out about its rows and targets, and the device functions that find and store it.

    R_p     = Σ_v exp(z_pv − m_p), without one maximum m_p             lse_p = m_p + log1p(R_p)
    loss    = Σ_pj c_pj · (log1p(R_p) + (m_p − z_p[t_pj]))

Formed so, the loss of a row is equally exact at any offset of its logits, and where a target has nearly all of the
softmax. What is kept of a row for its gradient is m and R, not the lse, which may have rounded R away.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._triton_math import exp
from npp_kernels.losses.target_math import find_divisor, find_penalty
from npp_kernels.losses.targets import Targets

# The rows of `Scores.rows`.
LOSS, MAXIMUM, REST, LSE, ACCURACY, ENTROPY = range(6)
# The rows of `Measures.maxima`: the largest logit; a checksum of the row's targets and its negative, whose maxima
# are no longer each other's negative where ranks have other targets; the largest logit before a softcap.
MAXIMUM_LOGIT, CHECKSUM, MINUS_CHECKSUM, BEFORE_CAP = range(4)


class Scores(NamedTuple):
    """The results of a loss, in the accumulation dtype."""

    rows: Tensor  # [3, N], or [6, N] with statistics: see LOSS and what follows
    losses: Tensor | None  # [N, K], of every target without its coefficient
    probabilities: Tensor | None  # [N, K], of every target, where they scale the losses
    predictions: Tensor | None  # [N] int64, with statistics

    @classmethod
    def empty(cls, targets: Targets, dtype: torch.dtype, *, per_target: bool, stats: bool) -> Scores:
        """Return room for the scores of all targets, for products or logits of some dtype."""
        device, (num_rows, group_size) = targets.groups.device, targets.groups.shape
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.empty((6 if stats else 3, num_rows), dtype=wide, device=device),
            torch.empty((num_rows, group_size), dtype=wide, device=device) if per_target else None,
            torch.empty((num_rows, group_size), dtype=wide, device=device) if targets.settings.token_scaling else None,
            torch.empty(num_rows, dtype=torch.int64, device=device) if stats else None,
        )

    def chunk(self, rows: slice) -> Scores:
        """Return the scores of some rows."""
        if rows.stop - rows.start == self.rows.shape[1]:
            return self
        losses, probabilities, predictions = (None if part is None else part[rows] for part in self[1:])
        return Scores(self.rows[:, rows], losses, probabilities, predictions)

    def split_upstream(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the upstream gradient as one number, and as one for each target; None for what is 1."""
        if upstream.ndim == 0:
            return upstream, self.probabilities
        return None, upstream if self.probabilities is None else upstream * self.probabilities


class Measures(NamedTuple):
    """What each rank measures on its slice of the vocabulary, and the group then reduces; in the accumulation dtype.

    ``R_p = Σ_r rest_rp + (Σ_r holders_rp − 1)``: every rank that has a logit equal to the maximum leaves out one of
    them and says so, and of all these one stays left out.
    """

    maxima: Tensor  # [3, N], or [4, N] with statistics: the rows MAXIMUM_LOGIT to BEFORE_CAP
    sums: Tensor  # [2 + K or more, N]: all that follows but the predictions, in one piece of memory
    rest: Tensor  # [N]: the sum of exponentials without one maximum
    holders: Tensor  # [N]: 1 if that one was left out here
    distances: Tensor  # [K, N]: the targets' below the maximum, 0 for those of other ranks
    shortfall: Tensor | None  # [N]: Σ_v w_v (m − z_v), for label smoothing
    weighted_sum: Tensor | None  # [N]: Σ_v exp(z_v − m) (z_v − m), for statistics
    predictions: Tensor | None  # [N] int64: the id of the largest logit before a softcap

    @classmethod
    def empty(cls, targets: Targets, scores: Scores) -> Measures:
        """Return room for the measures that the ``scores`` need."""
        num_rows, group_size = targets.groups.shape
        smoothed, stats = targets.settings.label_smoothing is not None, scores.predictions is not None
        sums = scores.rows.new_empty((2 + group_size + smoothed + stats, num_rows))
        return cls(
            scores.rows.new_empty((3 + stats, num_rows)),
            sums,
            sums[0],
            sums[1],
            sums[2 : 2 + group_size],
            sums[2 + group_size] if smoothed else None,
            sums[-1] if stats else None,
            None if scores.predictions is None else torch.empty_like(scores.predictions),
        )

    def find_other_rows(self) -> Tensor:
        """Return, from the maxima of all ranks, for which rows some rank has other targets than the others."""
        return self.maxima[CHECKSUM] != -self.maxima[MINUS_CHECKSUM]


@triton.jit
def find_anchor(target_logits, in_range):
    """Return a logit that the others are taken from before they are summed up: their sum must not depend on an offset.

    The largest target's will do, for the loss has an error of its distance from the maximum's size anyway.
    """
    anchor = tl.max(tl.where(in_range, target_logits, float("-inf")), axis=0)
    return tl.where(anchor > float("-inf"), anchor, 0.0)


@triton.jit
def score_targets(
    pointers,  # rows, losses or None, probabilities or None: they scale the losses where they are asked for
    place,  # the row, the distance between rows of `rows`, the slots
    statistics,  # the maximum; the sum of exponentials without it, and log1p of that; an anchor, Σ_v w_v (anchor − z_v)
    targets,  # distances below the maximum, weights by slot, weights by id, who counts, who is valid
    totals,
    options,  # label_smoothing, z_loss, class_weight_ptr, vocab_size
    NORMALIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Store the loss of a row, its maximum and rest; return its weights and what its gradient starts from."""
    rows_ptr, losses_ptr, probabilities_ptr = pointers
    row, rows_stride, slots = place
    maximum, rest, log_total, anchor, shortfall = statistics
    distances, weights, class_weights, counted, in_range = targets
    label_smoothing, z_loss, class_weight_ptr, vocab_size = options
    divisor = find_divisor(tl.sum(weights * class_weights, axis=0), totals, NORMALIZE)
    losses = class_weights * (log_total + distances)
    if label_smoothing is not None:
        smooth = log_total + (maximum - anchor)
        if class_weight_ptr is not None:
            smooth = smooth * (tl.load(class_weight_ptr + vocab_size) / vocab_size)
        smooth += shortfall / vocab_size
        smoothing = tl.cast(label_smoothing, tl.float32)  # torch.compile passes Python numbers as fp64
        losses = (1.0 - smoothing) * losses + smoothing * smooth
    losses = tl.where(counted, losses, 0.0)
    if probabilities_ptr is not None:
        probabilities = exp(-distances, True) / (1.0 + rest)
        tl.store(probabilities_ptr + row * GROUP_SIZE + slots, probabilities, mask=slots < GROUP_SIZE)
        losses = tl.where(counted, losses * probabilities, 0.0)
    # A target that weighs nothing may have an infinite loss.
    loss = tl.div_rn(tl.sum(tl.where(weights == 0, 0.0, weights * losses), axis=0), divisor)
    penalty = find_penalty(counted, totals, z_loss)
    slope = 0.0
    if z_loss is not None:
        lse = maximum + log_total
        loss += tl.where(penalty == 0, 0.0, penalty * lse * lse)
        slope = tl.where(penalty == 0, 0.0, 2.0 * penalty * lse)
    tl.store(rows_ptr + row, loss)
    tl.store(rows_ptr + rows_stride + row, maximum)
    tl.store(rows_ptr + 2 * rows_stride + row, rest)
    if losses_ptr is not None:
        losses = tl.where(counted & (in_range == 0), float("nan"), losses)
        tl.store(losses_ptr + row * GROUP_SIZE + slots, losses, mask=slots < GROUP_SIZE)
    if probabilities_ptr is not None:
        weights = tl.where(counted, weights * probabilities, 0.0)
    return weights, divisor, penalty, slope


@triton.jit
def store_statistics(pointers, place, statistics, weighted_sum, arg_max, ids):
    """Store a row's lse, accuracy, entropy and prediction; the weighted sum is Σ_v exp(z_v − m) · (z_v − m)."""
    targets, in_range, vocab_size = ids
    arg_max = tl.where(arg_max == vocab_size, 0, arg_max)  # of a row that is NaN, or -inf throughout
    rows_ptr, predictions_ptr = pointers
    row, rows_stride, _ = place
    maximum, rest, log_total, _, _ = statistics
    tl.store(rows_ptr + 3 * rows_stride + row, maximum + log_total)
    hits = in_range & (targets == arg_max)
    tl.store(rows_ptr + 4 * rows_stride + row, tl.max(hits.to(tl.float32), axis=0))
    tl.store(rows_ptr + 5 * rows_stride + row, log_total - weighted_sum / (1.0 + rest))
    tl.store(predictions_ptr + row, arg_max.to(tl.int64))


@triton.jit
def add_up_losses(rows_ptr, ticket_ptr, loss_ptr, BLOCK: tl.constexpr):
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
