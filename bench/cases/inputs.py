"""The tensors of a workload: real or uniform tokens, peaky logits, and a copy of what a contender may overwrite.

`bench.timing.measure` makes them, and `bench.cases.oracle` compares what contenders make of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.cases.shapes import LOSSES, Workload
from npp_kernels import group_tokens
from reference.tokenizer import load_tokens

SEED = 0
NUM_REAL_IDS = 512
LEAD = 6.0  # how far a single target's logit stands above the others'


def spread(tokens: Tensor, vocab_size: int, num_ids: int = NUM_REAL_IDS) -> Tensor:
    """Spread ids in ``[0, num_ids)`` over ``[0, vocab_size)`` by a fixed stride: how often each occurs stays as it is.

    >>> spread(torch.tensor([0, 1, 1, 511]), 16_384).tolist()
    [0, 31, 31, 15841]

    The stride is odd: rows of a table at a power of two's distance would meet in few memory channels, and the spread
    would measure that.
    """
    stride = max(vocab_size // num_ids, 1)
    return tokens * (stride - 1 + stride % 2)


def real_tokens(images: int, grid: int, vocab_size: int) -> Tensor:
    """Return ``[images, grid, grid]`` ids of real images: Fashion-MNIST at 16x16 tokens.

    A larger grid is cropped from the middle of a 2x2 mosaic of images. Where there are fewer images than asked for,
    they repeat.
    """
    stored = torch.from_numpy(load_tokens().tokens.astype("int64"))
    size = stored.shape[-1]
    if grid == size:
        chosen = stored[torch.arange(images) % len(stored)]
    elif size < grid <= 2 * size:
        quarters = stored[torch.arange(4 * images) % len(stored)].view(images, 2, 2, size, size)
        mosaic = quarters.permute(0, 1, 3, 2, 4).reshape(images, 2 * size, 2 * size)
        edge = (2 * size - grid) // 2
        chosen = mosaic[:, edge : edge + grid, edge : edge + grid]
    else:
        raise ValueError(f"grid: expected {size} to {2 * size}, got {grid}")
    return spread(chosen, vocab_size)


def uniform_tokens(images: int, grid: int, vocab_size: int) -> Tensor:
    """Return ``[images, grid, grid]`` ids that are all equally likely."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocab_size, (images, grid, grid), generator=generator)


@dataclass
class Inputs:
    """What the contenders of one workload are given; ``leaves`` are what gradients are asked for."""

    leaves: tuple[Tensor, ...]
    tokens: Tensor  # [images, grid, grid]
    groups: Tensor  # [rows, K] for a loss, [images, P, K] for a mean
    upstream: Tensor | None  # the gradient of the output; None for a scalar loss
    pristine: Tensor | None = field(default=None)  # the first leaf's values, kept once `keep` was called

    def keep(self) -> None:
        """Keep a copy of the first leaf, so that `restore` can undo what a contender writes over it."""
        self.pristine = self.leaves[0].detach().clone()

    def restore(self) -> None:
        """Give the first leaf its values back."""
        if self.pristine is not None:
            self.leaves[0].detach().copy_(self.pristine)


def _random(device: torch.device) -> Callable[..., Tensor]:
    """Return a function that draws normal values of a given shape, from one seed."""
    generator = torch.Generator(device).manual_seed(SEED)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def make_inputs(workload: Workload, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Make the tensors of a workload.

    Logits are peaky, as a trained model's are: standard deviation 2, and a lead for the targets that shrinks with
    their number.
    """
    make_tokens = uniform_tokens if workload.tokens == "uniform" else real_tokens
    tokens = make_tokens(workload.images, workload.grid, workload.vocab_size).to(device)
    groups = group_tokens(tokens, workload.patch).contiguous()
    normal = _random(device)
    upstream: Tensor | None = None
    if workload.operation in LOSSES:
        groups = groups.flatten(0, 1)
        if workload.reduction == "none":
            upstream = torch.rand(groups.shape, generator=torch.Generator().manual_seed(SEED)).to(device)
            upstream /= groups.numel()
    if workload.operation == "patch_cross_entropy":
        logits = normal(workload.rows, workload.vocab_size).mul_(2)
        # Written, not added up: a patch that has one id many times would be all but certain, with a gradient of zero.
        logits.scatter_(1, groups, logits.gather(1, groups) + LEAD / workload.patch)
        leaves: tuple[Tensor, ...] = (logits.to(dtype),)
    elif workload.operation == "linear_patch_cross_entropy":
        weight = normal(workload.vocab_size, workload.hidden_size) / workload.hidden_size**0.5
        hidden = 2 * normal(workload.rows, workload.hidden_size)
        for slot in range(workload.group_size):
            hidden += LEAD / workload.group_size * weight[groups[:, slot]]
        leaves = (hidden.to(dtype), weight.to(dtype))
    else:
        if workload.operation == "group_mean":
            leaves = (normal(workload.vocab_size, workload.hidden_size).to(dtype),)
        else:
            leaves = (normal(workload.images, workload.grid, workload.grid, workload.hidden_size).to(dtype),)
        upstream = normal(workload.images, groups.shape[1], workload.hidden_size).to(dtype)
    return Inputs(tuple(leaf.requires_grad_() for leaf in leaves), tokens, groups, upstream)
