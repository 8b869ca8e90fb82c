"""Tokens on a grid <-> groups of tokens. Geometry lives here and nowhere else.

A patch of ``kh × kw`` tokens is one group of ``K = kh·kw`` ids. Groups stand in raster order over the coarse grid, ids
in raster order inside their group; both are one permutation of the axes, so nothing is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

from npp_kernels._checks import check_integer_dtype, check_tensor, described

Patch = int | Sequence[int]

_AXES = ("t", "h", "w")
MAX_GRID_RANK = len(_AXES)


def resolve_patch(patch: Patch, grid: Sequence[int] | None) -> tuple[int, ...]:
    """Return ``patch`` as a tuple with one entry per grid axis.

    >>> resolve_patch(2, None), resolve_patch(4, (64,)), resolve_patch((1, 2, 2), None)
    ((2, 2), (4,), (1, 2, 2))
    """
    if isinstance(patch, int) and not isinstance(patch, bool):
        sizes = (patch,) * (2 if grid is None else len(grid))
    elif isinstance(patch, Sequence) and all(isinstance(size, int) and not isinstance(size, bool) for size in patch):
        sizes = tuple(patch)
    else:
        raise TypeError(f"patch: expected an int or a tuple of ints, got {patch!r}")
    if not 1 <= len(sizes) <= MAX_GRID_RANK:
        raise ValueError(f"patch: expected 1 to {MAX_GRID_RANK} axes, got {len(sizes)}: {patch!r}")
    if any(size < 1 for size in sizes):
        raise ValueError(f"patch: expected sizes of at least 1, got {patch!r}")
    if grid is not None and len(grid) != len(sizes):
        raise ValueError(f"patch: expected one size per grid axis, {len(grid)} for grid {tuple(grid)}, got {patch!r}")
    return sizes


def resolve_grid(
    name: str, shape: Sequence[int], patch: Sequence[int], grid: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split ``shape``, the shape of the argument ``name``, into its leading axes and its grid.

    The last axes are the grid where they equal ``grid`` or where no ``grid`` is given; else the last axis is the grid,
    flattened in raster order.
    """
    rank = len(patch)
    if grid is None:
        if len(shape) < rank:
            raise ValueError(
                f"{name}: expected at least {rank} axes for patch {tuple(patch)}, got shape {tuple(shape)}; "
                "flat tokens need grid="
            )
        leading, sizes = tuple(shape[: len(shape) - rank]), tuple(shape[len(shape) - rank :])
    else:
        sizes = tuple(grid)
        if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
            raise ValueError(f"grid: expected non-negative ints, got {grid!r}")
        if len(shape) >= rank and tuple(shape[len(shape) - rank :]) == sizes:
            leading = tuple(shape[: len(shape) - rank])
        elif len(shape) >= 1 and shape[-1] == math.prod(sizes):
            leading = tuple(shape[:-1])
        else:
            raise ValueError(
                f"grid: expected {name} to end in {sizes} or in {math.prod(sizes)} flat tokens, "
                f"got shape {tuple(shape)}"
            )
    for axis, (size, step) in enumerate(zip(sizes, patch, strict=True)):
        if size % step:
            raise ValueError(
                f"patch: expected sizes that divide the grid {sizes}, got {tuple(patch)} "
                f"({step} does not divide {size} on axis {axis})"
            )
    return leading, sizes


