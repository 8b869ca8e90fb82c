"""Cross entropy of one row of logits against the K targets of a group.

    loss    = Σ_pj c_pj · (lse_p − z_p[t_pj])                            lse_p = logsumexp_v z_pv
    dz_pv   = (Σ_j c_pj) · softmax(z_p)_v − Σ_{j: t_pj = v} c_pj

Every normalisation is a choice of the coefficients c; logits are never expanded to K rows.

Bytes where the upstream gradient is one number: logits once and gradient once. The forward already writes the gradient
for an upstream of 1, the rule in training; the backward looks at the upstream, on the device, and redoes the work only
where it is another number. Otherwise (``reduction="none"``; float16, whose loss scale must act before the rounding; the
CPU; a slice of the vocabulary): logits once forward, logits and gradient once backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npp_kernels._autograd import as_rows, first_order_only, refuse_transforms, wants_backward
from npp_kernels._checks import check_floating, check_groups, check_id_range, check_same_device, described, rows_overlap
from npp_kernels._dispatch import runs_kernels
from npp_kernels.losses.gradient_kernels import launch_gradient, launch_scale
from npp_kernels.losses.options import LossOptions, PatchLossStats
from npp_kernels.losses.row_kernels import launch_loss
from npp_kernels.losses.scores import ACCURACY, ENTROPY, LOSS, LSE, Scores
from npp_kernels.losses.sharded import find_scores
from npp_kernels.losses.targets import Settings, Targets, find_targets
from npp_kernels.losses.torch_path import torch_gradient, torch_loss
from npp_kernels.vocabulary_shard import VocabularyShard, find_vocab_size, is_dtensor, local_slice


class Wishes(NamedTuple):
    """What a call is to return, and where its gradient may go."""

    per_target: bool
    grad: bool
    inplace: bool
    stats: bool


def found(loss: Tensor | None, scores: Scores) -> tuple[Tensor, ...]:
    """Return the loss, and for statistics the rows and the predictions."""
    if loss is None:
        loss = scores.rows[LOSS].sum() if scores.losses is None else scores.losses
    return (loss,) if scores.predictions is None else (loss, scores.rows, scores.predictions)


def returned(ctx: Any, loss: Tensor | None, scores: Scores) -> tuple[Tensor, ...]:
    """Return the same from an autograd function."""
    ctx.set_materialize_grads(False)
    results = found(loss, scores)
    if len(results) > 1:
        ctx.mark_non_differentiable(*results[1:])
    return results


def shaped_result(results: tuple[Tensor, ...], groups: Tensor) -> Tensor | tuple[Tensor, PatchLossStats]:
    """Return the loss, per target in the shape of ``groups``, and the statistics, where there are any."""
    loss, *others = results
    if loss.ndim:
        loss = loss.view(groups.shape)
    if not others:
        return loss
    rows, predictions = others
    shape = groups.shape[:-1]
    lse, accuracy, entropy = (rows[row].float().view(shape) for row in (LSE, ACCURACY, ENTROPY))
    return loss, PatchLossStats(lse, accuracy, entropy, predictions.view(shape))


def handed_out(grad: Tensor) -> Tensor:
    """Return a saved gradient as one that the caller may change, without the change being seen as one of ours.

    What is handed out becomes ``x.grad``, which ``x.grad.zero_()`` overwrites; a second backward computes anew. Nor may
    logits that were overwritten by their gradient be handed out themselves: they have a graph behind them.
    """
    return grad if torch.compiler.is_compiling() else grad.data


class _PatchCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        groups: Tensor,
        slot_scale: Tensor | None,
        class_weight: Tensor | None,
        totals: Tensor | None,
        ticket: Tensor | None,
        settings: Settings,
        shard: VocabularyShard | None,
        wishes: Wishes,
    ) -> tuple[Tensor, ...]:
        targets = Targets(groups, slot_scale, class_weight, totals, settings, shard)
        per_target, wants_grad, inplace, stats = wishes
        grad = loss = None
        if shard is not None:
            scores = find_scores(logits, targets, per_target=per_target, stats=stats)
        else:
            scores = Scores.empty(targets, logits.dtype, per_target=per_target, stats=stats)
            if runs_kernels(logits):
                if wants_grad and not per_target and logits.dtype != torch.float16:
                    grad = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
                    if inplace:
                        # Whoever saved these logits for a backward of its own must find out.
                        torch.autograd.graph.increment_version(logits)
                if groups.shape[0]:
                    loss = launch_loss(logits, grad, targets, scores, ticket)
            else:
                torch_loss(logits, targets, scores)
        ctx.save_for_backward(logits, *targets.tensors(), scores.rows, scores.probabilities, grad)
        ctx.settings, ctx.shard, ctx.inplace, ctx.ran = settings, shard, inplace, False
        return returned(ctx, loss, scores)

    @staticmethod
    @first_order_only("patch_cross_entropy")
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 9
        # torch.compile may trace this more than once for one backward.
        again = ctx.ran and not torch.compiler.is_compiling()
        ctx.ran = True
        if ctx.inplace and again:
            raise RuntimeError(
                "inplace_backward=True: expected one backward, got a second; the first has overwritten the logits"
            )
        logits, groups, slot_scale, class_weight, totals, rows, probabilities, grad = ctx.saved_tensors
        targets = Targets(groups, slot_scale, class_weight, totals, ctx.settings, ctx.shard)
        scores = Scores(rows, None, probabilities, None)
        ready = grad is not None and not again
        if ready and ctx.inplace:
            launch_scale(grad, upstream)
        else:
            if not ready:
                grad = logits if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
            upstream = upstream.contiguous()
            if not runs_kernels(logits):
                torch_gradient(logits, grad, targets, scores, upstream)
            elif logits.numel():
                launch_gradient(logits, grad, targets, scores, upstream, skip_unit=ready)
        return handed_out(grad) if ready or ctx.inplace else grad, *(None,) * 8


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
    inplace_backward: bool = False,
    return_stats: bool = False,
    shard: VocabularyShard | None = None,
) -> Tensor | tuple[Tensor, PatchLossStats]:
    """Return the cross entropy of each row against all its targets: ``logits [..., V], groups [..., K]``.

    >>> import torch, npp_kernels
    >>> logits = torch.zeros(2, 3, 8, requires_grad=True)
    >>> groups = torch.tensor([[[0, 1], [2, 2], [3, -100]], [[4, 5], [6, 7], [-100, -100]]])
    >>> loss = npp_kernels.patch_cross_entropy(logits, groups)
    >>> round(loss.item(), 4)    # the logarithm of 8
    2.0794
    >>> loss.backward()
    >>> logits.grad.shape
    torch.Size([2, 3, 8])

    ``loss = Σ_pj c_pj · (lse_p − z_p[t_pj])`` over rows p and slots j. The coefficients c follow from ``normalize``;
    w are the slot weights, and m is 1 for a target that counts, 0 for one that is ignored:

    - ``"target"``: ``w_j m_pj / Σ_pj w_j m_pj``, what `F.cross_entropy` gives over all targets;
    - ``"row"``: ``w_j m_pj / (Σ_j w_j m_pj) / rows with a target``;
    - ``"slot"``: ``w_j m_pj / (Σ_p m_pj) / Σ_j w_j`` over the slots that have a target.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64.
        groups: ``[..., K]``, int32 or int64, ids in ``[0, V)`` or ``ignore_index``; the leading axes are those of
            ``logits``.
        ignore_index: the value of a target that does not count.
        slot_weights: K weights of at least 0, one for each slot; ones where None.
        class_weight: ``[V]``, floating point: one weight for each id, ``weight`` in `F.cross_entropy`. A target's loss
            is multiplied by that of its id, and so is m in the divisors above.
        normalize: ``"target"``, ``"row"`` or ``"slot"``; used by ``reduction="mean"``.
        reduction: ``"mean"``; ``"sum"``, with ``c_pj = w_j m_pj``; or ``"none"``, the loss of every target.
        label_smoothing: in [0, 1], as in `F.cross_entropy`.
        z_loss: λ of the penalty ``λ · lse²``, averaged over this call's rows with a target, with ``num_targets`` too,
            or summed under ``"sum"``.
        softcap: s of ``s · tanh(z / s)``, which is applied to the logits before everything else.
        token_scaling: multiply each target's loss by its probability, taken as a constant (``use_token_scaling`` in
            Liger Kernel). Divisors and the z-loss stay as they are.
        num_targets: a number or a 0-d tensor that replaces the divisor of ``"target"``: the targets of the whole batch,
            over all micro-batches or ranks; 0 counts as 1. It is not read on the host.
        inplace_backward: let the gradient overwrite the logits. They belong to the loss from the call on: it may write
            at once, and there can be only one backward. Under `torch.compile`, which plans memory itself, it has no
            effect.
        return_stats: also return `PatchLossStats`, from the same pass.
        shard: this rank's slice of the vocabulary, where a process group shares it out. ``logits`` are then
            ``[..., V_r]``; rows, ``groups`` (with ids of the whole vocabulary) and options are the same on every rank.
            A `DTensor` of logits that is sharded on its last axis needs none.

    Returns:
        The loss, 0-d, or with ``reduction="none"`` ``[..., K]`` with 0 where ignored; fp32, or fp64 for fp64 logits.
        With ``return_stats`` a pair of it and the statistics.

    Raises:
        TypeError: a tensor of another dtype, or a `DTensor` that is placed otherwise.
        ValueError: shapes, devices or options that do not fit, or, with `check_ids` on, a bad id on a GPU.
        IndexError: an id out of range, on the CPU. On a GPU the loss and the row's gradient are NaN.
        RuntimeError: a double backward, or a second one with ``inplace_backward``.

    Numerics:
        Softmax and sums in fp32 (fp64 for float64); the gradient is rounded once to the logits' dtype. Where all
        targets are ignored, loss and gradients are 0. Reproducible from run to run.

    Memory:
        The gradient, or nothing with ``inplace_backward``; and 12 bytes a row, with statistics 32.

    Source:
        NPP (arXiv 2412.15321), section 3.3; PatchTrain (arXiv 2407.12665) for ``"slot"``.
    """
    if is_dtensor(logits):
        logits, shard = local_slice("logits", logits, -1, shard)
    check_floating("logits", logits)
    check_groups(groups)
    check_same_device("groups", groups, "logits", logits)
    if logits.ndim < 1 or logits.shape[:-1] != groups.shape[:-1]:
        raise ValueError(
            f"groups: expected the leading shape of logits, {tuple(logits.shape[:-1])}, and K, got {described(groups)}"
        )
    if logits.shape[-1] < 1:
        raise ValueError(f"logits: expected a vocabulary of at least 1, got {described(logits)}")
    vocab_size = find_vocab_size("logits", logits, -1, shard)
    options = LossOptions(
        ignore_index, slot_weights, class_weight, normalize, reduction,
        label_smoothing, z_loss, softcap, token_scaling, num_targets,
    )  # fmt: skip
    options.check()
    options.check_sizes(groups.shape[-1], vocab_size, logits)
    inplace = inplace_backward and not torch.compiler.is_compiling()
    if inplace and rows_overlap(logits):
        raise ValueError(
            f"inplace_backward: expected logits whose elements each have memory of their own, got {described(logits)} "
            f"with strides {logits.stride()}, as from expand or unfold; pass a copy, or leave it off"
        )
    refuse_transforms("patch_cross_entropy")
    check_id_range(groups, vocab_size, ignore_index)

    flat_groups = as_rows(groups).contiguous()
    flat_logits = as_rows(logits)
    if flat_logits.stride(-1) != 1:
        flat_logits = flat_logits.contiguous()
    targets, ticket = find_targets(flat_groups, options, logits, shard)
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    wishes = Wishes(reduction == "none", wants_grad, inplace, return_stats)
    if runs_kernels(flat_logits) or wants_backward(flat_logits) or shard is not None:
        results = _PatchCrossEntropy.apply(flat_logits, *targets.tensors(), ticket, targets.settings, shard, wishes)
    else:
        scores = Scores.empty(targets, logits.dtype, per_target=wishes.per_target, stats=return_stats)
        torch_loss(flat_logits, targets, scores)
        results = found(None, scores)
    return shaped_result(results, groups)
