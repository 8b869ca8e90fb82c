"""What the kernels of the losses compute, in PyTorch: for the CPU, and for float64 on any device.

Rows come in chunks, so that temporaries stay in a CPU's cache. Compiled code takes all rows at once: the compiler fuses
them itself, and a loop over chunks would have it compile anew for every number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from npp_kernels.losses.scores import ACCURACY, ENTROPY, LOSS, LSE, MAXIMUM, REST, Scores
from npp_kernels.losses.targets import Targets

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


def torch_loss(logits: Tensor, targets: Targets, scores: Scores) -> None:
    """`launch_loss` in PyTorch, without the gradient: fill ``scores``."""
    wide = scores.rows.dtype
    settings = targets.settings
    coefficients, class_weights, penalty = _coefficients(targets, wide)
    for chunk in _chunks(logits, targets):
        z = _capped(logits[chunk], targets, wide)
        groups = targets.groups[chunk]
        counted = groups != settings.ignore_index
        maximum, arg_max = z.max(1, keepdim=True)
        below = z - maximum
        exponentials = torch.exp(below)
        # One maximum must not round the others away; where it is infinite or NaN, so is what comes of it.
        rest = exponentials.scatter_(1, arg_max, 0).sum(1) + (maximum - maximum).squeeze(1)
        log_total = torch.log1p(rest)
        nll = log_total.unsqueeze(1) - below.gather(1, groups.masked_fill(~counted, 0).long())
        of_ids = class_weights if isinstance(class_weights, float) else class_weights[chunk]
        losses = of_ids * nll
        if settings.label_smoothing is not None:
            if targets.class_weight is None:
                smooth = log_total - below.mean(1)
            else:
                smooth = (targets.class_weight[-1] * log_total - below @ targets.class_weight[:-1]) / below.shape[1]
            losses = (1 - settings.label_smoothing) * losses + settings.label_smoothing * smooth.unsqueeze(1)
        if scores.probabilities is not None:
            probabilities = torch.exp(-nll).masked_fill(~counted, 0)
            scores.probabilities[chunk] = probabilities
            losses = losses * probabilities
        losses = losses.masked_fill(~counted, 0)
        # A target that weighs nothing may have an infinite loss.
        loss = (coefficients[chunk] * losses).masked_fill(coefficients[chunk] == 0, 0).sum(1)
        lse = maximum.squeeze(1) + log_total
        if settings.z_loss is not None:
            loss = loss + (penalty[chunk] * lse.square()).masked_fill(penalty[chunk] == 0, 0)
        scores.rows[LOSS, chunk] = loss
        scores.rows[MAXIMUM, chunk] = maximum.squeeze(1)
        scores.rows[REST, chunk] = rest
        if scores.losses is not None:
            scores.losses[chunk] = losses
        if scores.predictions is not None:
            predictions = arg_max if settings.softcap is None else logits[chunk].argmax(1, keepdim=True)
            scores.predictions[chunk] = predictions.squeeze(1)
            hit = (predictions == groups) & counted
            scores.rows[LSE, chunk] = lse
            scores.rows[ACCURACY, chunk] = hit.any(1).to(wide)
            weighted = (exponentials * below).masked_fill(exponentials == 0, 0)
            scores.rows[ENTROPY, chunk] = log_total - weighted.sum(1) / (1 + rest)


def torch_gradient(logits: Tensor, grad: Tensor, targets: Targets, scores: Scores, upstream: Tensor) -> None:
    """`launch_gradient` in PyTorch; ``grad`` may be ``logits``."""
    vocab_size = logits.shape[1]
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
    by_id = None if targets.class_weight is None else targets.class_weight[:-1]
    surplus = spread * (vocab_size if targets.class_weight is None else targets.class_weight[-1])
    lse = scores.rows[MAXIMUM] + torch.log1p(scores.rows[REST])
    surplus = surplus + 2 * (penalty * lse).masked_fill(penalty == 0, 0).unsqueeze(1)
    at_targets = (1 - smoothing) * coefficients * class_weights
    softmax_weight = surplus + at_targets.sum(1, keepdim=True)
    for chunk in _chunks(logits, targets):
        z = _capped(logits[chunk], targets, wide)
        ids = targets.groups[chunk].masked_fill(targets.groups[chunk] == settings.ignore_index, 0).long()
        maximum, rest = (scores.rows[row, chunk].unsqueeze(1) for row in (MAXIMUM, REST))
        # Where a target is the one logit with more than half of the softmax, `softmax_weight · p` and its coefficient
        # are nearly equal; there p = 1 - rest / (1 + rest), and what cancels is left out beforehand.
        sure = (z.gather(1, ids) == maximum) & (rest < 1)
        others = at_targets[chunk].masked_fill(sure, 0).sum(1, keepdim=True)
        at_sure = (others + surplus[chunk]) - softmax_weight[chunk] * (rest / (1 + rest))
        dz = torch.exp(z - maximum).mul_(softmax_weight[chunk] / (1 + rest))
        # What equal targets take away is added up first: taken from p one after the other, each would be rounded.
        equals = ids.unsqueeze(2) == ids.unsqueeze(1)
        taken = (equals * at_targets[chunk].unsqueeze(1)).sum(2)
        dz.scatter_(1, ids, torch.where(sure, at_sure, dz.gather(1, ids) - taken))
        if settings.label_smoothing is not None:
            dz.sub_(spread[chunk] if by_id is None else spread[chunk] * by_id)
        if settings.softcap is not None:
            dz.mul_(1 - (z / settings.softcap).square())
        grad[chunk] = dz.masked_fill_(idle[chunk], 0).to(grad.dtype)
