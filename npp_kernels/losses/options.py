"""What a caller may ask of a loss: the options, their checks, and the statistics that come back.

Both losses and their modules take a `LossOptions` from here, and return `PatchLossStats`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from npp_kernels._checks import check_floating, check_same_device, described

NORMALIZATIONS = ("target", "row", "slot")
REDUCTIONS = ("mean", "sum", "none")


class PatchLossStats(NamedTuple):
    """Statistics of each row, from the loss's pass: detached, of the groups' leading shape; fp32 but for the ids."""

    lse: Tensor
    """The logsumexp of the row's logits."""
    accuracy: Tensor
    """1 where the largest logit (the first of equal ones) is one of the row's targets, else 0."""
    entropy: Tensor
    """The entropy of the row's softmax, in nats."""
    prediction: Tensor
    """The id of the largest logit (the first of equal ones), int64."""


class LossOptions(NamedTuple):
    """The options that both losses share, as the caller gave them; `patch_cross_entropy` says what they mean."""

    ignore_index: int = -100
    slot_weights: Sequence[float] | Tensor | None = None
    class_weight: Tensor | None = None
    normalize: str = "target"
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    token_scaling: bool = False
    num_targets: float | Tensor | None = None

    def check(self) -> None:
        """Raise a TypeError or ValueError on an option out of its range, or on options that exclude each other."""
        if not isinstance(self.ignore_index, int) or isinstance(self.ignore_index, bool):
            raise TypeError(f"ignore_index: expected an int, got {self.ignore_index!r}")
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected one of {NORMALIZATIONS}, got {self.normalize!r}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {self.reduction!r}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1], got {self.label_smoothing!r}")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss: expected a finite number of at least 0, got {self.z_loss!r}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap: expected a finite number above 0 or None, got {self.softcap!r}")
        if self.z_loss and self.reduction == "none":
            raise ValueError(
                f'z_loss: expected 0 with reduction="none", which has no place for it, got {self.z_loss!r}'
            )
        self._check_slot_weights()
        self._check_num_targets()
        if self.class_weight is not None:
            check_floating("class_weight", self.class_weight, ndim=1)
            _check_constant("class_weight", self.class_weight)

    def _check_slot_weights(self) -> None:
        weights = self.slot_weights
        if weights is None:
            return
        if self.reduction == "none":
            raise ValueError(
                'slot_weights: expected None with reduction="none", which returns unweighted losses, '
                f"got a {type(weights).__name__}"
            )
        if isinstance(weights, Tensor):
            if weights.ndim != 1:
                raise ValueError(f"slot_weights: expected [K], one weight per slot, got {described(weights)}")
            _check_constant("slot_weights", weights)
            if weights.device.type != "cpu" or torch.compiler.is_compiling():
                return  # reading them would make the host wait
            weights = weights.tolist()
        if not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(f"slot_weights: expected finite weights of at least 0, got {list(weights)}")

    def _check_num_targets(self) -> None:
        count = self.num_targets
        if count is None:
            return
        if self.normalize != "target" or self.reduction != "mean":
            raise ValueError(
                'num_targets: expected None unless normalize="target" and reduction="mean", whose divisor it is, '
                f"got normalize={self.normalize!r} and reduction={self.reduction!r}"
            )
        if isinstance(count, Tensor):
            if count.numel() != 1:
                raise ValueError(f"num_targets: expected a number or a 0-d tensor, got {described(count)}")
            _check_constant("num_targets", count)
        elif not 0 <= count < math.inf:
            raise ValueError(f"num_targets: expected a finite number of at least 0, got {count!r}")

    def check_sizes(self, group_size: int, vocab_size: int, like: Tensor) -> None:
        """Raise a ValueError where weights do not fit the groups, or the vocabulary and the device of ``like``."""
        if self.slot_weights is not None and len(self.slot_weights) != group_size:
            raise ValueError(f"slot_weights: expected {group_size} weights, one per slot, got {len(self.slot_weights)}")
        if self.class_weight is not None:
            if self.class_weight.shape[0] != vocab_size:
                raise ValueError(f"class_weight: expected [{vocab_size}], one weight per id, "
                                 f"got {described(self.class_weight)}")  # fmt: skip
            check_same_device("class_weight", self.class_weight, "the logits or hidden states", like)


def _check_constant(name: str, tensor: Tensor) -> None:
    """Raise a ValueError on a tensor that would silently get no gradient."""
    if tensor.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without a gradient, which the loss has none of; pass a detached one"
        )


def check_chunk_rows(chunk_rows: int | None) -> None:
    """Raise a ValueError unless ``chunk_rows`` is an int of at least 1 or None."""
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"chunk_rows: expected an int of at least 1 or None, got {chunk_rows!r}")
