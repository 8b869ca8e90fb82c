"""Cross entropy of one row of logits against the K targets of a group.

    loss    = Σ_pj c_pj · (lse_p − z_p[t_pj])                            lse_p = logsumexp_v z_pv
    dz_pv   = (Σ_j c_pj) · softmax(z_p)_v − Σ_{j: t_pj = v} c_pj

Every normalisation is a choice of the coefficients c; logits are never expanded to K rows.

Bytes where the upstream gradient is one number: logits once and gradient once. The forward already writes the gradient
for an upstream of 1, the rule in training; the backward looks at the upstream, on the device, and redoes the work only
where it is another number. Otherwise (``reduction="none"``; float16, whose loss scale must act before the rounding; the
CPU): logits once forward, logits and gradient once backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from npp_kernels._autograd import first_order_only
from npp_kernels._checks import check_floating, check_groups, check_id_range, check_same_device, described
from npp_kernels._dispatch import runs_kernels
from npp_kernels._loss_kernels import LossSettings, count_targets, launch_gradient, launch_loss, launch_scale

NORMALIZATIONS = ("target", "row", "slot")
REDUCTIONS = ("mean", "sum", "none")

# The PyTorch path works on so many logits at a time, to keep its temporaries in a CPU's cache.
TORCH_CHUNK_ELEMENTS = 1 << 20


class PatchLossStats(NamedTuple):
    """What the loss knows of each row: fp32, detached, of the groups' leading shape."""

    lse: Tensor
    """The logsumexp of the row's logits."""
    accuracy: Tensor
    """1 where the largest logit (the first of equal ones) is one of the row's targets, else 0."""
    entropy: Tensor
    """The entropy of the row's softmax, in nats."""


class Coefficients(NamedTuple):
    """What the coefficients of all targets are formed from, on the device."""

    slot_scale: Tensor | None  # [K]
    totals: Tensor | None  # [2, n]: partial sums of the targets' weight, and of the rows with a target
    ticket: Tensor | None = None  # [1]: for `launch_loss`, if the counting was the last thing launched


