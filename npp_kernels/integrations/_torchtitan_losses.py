"""TorchTitan's losses on patches: of logits, and of hidden states together with the output layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.protocols.module import Module

from npp_kernels.integrations._layers import linear_difference
from npp_kernels.losses.linear_patch_cross_entropy import linear_patch_cross_entropy
from npp_kernels.losses.patch_cross_entropy import patch_cross_entropy


class PatchLoss(BaseLoss):
    """The sum of all targets' cross entropies over the count that the trainer gives: each row against K targets.

    >>> import torch
    >>> loss_fn = PatchLoss.Config().build()
    >>> targets = torch.randint(512, (2, 8, 4))
    >>> loss, metrics = loss_fn(torch.randn(2, 8, 512), targets, torch.tensor(targets.numel()))
    >>> loss.shape, metrics
    (torch.Size([]), {})

    Row p of ``pred [B, P, V]`` is scored against row p of ``labels [B, P, K]``, without a shift, so that any chunks of
    P add up to the whole. Labels ``[B, P]`` are K = 1, the ordinary loss. -100 does not count. Without a divisor it is
    the sum, as the validator wants it.

    Raises:
        ValueError: ``labels`` do not have the rows of ``pred``: they were not grouped, or grouped otherwise.
        TypeError: those of `npp_kernels.patch_cross_entropy`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Nothing to choose: one target counts as much as another."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.fn = summed_cross_entropy
        self._maybe_compile(compile_config)

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and no metrics; 0 and not NaN where a whole step has nothing to score."""
        divisor = None if global_valid_tokens is None else global_valid_tokens.clamp(min=1)
        return cast(tuple[Tensor, dict[str, Tensor]], super().__call__(pred, labels, divisor, **kwargs))


def summed_cross_entropy(pred: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over all targets that count: ``pred [B, P, V], labels [B, P, K]`` or ``[B, P] ->`` a number.

    >>> import torch
    >>> summed_cross_entropy(torch.randn(2, 8, 512), torch.randint(512, (2, 8, 4))).shape
    torch.Size([])

    Raises:
        ValueError, TypeError, IndexError: as `PatchLoss`.
    """
    return cast(Tensor, patch_cross_entropy(pred, _groups_of(labels, pred), reduction="sum"))


def _groups_of(labels: Tensor, pred: Tensor) -> Tensor:
    groups = labels.unsqueeze(-1) if labels.ndim == pred.ndim - 1 else labels
    if groups.shape[:-1] != pred.shape[:-1]:
        raise ValueError(
            f"labels: expected the rows of pred, {tuple(pred.shape[:-1])}, with or without K targets each, "
            f"got {tuple(labels.shape)}"
        )
    return groups


class LinearPatchLoss(ChunkedLossWrapper):
    """`PatchLoss` and the output layer in one, so that no logits are stored; in the place of ``ChunkedLossWrapper``.

    >>> import torch
    >>> loss_fn = LinearPatchLoss.Config(chunk_rows=1024).build()
    >>> loss_fn.set_lm_head(torch.nn.Linear(64, 512, bias=False))  # as TorchTitan's trainer does
    >>> targets = torch.randint(512, (2, 8, 4))
    >>> loss, metrics = loss_fn(torch.randn(2, 8, 64, requires_grad=True), targets, torch.tensor(targets.numel()))
    >>> loss.backward()

    The model's output is then hidden states ``[B, P, D]``, of which `npp_kernels.linear_patch_cross_entropy` makes the
    loss and both gradients, in chunks of its own. Loss, labels and divisor are those of `PatchLoss`. FSDP gathers the
    weight before, and adds up its gradient as soon as the backward has left the layer. CUDA graphs may hold it.
    ``compile.components`` has no effect on it: there is nothing in it that torch.compile looks into.

    Raises:
        TypeError: the output layer is more than a ``Linear``, as with LoRA: the rest of it would be lost.
        ValueError: its weight is one part of several, by tensor parallelism; or as `PatchLoss`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """How many rows' logits exist at a time.

        Args:
            chunk_rows: as for `npp_kernels.linear_patch_cross_entropy`; None chooses.
        """

        chunk_rows: int | None = None

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.chunk_rows = config.chunk_rows
        self.lm_head: nn.Module | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Take the output layer; the trainer calls this once the model is sharded."""
        _check_head(lm_head)
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of hidden states ``pred``, and no metrics; see `PatchLoss`."""
        head = self.lm_head
        assert head is not None, "set_lm_head comes before the first loss"
        _check_head(head)
        groups = _groups_of(labels, pred)
        divisor = None if global_valid_tokens is None else global_valid_tokens.clamp(min=1)

        def loss_of(hidden: Tensor) -> Tensor:
            weight, bias = _whole_weight(head)
            reduction = "sum" if divisor is None else "mean"
            loss = linear_patch_cross_entropy(
                hidden, weight, groups, bias=bias, reduction=reduction, num_targets=divisor, chunk_rows=self.chunk_rows
            )
            return cast(Tensor, loss)

        if isinstance(head, FSDPModule):
            # As ChunkedLossWrapper does: what the hook gathers leaves an event behind, for which no graph can wait.
            head.unshard()
        with _as_forward(head, loss_of):
            loss = head(pred)
        if isinstance(head, FSDPModule) and not loss.requires_grad:
            head.reshard()  # as no backward will
        return loss, {}


@contextlib.contextmanager
def _as_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let a module call a function in place of its forward: FSDP's hooks are around calls, and nowhere else."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _check_head(head: nn.Module) -> None:
    if difference := linear_difference(head, only_shards=_only_shards):
        raise TypeError(
            f"lm_head: expected a torch.nn.Linear for LinearPatchLoss, got {difference}; "
            "ChunkedLossWrapper.Config(loss_fn=PatchLoss.Config()) takes any output layer"
        )


def _only_shards(function: Any) -> bool:
    """Return whether a hook is FSDP's, or a forward that of ``Module.parallelize``, which leaves a whole weight be."""
    module = str(function.__module__)
    name = str(getattr(function, "__qualname__", ""))
    return module.startswith("torch.distributed.fsdp.") or (
        module == Module.__module__ and name.startswith("Module.parallelize.")
    )


def _whole_weight(head: Any) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of an output layer, as FSDP's hooks have gathered them."""
    weight: Tensor = head.weight
    found = None
    if isinstance(weight, DTensor):
        found = f"a DTensor placed {weight.placements}"
    elif len(weight) != head.out_features:
        found = f"{len(weight)} of its {head.out_features} rows"
    if found is not None:
        raise ValueError(f"tensor_parallel_degree: expected 1, and so the whole lm_head.weight, got {found}")
    return weight, head.bias
