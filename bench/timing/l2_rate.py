"""The rate at which a GPU reads from its L2 cache: a kernel that does nothing else. Imported on a GPU only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK = 4096  # int32 values that one program reads at a time: 16 KiB
REPEATS = 64  # blocks that one program reads


@triton.jit
def _read_kernel(
    source_ptr,  # [num_blocks, BLOCK]
    sums_ptr,  # [num_programs]
    num_blocks,
    BLOCK: tl.constexpr,
    REPEATS: tl.constexpr,
):
    """One program reads REPEATS blocks of the source, past the L1, and writes their sum so that the reads count."""
    program = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for repeat in tl.static_range(REPEATS):
        block = (program + repeat * 131) % num_blocks  # a prime step: programs do not read in lockstep
        total += tl.load(source_ptr + block * BLOCK + offsets, cache_modifier=".cg")
    tl.store(sums_ptr + program, tl.sum(total))


def l2_reader(device: torch.device) -> tuple[Callable[[], None], int]:
    """Return a function that reads a buffer of half the L2's size over and over, and the bytes that it reads."""
    properties = torch.cuda.get_device_properties(device)
    num_blocks = max(properties.L2_cache_size // 2 // (4 * BLOCK), 1)
    num_programs = 32 * properties.multi_processor_count
    source = torch.zeros(num_blocks, BLOCK, dtype=torch.int32, device=device)
    sums = torch.empty(num_programs, dtype=torch.int32, device=device)

    def read() -> None:
        _read_kernel[(num_programs,)](source, sums, num_blocks, BLOCK, REPEATS, num_warps=8)

    return read, 4 * BLOCK * REPEATS * num_programs
