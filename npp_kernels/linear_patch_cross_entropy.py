"""Output layer and patch cross entropy in one, so that the logits of all rows never exist together.

    z = hidden · weightᵀ + bias,  the loss of `patch_cross_entropy` on z
    grad_hidden = dz · weight     grad_weight = dzᵀ · hidden     grad_bias = Σ_p dz_p

Work: three products of 2·N·D·V operations, no more. Rows come in chunks: a chunk of logits is made, scored, overwritten
by its gradient and used up by the two gradient products before the next one is made, all in the forward. The backward
looks at the upstream gradient, on the device, and scales the two results only where it is not 1. Where gradients need
the upstream first (``reduction="none"``, float16), the forward keeps only the lse and the backward makes the chunks
again: four products.

Bytes beside the products: each chunk of logits is read once and its gradient written once by the loss kernel, and the
fp32 gradient of the weight is read and written once a chunk, so chunks should be few: see `CHUNK_ROWS`. In bfloat16 on
a Hopper GPU the first product leaves the softmax's exponentials, from which the other two products follow with nothing
but vectors in between: see `_exponentials`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from npp_kernels._autograd import first_order_only
from npp_kernels._checks import check_floating, check_groups, check_id_range, check_same_device, described
from npp_kernels._dispatch import cdiv, runs_kernels
from npp_kernels._exponentials import (
    ScaledGradient,
    find_offsets,
    launch_exponentials,
    scale_rows,
    serves_exponentials,
)
from npp_kernels._loss_kernels import LossSettings, launch_gradient, launch_loss, launch_scale
from npp_kernels.patch_cross_entropy import (
    Coefficients,
    PatchLossStats,
    check_options,
    find_coefficients,
    shaped_result,
    torch_gradient,
    torch_loss,
)

# Adding a chunk to the fp32 gradient of the weight reads and writes 8·V·D bytes, against 6·rows·V·D operations: at an
# H100's rates 311/rows of the products' time, whatever V and D. 4,096 rows lose 8%, 512 rows 60% (H100, 2026-11-24:
# 31 ms for V = 128,256, D = 2048, 8,192 rows in chunks of 512 rows; 21 in chunks of 2,048; 20 in chunks of 4,096).
CHUNK_ROWS = 4096
CHUNK_ELEMENTS = 1 << 29  # and no more than a gigabyte of 16-bit logits, where the vocabulary is wide
CHUNK_MULTIPLE = 128


def _chunks(num_rows: int, vocab_size: int, chunk_rows: int | None, spare_rows: int) -> Iterator[slice]:
    """Yield the rows of each chunk: equal sizes, multiples of a product's tile where there is room.

    Several chunks need a buffer as large as ``spare_rows`` of logits; as many rows more in a single one cost no more.
    """
    if num_rows == 0:
        return
    limit = chunk_rows
    if limit is None:
        limit = min(CHUNK_ROWS, max(CHUNK_ELEMENTS // vocab_size, CHUNK_MULTIPLE))
        if num_rows <= limit + spare_rows:
            limit = num_rows
    step = cdiv(num_rows, cdiv(num_rows, limit))
    if step + CHUNK_MULTIPLE <= limit:
        step = cdiv(step, CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``left · right`` in ``dtype``, accumulated at least in fp32."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left · right`` to ``total``, in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class _Problem:
    """One call's tensors, in the dtype of its products, and how its chunks are scored."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: Tensor,
        coefficients: Coefficients,
        settings: LossSettings,
        dtype: torch.dtype,
        chunk_rows: int | None,
        wants: Sequence[bool],
    ) -> None:
        self.hidden = hidden.to(dtype)
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.groups = groups
        self.coefficients = coefficients
        self.settings = settings
        self.wants = wants  # gradients of hidden, weight and bias
        self.gradient_dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        self.wide = torch.promote_types(dtype, torch.float32)
        # The fp32 gradient of the weight is a buffer of its own where the weight has another dtype.
        summed_apart = wants[1] and weight.dtype != self.wide
        spare_rows = self.wide.itemsize * weight.shape[1] // dtype.itemsize if summed_apart else 0
        self.chunks = list(_chunks(hidden.shape[0], weight.shape[0], chunk_rows, spare_rows))

    def logits(self, chunk: slice) -> Tensor:
        """Return one chunk of logits."""
        if self.bias is None:
            return self.hidden[chunk] @ self.weight.t()
        return torch.addmm(self.bias, self.hidden[chunk], self.weight.t())

    def score(self, chunk: slice, logits: Tensor, losses: Tensor | None, rows: Tensor, stats: bool, grad: bool) -> None:
        """Fill the chunk's ``losses`` and ``rows``; with ``grad``, overwrite ``logits`` by their gradient."""
        chunk_losses = None if losses is None else losses[chunk]
        if runs_kernels(logits):
            launch_loss(
                logits,
                logits if grad else None,
                self.groups[chunk],
                self.coefficients.slot_scale,
                self.coefficients.totals,
                chunk_losses,
                rows[:, chunk],
                self.settings,
                stats,
            )
            return
        torch_loss(logits, self.groups[chunk], self.coefficients, chunk_losses, rows[:, chunk], self.settings, stats)
        if grad:
            unit = torch.ones((), dtype=self.wide, device=logits.device)
            torch_gradient(logits, logits, self.groups[chunk], self.coefficients, rows[:, chunk], unit, self.settings)

    def serves_exponentials(self, stats: bool) -> bool:
        """Return whether exponentials can take the place of logits; see `_exponentials`."""
        return not stats and self.bias is None and serves_exponentials(self.hidden, self.weight, self.settings)

    def exponentials(self, chunk: slice, offsets: Tensor, rows: Tensor) -> ScaledGradient:
        """Fill the chunk's ``rows``; return the factors of the logits' gradient."""
        return launch_exponentials(
            self.hidden[chunk],
            self.weight,
            offsets[chunk],
            self.groups[chunk],
            self.coefficients.slot_scale,
            self.coefficients.totals,
            rows[:, chunk],
            self.settings,
        )

    def overwrite_with_gradient(self, chunk: slice, logits: Tensor, rows: Tensor, upstream: Tensor) -> None:
        """Overwrite the chunk's ``logits`` by their gradient, for a known upstream."""
        chunk_upstream = upstream if upstream.ndim == 0 else upstream[chunk]
        if runs_kernels(logits):
            launch_gradient(
                logits,
                logits,
                self.groups[chunk],
                self.coefficients.slot_scale,
                self.coefficients.totals,
                rows[:, chunk],
                chunk_upstream,
                self.settings,
                skip_unit=False,
            )
        else:
            torch_gradient(
                logits, logits, self.groups[chunk], self.coefficients, rows[:, chunk], chunk_upstream, self.settings
            )


