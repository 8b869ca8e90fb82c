"""The positions of every id in a list of ids, as segments of one stable order.

A scatter-add over ids is made reproducible by turning it around: each id gathers what belongs to it, in the order in
which it stands in the list. That needs a stable sort of small integers, for which a general sort of 64-bit keys moves
far too many bytes. Two sorts are here, chosen by length n alone:

- `_rank_sort_kernel`, for short lists: the place of an element is the number of elements that come before it, n²
  comparisons spread over the whole GPU in one launch.
- `_digit_counts_kernel` and `_digit_scatter_kernel`, for long ones: a least-significant-digit radix sort, one pass per
  8 bits of the vocabulary size (2 passes up to 65,535 ids, 3 up to 16 million). The tiles are as many as the GPU keeps
  running at once and each counts its own digits, so that a pass is two launches at any length. A skewed distribution
  costs what a uniform one does: nothing is atomic, no bucket is a program's own.

Bytes of a pass: 4 + 4 read twice and written once for each id; everything stays in the L2 for a million ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import can_overlap, launch, num_multiprocessors

# H100, 2026-11-24: sorting 65,536 ids below 16,384 takes 44 µs in tiles of 256 and 78 in tiles of 512 (`torch.sort` of
# the ids as int16, without segments: 45).
RANK_SORT_LIMIT = 8192
RANK_BLOCK = 32
RANK_OTHERS = 128
DIGIT_BITS = 8
TILE_SIZE = 256
TILE_OTHERS = 32
BLOCK_TILES = 32
SCATTER_WARPS = 8
STARTS_BLOCK = 256


class Segments(NamedTuple):
    """``order[starts[v]:starts[v + 1]]`` are the positions of id ``v``, ascending."""

    keys: Tensor  # [num_ids], int32: the ids in that order; vocab_size for those that count nowhere, which come last
    order: Tensor  # [num_ids], int32
    starts: Tensor  # [vocab_size + 1], int32


@triton.jit
def _as_keys(ids, vocab_size, ignore_index, HAS_IGNORED: tl.constexpr):
    """Return ids as sort keys: what counts nowhere (ignored or out of range) comes last, as ``vocab_size``.

    The kernels load the ids themselves: torch.compile takes a pointer that goes into a function from which an address
    comes out for one that is written to.
    """
    wide = ids.to(tl.int64)
    counted = (wide >= 0) & (wide < vocab_size)
    if HAS_IGNORED:
        counted = counted & (wide != ignore_index)
    return tl.where(counted, wide, vocab_size).to(tl.int32)


@triton.jit
def _rank_sort_kernel(
    ids_ptr,  # [num_ids]
    keys_ptr,  # [num_ids] out: the ids, sorted
    order_ptr,  # [num_ids] out: where they stood
    num_ids,
    vocab_size,
    ignore_index,
    HAS_IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program finds the places of BLOCK elements by comparing them with all others."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = positions < num_ids
    keys = _as_keys(tl.load(ids_ptr + positions, mask=mask, other=-1), vocab_size, ignore_index, HAS_IGNORED)
    # Counted in a tile, and summed across threads once, at the end.
    earlier = tl.zeros([BLOCK, BLOCK_OTHERS], tl.int32)
    for first in range(0, num_ids, BLOCK_OTHERS):
        other_positions = first + tl.arange(0, BLOCK_OTHERS)
        other_mask = other_positions < num_ids
        other_ids = tl.load(ids_ptr + other_positions, mask=other_mask, other=-1)
        others = _as_keys(other_ids, vocab_size, ignore_index, HAS_IGNORED)
        # Equal keys keep their order: of two, the one at the lower position comes first.
        before = (others[None, :] < keys[:, None]) | (
            (others[None, :] == keys[:, None]) & (other_positions[None, :] < positions[:, None])
        )
        earlier += (before & other_mask[None, :]).to(tl.int32)
    ranks = tl.sum(earlier, axis=1)
    tl.store(keys_ptr + ranks, keys, mask=mask)
    tl.store(order_ptr + ranks, positions, mask=mask)


@triton.jit
def _digit_counts_kernel(
    ids_ptr,  # [num_ids]: the caller's ids in the first pass, the keys of the pass before in the later ones
    counts_ptr,  # [num_tiles, RADIX] out
    num_ids,
    subtiles,
    vocab_size,
    ignore_index,
    SHIFT: tl.constexpr,
    FIRST_PASS: tl.constexpr,
    HAS_IGNORED: tl.constexpr,
    RADIX: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program counts the digits of one tile of ``subtiles · TILE`` ids."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    counts = tl.zeros([RADIX], tl.int32)
    for subtile in range(subtiles):
        offsets = (tile * subtiles + subtile) * TILE + tl.arange(0, TILE)
        mask = offsets < num_ids
        keys = tl.load(ids_ptr + offsets, mask=mask, other=0)
        if FIRST_PASS:
            keys = _as_keys(keys, vocab_size, ignore_index, HAS_IGNORED)
        counts += tl.histogram((keys >> SHIFT) & (RADIX - 1), RADIX, mask=mask)
    tl.store(counts_ptr + tile * RADIX + tl.arange(0, RADIX), counts)


@triton.jit
def _digit_scatter_kernel(
    ids_ptr,  # [num_ids]
    positions_ptr,  # [num_ids], not read in the first pass
    counts_ptr,  # [num_tiles, RADIX]
    keys_ptr,  # [num_ids] out
    order_ptr,  # [num_ids] out
    num_ids,
    num_tiles,
    subtiles,
    vocab_size,
    ignore_index,
    SHIFT: tl.constexpr,
    FIRST_PASS: tl.constexpr,
    HAS_IGNORED: tl.constexpr,
    RADIX: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program moves one tile of ids to their places by one digit, keeping the order of equal digits."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    digits = tl.arange(0, RADIX)

    # Where this tile's ids of each digit begin: after all ids of lower digits, and those of this digit in tiles before.
    all_counts = tl.zeros([BLOCK_TILES, RADIX], tl.int32)
    counts_before = tl.zeros([BLOCK_TILES, RADIX], tl.int32)
    for first_tile in range(0, num_tiles, BLOCK_TILES):
        tiles = first_tile + tl.arange(0, BLOCK_TILES)
        counts = tl.load(
            counts_ptr + tiles[:, None] * RADIX + digits[None, :], mask=(tiles < num_tiles)[:, None], other=0
        )
        all_counts += counts
        counts_before += tl.where((tiles < tile)[:, None], counts, 0)
    totals = tl.sum(all_counts, axis=0)
    next_place = tl.cumsum(totals, axis=0) - totals + tl.sum(counts_before, axis=0)

    for subtile in range(subtiles):
        base = (tile * subtiles + subtile) * TILE
        offsets = base + tl.arange(0, TILE)
        mask = offsets < num_ids
        keys = tl.load(ids_ptr + offsets, mask=mask, other=0)
        if FIRST_PASS:
            keys = _as_keys(keys, vocab_size, ignore_index, HAS_IGNORED)
        digit = (keys >> SHIFT) & (RADIX - 1)
        # Of two ids with one digit, the earlier has the smaller of these numbers, by at most its distance from the
        # start: as unsigned numbers, one comparison tells an earlier equal from everything else.
        local = tl.arange(0, TILE)
        number = digit * TILE + local - 1
        # Counted in a tile, and summed across threads once, at the end.
        earlier = tl.zeros([TILE, BLOCK_OTHERS], tl.int32)
        for first in tl.static_range(0, TILE, BLOCK_OTHERS):
            other = first + tl.arange(0, BLOCK_OTHERS)
            other_keys = tl.load(ids_ptr + base + other, mask=base + other < num_ids, other=0)
            if FIRST_PASS:
                other_keys = _as_keys(other_keys, vocab_size, ignore_index, HAS_IGNORED)
            other_number = ((other_keys >> SHIFT) & (RADIX - 1)) * TILE + other
            distance = (number[:, None] - other_number[None, :]).to(tl.uint32, bitcast=True)
            earlier += (distance < local.to(tl.uint32)[:, None]).to(tl.int32)
        place = tl.gather(next_place, digit, 0) + tl.sum(earlier, axis=1)
        if FIRST_PASS:
            positions = offsets
        else:
            positions = tl.load(positions_ptr + offsets, mask=mask, other=0)
        tl.store(keys_ptr + place, keys, mask=mask)
        tl.store(order_ptr + place, positions, mask=mask)
        next_place += tl.histogram(digit, RADIX, mask=mask)


@triton.jit
def _segment_starts_kernel(
    keys_ptr,  # [num_ids], sorted
    starts_ptr,  # [vocab_size + 1] out
    num_ids,
    vocab_size,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program finds where BLOCK ids begin among the sorted ones, by bisection."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = ids <= vocab_size
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + num_ids
    for _ in range(STEPS):
        searching = low < high
        middle = (low + high) // 2
        below = tl.load(keys_ptr + middle, mask=mask & searching, other=0) < ids
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
    tl.store(starts_ptr + ids, low, mask=mask)


def _radix_sort(ids: Tensor, vocab_size: int, ignore_index: int | None, num_ids: int) -> tuple[Tensor, Tensor]:
    """Return the sorted keys and the order of ``ids``, by radix sort."""
    radix = 1 << DIGIT_BITS
    max_tiles = max(num_multiprocessors(ids), 2)
    subtiles = triton.cdiv(num_ids, max_tiles * TILE_SIZE)
    num_tiles = triton.cdiv(num_ids, subtiles * TILE_SIZE)
    counts = torch.empty((num_tiles, radix), dtype=torch.int32, device=ids.device)
    source, positions = ids, ids
    for shift in range(0, vocab_size.bit_length(), DIGIT_BITS):
        keys = torch.empty(num_ids, dtype=torch.int32, device=ids.device)
        order = torch.empty_like(keys)
        options: dict[str, Any] = {
            "SHIFT": shift,
            "FIRST_PASS": shift == 0,
            "HAS_IGNORED": ignore_index is not None,
            "RADIX": radix,
            "TILE": TILE_SIZE,
            "OVERLAP": can_overlap(ids),
            "early": can_overlap(ids),
        }
        ignored = -1 if ignore_index is None else ignore_index
        launch(_digit_counts_kernel, (num_tiles,), source, counts, num_ids, subtiles, vocab_size, ignored, **options)
        launch(
            _digit_scatter_kernel,
            (num_tiles,),
            source,
            positions,
            counts,
            keys,
            order,
            num_ids,
            num_tiles,
            subtiles,
            vocab_size,
            ignored,
            BLOCK_TILES=BLOCK_TILES,
            BLOCK_OTHERS=TILE_OTHERS,
            num_warps=SCATTER_WARPS,
            **options,
        )
        source, positions = keys, order
    return source, positions


def find_segments(ids: Tensor, vocab_size: int, ignore_index: int | None) -> Segments:
    """Return the segments of ``ids``; ids that are ignored or out of range are in none of them.

    Args:
        ids: contiguous, of any shape, int32 or int64, fewer than 2³¹.
        vocab_size: the number of segments.
        ignore_index: an id that counts nowhere, or None.
    """
    num_ids = ids.numel()
    if num_ids <= RANK_SORT_LIMIT:
        keys = torch.empty(num_ids, dtype=torch.int32, device=ids.device)
        order = torch.empty_like(keys)
        launch(
            _rank_sort_kernel,
            (triton.cdiv(num_ids, RANK_BLOCK),),
            ids,
            keys,
            order,
            num_ids,
            vocab_size,
            -1 if ignore_index is None else ignore_index,
            HAS_IGNORED=ignore_index is not None,
            BLOCK=RANK_BLOCK,
            BLOCK_OTHERS=RANK_OTHERS,
            OVERLAP=can_overlap(ids),
            early=can_overlap(ids),
        )
    else:
        keys, order = _radix_sort(ids, vocab_size, ignore_index, num_ids)
    starts = torch.empty(vocab_size + 1, dtype=torch.int32, device=ids.device)
    launch(
        _segment_starts_kernel,
        (triton.cdiv(vocab_size + 1, STARTS_BLOCK),),
        keys,
        starts,
        num_ids,
        vocab_size,
        STEPS=num_ids.bit_length() + 1,
        BLOCK=STARTS_BLOCK,
        OVERLAP=can_overlap(ids),
        early=can_overlap(ids),
    )
    return Segments(keys, order, starts)
