"""Output layer and patch cross entropy in one, so that the logits of all rows never exist together.

    z = hidden · weightᵀ + bias,  the loss of `patch_cross_entropy` on z
    grad_hidden = dz · weight     grad_weight = dzᵀ · hidden     grad_bias = Σ_p dz_p

Work: three products of 2·N·D·V operations, no more. Rows come in chunks: a chunk of logits is made, scored, overwritten
by its gradient and used up by the two gradient products before the next one is made, all in the forward. The backward
looks at the upstream gradient, on the device, and scales the two results only where it is not 1. Where gradients need
the upstream first (``reduction="none"``, float16), the forward keeps only the scores and the backward makes the chunks
again: four products.

Bytes beside the products: each chunk of logits is read once and its gradient written once by the loss kernel, and the
fp32 gradient of the weight is read and written once a chunk, so chunks should be few: see `chunks`. In bfloat16 on
a Hopper GPU the first product leaves the softmax's exponentials, from which the other two products follow with nothing
but vectors in between: see `exponentials`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npp_kernels._autograd import as_rows, first_order_only, refuse_transforms
from npp_kernels._checks import check_floating, check_groups, check_id_range, check_same_device, described
from npp_kernels._dispatch import runs_kernels
from npp_kernels.losses.chunks import Gradients, Layer, Plan, gradients_from_scores, loss_and_gradients
from npp_kernels.losses.gradient_kernels import launch_scale
from npp_kernels.losses.options import LossOptions, PatchLossStats, check_chunk_rows
from npp_kernels.losses.patch_cross_entropy import handed_out, returned, shaped_result
from npp_kernels.losses.scores import Scores
from npp_kernels.losses.sharded import flattened_shard, restored_shard
from npp_kernels.losses.targets import Settings, Targets, find_targets
from npp_kernels.vocabulary_shard import VocabularyShard, find_vocab_size, is_dtensor, local_slice, whole_tensor


class Request(NamedTuple):
    """What a call asks for, beside its tensors."""

    settings: Settings
    shard: VocabularyShard | None
    plan: Plan
    early: bool
    """Whether the forward makes the gradients, for an upstream of 1."""
    per_target: bool
    stats: bool


def _scaled(grad: Tensor | None, upstream: Tensor) -> Tensor | None:
    """Return a saved gradient times ``upstream``, with the kernels in place; see `handed_out`."""
    if grad is None or grad.numel() == 0:
        return grad
    if runs_kernels(grad):
        launch_scale(as_rows(grad), upstream)
    # Where looking costs nothing, a gradient as large as the weight need not be multiplied by 1.
    elif grad.device.type != "cpu" or torch.compiler.is_compiling() or upstream.item() != 1:
        return grad * upstream
    return handed_out(grad)


# How torch.compile sees the two halves of the loss: as operators that it does not look into. Traced, the kernels would
# neither overlap nor take exponentials in place of logits, which both want to see the tensors, and the number of chunks
# would be compiled in.
_CALL = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor groups, Tensor? slot_scale, Tensor? class_weight, "
    "Tensor? totals, int ignore_index, str normalize, float? label_smoothing, float? z_loss, float? softcap, "
    "bool token_scaling, int[]? sizes, int rank, str group_name, ScalarType dtype, int? chunk_rows, bool[] wants"
)
_NUM_CALL = _CALL.count(",") + 1


def _flattened(layer: Layer, targets: Targets, plan: Plan) -> tuple[Any, ...]:
    """Return the arguments of the operators, in the order of their schema."""
    shard = flattened_shard(targets.shard)
    return *layer, *targets.tensors(), *targets.settings, *shard, plan.dtype, plan.chunk_rows, list(plan.wants)


def _restored(arguments: Sequence[Any]) -> tuple[Layer, Targets, Plan]:
    """Return what `_flattened` made a list of."""
    groups, slot_scale, class_weight, totals = arguments[3:7]
    shard = restored_shard(*arguments[13:16])
    dtype, chunk_rows, wants = arguments[16:19]
    return (
        Layer(*arguments[:3]),
        Targets(groups, slot_scale, class_weight, totals, Settings(*arguments[7:13]), shard),
        Plan(dtype, chunk_rows, tuple(wants)),
    )


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


@torch.library.custom_op(
    "npp_kernels::linear_loss", mutates_args=(), schema=f"({_CALL}, bool per_target, bool stats) -> Tensor[]"
)
def _linear_loss(*arguments: Any) -> list[Tensor]:
    """Return the scores that there are, and the wanted gradients for an upstream of 1."""
    layer, targets, plan = _restored(arguments)
    per_target, stats = arguments[_NUM_CALL:]
    scores = Scores.empty(targets, plan.dtype, per_target=per_target, stats=stats)
    grads = loss_and_gradients(layer, targets, plan, scores)
    return _present(*scores, *grads)


@_linear_loss.register_fake
def _(*arguments: Any) -> list[Tensor]:
    layer, targets, plan = _restored(arguments)
    per_target, stats = arguments[_NUM_CALL:]
    scores = Scores.empty(targets, plan.dtype, per_target=per_target, stats=stats)
    return _present(*scores, *_empty_gradients(layer, plan))


@torch.library.custom_op(
    "npp_kernels::linear_gradients",
    mutates_args=(),
    schema=f"({_CALL}, Tensor rows, Tensor? probabilities, Tensor upstream) -> Tensor[]",
)
def _linear_gradients(*arguments: Any) -> list[Tensor]:
    """Return the wanted gradients for an upstream that is known."""
    rows, probabilities, upstream = arguments[_NUM_CALL:]
    scores = Scores(rows, None, probabilities, None)
    return _present(*gradients_from_scores(*_restored(arguments), scores, upstream))


@_linear_gradients.register_fake
def _(*arguments: Any) -> list[Tensor]:
    layer, _, plan = _restored(arguments)
    return _empty_gradients(layer, plan)


def _empty_gradients(layer: Layer, plan: Plan) -> list[Tensor]:
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, want in zip(layer, plan.wants, strict=True)
        if want and tensor is not None
    ]


def _in_their_places(present: list[Tensor], there: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Return the tensors that an operator returned, and None for what was not there."""
    return tuple(present[sum(there[:index])] if is_there else None for index, is_there in enumerate(there))


