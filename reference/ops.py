"""The operations of npp_kernels in plain PyTorch: the specification, and the oracle of every test and benchmark.

Each function says in a few lines what its fused twin must compute, in the dtype of its inputs: call it with float64 for
an oracle. Nothing here is fast, and gradients come from autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor


class PatchLossStats(NamedTuple):
    """Per-row statistics of the loss."""

    lse: Tensor
    accuracy: Tensor
    entropy: Tensor
    prediction: Tensor


def group_tokens(tokens: Tensor, patch: tuple[int, int]) -> Tensor:
    """Group a grid of ids into patches: ``[..., H, W] -> [..., P, K]``."""
    return rearrange(tokens, "... (h kh) (w kw) -> ... (h w) (kh kw)", kh=patch[0], kw=patch[1])


def group_mean(table: Tensor, groups: Tensor, *, ignore_index: int | None = None) -> Tensor:
    """Average the embeddings of each group: ``table [V, D], groups [..., K] -> [..., D]``."""
    counted = torch.ones_like(groups, dtype=torch.bool) if ignore_index is None else groups != ignore_index
    rows = F.embedding(groups.masked_fill(~counted, 0), table).masked_fill(~counted.unsqueeze(-1), 0)
    return rows.sum(-2) / counted.sum(-1, keepdim=True).clamp(min=1)


def patch_mean(embeddings: Tensor, patch: tuple[int, int]) -> Tensor:
    """Average embeddings over patches: ``[..., H, W, D] -> [..., P, D]``."""
    return reduce(embeddings, "... (h kh) (w kw) d -> ... (h w) d", "mean", kh=patch[0], kw=patch[1])


def divisor(total: Tensor) -> Tensor:
    """Return what weights of this total are divided by: 1 where there is nothing to divide by."""
    return torch.where(total == 0, 1, total)


def coefficients(
    weights: Tensor,  # [N, K]: by slot, 0 where ignored
    class_weights: Tensor,  # [N, K]: by id
    counted: Tensor,  # [N, K] bool
    normalize: str,
    num_targets: float | Tensor | None,
) -> Tensor:
    """Return the coefficient of every target's loss, ``c [N, K]``."""
    counts = weights * class_weights
    if normalize == "target":
        return weights / divisor(
            counts.sum() if num_targets is None else torch.as_tensor(num_targets, device=counts.device)
        )
    if normalize == "row":
        return weights / divisor(counts.sum(-1, keepdim=True)) / counted.any(-1).sum().clamp(min=1)
    slot_weights = weights.amax(0) if len(weights) else weights.sum(0)  # of the slots that have a target
    return weights / divisor((counted * class_weights).sum(0)) / divisor(slot_weights.sum())


def patch_cross_entropy(
    logits: Tensor,
    groups: Tensor,
    *,
    ignore_index: int = -100,
    slot_weights: Sequence[float] | Tensor | None = None,
    class_weight: Tensor | None = None,
    normalize: str = "target",
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_scaling: bool = False,
    num_targets: float | Tensor | None = None,
) -> tuple[Tensor, PatchLossStats]:
    """Score each row of logits ``[..., V]`` against its targets ``[..., K]``; return the loss and the statistics."""
    raw = logits.reshape(-1, logits.shape[-1])
    targets = groups.reshape(-1, groups.shape[-1])
    counted = targets != ignore_index
    safe = targets.masked_fill(~counted, 0)
    by_id = raw.new_ones(raw.shape[1]) if class_weight is None else class_weight.to(raw)
    class_weights = by_id[safe]

    # The logsumexp in two parts, maximum + log1p(rest), for their sum may round the second away.
    z = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    maximum, where = z.max(-1, keepdim=True)
    below = (z - maximum).scatter(-1, where, 0)  # the maximum itself is a constant, also to autograd
    rest = below.exp().scatter(-1, where, 0).sum(-1)
    log_total = torch.log1p(rest)
    nll = log_total.unsqueeze(-1) - below.gather(-1, safe)
    losses = class_weights * nll
    if label_smoothing:
        smooth = (by_id * (log_total.unsqueeze(-1) - below)).mean(-1, keepdim=True)
        losses = (1 - label_smoothing) * losses + label_smoothing * smooth
    if token_scaling:
        losses = losses * torch.exp(-nll.detach())
    losses = losses.masked_fill(~counted, 0)

    p = below.exp() / (1 + rest).unsqueeze(-1)
    prediction = raw.argmax(-1)
    hit = ((prediction.unsqueeze(-1) == targets) & counted).any(-1)
    entropy = log_total - (p * below).masked_fill(p == 0, 0).sum(-1)
    lse = maximum.squeeze(-1) + log_total
    stats = (lse, hit.to(lse.dtype), entropy, prediction)
    stats = PatchLossStats(*(value.detach().view(groups.shape[:-1]) for value in stats))

    if reduction == "none":
        return losses.view(groups.shape), stats
    weights = torch.ones(targets.shape[-1], dtype=z.dtype, device=z.device)
    if slot_weights is not None:
        weights = torch.as_tensor(slot_weights, dtype=z.dtype, device=z.device)
    weights = weights * counted
    if reduction == "mean":
        weights = coefficients(weights, class_weights, counted, normalize, num_targets)
    loss = (weights * losses).sum()
    if z_loss:
        penalties = lse.square() * counted.any(-1)
        loss = loss + z_loss * penalties.sum() / (counted.any(-1).sum().clamp(min=1) if reduction == "mean" else 1)
    return loss, stats


def linear_patch_cross_entropy(
    hidden: Tensor, weight: Tensor, groups: Tensor, *, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, PatchLossStats]:
    """Apply the output layer, ``hidden [..., D]`` times ``weight [V, D]``, and score the logits."""
    return patch_cross_entropy(F.linear(hidden, weight, bias), groups, **options)
