"""`group_mean` and the losses as `torch.nn` modules, for models that are put together from modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from npp_kernels.embeddings.group_mean import group_mean
from npp_kernels.embeddings.group_order import GroupOrder
from npp_kernels.losses.linear_patch_cross_entropy import linear_patch_cross_entropy
from npp_kernels.losses.options import LossOptions, PatchLossStats, check_chunk_rows
from npp_kernels.losses.patch_cross_entropy import patch_cross_entropy
from npp_kernels.vocabulary_shard import VocabularyShard


class PatchEmbedding(nn.Embedding):
    """A `torch.nn.Embedding` whose forward takes groups of ids and averages each: ``[..., K] -> [..., D]``.

    >>> import torch, npp_kernels
    >>> embedding = npp_kernels.PatchEmbedding(1024, 64)
    >>> tokens = torch.randint(1024, (2, 16, 16))
    >>> embedding(npp_kernels.group_tokens(tokens, 4)).shape
    torch.Size([2, 16, 64])
    >>> list(embedding.state_dict())
    ['weight']

    Arguments and state dict are those of `torch.nn.Embedding`; see `group_mean` for shapes, numerics and errors. Ids
    equal to ``padding_idx`` are left out of the mean, and its row gets no gradient.

    Raises:
        ValueError: an option of `torch.nn.Embedding` that the kernel does not have: ``max_norm``,
            ``scale_grad_by_freq`` or ``sparse``.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, **options: Any) -> None:
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if options.get(name):
                raise ValueError(f"{name}: expected {name} to be off, since the kernel has no such option, "
                                 f"got {options[name]!r}")  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, padding_idx, **options)

    def forward(self, groups: Tensor, order: GroupOrder | None = None) -> Tensor:
        """Return the mean embedding of each group: ``[..., K] -> [..., D]``.

        ``order`` is what `order_groups` made of the groups, with ``padding_idx`` as its ``ignore_index``.
        """
        return group_mean(self.weight, groups, ignore_index=self.padding_idx, order=order)


class PatchCrossEntropyLoss(nn.Module):
    """`patch_cross_entropy` as a module; its options are set, and checked, once.

    >>> import torch, npp_kernels
    >>> criterion = npp_kernels.PatchCrossEntropyLoss(label_smoothing=0.1)
    >>> logits, groups = torch.randn(2, 16, 1024), torch.randint(1024, (2, 16, 4))
    >>> criterion(logits, groups).shape
    torch.Size([])

    Args:
        slot_weights: K weights; ones where None. They stay as they are, whatever the module is moved or cast to.
        class_weight: ``[V]``, one weight for each id, or None; a buffer, and in the state dict, as the weight of
            `torch.nn.CrossEntropyLoss`.
        ignore_index: see `patch_cross_entropy`, as for all other options.
        normalize: ``"target"``, ``"row"`` or ``"slot"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1].
        z_loss: λ of ``λ · lse²``.
        softcap: s of ``s · tanh(z / s)``.
        token_scaling: multiply each target's loss by its own probability.
        inplace_backward: let the gradient overwrite the logits.
        return_stats: also return `PatchLossStats`.

    Raises:
        TypeError, ValueError: an option out of its range, or options that exclude each other.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        slot_weights: Sequence[float] | Tensor | None = None,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        normalize: str = "target",
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        token_scaling: bool = False,
        inplace_backward: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(slot_weights, Tensor):
            slot_weights = slot_weights.tolist()
        # Python numbers: a cast of the module does not round them, and a move from the meta device does not lose them.
        self.slot_weights = None if slot_weights is None else tuple(map(float, slot_weights))
        self.register_buffer("class_weight", class_weight)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "normalize": normalize,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "token_scaling": token_scaling,
        }
        LossOptions(slot_weights=self.slot_weights, class_weight=class_weight, **self.options).check()
        self.options |= {"inplace_backward": inplace_backward, "return_stats": return_stats}

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        options = {"slot_weights": self.slot_weights, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    def forward(
        self,
        logits: Tensor,
        groups: Tensor,
        *,
        num_targets: float | Tensor | None = None,
        shard: VocabularyShard | None = None,
    ) -> Tensor | tuple[Tensor, PatchLossStats]:
        """Return the loss of ``logits [..., V]`` against ``groups [..., K]``."""
        return patch_cross_entropy(
            logits,
            groups,
            slot_weights=self.slot_weights,
            class_weight=self.class_weight,
            num_targets=num_targets,
            shard=shard,
            **self.options,
        )


class LinearPatchCrossEntropyLoss(PatchCrossEntropyLoss):
    """`linear_patch_cross_entropy` as a module; it holds no weight, which stays with the model's output layer.

    >>> import torch, npp_kernels
    >>> criterion = npp_kernels.LinearPatchCrossEntropyLoss()
    >>> head = torch.nn.Linear(64, 1024, bias=False)
    >>> hidden, groups = torch.randn(2, 16, 64), torch.randint(1024, (2, 16, 4))
    >>> criterion(hidden, head.weight, groups).shape
    torch.Size([])

    Args:
        slot_weights: K weights; ones where None.
        chunk_rows: at most so many rows of logits exist at a time; chosen by V where None.
        options: those of `PatchCrossEntropyLoss`.

    Raises:
        TypeError, ValueError: an option out of its range, or options that exclude each other.
    """

    def __init__(
        self,
        slot_weights: Sequence[float] | Tensor | None = None,
        *,
        chunk_rows: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(slot_weights, **options)
        check_chunk_rows(chunk_rows)
        self.options["chunk_rows"] = chunk_rows

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        weight: Tensor,
        groups: Tensor,
        *,
        bias: Tensor | None = None,
        num_targets: float | Tensor | None = None,
        shard: VocabularyShard | None = None,
    ) -> Tensor | tuple[Tensor, PatchLossStats]:
        """Return the loss of ``hidden [..., D]`` times ``weight [V, D]`` against ``groups [..., K]``."""
        return linear_patch_cross_entropy(
            hidden,
            weight,
            groups,
            bias=bias,
            slot_weights=self.slot_weights,
            class_weight=self.class_weight,
            num_targets=num_targets,
            shard=shard,
            **self.options,
        )