def _run_loss(layer: Layer, targets: Targets, request: Request) -> tuple[Scores, Gradients]:
    """Return the scores, and the gradients that the forward makes."""
    plan = request.plan if request.early else request.plan.wanting(False, False, False)
    if not torch.compiler.is_compiling():
        scores = Scores.empty(targets, plan.dtype, per_target=request.per_target, stats=request.stats)
        return scores, loss_and_gradients(layer, targets, plan, scores)
    found = _linear_loss(*_flattened(layer, targets, plan), request.per_target, request.stats)
    there = (request.per_target, targets.settings.token_scaling, request.stats, *plan.wants)
    losses, probabilities, predictions, *grads = _in_their_places(found[1:], there)
    hidden, weight, bias = grads
    return Scores(found[0], losses, probabilities, predictions), (hidden, weight, bias)


class _LinearPatchCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: Tensor,
        slot_scale: Tensor | None,
        class_weight: Tensor | None,
        totals: Tensor | None,
        request: Request,
    ) -> tuple[Tensor, ...]:
        targets = Targets(groups, slot_scale, class_weight, totals, request.settings, request.shard)
        scores, grads = _run_loss(Layer(hidden, weight, bias), targets, request)
        ctx.request, ctx.ran = request, False
        ctx.save_for_backward(hidden, weight, bias, *targets.tensors(), scores.rows, scores.probabilities, *grads)
        return returned(ctx, None, scores)

    @staticmethod
    @first_order_only("linear_patch_cross_entropy")
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 8
        hidden, weight, bias, groups, slot_scale, class_weight, totals, rows, probabilities, *grads = ctx.saved_tensors
        request = ctx.request
        # torch.compile may trace this more than once for one backward.
        again = ctx.ran and not torch.compiler.is_compiling()
        ctx.ran = True
        layer = Layer(hidden, weight, bias)
        targets = Targets(groups, slot_scale, class_weight, totals, request.settings, request.shard)
        if request.early:
            if again:
                grads = _run_loss(layer, targets, request)[1]
            grads = [_scaled(grad, upstream) for grad in grads]
        else:
            # What autograd wants, not what the forward saw: a compiled `torch.func.grad` does not show there.
            wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
            plan = request.plan.wanting(wants_hidden, wants_weight, wants_bias)
            if torch.compiler.is_compiling():
                arguments = _flattened(layer, targets, plan)
                grads = _in_their_places(_linear_gradients(*arguments, rows, probabilities, upstream), plan.wants)
            else:
                grads = gradients_from_scores(layer, targets, plan, Scores(rows, None, probabilities, None), upstream)
        return *grads, *(None,) * 5


