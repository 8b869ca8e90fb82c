"""What the kernels of the losses compute, in PyTorch: for the CPU, and for float64 on any device.

Rows come in chunks, so that temporaries stay in a CPU's cache. Compiled code takes all rows at once: the compiler fuses
them itself, and a loop over chunks would have it compile anew for every number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from npp_kernels.losses.scores import (
    ACCURACY,
    BEFORE_CAP,
    CHECKSUM,
    ENTROPY,
    LOSS,
    LSE,
    MAXIMUM,
    MAXIMUM_LOGIT,
    MINUS_CHECKSUM,
    REST,
    Measures,
    Scores,
)
from npp_kernels.losses.targets import Targets
from npp_kernels.vocabulary_shard import VocabularyShard, row_checksums

CHUNK_ELEMENTS = 1 << 20


def _chunks(logits: Tensor, targets: Targets) -> Iterator[slice]:
    """Yield the rows that are worked on at a time."""
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    step = max(CHUNK_ELEMENTS // max(logits.shape[1], targets.groups.shape[1] ** 2), 1)
    for first in range(0, logits.shape[0], step):
        yield slice(first, first + step)


def _coefficients(targets: Targets, wide: torch.dtype) -> tuple[Tensor, Tensor | float, Tensor]:
    """Return the coefficients, without the weights by id, and these; and what multiplies the rows' squared lse."""
    counted = targets.groups != targets.settings.ignore_index
    weights: Tensor = counted.to(wide)
    class_weights: Tensor | float = 1.0
    if targets.slot_scale is not None:
        weights = weights * targets.slot_scale
    if targets.class_weight is not None:
        class_weights = targets.class_weight[targets.groups.masked_fill(~counted, 0).long()]
    penalty = counted.any(1).to(wide) * (targets.settings.z_loss or 0.0)
    if targets.totals is not None:
        totals = targets.totals.sum(1)
        totals = torch.where(totals == 0, 1, totals)
        penalty = penalty / totals[1]
        if targets.settings.normalize == "target":
            weights = weights / totals[0]
        elif targets.settings.normalize == "row":
            row_weight = (weights * class_weights).sum(1, keepdim=True)
            weights = weights / (torch.where(row_weight == 0, 1, row_weight) * totals[1])
    return weights, class_weights, penalty


def _capped(logits: Tensor, targets: Targets, wide: torch.dtype) -> Tensor:
    """Return the logits in the accumulation dtype, capped."""
    logits, softcap = logits.to(wide), targets.settings.softcap
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _Rows(NamedTuple):
    """What the losses of some rows follow from."""

    maximum: Tensor  # [n]
    rest: Tensor  # [n]: the sum of exponentials without one maximum
    distances: Tensor  # [n, K]: how far the targets are below the maximum
    shortfall: Tensor | None  # [n]: Σ_v w_v (maximum − z_v), for label smoothing
    statistics: tuple[Tensor, Tensor] | None  # [n] each: the prediction, and Σ_v exp(z_v − maximum) (z_v − maximum)


def _fill_scores(
    chunk: slice, found: _Rows, targets: Targets, scores: Scores, weights: tuple[Tensor, Tensor | float, Tensor],
    vocab_size: int,
) -> None:  # fmt: skip
    """Fill the ``scores`` of some rows; ``weights`` are the `_coefficients` of all."""
    settings = targets.settings
    coefficients, class_weights, penalty = weights
    groups = targets.groups[chunk]
    counted = groups != settings.ignore_index
    log_total = torch.log1p(found.rest)
    nll = log_total.unsqueeze(1) + found.distances
    of_ids = class_weights if isinstance(class_weights, float) else class_weights[chunk]
    losses = of_ids * nll
    if found.shortfall is not None and settings.label_smoothing is not None:
        if targets.class_weight is None:
            smooth = log_total + found.shortfall / vocab_size
        else:
            smooth = (targets.class_weight[-1] * log_total + found.shortfall) / vocab_size
        losses = (1 - settings.label_smoothing) * losses + settings.label_smoothing * smooth.unsqueeze(1)
    if scores.probabilities is not None:
        probabilities = torch.exp(-nll).masked_fill(~counted, 0)
        scores.probabilities[chunk] = probabilities
        losses = losses * probabilities
    losses = losses.masked_fill(~counted, 0)
    # A target that weighs nothing may have an infinite loss.
    loss = (coefficients[chunk] * losses).masked_fill(coefficients[chunk] == 0, 0).sum(1)
    lse = found.maximum + log_total
    if settings.z_loss is not None:
        loss = loss + (penalty[chunk] * lse.square()).masked_fill(penalty[chunk] == 0, 0)
    scores.rows[LOSS, chunk] = loss
    scores.rows[MAXIMUM, chunk] = found.maximum
    scores.rows[REST, chunk] = found.rest
    if scores.losses is not None:
        scores.losses[chunk] = losses
    if found.statistics is not None and scores.predictions is not None:
        predictions, weighted_sum = found.statistics
        scores.predictions[chunk] = predictions
        hit = (predictions.unsqueeze(1) == groups) & counted
        scores.rows[LSE, chunk] = lse
        scores.rows[ACCURACY, chunk] = hit.any(1).to(lse.dtype)
        scores.rows[ENTROPY, chunk] = log_total - weighted_sum / (1 + found.rest)


