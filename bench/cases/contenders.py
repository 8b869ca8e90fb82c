"""Who takes part: npp_kernels and every other way to compute the same, each in its strongest form.

A contender builds, for a workload, a function of the leaves (and ids) that returns the operation's output. Whatever it
has to do to its inputs, such as repeating rows for a kernel that knows one target a row, happens inside that function
and is timed. Packages of others are imported when their contender is built; one that is not installed is absent.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

import npp_kernels
from bench.cases.shapes import DIRECTIONS, Workload

Function = Callable[..., Any]


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation."""

    operation: str
    name: str
    label: str  # as tables and plots call it
    build: Callable[[Workload], Function]  # the built function takes the leaves, then the ids
    ids: str = "groups"  # which ids it takes: "groups", "tokens", or "" for none
    package: str = ""  # what has to be installed
    compiled: bool = False
    needs_cuda: bool = False
    overwrites: bool = False  # its backward writes over the logits, which are restored before each run
    returns_gradients: bool = False  # gives (output, gradients) at once, with no help from autograd
    directions: tuple[str, ...] = DIRECTIONS  # a form that differs in its backward alone takes part in that alone
    single_target: bool = False  # knows K = 1 only
    reductions: tuple[str, ...] = ("mean", "none")

    @property
    def installed(self) -> bool:
        """Whether the package that it needs is there."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    def takes_part(self, workload: Workload, direction: str, device_type: str) -> bool:
        """Whether it can compute this workload in this direction on this kind of device."""
        return (
            self.operation == workload.operation
            and self.name not in workload.left_out
            and self.installed
            and (device_type == "cuda" or not self.needs_cuda)
            and workload.reduction in self.reductions
            and not (self.single_target and workload.group_size > 1)
            and direction in self.directions
            and not (self.overwrites and workload.host_bound)  # calls back to back leave no time to restore
        )


# --- embedding aggregation ---


def _unfolded_mean(embeddings: Tensor, patch: int) -> Tensor:
    """Average over patches as NPP's official code does: ``F.unfold`` on channels first, then a mean."""
    if patch == 1:  # as there, nothing is unfolded then
        return embeddings.flatten(1, 2)
    images, _, _, hidden_size = embeddings.shape
    columns = F.unfold(embeddings.permute(0, 3, 1, 2), kernel_size=patch, stride=patch)
    return columns.view(images, hidden_size, patch * patch, -1).mean(2).transpose(1, 2)


def _ours_group_mean(workload: Workload) -> Function:
    return npp_kernels.group_mean


def _official_group_mean(workload: Workload) -> Function:
    patch = workload.patch

    def official_group_mean(table: Tensor, tokens: Tensor) -> Tensor:
        return _unfolded_mean(F.embedding(tokens, table), patch)

    return official_group_mean


def _honest_group_mean(workload: Workload) -> Function:
    def honest_group_mean(table: Tensor, groups: Tensor) -> Tensor:
        return F.embedding(groups, table).mean(-2)

    return honest_group_mean


def _embedding_bag(workload: Workload) -> Function:
    def embedding_bag(table: Tensor, groups: Tensor) -> Tensor:
        return F.embedding_bag(groups.flatten(0, 1), table, mode="mean").unflatten(0, groups.shape[:2])

    return embedding_bag


def _ours_patch_mean(workload: Workload) -> Function:
    return partial(npp_kernels.patch_mean, patch=workload.patch)


def _official_patch_mean(workload: Workload) -> Function:
    return partial(_unfolded_mean, patch=workload.patch)


def _honest_patch_mean(workload: Workload) -> Function:
    patch = workload.patch

    def honest_patch_mean(embeddings: Tensor) -> Tensor:
        return reduce(embeddings, "b (h kh) (w kw) d -> b (h w) d", "mean", kh=patch, kw=patch)

    return honest_patch_mean


def _average_pool(workload: Workload) -> Function:
    patch = workload.patch

    def average_pool(embeddings: Tensor) -> Tensor:
        # The permuted view is channels_last, which the pooling keeps: nothing is moved.
        return F.avg_pool2d(embeddings.permute(0, 3, 1, 2), patch).permute(0, 2, 3, 1).flatten(1, 2)

    return average_pool


# --- losses ---


def _official_loss(logits: Tensor, groups: Tensor, reduction: str) -> Tensor:
    """Score as NPP's official code does: fp32 logits, repeated for every target."""
    expanded = logits.float().unsqueeze(1).repeat(1, groups.shape[1], 1).flatten(0, 1)
    losses = F.cross_entropy(expanded, groups.flatten(), reduction=reduction)
    return losses.view(groups.shape) if reduction == "none" else losses