class _Gradients:
    """The gradients of the arguments, gathered chunk by chunk; None for those that nobody wants."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        hidden_dtype, self.weight_dtype, self.bias_dtype = problem.gradient_dtypes
        self.hidden: Tensor | None = None
        if problem.wants[0]:
            self.hidden = torch.empty(problem.hidden.shape, dtype=hidden_dtype, device=problem.hidden.device)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(
        self, chunk: slice, dlogits: Tensor, row_scale: Tensor | None = None, scaled_hidden: Tensor | None = None
    ) -> None:
        """Use up one chunk of the logits' gradient, or its factors (see `ScaledGradient`).

        Args:
            chunk: which rows.
            dlogits: ``[N, V]``.
            row_scale: ``[N]``, what the rows are still to be multiplied by.
            scaled_hidden: ``[N, D]``, the hidden states, already multiplied by it.
        """
        problem = self.problem
        hidden = problem.hidden[chunk] if scaled_hidden is None else scaled_hidden
        if self.hidden is not None:
            if row_scale is not None:
                scale_rows(_product(dlogits, problem.weight, problem.wide), row_scale, self.hidden[chunk])
            elif self.hidden.dtype == dlogits.dtype:
                torch.mm(dlogits, problem.weight, out=self.hidden[chunk])
            else:
                self.hidden[chunk] = dlogits @ problem.weight
        if problem.wants[1]:
            if self.weight is not None:
                _add_product(self.weight, dlogits.t(), hidden)
            else:
                # A single chunk is summed inside one product, which rounds once; several need fp32 between them.
                dtype = self.weight_dtype if len(problem.chunks) == 1 else problem.wide
                self.weight = _product(dlogits.t(), hidden, dtype)
        if problem.wants[2]:
            total = dlogits.sum(0, dtype=problem.wide)
            self.bias = total if self.bias is None else self.bias.add_(total)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in the dtypes of the arguments."""
        problem = self.problem
        if problem.wants[1] and self.weight is None:
            self.weight = torch.zeros_like(problem.weight)
        if problem.wants[2] and self.bias is None:
            self.bias = problem.weight.new_zeros(problem.weight.shape[0])
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(self.weight_dtype),
            None if self.bias is None else self.bias.to(self.bias_dtype),
        )


