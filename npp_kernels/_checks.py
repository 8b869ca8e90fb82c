"""Checks of arguments, made before any kernel runs: a message names the argument, what was expected and what came.

Every public function begins with them.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)
STORED_ID_DTYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.uint64)


def read_switch(name: str) -> bool:
    """Return whether the environment variable ``name`` says yes; one that is not set, or empty, says no.

    A word that is neither is an error: a check that its owner believes to be on must not be off.
    """
    word = os.environ.get(name, "").strip()
    if word.lower() in ("1", "true", "yes", "on"):
        return True
    if word.lower() in ("", "0", "false", "no", "off"):
        return False
    raise ValueError(f"{name}: expected 1, true, yes or on, or else 0, false, no, off or nothing, got {word!r}")


_ids_are_checked = read_switch("NPP_KERNELS_CHECK")


def check_ids(enabled: bool = True) -> None:
    """Turn the checking of ids on the GPU on or off, for the whole process.

    >>> import npp_kernels
    >>> npp_kernels.check_ids(True)   # every call now raises a ValueError on a bad id, and waits for the GPU to do so
    >>> npp_kernels.check_ids(False)

    Off by default, since finding a bad id needs a host synchronisation; without it, the row of a bad id is NaN. The
    environment variable ``NPP_KERNELS_CHECK``, read at import, turns it on from the start: 1, true, yes or on; with 0,
    false, no or off, or empty, it stays off, and another word is a ValueError. On the CPU ids are always checked. Under
    `torch.compile` and CUDA graph capture, where the host cannot wait for the GPU, the switch has no effect.

    Args:
        enabled: whether ids are checked from now on.
    """
    global _ids_are_checked
    _ids_are_checked = bool(enabled)


def described(tensor: Tensor) -> str:
    """Describe a tensor in an error message: its shape, dtype and device."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def check_tensor(name: str, value: object) -> None:
    """Raise a TypeError unless ``value`` is a plain tensor."""
    if not isinstance(value, Tensor):
        way_out = ": pass module.weight" if isinstance(value, torch.nn.Embedding | torch.nn.Linear) else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}{way_out}")
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(value, distributed.DTensor):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor. Pass the local shard, {name}.to_local(), where the other "
            f"arguments are sharded alike, or {name}.full_tensor() where every rank needs the whole; under FSDP2, call "
            "the function in the forward of the module that owns the parameter, where it is gathered already"
        )


def check_integer_dtype(name: str, tensor: Tensor) -> None:
    """Raise a TypeError unless ``tensor`` has an integer dtype."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer dtype, got {described(tensor)}")


def check_groups(groups: Tensor) -> None:
    """Raise unless ``groups`` is a tensor ``[..., K]`` of int32 or int64 with K of at least 1."""
    check_tensor("groups", groups)
    if groups.dtype not in ID_DTYPES:
        way_out = ": pass groups.long()" if groups.dtype in STORED_ID_DTYPES else ""
        raise TypeError(f"groups: expected int32 or int64, got {described(groups)}{way_out}")
    if groups.ndim < 1 or groups.shape[-1] < 1:
        raise ValueError(f"groups: expected [..., K] with K of at least 1, got {described(groups)}")


def check_floating(name: str, tensor: Tensor, *, ndim: int | None = None) -> None:
    """Raise unless ``tensor`` is a floating-point tensor of a supported dtype, and has ``ndim`` axes where given."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {described(tensor)}")
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} axes, got {described(tensor)}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {tensor.device}")


def may_read(groups: Tensor) -> bool:
    """Return whether ids are looked at on the host: on the CPU; on a GPU, where it has to wait, if asked for.

    Never while `torch.compile` traces, whose graph a data-dependent branch would break, nor while a graph is captured.
    """
    if torch.compiler.is_compiling() or groups.is_meta or not (groups.device.type == "cpu" or _ids_are_checked):
        return False
    return not (groups.is_cuda and torch.cuda.is_current_stream_capturing())


def asks_to_read(groups: Tensor) -> bool:
    """Return whether `check_ids` is on, and ids may be looked at: for checks that cost a sort, on the CPU too."""
    return _ids_are_checked and may_read(groups)


def check_id_range(groups: Tensor, vocab_size: int, ignore_index: int | None) -> None:
    """Raise on an id outside ``[0, vocab_size)``: an IndexError on the CPU; on a GPU a ValueError, if asked for."""
    if not may_read(groups):
        return
    if not groups.numel():
        return
    smallest, largest = groups.aminmax()
    if smallest.item() >= 0 and largest.item() < vocab_size:  # the usual case; faster than comparing every id
        return
    bad = (groups < 0) | (groups >= vocab_size)
    if ignore_index is not None:
        bad &= groups != ignore_index
    if not bad.any():
        return
    position = tuple(bad.nonzero()[0].tolist())
    error = IndexError if groups.device.type == "cpu" else ValueError
    raise error(f"groups: expected ids in [0, {vocab_size}), got {groups[position].item()} at position {position}")


def rows_overlap(tensor: Tensor) -> bool:
    """Return whether two elements of a tensor may share memory, as those of an expanded one do."""
    if not tensor.numel():
        return False
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False
