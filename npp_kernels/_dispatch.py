"""Which implementation runs, decided by the tensor alone, and how a kernel is launched on that tensor's GPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

# Triton reads TRITON_INTERPRET when it decorates a kernel, at import; so do we.
INTERPRETED = triton.knobs.runtime.interpret

# In Triton 3.4 the waiting of an overlapping kernel (`gdc_wait`) does not compile.
TRITON_OVERLAPS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5)


def runs_kernels(tensor: Tensor) -> bool:
    """Return whether the Triton kernels serve this tensor: on a GPU, or anywhere under ``TRITON_INTERPRET=1``.

    float64 always takes the PyTorch path: it is for checking gradients, and the kernels accumulate in float32.
    """
    return (tensor.is_cuda or INTERPRETED) and tensor.dtype != torch.float64


def cdiv(size: int, step: int) -> int:
    """Return how many steps cover a size. Triton's own also serves kernels, and takes the host several µs."""
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


@functools.cache
def _read_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_multiprocessors(tensor: Tensor) -> int:
    """Return how many multiprocessors the tensor's GPU has; 1 for the interpreter, which runs one program at a time."""
    if not tensor.is_cuda:
        return 1
    if torch.compiler.is_compiling():  # torch.compile takes this call as a constant, and cannot trace the cache
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return _read_multiprocessors(tensor.device.index)


@functools.cache
def _read_capability(index: int) -> tuple[int, int]:
    # ROCm numbers its devices otherwise, so they count as older than any of NVIDIA's.
    return torch.cuda.get_device_capability(index) if torch.version.cuda is not None else (0, 0)


# torch.compile keeps the value, and cannot trace the cache.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda_capability(index: int) -> tuple[int, int]:
    return _read_capability(index)


def is_hopper(tensor: Tensor) -> bool:
    """Return whether the tensor is on an NVIDIA GPU of compute capability 9."""
    return tensor.is_cuda and _cuda_capability(tensor.device.index)[0] == 9


def can_overlap(tensor: Tensor) -> bool:
    """Return whether a kernel may be launched before the one ahead of it has ended (programmatic dependent launch).

    It saves the 1 to 3 µs that a launch takes. A kernel that is launched so must wait (`gdc_wait`) before it touches
    what those before it read or write. `torch.compile` orders kernels itself.
    """
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return False
    return TRITON_OVERLAPS and _cuda_capability(tensor.device.index) >= (9, 0)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    early: bool | None = None,
    max_registers: int | None = None,
    **options: Any,
) -> None:
    """Launch a kernel on the GPU of its first argument, a tensor, which need not be on the current GPU.

    Args:
        kernel: a `triton.jit` function.
        grid: one to three numbers of programs.
        arguments: those that are not fixed, by position.
        early: for a kernel with a fixed parameter OVERLAP, which tells it to wait: whether to launch it before the
            kernel ahead of it has ended, where `can_overlap` allows that.
        max_registers: of a thread, for NVIDIA's compiler, which otherwise weighs the number of programs that run at a
            time by rules of its own; `torch.compile` takes no such limit.
        options: the fixed parameters, and Triton's own options.
    """
    compiling = torch.compiler.is_compiling()
    if early is not None:
        options["OVERLAP"] = early and can_overlap(arguments[0])
        if options["OVERLAP"]:
            options["launch_pdl"] = True
    if max_registers is not None and torch.version.cuda is not None and not compiling:
        options["maxnreg"] = max_registers
    device = arguments[0].device
    if INTERPRETED or compiling or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