def _scaled(grad: Tensor | None, upstream: Tensor) -> Tensor | None:
    """Return ``grad · upstream``, with the kernels in place."""
    if grad is None or grad.numel() == 0:
        return grad
    if runs_kernels(grad):
        launch_scale(grad.view(-1, grad.shape[-1]), upstream)
        return grad
    # Where looking costs nothing, a gradient as large as the weight need not be multiplied by 1.
    if grad.device.type == "cpu" and not torch.compiler.is_compiling() and upstream.item() == 1:
        return grad
    return grad * upstream


def _loss_and_gradients(
    arguments: tuple[Any, ...], losses: Tensor | None, stats: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Fill ``losses``; return the rows' statistics and the wanted gradients. The arguments are those of `_Problem`."""
    device = arguments[0].device
    with torch.autocast(device.type, enabled=False):
        problem = _Problem(*arguments)
        rows = torch.empty((4, problem.groups.shape[0]), dtype=problem.wide, device=device)
        gradients = _Gradients(problem) if any(problem.wants) else None
        if gradients is not None and problem.serves_exponentials(stats):
            offsets = find_offsets(problem.hidden, problem.weight)
            for chunk in problem.chunks:
                gradients.add(chunk, *problem.exponentials(chunk, offsets, rows))
        else:
            for chunk in problem.chunks:
                logits = problem.logits(chunk)
                problem.score(chunk, logits, losses, rows, stats, grad=gradients is not None)
                if gradients is not None:
                    gradients.add(chunk, logits)
                del logits  # before the next chunk is made
        return rows, (None, None, None) if gradients is None else gradients.finish()


@torch.library.custom_op("npp_kernels::linear_loss_and_gradients", mutates_args=())
def _opaque_loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: Tensor,
    slot_scale: Tensor | None,
    totals: Tensor | None,
    ignore_index: int,
    normalize: str,
    label_smoothing: float | None,
    z_loss: float | None,
    softcap: float | None,
    dtype: torch.dtype,
    chunk_rows: int | None,
    wants: list[bool],
    stats: bool,
) -> list[Tensor]:
    """Return ``rows`` and the wanted gradients: `_loss_and_gradients` as `torch.compile` sees it, without looking in.

    Traced, its kernels would neither overlap nor take exponentials in place of logits: both want to see the tensors.
    """
    coefficients = Coefficients(slot_scale, totals)
    settings = LossSettings(ignore_index, normalize, label_smoothing, z_loss, softcap)
    arguments = (hidden, weight, bias, groups, coefficients, settings, dtype, chunk_rows, wants)
    rows, grads = _loss_and_gradients(arguments, None, stats)
    return [rows, *(grad for grad in grads if grad is not None)]


@_opaque_loss_and_gradients.register_fake
def _(hidden, weight, bias, groups, *options):
    dtype, _, wants, _ = options[-4:]
    rows = hidden.new_empty((4, groups.shape[0]), dtype=torch.promote_types(dtype, torch.float32))
    wanted = [tensor for tensor, want in zip((hidden, weight, bias), wants, strict=True) if want]
    return [rows, *(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in wanted)]