def _honest_loss(logits: Tensor, groups: Tensor, reduction: str) -> Tensor:
    """Score without repeating anything: the logsumexp is shared, the targets are gathered."""
    scores = logits.float()
    losses = torch.logsumexp(scores, -1, keepdim=True) - scores.gather(-1, groups)
    return losses if reduction == "none" else losses.mean()


def _expanded(rows: Tensor, groups: Tensor) -> Tensor:
    """Repeat each row for each of its targets, where there is more than one."""
    return rows if groups.shape[1] == 1 else rows.repeat_interleave(groups.shape[1], 0)


def _ours_loss(workload: Workload, inplace_backward: bool = False) -> Function:
    return partial(npp_kernels.patch_cross_entropy, reduction=workload.reduction, inplace_backward=inplace_backward)


def _torch_loss(loss: Function, workload: Workload) -> Function:
    return partial(loss, reduction=workload.reduction)


def _liger_loss(workload: Workload) -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def liger_loss(logits: Tensor, groups: Tensor) -> Tensor:
        losses = liger_cross_entropy(_expanded(logits, groups), groups.flatten(), reduction=workload.reduction)
        return losses.view(groups.shape) if workload.reduction == "none" else losses

    return liger_loss


def _liger_kernel(workload: Workload) -> Function:
    import triton
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel

    block = min(MAX_FUSED_SIZE, triton.next_power_of_2(workload.vocab_size))

    def liger_kernel(logits: Tensor, groups: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        """Launch Liger's kernel by itself, without the host's waiting that surrounds it in Liger's own call."""
        logits = logits.detach()
        rows = logits.shape[0]
        losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
        liger_cross_entropy_kernel[(rows,)](
            X_ptr=logits,
            X_stride=logits.stride(0),
            Y_ptr=groups,
            Y_stride=groups.stride(0),
            weight_ptr=None,
            loss_ptr=losses,
            z_loss_ptr=None,
            loss_stride=1,
            token_accuracy_ptr=None,
            token_accuracy_stride=0,
            predicted_tokens_ptr=None,
            predicted_tokens_stride=0,
            n_cols=workload.vocab_size,
            n_non_ignore=rows,
            sum_non_ignore_weight=rows,
            weight_sum=0.0,
            ignore_index=-100,
            lse_square_scale=0.0,
            label_smoothing=0.0,
            reduction="mean",
            softcap=None,
            RETURN_Z_LOSS=False,
            RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False,
            BLOCK_SIZE=block,
            HAS_WEIGHT=False,
            HAS_SOFTCAPPING=False,
            HAS_GRADIENTS=True,
            num_warps=32,
        )
        return losses.sum(), (logits,)

    return liger_kernel


def _quack_loss(workload: Workload, inplace_backward: bool) -> Function:
    from quack.cross_entropy import cross_entropy

    def quack_loss(logits: Tensor, groups: Tensor) -> Tensor:
        losses = cross_entropy(
            _expanded(logits, groups),
            groups.flatten(),
            reduction=workload.reduction,
            # Repeated rows are a buffer of its own, which it may always overwrite.
            inplace_backward=inplace_backward or workload.group_size > 1,
        )
        return losses.view(groups.shape) if workload.reduction == "none" else losses

    return quack_loss


# --- output layer and loss ---


def _ours_linear(workload: Workload) -> Function:
    return npp_kernels.linear_patch_cross_entropy


def _torch_linear(loss: Function, workload: Workload) -> Function:
    def torch_linear(hidden: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
        return loss(F.linear(hidden, weight), groups, "mean")

    return torch_linear


def _liger_linear(workload: Workload) -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def liger_linear(hidden: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
        return liger_fused_linear_cross_entropy(_expanded(hidden, groups), weight, groups.flatten())

    return liger_linear


def _apple_linear(workload: Workload, **options: Any) -> Function:
    from cut_cross_entropy import linear_cross_entropy

    def apple_linear(hidden: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
        return linear_cross_entropy(_expanded(hidden, groups), weight, groups.flatten(), **options)

    return apple_linear


def _quack_linear(workload: Workload, chunked: bool) -> Function:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

    def quack_linear(hidden: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
        rows, targets = _expanded(hidden, groups), groups.flatten()
        if chunked:
            return chunked_linear_cross_entropy(rows, weight, targets)
        return linear_cross_entropy_func(rows, weight, None, targets, inplace_backward=True)

    return quack_linear


_MEAN = "group_mean"
_PATCH = "patch_mean"
_LOSS = "patch_cross_entropy"
_LINEAR = "linear_patch_cross_entropy"

CONTENDERS = (
    Contender(_MEAN, "ours", "npp_kernels", _ours_group_mean),
    Contender(_MEAN, "official_eager", "official (unfold)", _official_group_mean, ids="tokens"),
    Contender(_MEAN, "official_compiled", "official, compiled", _official_group_mean, ids="tokens", compiled=True),
    Contender(_MEAN, "honest_eager", "embedding + mean", _honest_group_mean),
    Contender(_MEAN, "honest_compiled", "embedding + mean, compiled", _honest_group_mean, compiled=True),
    Contender(_MEAN, "embedding_bag", "F.embedding_bag", _embedding_bag),
    Contender(_PATCH, "ours", "npp_kernels", _ours_patch_mean, ids=""),
    Contender(_PATCH, "official_eager", "official (unfold)", _official_patch_mean, ids=""),
    Contender(_PATCH, "official_compiled", "official, compiled", _official_patch_mean, ids="", compiled=True),
    Contender(_PATCH, "honest_eager", "einops mean", _honest_patch_mean, ids=""),
    Contender(_PATCH, "honest_compiled", "einops mean, compiled", _honest_patch_mean, ids="", compiled=True),
    Contender(_PATCH, "average_pool", "F.avg_pool2d", _average_pool, ids=""),
    Contender(_LOSS, "ours", "npp_kernels", _ours_loss),
    Contender(
        _LOSS,
        "ours_in_place",
        "npp_kernels, in place",
        partial(_ours_loss, inplace_backward=True),
        overwrites=True,
        directions=("forward_backward",),
    ),
    Contender(_LOSS, "official_eager", "official (repeat)", partial(_torch_loss, _official_loss)),
    Contender(_LOSS, "official_compiled", "official, compiled", partial(_torch_loss, _official_loss), compiled=True),
    Contender(_LOSS, "honest_eager", "lse - gather", partial(_torch_loss, _honest_loss)),
    Contender(_LOSS, "honest_compiled", "lse - gather, compiled", partial(_torch_loss, _honest_loss), compiled=True),
    Contender(_LOSS, "liger", "Liger", _liger_loss, package="liger_kernel", needs_cuda=True, overwrites=True),
    Contender(
        _LOSS,
        "liger_kernel",
        "Liger, kernel alone",
        _liger_kernel,
        package="liger_kernel",
        needs_cuda=True,
        overwrites=True,
        directions=("forward_backward",),
        returns_gradients=True,
        single_target=True,
        reductions=("mean",),
    ),
    Contender(
        _LOSS,
        "quack",
        "QuACK",
        partial(_quack_loss, inplace_backward=False),
        package="quack",
        needs_cuda=True,
    ),
    Contender(
        _LOSS,
        "quack_in_place",
        "QuACK, in place",
        partial(_quack_loss, inplace_backward=True),
        package="quack",
        needs_cuda=True,
        overwrites=True,
        directions=("forward_backward",),
        single_target=True,
    ),
    Contender(_LINEAR, "ours", "npp_kernels", _ours_linear),
    Contender(_LINEAR, "official_eager", "official (repeat)", partial(_torch_linear, _official_loss)),
    Contender(
        _LINEAR,
        "official_compiled",
        "official, compiled",
        partial(_torch_linear, _official_loss),
        compiled=True,
    ),
    Contender(_LINEAR, "honest_eager", "lse - gather", partial(_torch_linear, _honest_loss)),
    Contender(
        _LINEAR,
        "honest_compiled",
        "lse - gather, compiled",
        partial(_torch_linear, _honest_loss),
        compiled=True,
    ),
    Contender(_LINEAR, "liger", "Liger, fused linear", _liger_linear, package="liger_kernel", needs_cuda=True),
    Contender(_LINEAR, "apple_cce", "Apple CCE", _apple_linear, package="cut_cross_entropy", needs_cuda=True),
    # Its default leaves out small gradients; where that is too far from the oracle, this form still takes part.
    Contender(
        _LINEAR,
        "apple_cce_exact",
        "Apple CCE, unfiltered",
        partial(_apple_linear, filter_eps=None),
        package="cut_cross_entropy",
        needs_cuda=True,
    ),
    Contender(
        _LINEAR,
        "quack_linear",
        "QuACK, fused linear",
        partial(_quack_linear, chunked=True),
        package="quack",
        needs_cuda=True,
    ),
    Contender(
        _LINEAR,
        "quack_linear_whole",
        "QuACK, linear then loss",
        partial(_quack_linear, chunked=False),
        package="quack",
        needs_cuda=True,
    ),
)
BY_NAME = {(contender.operation, contender.name): contender for contender in CONTENDERS}
PACKAGES = {"liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy", "quack": "quack-kernels"}


def absent_packages() -> list[str]:
    """Return the names, as on PyPI, of the packages of contenders that are not installed."""
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
