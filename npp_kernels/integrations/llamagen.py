"""LlamaGen's and NPP's class-conditional `Transformer`: the two lines of its training forward that a patch changes.

In ``Transformer.forward``, with ``groups = group_tokens(tokens, patch, grid=(16, 16))`` made once a step::

    token_embeddings = patch_inputs(self.tok_embeddings, groups)     # instead of self.tok_embeddings(idx)
    ...                                                              # condition, layers and norm as they are
    loss = patch_loss(h, self.output, groups)                        # instead of self.output(h) and F.cross_entropy

The rotary table is that of the coarse grid: ``precompute_freqs_cis_2d(grid_size // patch, ...)``, one per stage.
Sampling and checkpoints do not change.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from npp_kernels.group_mean import group_mean
from npp_kernels.losses.linear_patch_cross_entropy import linear_patch_cross_entropy


def patch_inputs(embedding: nn.Embedding, groups: Tensor) -> Tensor:
    """Return what follows the condition token at the transformer's entry: ``groups [B, P, K] -> [B, P - 1, D]``.

    >>> import torch
    >>> from npp_kernels import group_tokens
    >>> groups = group_tokens(torch.randint(512, (2, 256)), 4, grid=(16, 16))
    >>> patch_inputs(torch.nn.Embedding(512, 64), groups).shape
    torch.Size([2, 15, 64])

    The last group is left out: nothing comes after it.

    Args:
        embedding: ``tok_embeddings`` of the model.
        groups: ids of a step, int32 or int64.

    Raises:
        TypeError, ValueError, IndexError: those of `npp_kernels.group_mean`.
    """
    return group_mean(embedding.weight, groups[:, :-1])


def patch_loss(hidden: Tensor, output: nn.Linear, groups: Tensor, *, num_targets: int | Tensor | None = None) -> Tensor:
    """Return the mean cross entropy of all tokens: ``hidden [B, P, D], groups [B, P, K] ->`` a number.

    >>> import torch
    >>> from npp_kernels import group_tokens
    >>> groups = group_tokens(torch.randint(512, (2, 256)), 4, grid=(16, 16))
    >>> output = torch.nn.Linear(64, 512, bias=False)
    >>> patch_loss(torch.randn(2, 16, 64), output, groups).shape
    torch.Size([])

    Row p has seen the condition and the groups before p, so there is no shift.

    Args:
        hidden: the model's last hidden states, after its norm.
        output: the model's output layer, not applied yet.
        groups: the ids that `patch_inputs` got.
        num_targets: the targets of the whole step, where a step is many batches.

    Raises:
        TypeError, ValueError, IndexError: those of `npp_kernels.linear_patch_cross_entropy`.
    """
    loss = linear_patch_cross_entropy(hidden, output.weight, groups, bias=output.bias, num_targets=num_targets)
    return cast(Tensor, loss)  # alone, since no statistics are asked for
