"""Which implementation runs, decided by the tensor alone, and how a kernel is launched on that tensor's GPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

# Triton reads TRITON_INTERPRET when it decorates a kernel, at import; so do we.
INTERPRETED = triton.knobs.runtime.interpret

# Compiled kernels by everything that Triton compiles differently for; emptied when it grows past this.
MAX_COMPILED = 4096
_compiled: dict[tuple, tuple] = {}


def runs_kernels(tensor: Tensor) -> bool:
    """Return whether the Triton kernels serve this tensor: on a GPU, or anywhere under ``TRITON_INTERPRET=1``.

    float64 always takes the PyTorch path: it is for checking gradients, and the kernels accumulate in float32.
    """
    return (tensor.is_cuda or INTERPRETED) and tensor.dtype != torch.float64


def cdiv(size: int, step: int) -> int:
    """Return how many steps cover a size. Triton's own also serves kernels, and takes a slow host 5 µs."""
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


def num_multiprocessors(tensor: Tensor) -> int:
    """Return how many multiprocessors the tensor's GPU has; 1 for the interpreter, which runs one program at a time."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


@functools.cache
def _supports_dependent_launch(index: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (9, 0)


def can_overlap(tensor: Tensor) -> bool:
    """Return whether a kernel may be launched before the one ahead of it has ended (programmatic dependent launch).

    It saves the 1 to 3 µs that a launch takes. A kernel that is launched so must wait (`gdc_wait`) before it touches
    what those before it read or write. `torch.compile` orders kernels itself.
    """
    return tensor.is_cuda and not torch.compiler.is_compiling() and _supports_dependent_launch(tensor.device.index)


def _argument_key(argument: Any) -> Any:
    """Return what Triton compiles differently for: dtype and alignment of a tensor, 1, multiples of 16, 64 bits."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return -1 if argument == 1 else (argument % 16 == 0) + 2 * (not -(2**31) <= argument < 2**31)
    return type(argument)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, early: bool = False, **options: Any) -> None:
    """Launch a kernel on the GPU of its first argument, a tensor, which need not be on the current GPU.

    ``kernel[grid](*arguments, **options)`` binds and inspects all arguments each time, which takes a slow host 50 µs.
    Here the compiled kernel is found by a key and launched at once.

    Args:
        kernel: a `triton.jit` function whose fixed parameters (``tl.constexpr``) come last.
        grid: one to three numbers of programs.
        arguments: the others, by position.
        early: launch it before the kernel ahead of it has ended, where `can_overlap` says so.
        options: the fixed parameters, and Triton's own options.
    """
    if early:
        options["launch_pdl"] = True
    if INTERPRETED or torch.compiler.is_compiling():
        kernel[grid](*arguments, **options)
        return
    device = arguments[0].device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, early=early, **options)
        return
    key = (kernel.fn, device.index, *map(_argument_key, arguments), *options.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **options)
        if len(_compiled) >= MAX_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(arguments) :])
        return
    compiled, fixed = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *fixed)
