"""Which implementation runs, decided by the tensor alone, and on which device its kernels are launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

# Triton reads TRITON_INTERPRET when it decorates a kernel, at import; so do we.
INTERPRETED = triton.knobs.runtime.interpret


def runs_kernels(tensor: Tensor) -> bool:
    """Return whether the Triton kernels serve this tensor: on a GPU, or anywhere under ``TRITON_INTERPRET=1``.

    float64 always takes the PyTorch path: it is for checking gradients, and the kernels accumulate in float32.
    """
    return (tensor.is_cuda or INTERPRETED) and tensor.dtype != torch.float64


def launch_device(tensor: Tensor) -> AbstractContextManager:
    """Return a context in which Triton launches on the tensor's GPU, which need not be the current one."""
    if not tensor.is_cuda or torch.compiler.is_compiling() or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def num_multiprocessors(tensor: Tensor) -> int:
    """Return how many multiprocessors the tensor's GPU has; 1 for the interpreter, which runs one program at a time."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
