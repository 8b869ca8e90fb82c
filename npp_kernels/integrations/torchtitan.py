"""TorchTitan: a loss function of ``(pred, labels)`` for phases on patches of K consecutive tokens.

The model's ``tok_embeddings`` becomes a `PatchBag`, which averages K tokens at a time, and `patch_loss` scores the
shorter ``pred`` against labels that the data loader shifted by one token, as always::

    model.tok_embeddings = PatchBag(model.tok_embeddings, patch=4)
    loss_fn = patch_loss                                          # K is read off the shapes: 1 is the ordinary loss
    loss_fn = functools.partial(patch_loss, reduction="sum")      # where the trainer divides by its count of tokens

Set ``patch`` to 1 for the last phase. With tensor parallelism, ``pred`` must not be sharded (``loss_parallel`` off).
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from npp_kernels.group_mean import group_mean
from npp_kernels.grouping import Patch, group_tokens
from npp_kernels.patch_cross_entropy import patch_cross_entropy

IGNORE_INDEX = -100


class PatchBag(nn.Module):
    """An embedding layer that averages every ``patch`` consecutive tokens: ``[..., L] -> [..., L / patch, D]``.

    >>> import torch
    >>> bag = PatchBag(torch.nn.Embedding(512, 64), patch=4)
    >>> bag(torch.randint(512, (2, 32))).shape
    torch.Size([2, 8, 64])

    Its parameter is that of ``embedding``, under the same name, ``weight``. Setting ``patch`` begins another phase.

    Raises:
        TypeError, ValueError, IndexError: those of `npp_kernels.group_tokens` and `npp_kernels.group_mean`.
    """

    def __init__(self, embedding: nn.Embedding, patch: Patch) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.patch = patch

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean embedding of each patch."""
        return group_mean(self.weight, group_tokens(tokens, self.patch, grid=tokens.shape[-1:]))


def patch_loss(pred: Tensor, labels: Tensor, *, normalize: str = "target", reduction: str = "mean") -> Tensor:
    """Score each patch's prediction against the tokens of the next: ``pred [B, P, V], labels [B, P·K] ->`` a number.

    >>> import torch
    >>> patch_loss(torch.randn(2, 8, 512), torch.randint(512, (2, 32))).shape
    torch.Size([])

    Label i is token i + 1, so the patch after patch p begins at label ``(p + 1)·K − 1``. The first K − 1 labels belong
    to the first patch, which nothing predicts; of the patch after the last, only the first token is known, and scored.

    Args:
        pred: logits of P patches, any dtype of `npp_kernels.patch_cross_entropy`.
        labels: the token after each token; -100 does not count.
        normalize: ``"target"``, ``"row"`` or ``"slot"`` (PatchTrain).
        reduction: ``"mean"``, or ``"sum"`` where the trainer divides by the number of labels. Of each sequence
            K − 1 are not scored, so that its loss and gradient come out lower by that part, ``(K − 1) / (P·K)``.

    Raises:
        ValueError: the length of ``labels`` is not a multiple of P.
        TypeError, IndexError: those of `npp_kernels.patch_cross_entropy`.
    """
    num_labels, num_patches = labels.shape[-1], pred.shape[-2]
    if num_patches < 1 or num_labels % num_patches:
        raise ValueError(f"labels: expected a multiple of the {num_patches} patches of pred, got {num_labels}")
    patch = num_labels // num_patches
    shifted = F.pad(labels[..., patch - 1 :], (0, patch - 1), value=IGNORE_INDEX)
    loss = patch_cross_entropy(pred, group_tokens(shifted, (patch,)), normalize=normalize, reduction=reduction)
    return cast(Tensor, loss)  # alone, since no statistics are asked for
