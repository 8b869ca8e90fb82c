"""The positions of every id in a list of ids, as segments of one stable order.

A scatter-add over ids is made reproducible by turning it around: each id gathers what belongs to it, in the order in
which it stands in the list. That needs a stable sort of small integers, for which a general sort of 64-bit keys moves
far too many bytes. Two sorts are here, chosen by length n alone:

- `_rank_sort_kernel`, for short lists: the place of an element is the number of elements that come before it, n²
  comparisons spread over the whole GPU in one launch.
- `_digit_counts_kernel` and `_digit_scatter_kernel`, for long ones: a least-significant-digit radix sort, one pass per
  8 bits of the vocabulary size (2 passes up to 65,535 ids, 3 up to 16 million). The tiles are as many as the GPU keeps
  running at once, so that a pass is one launch at any length. A skewed distribution costs what a uniform one does: no
  bucket is a program's own.

Bytes of a pass: 4 + 4 read and written for each id; everything stays in the L2 for a million ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import cdiv, launch, num_multiprocessors

# H100, 2026-11-24: sorting 65,536 ids below 16,384 takes 36 µs in tiles of 256 and 8 warps; tiles of 128 take 38 to 41,
# tiles of 512 48 to 55, 16 warps 46 (`torch.sort` of the ids as int16, without segments: 45).
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

    keys: Tensor  # [num_ids], int32: sorted ids; those that do not count are vocab_size, last
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
    ids_ptr,  # [num_ids]
    counts_ptr,  # [PASSES, num_tiles, RADIX] out: the first pass's counts, and 0 for the others'
    num_ids,
    num_tiles,
    subtiles,
    vocab_size,
    ignore_index,
    HAS_IGNORED: tl.constexpr,
    PASSES: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program counts the lowest digits of one tile of ``subtiles · TILE`` ids."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    RADIX: tl.constexpr = 1 << BITS
    tile = tl.program_id(0)
    digits = tl.arange(0, RADIX)
    counts = tl.zeros([RADIX], tl.int32)
    for subtile in range(subtiles):
        offsets = (tile * subtiles + subtile) * TILE + tl.arange(0, TILE)
        mask = offsets < num_ids
        keys = _as_keys(tl.load(ids_ptr + offsets, mask=mask, other=0), vocab_size, ignore_index, HAS_IGNORED)
        counts += tl.histogram(keys & (RADIX - 1), RADIX, mask=mask)
    tl.store(counts_ptr + tile * RADIX + digits, counts)
    for later in tl.static_range(1, PASSES):
        tl.store(counts_ptr + (later * num_tiles + tile) * RADIX + digits, tl.zeros([RADIX], tl.int32))


@triton.jit
def _digit_scatter_kernel(
    ids_ptr,  # [num_ids]: the caller's ids in the first pass, the keys of the pass before in the later ones
    positions_ptr,  # [num_ids], not read in the first pass
    counts_ptr,  # [PASSES, num_tiles, RADIX] in, and out for the next pass
    keys_ptr,  # [num_ids] out
    order_ptr,  # [num_ids] out
    num_ids,
    num_tiles,
    subtiles,
    vocab_size,
    ignore_index,
    PASS: tl.constexpr,
    PASSES: tl.constexpr,
    BITS: tl.constexpr,
    HAS_IGNORED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program moves one tile of ids to their places by one digit, keeping the order of equal digits.

    It also counts the next digit, for the tiles that the ids go to: whole numbers add up to the same in any order.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    RADIX: tl.constexpr = 1 << BITS
    SHIFT: tl.constexpr = PASS * BITS
    tile = tl.program_id(0)
    digits = tl.arange(0, RADIX)

    # Where this tile's ids of each digit begin: after all ids of lower digits, and those of this digit in tiles before.
    all_counts = tl.zeros([BLOCK_TILES, RADIX], tl.int32)
    counts_before = tl.zeros([BLOCK_TILES, RADIX], tl.int32)
    for first_tile in range(0, num_tiles, BLOCK_TILES):
        tiles = first_tile + tl.arange(0, BLOCK_TILES)
        counts = tl.load(
            counts_ptr + (PASS * num_tiles + tiles)[:, None] * RADIX + digits[None, :],
            mask=(tiles < num_tiles)[:, None],
            other=0,
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
        if PASS == 0:
            keys = _as_keys(keys, vocab_size, ignore_index, HAS_IGNORED)
        digit = (keys >> SHIFT) & (RADIX - 1)
        # Of two ids with one digit, the earlier has the smaller of these numbers, by at most its distance from the
        # start: as unsigned numbers, one comparison tells an earlier equal from everything else.
        local = tl.arange(0, TILE)
        number = digit * TILE + local - 1
        # Counted per element of a tile, and summed across threads once, at the end.
        earlier = tl.zeros([TILE, BLOCK_OTHERS], tl.int32)
        for first in tl.static_range(0, TILE, BLOCK_OTHERS):
            other = first + tl.arange(0, BLOCK_OTHERS)
            other_keys = tl.load(ids_ptr + base + other, mask=base + other < num_ids, other=0)
            if PASS == 0:
                other_keys = _as_keys(other_keys, vocab_size, ignore_index, HAS_IGNORED)
            other_number = ((other_keys >> SHIFT) & (RADIX - 1)) * TILE + other
            distance = (number[:, None] - other_number[None, :]).to(tl.uint32, bitcast=True)
            earlier += (distance < local.to(tl.uint32)[:, None]).to(tl.int32)
        place = tl.gather(next_place, digit, 0) + tl.sum(earlier, axis=1)
        if PASS == 0:
            positions = offsets
        else:
            positions = tl.load(positions_ptr + offsets, mask=mask, other=0)
        tl.store(keys_ptr + place, keys, mask=mask)
        tl.store(order_ptr + place, positions, mask=mask)
        if PASS + 1 < PASSES:
            next_tile = (PASS + 1) * num_tiles + place // (subtiles * TILE)
            next_digit = (keys >> (SHIFT + BITS)) & (RADIX - 1)
            tl.atomic_add(counts_ptr + next_tile * RADIX + next_digit, 1, mask=mask, sem="relaxed")
        next_place += tl.histogram(digit, RADIX, mask=mask)


@triton.jit
def _segment_starts_kernel(
    keys_ptr,  # [num_ids], sorted
    starts_ptr,  # [vocab_size + 1] out
    num_ids,
    vocab_size,
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
    # Not a fixed parameter: code compiled for any number of ids would then be compiled for each of its powers of two.
    steps = tl.log2(tl.full([], num_ids + 1, tl.float32)).to(tl.int32) + 2
    for _ in range(steps):
        searching = low < high
        middle = (low + high) // 2
        below = tl.load(keys_ptr + middle, mask=mask & searching, other=0) < ids
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
    tl.store(starts_ptr + ids, low, mask=mask)


def _radix_sort(ids: Tensor, vocab_size: int, ignore_index: int | None, num_ids: int) -> tuple[Tensor, Tensor]:
    """Return the sorted keys and the order of ``ids``, by radix sort."""
    passes = cdiv(vocab_size.bit_length(), DIGIT_BITS)
    subtiles = cdiv(num_ids, max(num_multiprocessors(ids), 2) * TILE_SIZE)
    num_tiles = cdiv(num_ids, subtiles * TILE_SIZE)
    counts = torch.empty((passes, num_tiles, 1 << DIGIT_BITS), dtype=torch.int32, device=ids.device)
    sizes = (num_ids, num_tiles, subtiles, vocab_size, -1 if ignore_index is None else ignore_index)
    options: dict[str, Any] = {
        "PASSES": passes,
        "HAS_IGNORED": ignore_index is not None,
        "TILE": TILE_SIZE,
        "BITS": DIGIT_BITS,
        "early": True,
    }
    launch(_digit_counts_kernel, (num_tiles,), ids, counts, *sizes, **options)
    source, positions = ids, ids
    for index in range(passes):
        keys = torch.empty(num_ids, dtype=torch.int32, device=ids.device)
        order = torch.empty_like(keys)
        launch(
            _digit_scatter_kernel,
            (num_tiles,),
            source,
            positions,
            counts,
            keys,
            order,
            *sizes,
            PASS=index,
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
            (cdiv(num_ids, RANK_BLOCK),),
            ids,
            keys,
            order,
            num_ids,
            vocab_size,
            -1 if ignore_index is None else ignore_index,
            HAS_IGNORED=ignore_index is not None,
            BLOCK=RANK_BLOCK,
            BLOCK_OTHERS=RANK_OTHERS,
            early=True,
        )
    else:
        keys, order = _radix_sort(ids, vocab_size, ignore_index, num_ids)
    starts = torch.empty(vocab_size + 1, dtype=torch.int32, device=ids.device)
    launch(
        _segment_starts_kernel,
        (cdiv(vocab_size + 1, STARTS_BLOCK),),
        keys,
        starts,
        num_ids,
        vocab_size,
        BLOCK=STARTS_BLOCK,
        early=True,
    )
    return Segments(keys, order, starts)