def linear_patch_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    groups: Tensor,
    *,
    bias: Tensor | None = None,
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
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor | tuple[Tensor, PatchLossStats]:
    """Return the patch cross entropy of ``hidden [..., D] @ weight [V, D].T`` without keeping those logits.

    >>> import torch, npp_kernels
    >>> hidden = torch.randn(2, 3, 16, requires_grad=True)
    >>> head = torch.nn.Linear(16, 8, bias=False)
    >>> groups = torch.randint(8, (2, 3, 4))
    >>> loss = npp_kernels.linear_patch_cross_entropy(hidden, head.weight, groups)
    >>> loss.backward()
    >>> hidden.grad.shape, head.weight.grad.shape
    (torch.Size([2, 3, 16]), torch.Size([8, 16]))

    It is ``patch_cross_entropy(F.linear(hidden, weight, bias), groups, ...)``, a chunk of rows at a time.

    Args:
        hidden: ``[..., D]``, float32, bfloat16, float16 or float64.
        weight: ``[V, D]``, of the same dtype; under `torch.autocast` both may have any, and the products run in
            autocast's.
        groups: ``[..., K]``, int32 or int64, ids in ``[0, V)`` or ``ignore_index``; the leading axes are those of
            ``hidden``.
        bias: ``[V]`` or None.
        ignore_index: see `patch_cross_entropy`, as for all options up to ``num_targets``.
        slot_weights: K weights, one for each slot.
        class_weight: ``[V]``, one weight for each id.
        normalize: ``"target"``, ``"row"`` or ``"slot"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1].
        z_loss: λ of ``λ · lse²``.
        softcap: s of ``s · tanh(z / s)``.
        token_scaling: multiply each target's loss by its own probability.
        num_targets: a number or a 0-d tensor that replaces the divisor of ``"target"``.
        inplace_backward: accepted so that both losses take the same options; the logits of a chunk are never the
            caller's, and are always overwritten.
        return_stats: also return `PatchLossStats`, from the same pass.
        chunk_rows: the most rows whose logits exist at a time. None chooses 4,096, or fewer so that they stay below
            2²⁹ elements, or all rows where that takes no more memory.
        shard: this rank's slice of the vocabulary, where a process group shares it out. ``weight`` is then
            ``[V_r, D]`` and ``bias [V_r]``; ``hidden``, ``groups`` (with ids of the whole vocabulary) and options are
            the same on every rank. Every rank gets the whole loss and the whole gradient of ``hidden``. A `DTensor` of
            weights with the placement ``Shard(0)`` needs none; ``hidden`` may be a replicated one.

    Returns:
        The loss, 0-d, or with ``reduction="none"`` ``[..., K]`` with 0 where ignored; fp32, or fp64 for fp64 products.
        With ``return_stats`` a pair of it and the statistics.

    Raises:
        TypeError: a tensor of another dtype, or a `DTensor` that is placed otherwise.
        ValueError: shapes, devices or options that do not fit, or, with `check_ids` on, a bad id on a GPU.
        IndexError: an id out of range, on the CPU. On a GPU the loss and all gradients it touches are NaN.
        RuntimeError: a double backward.

    Numerics:
        Logits are rounded to the products' dtype, as by `F.linear`. One case is more exact: in bfloat16 on a Hopper
        GPU, with 4,096 rows or more and without ``bias``, ``label_smoothing``, ``softcap``, ``return_stats`` and a
        shard, only the softmax's numerators are rounded. Softmax and sums are in fp32. The gradient of ``weight``
        accumulates in fp32 over the chunks, and is rounded once to the dtype of ``weight``. Over a shard the gradient
        of ``hidden`` is summed over the ranks in fp32, and rounded once.

    Memory:
        The gradients, which exist from the forward on, and one chunk of R = ``chunk_rows`` logits; with more than one
        chunk the gradient of ``weight`` in fp32 until the end. In 16-bit dtypes and bytes, beside the gradients:
        ``max(4·V·D, 2·V·D + R·m)``, or up to ``R·m`` with a single chunk. There ``m = 2·V``, with V counted up to a
        multiple of 64 where it is none of 16, and ``2·V + 6·D`` where logits are not rounded. With V = 16,384 and
        D = 768 that is 170 MiB for the default of 4,096 rows, and 95 for 2,000. Over a shard two chunks of the
        gradient of ``hidden`` in fp32 besides.

    Source:
        NPP (arXiv 2412.15321), section 3.3; chunked products as in Liger Kernel (arXiv 2410.10989). That exponentials
        with offsets can stand for logits between the products is also how QuACK computes the loss of one target.
    """
    if is_dtensor(weight):
        weight, shard = local_slice("weight", weight, 0, shard)
        if is_dtensor(hidden):
            hidden = whole_tensor("hidden", hidden)
    if bias is not None and is_dtensor(bias):
        bias, _ = local_slice("bias", bias, 0, shard)
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
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != hidden.dtype:
                raise TypeError(
                    f"{name}: expected the dtype of hidden, {hidden.dtype}, outside of autocast, got {tensor.dtype}"
                )
    check_chunk_rows(chunk_rows)
    options = LossOptions(
        ignore_index, slot_weights, class_weight, normalize, reduction,
        label_smoothing, z_loss, softcap, token_scaling, num_targets,
    )  # fmt: skip
    options.check()
    vocab_size = find_vocab_size("weight", weight, 0, shard)
    options.check_sizes(groups.shape[-1], vocab_size, hidden)
    refuse_transforms("linear_patch_cross_entropy")
    check_id_range(groups, vocab_size, ignore_index)

    flat_groups = as_rows(groups).contiguous()
    like = hidden if dtype == hidden.dtype else hidden.new_empty(0, dtype=dtype)
    targets, _ = find_targets(flat_groups, options, like, shard)
    grad_enabled = torch.is_grad_enabled()
    layer = Layer(as_rows(hidden), weight, bias)
    wants_hidden, wants_weight, wants_bias = (
        grad_enabled and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    wants = (wants_hidden, wants_weight, wants_bias)
    per_target = reduction == "none"
    early = any(wants) and not per_target and dtype != torch.float16
    request = Request(targets.settings, shard, Plan(dtype, chunk_rows, wants), early, per_target, return_stats)
    return shaped_result(_LinearPatchCrossEntropy.apply(*layer, *targets.tensors(), request), groups)