def resolve_geometry(
    name: str, shape: Sequence[int], patch: Patch, grid: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the patch as a tuple, and ``shape`` split into leading axes and grid: `resolve_patch` and `resolve_grid`.

    An int without ``grid`` is a square patch of images in a batch. Where there are two axes or fewer it is refused: a
    batch of sequences and one image look alike, and taken for the other, groups would mix sequences.
    """
    sizes = resolve_patch(patch, grid)
    if isinstance(patch, int) and grid is None and len(shape) < 3:
        raise ValueError(
            f"patch: expected a tuple, or grid=, since the axes {tuple(shape)} of {name} may be sequences or an image, "
            f"got {patch}: pass ({patch},) for {patch} tokens in a row, ({patch}, {patch}) for a patch of an image, or "
            "grid=(L,) or grid=(H, W)"
        )
    return sizes, *resolve_grid(name, shape, sizes, grid)


def _patterns(rank: int) -> tuple[str, str]:
    """Return the einops patterns of a grid of this rank and of its groups."""
    axes = _AXES[MAX_GRID_RANK - rank :]
    grid = "... " + " ".join(f"({axis} k{axis})" for axis in axes)
    groups = f"... ({' '.join(axes)}) ({' '.join(f'k{axis}' for axis in axes)})"
    return grid, groups


def group_tokens(tokens: Tensor, patch: Patch, *, grid: Sequence[int] | None = None) -> Tensor:
    """Group the tokens of a grid into patches: ``[..., H, W] -> [..., P, K]``.

    >>> import torch, npp_kernels
    >>> tokens = torch.arange(16).view(1, 4, 4)
    >>> npp_kernels.group_tokens(tokens, 2)[0].tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    >>> npp_kernels.group_tokens(torch.arange(6), (3,)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    >>> text = torch.arange(12).view(2, 6)
    >>> npp_kernels.group_tokens(text, 3, grid=(6,)).shape  # the patch of a schedule, an int or a tuple
    torch.Size([2, 2, 3])

    Args:
        tokens: ids of any integer dtype (the operations take int32 and int64: small stored ids need one ``.long()``).
            ``[..., H, W]`` for a 2-D patch, ``[..., T, H, W]`` for a 3-D one, ``[..., L]`` for a 1-D one; or
            flat in raster order, ``[..., H·W]``, together with ``grid``. Where the last axes equal ``grid``, they are
            taken as the grid; else the last axis is taken as flat.
        patch: patch size in tokens: a tuple ``(kh, kw)``, ``(kt, kh, kw)`` or ``(k,)``; or an int for that size on
            every axis of ``grid``. Without ``grid`` an int is a square patch, and ``tokens`` have three axes or more:
            two may be sequences ``[B, L]`` as well as an image ``[H, W]``.
        grid: the size of the grid in tokens, ``(H, W)``, ``(T, H, W)`` or ``(L,)``. Flat tokens do not show which of
            two grids they had: ``(10, 6)`` for images of 6×10 gives other groups, and no error.

    Returns:
        ``[..., P, K]`` of the same dtype: P groups in raster order over the coarse grid, K ids in raster order inside
        each. Size 1 on every axis gives ``[..., H·W, 1]``.

    Raises:
        TypeError: ``tokens`` is not an integer tensor, ``patch`` is not an int or a tuple of ints.
        ValueError: the patch does not divide the grid, has another rank, or is an int where the number of axes is
            open; or the grid does not match ``tokens``.

    Numerics:
        Exact; ids are only moved.

    Memory:
        One copy of the ids where they have to move; a view where they do not.

    Source:
        NPP (arXiv 2412.15321), section 3: what ``F.unfold`` with kernel = stride = patch gives on ids.
    """
    check_tensor("tokens", tokens)
    check_integer_dtype("tokens", tokens)
    sizes, leading, grid_sizes = resolve_geometry("tokens", tokens.shape, patch, grid)
    from_grid, to_groups = _patterns(len(sizes))
    steps = {f"k{axis}": step for axis, step in zip(_AXES[-len(sizes) :], sizes, strict=True)}
    return rearrange(tokens.reshape(*leading, *grid_sizes), f"{from_grid} -> {to_groups}", **steps)


def ungroup_tokens(groups: Tensor, patch: Patch, *, grid: Sequence[int]) -> Tensor:
    """Put groups back on their grid, the inverse of `group_tokens`: ``[..., P, K] -> [..., H, W]``.

    >>> import torch, npp_kernels
    >>> tokens = torch.arange(16).view(1, 4, 4)
    >>> groups = npp_kernels.group_tokens(tokens, 2)
    >>> torch.equal(npp_kernels.ungroup_tokens(groups, 2, grid=(4, 4)), tokens)
    True

    Args:
        groups: ids of any integer dtype, ``[..., P, K]``.
        patch: as for `group_tokens`.
        grid: the size of the grid in tokens, ``(H, W)``, ``(T, H, W)`` or ``(L,)``.

    Returns:
        ``[..., *grid]`` of the same dtype.

    Raises:
        TypeError: ``groups`` is not an integer tensor, ``patch`` is not an int or a tuple of ints.
        ValueError: the patch does not divide the grid, has another rank, or P or K is not what they imply.

    Numerics:
        Exact; ids are only moved.

    Memory:
        One copy of the ids where they have to move; a view where they do not.

    Source:
        NPP (arXiv 2412.15321), section 3.
    """
    check_tensor("groups", groups)
    check_integer_dtype("groups", groups)
    sizes = resolve_patch(patch, grid)
    _, grid_sizes = resolve_grid("groups", tuple(grid), sizes, grid)
    coarse = [size // step for size, step in zip(grid_sizes, sizes, strict=True)]
    expected = (math.prod(coarse), math.prod(sizes))
    if groups.ndim < 2 or tuple(groups.shape[-2:]) != expected:
        raise ValueError(
            f"groups: expected [..., {expected[0]}, {expected[1]}] for patch {sizes} on grid {grid_sizes}, "
            f"got {described(groups)}"
        )
    from_grid, to_groups = _patterns(len(sizes))
    axes = _AXES[-len(sizes) :]
    steps = {f"k{axis}": step for axis, step in zip(axes, sizes, strict=True)}
    return rearrange(groups, f"{to_groups} -> {from_grid}", **steps, **dict(zip(axes, coarse, strict=True)))
