"""Mean over patches of embeddings that exist already, and its backward.

    out[p] = 1/K · Σ_j embeddings[token(p, j)]
    grad_embeddings[token(p, j)] = grad[p] / K

Bytes: the embeddings once and the means once, both ways. A patch is a strided box of the grid, so each program walks
over it in place; nothing is unfolded. Grids of lower rank are 3-D grids with axes of size 1 in front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._autograd import first_order_only, refuse_transforms, wants_backward
from npp_kernels._checks import check_floating
from npp_kernels._dispatch import cdiv, launch, next_power_of_2, runs_kernels
from npp_kernels.grouping import MAX_GRID_RANK, Patch, resolve_geometry

BLOCK_ELEMENTS = 2048
MAX_BLOCK_HIDDEN = 512
UNROLLED_TOKENS = 8


@triton.jit
def _first_token(patch, height, width, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """Return the flat index of the first token of each patch; patches are counted through the whole batch."""
    patch_columns = width // KW
    patch_rows = height // KH
    column = patch % patch_columns
    row = (patch // patch_columns) % patch_rows
    # Frames of consecutive images follow each other, so images need no axis of their own.
    frame = patch // (patch_columns * patch_rows)
    return (frame * KT * height + row * KH) * width + column * KW


@triton.jit
def _patch_mean_kernel(
    embeddings_ptr,  # [num_tokens, hidden_size]; with BACKWARD out
    means_ptr,  # [num_patches, hidden_size]; without BACKWARD out
    num_patches,
    hidden_size,
    height,
    width,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program averages BLOCK_HIDDEN columns of BLOCK_PATCHES patches; backward, it spreads their gradient."""
    patch = tl.program_id(0).to(tl.int64) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    mask = (patch < num_patches)[:, None] & (columns < hidden_size)[None, :]
    means = means_ptr + patch[:, None] * hidden_size + columns[None, :]
    first = _first_token(patch, height, width, KT, KH, KW)
    GROUP_SIZE: tl.constexpr = KT * KH * KW

    if BACKWARD:
        spread = tl.load(means, mask=mask, other=0.0).to(tl.float32) / GROUP_SIZE
    else:
        total = tl.zeros([BLOCK_PATCHES, BLOCK_HIDDEN], tl.float32)
    for slot in tl.range(0, GROUP_SIZE, loop_unroll_factor=UNROLL):
        token = first + ((slot // (KH * KW)) * height + (slot // KW) % KH) * width + slot % KW
        embeddings = embeddings_ptr + token[:, None] * hidden_size + columns[None, :]
        if BACKWARD:
            tl.store(embeddings, spread.to(embeddings_ptr.dtype.element_ty), mask=mask)
        else:
            total += tl.load(embeddings, mask=mask, other=0.0).to(tl.float32)
    if not BACKWARD:
        tl.store(means, (total / GROUP_SIZE).to(means_ptr.dtype.element_ty), mask=mask)


def _rank_3(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of a grid or patch with axes of size 1 in front."""
    return (1,) * (MAX_GRID_RANK - len(sizes)) + tuple(sizes)


def _launch(embeddings: Tensor, means: Tensor, grid: Sequence[int], patch: Sequence[int], backward: bool) -> None:
    """Fill ``means [P, D]`` from ``embeddings [N, D]``, or backward the other way round."""
    num_patches, hidden_size = means.shape
    if means.numel() == 0:
        return
    (kt, kh, kw), (_, height, width) = _rank_3(patch), _rank_3(grid)
    block_hidden = min(next_power_of_2(hidden_size), MAX_BLOCK_HIDDEN)
    block_patches = BLOCK_ELEMENTS // block_hidden
    launch(
        _patch_mean_kernel,
        (cdiv(num_patches, block_patches), cdiv(hidden_size, block_hidden)),
        embeddings,
        means,
        num_patches,
        hidden_size,
        height,
        width,
        KT=kt,
        KH=kh,
        KW=kw,
        BACKWARD=backward,
        BLOCK_PATCHES=block_patches,
        BLOCK_HIDDEN=block_hidden,
        UNROLL=UNROLLED_TOKENS,
    )


def _torch_forward(embeddings: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Return the means ``[P, D]`` of ``embeddings [N, D]``: pooled over height and width, then over frames."""
    shape = (embeddings.shape[0] // math.prod(patch), embeddings.shape[1])
    if not embeddings.numel():
        return embeddings.new_empty(shape)
    (kt, *window), (_, height, width) = _rank_3(patch), _rank_3(grid)
    frames = embeddings.view(-1, height, width, embeddings.shape[1]).permute(0, 3, 1, 2)
    if kt == 1:
        return F.avg_pool2d(frames, window).permute(0, 2, 3, 1).reshape(shape)
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    pooled = F.avg_pool2d(frames.to(wide), window).permute(0, 2, 3, 1)
    means: Tensor = pooled.unflatten(0, (-1, kt)).mean(1)
    return means.to(embeddings.dtype).reshape(shape)


def _torch_backward(grad: Tensor, grad_embeddings: Tensor, grid: Sequence[int], patch: Sequence[int]) -> None:
    """Fill ``grad_embeddings [N, D]`` from the means' gradient ``[P, D]``."""
    split = [size for axis, step in zip(grid, patch, strict=True) for size in (axis // step, step)]
    once = [size if index % 2 == 0 else 1 for index, size in enumerate(split)]  # the shape of one place of every patch
    images, hidden_size = grad_embeddings.shape[0] // max(math.prod(grid), 1), grad_embeddings.shape[1]
    spread = (grad / math.prod(patch)).view(images, *once, hidden_size)
    grad_embeddings.view(images, *split, hidden_size).copy_(spread)


class _PatchMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
        ctx.grid, ctx.patch = grid, patch
        num_patches = embeddings.shape[0] // math.prod(patch)
        if runs_kernels(embeddings):
            means = embeddings.new_empty((num_patches, embeddings.shape[1]))
            _launch(embeddings, means, grid, patch, backward=False)
            return means
        return _torch_forward(embeddings, grid, patch)

    @staticmethod
    @first_order_only("patch_mean")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        num_tokens = grad.shape[0] * math.prod(ctx.patch)
        grad_embeddings = grad.new_empty((num_tokens, grad.shape[1]))
        if runs_kernels(grad):
            _launch(grad_embeddings, grad.contiguous(), ctx.grid, ctx.patch, backward=True)
        else:
            _torch_backward(grad, grad_embeddings, ctx.grid, ctx.patch)
        return grad_embeddings, None, None


def patch_mean(embeddings: Tensor, patch: Patch, *, grid: Sequence[int] | None = None) -> Tensor:
    """Average embeddings over patches: ``[..., H, W, D]`` or ``[..., H·W, D]`` ``-> [..., P, D]``.

    >>> import torch, npp_kernels
    >>> embeddings = torch.arange(16.0).view(1, 4, 4, 1)
    >>> npp_kernels.patch_mean(embeddings, 2)[0, :, 0].tolist()
    [2.5, 4.5, 10.5, 12.5]
    >>> npp_kernels.patch_mean(embeddings.view(1, 16, 1), 2, grid=(4, 4)).shape
    torch.Size([1, 4, 1])

    Where the embeddings come from a table, `group_mean` gathers and averages in one pass and never stores them.

    Args:
        embeddings: ``[..., H, W, D]`` for a 2-D patch, ``[..., T, H, W, D]`` for a 3-D one, ``[..., L, D]`` for a 1-D
            one; or flat in raster order, ``[..., H·W, D]``, together with ``grid``. float32, bfloat16, float16 or
            float64.
        patch: as for `group_tokens`.
        grid: as for `group_tokens`.

    Returns:
        ``[..., P, D]`` of the same dtype; with a patch of one token the embeddings themselves, as ``[..., H·W, D]``.

    Raises:
        TypeError: ``embeddings`` has another dtype or is a `DTensor`; ``patch`` is not an int or a tuple of ints.
        ValueError: the patch does not divide the grid, has another rank, or is an int where the number of axes is
            open; or the grid does not match ``embeddings``.
        RuntimeError: a double backward, or a transform of `torch.func`.

    Numerics:
        Sums in fp32 (fp64 for float64), rounded once; the gradient is rounded once.

    Memory:
        The result alone; a copy of ``embeddings`` where they are not contiguous.

    Source:
        NPP (arXiv 2412.15321), section 3.2; ``tensor_patchify`` in the official code.
    """
    check_floating("embeddings", embeddings)
    if embeddings.ndim < 2:
        raise ValueError(f"embeddings: expected [..., H, W, D] or [..., H·W, D], got shape {tuple(embeddings.shape)}")
    sizes, leading, grid_sizes = resolve_geometry("embeddings", embeddings.shape[:-1], patch, grid)
    hidden_size = embeddings.shape[-1]
    num_patches = math.prod(grid_sizes) // math.prod(sizes)
    if math.prod(sizes) == 1:
        return embeddings.reshape(*leading, num_patches, hidden_size)
    refuse_transforms("patch_mean")
    flat = embeddings.reshape(math.prod(leading) * math.prod(grid_sizes), hidden_size).contiguous()
    if runs_kernels(flat) or wants_backward(flat):
        means: Tensor = _PatchMean.apply(flat, grid_sizes, sizes)
    else:
        means = _torch_forward(flat, grid_sizes, sizes)
    return means.view(*leading, num_patches, hidden_size)