def _shortfall(below: Tensor, targets: Targets, by_id: Tensor | None) -> Tensor | None:
    """Return what label smoothing needs to know of logits ``below [n, V]`` the maximum."""
    if targets.settings.label_smoothing is None:
        return None
    return -(below.sum(1) if by_id is None else below @ by_id)


def _weighted_sum(exponentials: Tensor, below: Tensor) -> Tensor:
    return (exponentials * below).masked_fill(exponentials == 0, 0).sum(1)


def torch_loss(logits: Tensor, targets: Targets, scores: Scores) -> None:
    """`launch_loss` in PyTorch, without the gradient: fill ``scores``."""
    wide = scores.rows.dtype
    settings = targets.settings
    weights = _coefficients(targets, wide)
    by_id = targets.weights_by_id()
    for chunk in _chunks(logits, targets):
        z = _capped(logits[chunk], targets, wide)
        groups = targets.groups[chunk]
        counted = groups != settings.ignore_index
        maximum, arg_max = z.max(1, keepdim=True)
        below = z - maximum
        exponentials = torch.exp(below)
        # One maximum must not round the others away; where it is infinite or NaN, so is what comes of it.
        rest = exponentials.scatter_(1, arg_max, 0).sum(1) + (maximum - maximum).squeeze(1)
        distances = -below.gather(1, groups.masked_fill(~counted, 0).long())
        statistics = None
        if scores.predictions is not None:
            predictions = arg_max if settings.softcap is None else logits[chunk].argmax(1, keepdim=True)
            statistics = predictions.squeeze(1), _weighted_sum(exponentials, below)
        found = _Rows(maximum.squeeze(1), rest, distances, _shortfall(below, targets, by_id), statistics)
        _fill_scores(chunk, found, targets, scores, weights, below.shape[1])


def torch_maxima(logits: Tensor, targets: Targets, shard: VocabularyShard, measures: Measures) -> None:
    """`launch_measures` in PyTorch: fill the maxima and the predictions; the sums come when the maxima are known."""
    checksums = row_checksums(targets.groups)
    measures.maxima[CHECKSUM], measures.maxima[MINUS_CHECKSUM] = checksums, -checksums
    for chunk in _chunks(logits, targets):
        measures.maxima[MAXIMUM_LOGIT, chunk] = _capped(logits[chunk], targets, measures.maxima.dtype).amax(1)
        if measures.predictions is not None:
            measures.maxima[BEFORE_CAP, chunk], arg_max = logits[chunk].to(measures.maxima.dtype).max(1)
            measures.predictions[chunk] = shard.start + arg_max


def torch_sums(logits: Tensor, targets: Targets, shard: VocabularyShard, own: Tensor, measures: Measures) -> None:
    """`launch_sums` in PyTorch: fill the sums of this rank's logits below the maxima of all."""
    wide = measures.sums.dtype
    by_id = targets.weights_by_id()
    spoilt = torch.where(measures.find_other_rows(), float("nan"), 0.0)
    for chunk in _chunks(logits, targets):
        z = _capped(logits[chunk], targets, wide)
        ids, mine = _local_ids(targets.groups[chunk], targets)
        maximum = measures.maxima[MAXIMUM_LOGIT, chunk].unsqueeze(1)
        below = z - maximum
        exponentials = torch.exp(below)
        # The maximum is left out of the sum, by the ranks that have it, and counted: all but one are added again.
        holds = own[MAXIMUM_LOGIT, chunk].unsqueeze(1) == maximum
        arg_max = z.argmax(1, keepdim=True)
        exponentials.scatter_(1, arg_max, exponentials.gather(1, arg_max).masked_fill_(holds, 0))
        measures.rest[chunk] = exponentials.sum(1) + (maximum - maximum).squeeze(1) + spoilt[chunk]
        measures.holders[chunk] = holds.squeeze(1).to(wide)
        measures.distances[:, chunk] = -below.gather(1, ids).masked_fill_(~mine, 0).t()
        shortfall = _shortfall(below, targets, by_id)
        if measures.shortfall is not None and shortfall is not None:
            measures.shortfall[chunk] = shortfall
        if measures.weighted_sum is not None:
            measures.weighted_sum[chunk] = _weighted_sum(exponentials, below)