class _LinearPatchCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, groups, slot_scale, totals, settings, dtype, chunk_rows, per_target, wants, stats
    ):
        wide = torch.promote_types(dtype, torch.float32)
        losses = torch.empty(groups.shape, dtype=wide, device=hidden.device) if per_target else None
        ctx.problem_options = (settings, dtype, chunk_rows, wants)
        ctx.ran = False
        early = any(wants) and not per_target and dtype != torch.float16
        wanted = wants if early else (False, False, False)
        if torch.compiler.is_compiling() and early:
            found = _opaque_loss_and_gradients(
                hidden, weight, bias, groups, slot_scale, totals, *settings, dtype, chunk_rows, list(wanted), stats
            )
            rows = found[0]
            grads = tuple(found[sum(wanted[: i + 1])] if want else None for i, want in enumerate(wanted))
        else:
            coefficients = Coefficients(slot_scale, totals)
            arguments = (hidden, weight, bias, groups, coefficients, settings, dtype, chunk_rows, wanted)
            rows, grads = _loss_and_gradients(arguments, losses, stats)
        ctx.early = early
        ctx.save_for_backward(hidden, weight, bias, groups, slot_scale, totals, rows, *grads)
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        return (rows[0].sum() if losses is None else losses), rows

    @staticmethod
    @first_order_only("linear_patch_cross_entropy")
    def backward(ctx, upstream, _):
        if upstream is None:
            return (None,) * 12
        hidden, weight, bias, groups, slot_scale, totals, rows, *grads = ctx.saved_tensors
        # torch.compile may trace this more than once for one backward.
        again = ctx.ran and not torch.compiler.is_compiling()
        ctx.ran = True
        if ctx.early and not again:
            grads = tuple(_scaled(grad, upstream) for grad in grads)
        else:
            with torch.autocast(hidden.device.type, enabled=False):
                problem = _Problem(hidden, weight, bias, groups, Coefficients(slot_scale, totals), *ctx.problem_options)
                gradients = _Gradients(problem)
                upstream = upstream.contiguous()
                for chunk in problem.chunks:
                    logits = problem.logits(chunk)
                    problem.overwrite_with_gradient(chunk, logits, rows, upstream)
                    gradients.add(chunk, logits)
                    del logits  # before the next chunk is made
                grads = gradients.finish()
        return *grads, *(None,) * 9


