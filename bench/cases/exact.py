"""What the losses and the means are exactly: fp64, and written so that nothing cancels.

PyTorch's own fp64 `log_softmax` is good to 1e-16 absolutely. A row whose target is 30 above all others has a loss of
1e-13, of which that leaves three digits; here everything that is small is a sum of small terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ExactRows(NamedTuple):
    """The loss of every target and what else is known of a row, in fp64."""

    losses: Tensor  # [N, K]
    lse: Tensor  # [N]
    entropy: Tensor  # [N]
    gradient: Tensor  # [N, V], of the sum of all losses


def exact_rows(logits: Tensor, groups: Tensor) -> ExactRows:
    """Score ``logits [N, V]`` against ``groups [N, K]``; every id counts."""
    logits = logits.double()
    largest, where = logits.max(1, keepdim=True)
    below = largest - logits
    exponentials = torch.exp(-below)
    others = exponentials.scatter(1, where, 0).sum(1, keepdim=True)
    total = 1 + others
    log_total = torch.log1p(others)
    softmax = exponentials / total
    losses, gradient = [], torch.zeros_like(logits)
    for target in groups.long().split(1, 1):
        at_target = exponentials.gather(1, target)
        rest = exponentials.scatter(1, target, 0).sum(1, keepdim=True)
        odds = rest / at_target
        losses.append(torch.where(odds < 1, torch.log1p(odds), log_total + below.gather(1, target)))
        gradient += softmax.scatter(1, target, -rest / total)
    entropy = log_total + (softmax * below).sum(1, keepdim=True)
    return ExactRows(torch.cat(losses, 1), (largest + log_total).squeeze(1), entropy.squeeze(1), gradient)


def half_ulps(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return half of the last place that each of the fp64 ``values`` has in ``dtype``: what its rounding may take."""
    info = torch.finfo(dtype)
    halves = torch.ldexp(torch.full_like(values, info.eps / 4), torch.frexp(values).exponent)
    return halves.masked_fill(values == 0, 0).clamp(min=info.smallest_normal * info.eps / 2)
