"""What the kernels of the losses compute, in PyTorch: for the CPU, and for float64 on any device.

Rows come in chunks, so that temporaries stay in a CPU's cache. Compiled code takes all rows at once: the compiler fuses
them itself, and a loop over chunks would have it compile anew for every number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
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

CHUNK_ELEMENTS = 1 << 18  # of each thread: 1 MiB of fp32


def _may_look(tensor: Tensor) -> bool:
    """Return whether values may decide what is computed: a GPU would make the host wait, compiled code would break."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Yield the rows that are worked on at a time."""
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    num_rows, vocab_size = logits.shape
    # Threads share an operation, and wait for each other at its end.
    step = max(CHUNK_ELEMENTS * torch.get_num_threads() // vocab_size, 1)
    if num_rows <= step:
        yield slice(None)
        return
    for first in range(0, num_rows, step):
        yield slice(first, first + step)


def _ids(targets: Targets, counted: Tensor) -> Tensor:
    """Return the groups as indices, 0 where a target does not count."""
    return targets.groups.long() * counted


def _slot_weights(targets: Targets, counted: Tensor, wide: torch.dtype) -> Tensor:
    """Return the weight of each target by its slot, 0 where it does not count."""
    return counted.to(wide) if targets.slot_scale is None else counted * targets.slot_scale


def _divisors(
    targets: Targets, counted: Tensor, class_weights: Tensor | None, wide: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return what divides the weights, one number or ``[N, 1]``; and what multiplies the rows' squared lse."""
    settings = targets.settings
    divisor = penalty = totals = None
    if targets.totals is not None:
        totals = targets.totals.sum(1)
        totals = totals + (totals == 0)
    if totals is not None and settings.normalize == "target":
        divisor = totals[0]
    elif totals is not None and settings.normalize == "row":
        weights = _slot_weights(targets, counted, wide)
        weight = (weights if class_weights is None else weights * class_weights).sum(1, keepdim=True)
        divisor = (weight + (weight == 0)) * totals[1]
    if settings.z_loss is not None:
        penalty = counted.any(1).to(wide) * settings.z_loss
        penalty = penalty if totals is None else penalty / totals[1]
    return divisor, penalty


def _capped(logits: Tensor, targets: Targets, wide: torch.dtype) -> Tensor:
    """Return the logits in the accumulation dtype, capped."""
    logits, softcap = logits.to(wide), targets.settings.softcap
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _rest_of(exponentials: Tensor) -> Tensor:
    """Return each row's sum without one maximum, whose exponential is 1; the values decide what is computed.

    A sum of at least 2, less 1, is as exact as it was. A smaller one has rounded the others away beside the 1; there no
    other element can be 1, so that leaving out what is 1 leaves out the maximum.
    """
    rest = exponentials.sum(1) - 1
    sure = rest < 1  # which NaN is not
    if sure.any():
        # A threshold leaves out what is 1 in a fifth of the time that a mask takes.
        rest[sure] = F.threshold(exponentials[sure].neg_(), -1, 0).sum(1).neg_()
    return rest


def _weighted_sum(exponentials: Tensor, below: Tensor) -> Tensor:
    """Return each row's sum of exponentials times what they are the exponentials of."""
    return (exponentials * below).masked_fill(exponentials == 0, 0).sum(1)


def torch_loss(logits: Tensor, targets: Targets, scores: Scores) -> None:
    """`launch_loss` in PyTorch, without the gradient: fill ``scores``."""
    wide = scores.rows.dtype
    settings = targets.settings
    counted = targets.groups != settings.ignore_index
    ids = _ids(targets, counted)
    # Finding the place of the maximum takes longer than the exponentials: only where asked, or where none may look.
    indexed = scores.predictions is not None or not _may_look(logits)
    distances = torch.empty(ids.shape, dtype=wide, device=logits.device)  # of the targets, below the maximum
    smooth = torch.empty_like(scores.rows[REST]) if settings.label_smoothing is not None else None
    by_id = targets.weights_by_id()
    below: Tensor | None = None
    for chunk in _chunks(logits):
        z = _capped(logits[chunk], targets, wide)
        maximum, arg_max = z.max(1, keepdim=True) if indexed else (z.amax(1, keepdim=True), None)
        distances[chunk] = maximum - z.gather(1, ids[chunk])
        # Reuse the last chunk's memory where possible: getting fresh memory takes longer than filling it.
        below = torch.sub(z, maximum, out=None if indexed or below is None else below[: len(z)])
        if smooth is not None:
            smooth[chunk] = below.mean(1) if by_id is None else below @ by_id
        if arg_max is None:
            rest = _rest_of(below.exp_())
        else:
            # The one maximum must not round the others away. Where it is infinite or NaN, the sum becomes NaN too.
            exponentials = torch.exp(below).scatter_(1, arg_max, 0)
            rest = exponentials.sum(1) + (maximum - maximum).squeeze(1)
        scores.rows[MAXIMUM, chunk] = maximum.squeeze(1)
        scores.rows[REST, chunk] = rest
        if scores.predictions is not None:
            predictions = arg_max
            if predictions is None or settings.softcap is not None:  # a cap may make the largest logits equal
                predictions = logits[chunk].argmax(1, keepdim=True)
            scores.predictions[chunk] = predictions.squeeze(1)
            scores.rows[ENTROPY, chunk] = torch.log1p(rest) - _weighted_sum(exponentials, below) / (1 + rest)
    _score_targets(distances, smooth, counted, ids, targets, scores)


def _score_targets(
    distances: Tensor, smooth: Tensor | None, counted: Tensor, ids: Tensor, targets: Targets, scores: Scores
) -> None:
    """Fill in the losses of targets and rows; ``smooth`` is a row's mean logit or ``Σ w_v z_v``, less the maximum."""
    settings = targets.settings
    class_weights = None if targets.class_weight is None else targets.class_weight[ids]
    divisor, penalty = _divisors(targets, counted, class_weights, distances.dtype)
    log_total = torch.log1p(scores.rows[REST])
    nll = log_total.unsqueeze(1) + distances
    losses = nll if class_weights is None else class_weights * nll
    if smooth is not None and settings.label_smoothing is not None:
        if targets.class_weight is None:
            smooth = log_total - smooth
        else:
            smooth = (targets.class_weight[-1] * log_total - smooth) / (targets.class_weight.shape[0] - 1)
        losses = (1 - settings.label_smoothing) * losses + settings.label_smoothing * smooth.unsqueeze(1)
    if scores.probabilities is not None:
        probabilities = torch.exp(-nll).masked_fill(~counted, 0)
        scores.probabilities[:] = probabilities
        losses = losses * probabilities
    if scores.losses is not None:
        scores.losses[:] = losses.masked_fill(~counted, 0)
    # A target that weighs nothing may have an infinite loss.
    if targets.slot_scale is None:
        loss = losses.masked_fill(~counted, 0).sum(1)
    else:
        weights = _slot_weights(targets, counted, distances.dtype)
        loss = (weights * losses).masked_fill(weights == 0, 0).sum(1)
    if divisor is not None:
        loss = loss / (divisor.squeeze(1) if divisor.ndim else divisor)
    if penalty is not None or scores.predictions is not None:
        lse = scores.rows[MAXIMUM] + log_total
        if penalty is not None:
            loss = loss + (penalty * lse.square()).masked_fill(penalty == 0, 0)
        if scores.predictions is not None:
            scores.rows[LSE] = lse
            hit = (scores.predictions.unsqueeze(1) == targets.groups) & counted
            scores.rows[ACCURACY] = hit.any(1).to(lse.dtype)
    scores.rows[LOSS] = loss


def torch_maxima(logits: Tensor, targets: Targets, shard: VocabularyShard, measures: Measures) -> None:
    """`launch_measures` in PyTorch: fill the maxima and the predictions; the sums come when the maxima are known."""
    checksums = row_checksums(targets.groups)
    measures.maxima[CHECKSUM], measures.maxima[MINUS_CHECKSUM] = checksums, -checksums
    for chunk in _chunks(logits):
        measures.maxima[MAXIMUM_LOGIT, chunk] = _capped(logits[chunk], targets, measures.maxima.dtype).amax(1)
        if measures.predictions is not None:
            measures.maxima[BEFORE_CAP, chunk], arg_max = logits[chunk].to(measures.maxima.dtype).max(1)
            measures.predictions[chunk] = shard.start + arg_max


def torch_sums(logits: Tensor, targets: Targets, shard: VocabularyShard, own: Tensor, measures: Measures) -> None:
    """`launch_sums` in PyTorch: fill the sums of this rank's logits below the maxima of all."""
    wide = measures.sums.dtype
    by_id = targets.weights_by_id()
    spoilt = torch.where(measures.find_other_rows(), float("nan"), 0.0)
    for chunk in _chunks(logits):
        z = _capped(logits[chunk], targets, wide)
        ids, mine = _local_ids(targets.groups[chunk], targets)
        maximum = measures.maxima[MAXIMUM_LOGIT, chunk].unsqueeze(1)
        below = z - maximum
        exponentials = torch.exp(below)
        # Ranks that hold the maximum leave it out of their sums and count it; all but one of them are added again.
        holds = own[MAXIMUM_LOGIT, chunk].unsqueeze(1) == maximum
        arg_max = z.argmax(1, keepdim=True)
        exponentials.scatter_(1, arg_max, exponentials.gather(1, arg_max).masked_fill_(holds, 0))
        measures.rest[chunk] = exponentials.sum(1) + (maximum - maximum).squeeze(1) + spoilt[chunk]
        measures.holders[chunk] = holds.squeeze(1).to(wide)
        measures.distances[:, chunk] = -below.gather(1, ids).masked_fill_(~mine, 0).t()
        if measures.shortfall is not None:
            measures.shortfall[chunk] = -(below.sum(1) if by_id is None else below @ by_id)
        if measures.weighted_sum is not None:
            measures.weighted_sum[chunk] = _weighted_sum(exponentials, below)


def torch_scores(targets: Targets, shard: VocabularyShard, measures: Measures, scores: Scores) -> None:
    """`launch_scores` in PyTorch: fill the ``scores`` from the sums of all ranks."""
    counted = targets.groups != targets.settings.ignore_index
    rest = measures.rest + (measures.holders - 1)
    scores.rows[MAXIMUM], scores.rows[REST] = measures.maxima[MAXIMUM_LOGIT], rest
    if scores.predictions is not None and measures.predictions is not None and measures.weighted_sum is not None:
        scores.predictions[:] = measures.predictions
        scores.rows[ENTROPY] = torch.log1p(rest) - measures.weighted_sum / (1 + rest)
    smooth = None
    if measures.shortfall is not None:
        smooth = -measures.shortfall / (shard.vocab_size if targets.class_weight is None else 1)
    _score_targets(measures.distances.t(), smooth, counted, _ids(targets, counted), targets, scores)


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
    counted = targets.groups != settings.ignore_index
    ids = _ids(targets, counted)
    class_weights = None if targets.class_weight is None else targets.class_weight[ids]
    divisor, penalty = _divisors(targets, counted, class_weights, wide)
    coefficients = _slot_weights(targets, counted, wide)
    coefficients = coefficients if divisor is None else coefficients / divisor
    scalar, per_target = scores.split_upstream(upstream)
    for factor in (scalar, per_target):
        coefficients = coefficients if factor is None else coefficients * factor
    idle = (coefficients == 0).all(1, keepdim=True)
    at_targets = coefficients if class_weights is None else coefficients * class_weights
    surplus: Tensor | float = 0.0
    if smoothing:
        at_targets = at_targets * (1 - smoothing)
        spread = smoothing / vocab_size * coefficients.sum(1, keepdim=True)  # what each logit loses to label smoothing
        by_id = targets.weights_by_id()
        surplus = spread * (vocab_size if targets.class_weight is None else targets.class_weight[-1])
    maxima, rests = scores.rows[MAXIMUM].unsqueeze(1), scores.rows[REST].unsqueeze(1)
    if penalty is not None:
        penalty = (penalty if scalar is None else penalty * scalar).unsqueeze(1)
        idle = idle & (penalty == 0)
        lse = maxima + torch.log1p(rests)
        surplus = surplus + 2 * (penalty * lse).masked_fill(penalty == 0, 0)
    softmax_weight = surplus + at_targets.sum(1, keepdim=True)
    # Where a target is the one logit with more than half of the softmax, `softmax_weight · p` and its coefficient are
    # nearly equal; there p = 1 - rest / (1 + rest), and what cancels is left out beforehand.
    off_sure = surplus - softmax_weight * (rests / (1 + rests))
    scale = softmax_weight / (1 + rests)
    ids, mine = _local_ids(targets.groups, targets)
    looks = _may_look(logits)
    any_idle = not looks or bool(idle.any())
    for chunk in _chunks(logits):
        z = _capped(logits[chunk], targets, wide)
        at_ids, weights = ids[chunk], at_targets[chunk]
        sure = (z.gather(1, at_ids) == maxima[chunk]) & (rests[chunk] < 1)
        # Into the gradient's own memory where that has the dtype; if the logits are there, they have been read by then.
        out = grad[chunk] if looks and grad.dtype == wide and settings.softcap is None else None
        dz = torch.sub(z, maxima[chunk], out=out).exp_().mul_(scale[chunk])
        others = weights.masked_fill(sure & mine[chunk], 0).sum(1, keepdim=True)
        softmax = dz.gather(1, at_ids)
        if targets.shard is not None:
            weights = weights.masked_fill(~mine[chunk], 0)
        # What equal targets take away is added up first: taken from p one after the other, each would be rounded.
        if looks:
            weights = dz.scatter_(1, at_ids, 0).scatter_add_(1, at_ids, weights).gather(1, at_ids)
        else:  # where additions have no order
            equals = at_ids.unsqueeze(2) == at_ids.unsqueeze(1)
            weights = (equals * weights.unsqueeze(1)).sum(2)
        dz.scatter_(1, at_ids, torch.where(sure, others + off_sure[chunk], softmax - weights))
        if smoothing:
            dz.sub_(spread[chunk] if by_id is None else spread[chunk] * by_id)
        if settings.softcap is not None:
            dz.mul_(1 - (z / settings.softcap).square())
        if any_idle:
            dz.masked_fill_(idle[chunk], 0)
        if out is None:
            grad[chunk] = dz.to(grad.dtype)