def torch_scores(targets: Targets, shard: VocabularyShard, measures: Measures, scores: Scores) -> None:
    """`launch_scores` in PyTorch: fill the ``scores`` from the sums of all ranks."""
    weights = _coefficients(targets, scores.rows.dtype)
    statistics = None
    if measures.predictions is not None and measures.weighted_sum is not None:
        statistics = measures.predictions, measures.weighted_sum
    rest = measures.rest + (measures.holders - 1)
    found = _Rows(measures.maxima[MAXIMUM_LOGIT], rest, measures.distances.t(), measures.shortfall, statistics)
    _fill_scores(slice(None), found, targets, scores, weights, shard.vocab_size)


def _local_ids(groups: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return the columns of the targets among the logits that are here, 0 for the others; and whose are here."""
    mine = groups != targets.settings.ignore_index
    ids = groups
    if targets.shard is not None:
        mine &= (groups >= targets.shard.start) & (groups < targets.shard.stop)
        ids = groups - targets.shard.start
    return ids.masked_fill(~mine, 0).long(), mine


def torch_gradient(logits: Tensor, grad: Tensor, targets: Targets, scores: Scores, upstream: Tensor) -> None:
    """`launch_gradient` in PyTorch; ``grad`` may be ``logits``."""
    vocab_size = logits.shape[1] if targets.shard is None else targets.shard.vocab_size
    wide = scores.rows.dtype
    settings = targets.settings
    smoothing = settings.label_smoothing or 0.0
    coefficients, class_weights, penalty = _coefficients(targets, wide)
    scalar, per_target = scores.split_upstream(upstream)
    for factor in (scalar, per_target):
        coefficients = coefficients if factor is None else coefficients * factor
    if scalar is not None:
        penalty = penalty * scalar
    idle = (coefficients == 0).all(1, keepdim=True) & (penalty == 0).unsqueeze(1)
    spread = smoothing / vocab_size * coefficients.sum(1, keepdim=True)  # what each logit loses to label smoothing
    by_id = targets.weights_by_id()
    surplus = spread * (vocab_size if targets.class_weight is None else targets.class_weight[-1])
    lse = scores.rows[MAXIMUM] + torch.log1p(scores.rows[REST])
    surplus = surplus + 2 * (penalty * lse).masked_fill(penalty == 0, 0).unsqueeze(1)
    at_targets = (1 - smoothing) * coefficients * class_weights
    softmax_weight = surplus + at_targets.sum(1, keepdim=True)
    for chunk in _chunks(logits, targets):
        z = _capped(logits[chunk], targets, wide)
        ids, mine = _local_ids(targets.groups[chunk], targets)
        maximum, rest = (scores.rows[row, chunk].unsqueeze(1) for row in (MAXIMUM, REST))
        # Where a target is the one logit with more than half of the softmax, `softmax_weight · p` and its coefficient
        # are nearly equal; there p = 1 - rest / (1 + rest), and what cancels is left out beforehand.
        sure = (z.gather(1, ids) == maximum) & (rest < 1)
        others = at_targets[chunk].masked_fill(sure & mine, 0).sum(1, keepdim=True)
        at_sure = (others + surplus[chunk]) - softmax_weight[chunk] * (rest / (1 + rest))
        dz = torch.exp(z - maximum).mul_(softmax_weight[chunk] / (1 + rest))
        # What equal targets take away is added up first: taken from p one after the other, each would be rounded.
        equals = ids.unsqueeze(2) == ids.unsqueeze(1)
        taken = (equals * at_targets[chunk].masked_fill(~mine, 0).unsqueeze(1)).sum(2)
        dz.scatter_(1, ids, torch.where(sure, at_sure, dz.gather(1, ids) - taken))
        if settings.label_smoothing is not None:
            dz.sub_(spread[chunk] if by_id is None else spread[chunk] * by_id)
        if settings.softcap is not None:
            dz.mul_(1 - (z / settings.softcap).square())
        grad[chunk] = dz.masked_fill_(idle[chunk], 0).to(grad.dtype)