def linear_patch_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    groups: Tensor,
    *,
    bias: Tensor | None = None,
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
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, PatchLossStats]:
    """Apply the output layer and score its rows: ``hidden [..., D], weight [V, D], groups [..., K]``.

    >>> import torch, npp_kernels
    >>> hidden = torch.randn(2, 3, 16, requires_grad=True)
    >>> head = torch.nn.Linear(16, 8, bias=False)
    >>> groups = torch.randint(8, (2, 3, 4))
    >>> loss = npp_kernels.linear_patch_cross_entropy(hidden, head.weight, groups)
    >>> loss.backward()
    >>> hidden.grad.shape, head.weight.grad.shape
    (torch.Size([2, 3, 16]), torch.Size([8, 16]))

    ``patch_cross_entropy(F.linear(hidden, weight, bias), groups, ...)``, without the ``[N, V]`` logits.

    Args:
        hidden: ``[..., D]``, float32, bfloat16, float16 or float64.
        weight: ``[V, D]``, of the same dtype; under `torch.autocast` both may have any, and the products run in
            autocast's.
        groups: ``[..., K]``, int32 or int64, ids in ``[0, V)`` or ``ignore_index``; the leading axes are those of
            ``hidden``.
        bias: ``[V]`` or None.
        ignore_index: see `patch_cross_entropy`, as for all options up to ``num_targets``.
        slot_weights: K weights, one per place in the group.
        normalize: ``"target"``, ``"row"`` or ``"slot"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1].
        z_loss: λ of ``λ · lse²``.
        softcap: s of ``s · tanh(z / s)``.
        num_targets: a number or a 0-d tensor that replaces the divisor of ``"target"``.
        inplace_backward: accepted so that both losses take the same options; the logits of a chunk are never the
            caller's, and are always overwritten.
        return_stats: also return `PatchLossStats`, from the same pass.
        chunk_rows: at most so many rows of logits exist at a time; where None, 4,096, or fewer so that they stay below
            2²⁹ elements, or all, where that takes no more memory.

    Returns:
        The loss, 0-d, or with ``reduction="none"`` ``[..., K]`` with 0 where ignored; fp32, or fp64 for fp64 products.
        With ``return_stats`` a pair of it and the statistics.

    Raises:
        TypeError: a tensor of another dtype or a `DTensor`.
        ValueError: shapes, devices or options that do not fit, or, with `check_ids` on, a bad id on a GPU.
        IndexError: an id out of range, on the CPU. On a GPU the loss and all gradients it touches are NaN.
        RuntimeError: a double backward.

    Numerics:
        Logits are rounded to the products' dtype, as `F.linear` does, except in bfloat16 on a Hopper GPU, where 4,096
        rows and more without ``bias``, ``label_smoothing``, ``softcap`` and ``return_stats`` round only the softmax's
        numerators. Softmax and sums in fp32. The gradient of ``weight`` accumulates in fp32 across chunks and is
        rounded once to the dtype of ``weight``.

    Memory:
        One chunk of logits, ``chunk_rows · V`` elements, and the gradients, which exist from the forward on; with more
        than one chunk the gradient of ``weight`` in fp32. Where logits are not rounded, up to 6 bytes for each element
        of a chunk of ``hidden`` besides.

    Source:
        NPP (arXiv 2412.15321), section 3.3; chunked products as in Liger Kernel (arXiv 2410.10989). That exponentials
        with offsets can stand for logits between the products is also how QuACK computes the loss of one target.
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight, ndim=2)
    check_groups(groups)
    check_same_device("weight", weight, "hidden", hidden)
    check_same_device("groups", groups, "hidden", hidden)
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden: expected [..., {weight.shape[1]}] for weight {tuple(weight.shape)}, "
                         f"got {described(hidden)}")  # fmt: skip
    if hidden.shape[:-1] != groups.shape[:-1]:
        raise ValueError(
            f"groups: expected the leading shape of hidden, {tuple(hidden.shape[:-1])}, and K, got {described(groups)}"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"weight: expected a vocabulary of at least 1, got {described(weight)}")
    if bias is not None:
        check_floating("bias", bias, ndim=1)
        check_same_device("bias", bias, "hidden", hidden)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: expected [{weight.shape[0]}], one per row of weight, got {described(bias)}")
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
    if not torch.is_autocast_enabled(device_type):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != hidden.dtype:
                raise TypeError(
                    f"{name}: expected the dtype of hidden, {hidden.dtype}, outside of autocast, got {tensor.dtype}"
                )
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"chunk_rows: expected an int of at least 1 or None, got {chunk_rows!r}")
    check_options(groups.shape[-1], slot_weights, normalize, reduction, label_smoothing, z_loss, softcap, num_targets)
    check_id_range(groups, weight.shape[0], ignore_index)

    flat_groups = groups.reshape(-1, groups.shape[-1]).contiguous()
    coefficients, divide_by = find_coefficients(
        flat_groups,
        ignore_index,
        slot_weights,
        normalize,
        reduction,
        z_loss,
        num_targets,
        like=hidden.new_empty(0, dtype=dtype),
    )
    settings = LossSettings(ignore_index, divide_by, label_smoothing or None, z_loss or None, softcap)
    grad_enabled = torch.is_grad_enabled()
    loss, rows = _LinearPatchCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        flat_groups,
        coefficients.slot_scale,
        coefficients.totals,
        settings,
        dtype,
        chunk_rows,
        reduction == "none",
        tuple(grad_enabled and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)),
        return_stats,
    )
    return shaped_result(loss, rows, groups, return_stats)