def check_options(
    group_size: int,
    slot_weights: Sequence[float] | Tensor | None,
    normalize: str,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    num_targets: float | Tensor | None,
) -> None:
    """Raise a ValueError on an option out of its range, or on options that exclude each other."""
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: expected one of {NORMALIZATIONS}, got {normalize!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing!r}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: expected a finite number of at least 0, got {z_loss!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number above 0 or None, got {softcap!r}")
    if slot_weights is not None:
        length = slot_weights.shape if isinstance(slot_weights, Tensor) else (len(slot_weights),)
        if tuple(length) != (group_size,):
            raise ValueError(f"slot_weights: expected {group_size} weights, one per slot, got shape {tuple(length)}")
        if reduction == "none":
            raise ValueError('slot_weights: expected None with reduction="none", which returns unweighted losses')
    if z_loss and reduction == "none":
        raise ValueError(f'z_loss: expected 0 with reduction="none", which has no place for it, got {z_loss!r}')
    if num_targets is not None:
        if normalize != "target" or reduction != "mean":
            raise ValueError(
                'num_targets: expected None unless normalize="target" and reduction="mean", whose divisor it is, '
                f"got normalize={normalize!r} and reduction={reduction!r}"
            )
        if isinstance(num_targets, Tensor) and num_targets.numel() != 1:
            raise ValueError(f"num_targets: expected a number or a 0-d tensor, got {described(num_targets)}")


def find_coefficients(
    groups: Tensor,
    ignore_index: int,
    slot_weights: Sequence[float] | Tensor | None,
    normalize: str,
    reduction: str,
    z_loss: float,
    num_targets: float | Tensor | None,
    like: Tensor,
) -> tuple[Coefficients, str]:
    """Return what the coefficients are formed from, and what the kernels divide by (`LossSettings.normalize`)."""
    wide = torch.promote_types(like.dtype, torch.float32)
    weights = None
    if slot_weights is not None:
        weights = torch.as_tensor(slot_weights, dtype=wide, device=like.device).detach().contiguous()
    if reduction != "mean":
        return Coefficients(weights, None), "none"

    totals = ticket = None
    if (normalize != "slot" and num_targets is None) or z_loss:
        if runs_kernels(like):
            totals, ticket = count_targets(groups, weights, ignore_index)
        else:
            counted = groups != ignore_index
            weight = counted.sum() if weights is None else (counted * weights).sum()
            totals = torch.stack([weight.to(wide), counted.any(1).sum().to(wide)]).view(2, 1)
    if num_targets is not None:
        ticket = None
        if totals is None:
            totals = torch.ones((2, 1), dtype=wide, device=like.device)
        else:
            totals[0].zero_()
        totals[0, :1] = num_targets
    if normalize == "slot":
        counts = (groups != ignore_index).sum(0).to(wide)
        weights = torch.ones_like(counts) if weights is None else weights
        weight_in_use = (weights * (counts > 0)).sum()
        weight_in_use = torch.where(weight_in_use == 0, 1, weight_in_use)
        return Coefficients(weights / counts.clamp(min=1) / weight_in_use, totals), "none"
    return Coefficients(weights, totals, ticket), normalize


def _torch_coefficients(
    groups: Tensor, coefficients: Coefficients, settings: LossSettings, wide: torch.dtype
) -> Tensor:
    """Return the coefficients ``[N, K]`` as the kernels form them."""
    counted = groups != settings.ignore_index
    weights = counted.to(wide)
    if coefficients.slot_scale is not None:
        weights = weights * coefficients.slot_scale
    if settings.normalize == "none":
        return weights
    assert coefficients.totals is not None
    totals = coefficients.totals.sum(1)
    totals = torch.where(totals == 0, 1, totals)
    if settings.normalize == "target":
        return weights / totals[0]
    row_weight = weights.sum(1, keepdim=True)
    return weights / (torch.where(row_weight == 0, 1, row_weight) * totals[1])


def _torch_penalty(groups: Tensor, coefficients: Coefficients, settings: LossSettings, wide: torch.dtype) -> Tensor:
    """Return what multiplies the squared lse of each row, ``[N]``."""
    penalty = (groups != settings.ignore_index).any(1).to(wide) * (settings.z_loss or 0.0)
    if coefficients.totals is not None:
        penalty = penalty / coefficients.totals[1].sum().clamp(min=1)
    return penalty


def _torch_capped(logits: Tensor, softcap: float | None, wide: torch.dtype) -> Tensor:
    """Return the logits in the accumulation dtype, capped."""
    logits = logits.to(wide)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def torch_loss(
    logits: Tensor,
    groups: Tensor,
    coefficients: Coefficients,
    losses: Tensor | None,
    rows: Tensor,
    settings: LossSettings,
    stats: bool,
) -> None:
    """`launch_loss` in PyTorch, without the gradient: fills ``losses [N, K]`` and ``rows [4, N]``."""
    wide = rows.dtype
    vocab_size = logits.shape[1]
    target_coefficients = _torch_coefficients(groups, coefficients, settings, wide)
    penalty = _torch_penalty(groups, coefficients, settings, wide)
    step = max(TORCH_CHUNK_ELEMENTS // vocab_size, 1)
    for first in range(0, logits.shape[0], step):
        chunk = slice(first, first + step)
        z = _torch_capped(logits[chunk], settings.softcap, wide)
        targets = groups[chunk]
        counted = targets != settings.ignore_index
        lse = torch.logsumexp(z, 1)
        target_losses = lse.unsqueeze(1) - z.gather(1, targets.masked_fill(~counted, 0).long())
        if settings.label_smoothing is not None:
            smooth = (lse - z.mean(1)).unsqueeze(1)
            target_losses = (1 - settings.label_smoothing) * target_losses + settings.label_smoothing * smooth
        target_losses = target_losses.masked_fill(~counted, 0)
        loss = (target_coefficients[chunk] * target_losses).sum(1)
        if settings.z_loss is not None:
            loss = loss + (penalty[chunk] * lse.square()).masked_fill(penalty[chunk] == 0, 0)
        rows[0, chunk] = loss
        rows[1, chunk] = lse
        if losses is not None:
            losses[chunk] = target_losses
        if stats:
            hit = (logits[chunk].argmax(1, keepdim=True) == targets) & counted
            p = torch.softmax(z, 1)
            rows[2, chunk] = hit.any(1).to(wide)
            rows[3, chunk] = -torch.xlogy(p, p).sum(1)


def torch_gradient(
    logits: Tensor,
    grad: Tensor,
    groups: Tensor,
    coefficients: Coefficients,
    rows: Tensor,
    upstream: Tensor,
    settings: LossSettings,
) -> None:
    """`launch_gradient` in PyTorch; ``grad`` may be ``logits``."""
    wide = rows.dtype
    vocab_size = logits.shape[1]
    target_coefficients = _torch_coefficients(groups, coefficients, settings, wide) * upstream
    row_coefficients = target_coefficients.sum(1, keepdim=True)
    penalty = _torch_penalty(groups, coefficients, settings, wide) * (upstream if upstream.ndim == 0 else 0)
    softmax_weight = row_coefficients + 2 * (penalty * rows[1]).masked_fill(penalty == 0, 0).unsqueeze(1)
    idle = (target_coefficients == 0).all(1) & (penalty == 0)
    smoothing = settings.label_smoothing or 0.0
    step = max(TORCH_CHUNK_ELEMENTS // vocab_size, 1)
    for first in range(0, logits.shape[0], step):
        chunk = slice(first, first + step)
        z = _torch_capped(logits[chunk], settings.softcap, wide)
        targets = groups[chunk].masked_fill(groups[chunk] == settings.ignore_index, 0).long()
        dz = torch.exp(z - rows[1, chunk].unsqueeze(1)).mul_(softmax_weight[chunk])
        dz.sub_(smoothing / vocab_size * row_coefficients[chunk])
        dz.scatter_add_(1, targets, (smoothing - 1) * target_coefficients[chunk])
        if settings.softcap is not None:
            dz.mul_(1 - (z / settings.softcap).square())
        grad[chunk] = dz.masked_fill_(idle[chunk].unsqueeze(1), 0).to(grad.dtype)


def shaped_result(
    loss: Tensor, rows: Tensor, groups: Tensor, return_stats: bool
) -> Tensor | tuple[Tensor, PatchLossStats]:
    """Return the loss, per target in the shape of ``groups``, and where asked the statistics from ``rows [4, N]``."""
    if loss.ndim:
        loss = loss.view(groups.shape)
    if not return_stats:
        return loss
    return loss, PatchLossStats(*(rows[column].float().view(groups.shape[:-1]) for column in (1, 2, 3)))


class _PatchCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, groups, slot_scale, totals, ticket, settings, per_target, wants_grad, inplace, stats):
        num_rows, group_size = groups.shape
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows = torch.empty((4, num_rows), dtype=wide, device=logits.device)
        losses = torch.empty((num_rows, group_size), dtype=wide, device=logits.device) if per_target else None
        grad = loss = None
        if runs_kernels(logits):
            if wants_grad and not per_target and logits.dtype != torch.float16:
                grad = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
                if inplace:
                    # Whoever saved these logits for a backward of its own must find out.
                    torch.autograd.graph.increment_version(logits)
            if num_rows:
                loss = launch_loss(logits, grad, groups, slot_scale, totals, losses, rows, settings, stats, ticket)
        else:
            torch_loss(logits, groups, Coefficients(slot_scale, totals), losses, rows, settings, stats)
        if loss is None:
            loss = rows[0].sum() if losses is None else losses
        ctx.save_for_backward(logits, groups, slot_scale, totals, rows, grad)
        ctx.settings, ctx.inplace, ctx.ran = settings, inplace, False
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        return loss, rows

    @staticmethod
    @first_order_only("patch_cross_entropy")
    def backward(ctx, upstream, _):
        if upstream is None:
            return (None,) * 10
        # torch.compile may trace this more than once for one backward.
        again = ctx.ran and not torch.compiler.is_compiling()
        ctx.ran = True
        if ctx.inplace and again:
            raise RuntimeError(
                "inplace_backward=True: expected one backward, got a second; the first has overwritten the logits"
            )
        logits, groups, slot_scale, totals, rows, grad = ctx.saved_tensors
        ready = grad is not None and not again
        if ready and ctx.inplace:
            launch_scale(grad, upstream)
        else:
            if not ready:
                grad = logits if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
            upstream = upstream.contiguous()
            if not runs_kernels(logits):
                torch_gradient(logits, grad, groups, Coefficients(slot_scale, totals), rows, upstream, ctx.settings)
            elif logits.numel():
                launch_gradient(logits, grad, groups, slot_scale, totals, rows, upstream, ctx.settings, skip_unit=ready)
        return grad, *(None,) * 9


def patch_cross_entropy(
    logits: Tensor,
    groups: Tensor,
    *,
    ignore_index: int = -100,
    slot_weights: Sequence[float] | Tensor | None = None,
    normalize: str = "target",
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_targets: float | Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PatchLossStats]:
    """Score each row of logits against all targets of its group: ``logits [..., V], groups [..., K]``.

    >>> import torch, npp_kernels
    >>> logits = torch.zeros(2, 3, 8, requires_grad=True)
    >>> groups = torch.tensor([[[0, 1], [2, 2], [3, -100]], [[4, 5], [6, 7], [-100, -100]]])
    >>> loss = npp_kernels.patch_cross_entropy(logits, groups)
    >>> round(loss.item(), 4)    # the logarithm of 8
    2.0794
    >>> loss.backward()
    >>> logits.grad.shape
    torch.Size([2, 3, 8])

    ``loss = Σ_pj c_pj · (lse_p − z_p[t_pj])``, with coefficients c by ``normalize``, w the slot weights and m 1 for a
    target that counts:

    - ``"target"``: ``w_j m_pj / Σ_pj w_j m_pj``, what `F.cross_entropy` gives over all targets;
    - ``"row"``: ``w_j m_pj / (Σ_j w_j m_pj) / rows with a target``;
    - ``"slot"``: ``w_j m_pj / (Σ_p m_pj) / Σ_j w_j`` over the slots that have a target.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64.
        groups: ``[..., K]``, int32 or int64, ids in ``[0, V)`` or ``ignore_index``; the leading axes are those of
            ``logits``.
        ignore_index: a target that counts nowhere.
        slot_weights: K weights of at least 0, one per place in the group; ones where None.
        normalize: ``"target"``, ``"row"`` or ``"slot"``; used by ``reduction="mean"``.
        reduction: ``"mean"``; ``"sum"``, with ``c_pj = w_j m_pj``; or ``"none"``, the loss of every target.
        label_smoothing: in [0, 1], as in `F.cross_entropy`.
        z_loss: λ of the penalty ``λ · lse²``, averaged over the rows with a target, or summed under ``"sum"``.
        softcap: s of ``s · tanh(z / s)``, which is applied to the logits before everything else.
        num_targets: a number or a 0-d tensor that replaces the divisor of ``"target"``: the targets of the whole batch,
            over all micro-batches or ranks. It is not read on the host.
        inplace_backward: let the gradient overwrite the logits. They belong to the loss from the call on: it may write
            at once, and there can be only one backward. Under `torch.compile`, which plans memory itself, it has no
            effect.
        return_stats: also return `PatchLossStats`, from the same pass.

    Returns:
        The loss, 0-d, or with ``reduction="none"`` ``[..., K]`` with 0 where ignored; fp32, or fp64 for fp64 logits.
        With ``return_stats`` a pair of it and the statistics.

    Raises:
        TypeError: a tensor of another dtype or a `DTensor`.
        ValueError: shapes, devices or options that do not fit, or, with `check_ids` on, a bad id on a GPU.
        IndexError: an id out of range, on the CPU. On a GPU the loss and the row's gradient are NaN.
        RuntimeError: a double backward, or a second one with ``inplace_backward``.

    Numerics:
        Softmax and sums in fp32 (fp64 for float64); the gradient is rounded once to the logits' dtype. Where all
        targets are ignored, loss and gradients are 0. Reproducible from run to run.

    Memory:
        The gradient, or nothing with ``inplace_backward``; and 16 bytes a row.

    Source:
        NPP (arXiv 2412.15321), section 3.3; PatchTrain (arXiv 2407.12665) for ``"slot"``.
    """
    check_floating("logits", logits)
    check_groups(groups)
    check_same_device("groups", groups, "logits", logits)
    if logits.ndim < 1 or logits.shape[:-1] != groups.shape[:-1]:
        raise ValueError(
            f"groups: expected the leading shape of logits, {tuple(logits.shape[:-1])}, and K, got {described(groups)}"
        )
    if logits.shape[-1] < 1:
        raise ValueError(f"logits: expected a vocabulary of at least 1, got {described(logits)}")
    check_options(groups.shape[-1], slot_weights, normalize, reduction, label_smoothing, z_loss, softcap, num_targets)
    check_id_range(groups, logits.shape[-1], ignore_index)

    flat_groups = groups.reshape(-1, groups.shape[-1]).contiguous()
    flat_logits = logits.reshape(-1, logits.shape[-1])
    if flat_logits.stride(-1) != 1:
        flat_logits = flat_logits.contiguous()
    coefficients, divide_by = find_coefficients(
        flat_groups, ignore_index, slot_weights, normalize, reduction, z_loss, num_targets, like=logits
    )
    settings = LossSettings(ignore_index, divide_by, label_smoothing or None, z_loss or None, softcap)
    loss, rows = _PatchCrossEntropy.apply(
        flat_logits,
        flat_groups,
        coefficients.slot_scale,
        coefficients.totals,
        coefficients.ticket,
        settings,
        reduction == "none",
        torch.is_grad_enabled() and logits.requires_grad,
        inplace_backward and not torch.compiler.is_compiling(),
        return_stats,
    )
    return shaped_result(loss, rows, groups, return_stats)
