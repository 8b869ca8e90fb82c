"""What the kernels of `group_mean` compute, in PyTorch: for the CPU, and for float64 on any device.

`group_mean` calls it where `_dispatch` says that no kernel runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from npp_kernels._autograd import in_dtype
from npp_kernels.embeddings.segments import Segments


def torch_means(
    table: Tensor, groups: Tensor, ignore_index: int | None, out_dtype: torch.dtype, *, divide: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`launch_means` in PyTorch: one slot of all groups at a time where no operation serves the whole."""
    num_groups, group_size = groups.shape
    if group_size == 1 and ignore_index is None:
        return in_dtype(F.embedding(groups[:, 0], table), out_dtype), None
    wide = torch.promote_types(table.dtype, torch.float32)
    # In 16 bit the operation rounds the sum before it divides; some of its code paths round every partial sum.
    if ignore_index is None and out_dtype == table.dtype == wide and num_groups:
        # Its mean takes longer than its sum and a division.
        return _divided(F.embedding_bag(groups, table, mode="sum"), group_size), None
    ignored = None if ignore_index is None else groups == ignore_index

    def load_rows(slot: int) -> Tensor:
        if ignored is None:
            return F.embedding(groups[:, slot], table)
        rows = F.embedding(groups[:, slot].masked_fill(ignored[:, slot], 0), table)
        return rows.masked_fill_(ignored[:, slot].unsqueeze(1), 0)

    total = load_rows(0).to(wide)
    for slot in range(1, group_size):
        total += load_rows(slot)
    if not divide:
        return in_dtype(total, out_dtype), None
    if ignored is None:
        return in_dtype(_divided(total, group_size), out_dtype), None
    counts = (~ignored).sum(1).to(wide)
    return in_dtype(_divided(total, counts.clamp(min=1).unsqueeze(1)), out_dtype), counts


def _divided(total: Tensor, divisor: int | Tensor) -> Tensor:
    # Not in place where it is traced: see `in_dtype`.
    return total / divisor if torch.compiler.is_compiling() else total.div_(divisor)


def torch_segments(ids: Tensor, vocab_size: int, ignore_index: int | None) -> Segments:
    """`find_segments` in PyTorch, in int64; an id out of range is an error of PyTorch's."""
    ids = ids.flatten()
    if ignore_index is not None:
        ids = ids.masked_fill(ids == ignore_index, vocab_size)
    keys, order = torch.sort(ids, stable=True)
    numbers = torch.zeros(vocab_size + 1, dtype=torch.int64, device=ids.device)
    numbers.scatter_add_(0, ids.long(), torch.ones_like(order))
    return Segments(keys, order, numbers.cumsum(0) - numbers)


def torch_table_gradient(
    grad: Tensor,
    groups: Tensor,
    counts: Tensor | None,
    ignore_index: int | None,
    vocab_size: int,
    dtype: torch.dtype,
    segments: Segments | None = None,
) -> Tensor:
    """`launch_table_gradient` in PyTorch: each id sums its own segment of one stable order, as there."""
    group_size = groups.shape[1]
    if not groups.numel():
        return torch.zeros((vocab_size, grad.shape[1]), dtype=dtype, device=grad.device)
    wide = torch.promote_types(dtype, torch.float32)
    scaled = grad.to(wide)
    if counts is not None:
        scaled = scaled / counts.to(wide).clamp(min=1).unsqueeze(1)
    elif group_size > 1:
        scaled = scaled / group_size
    _, order, starts = segments or torch_segments(groups, vocab_size, ignore_index)
    num_segments = vocab_size if ignore_index is None else vocab_size + 1  # the last is dropped
    sums = F.embedding_bag(order.long() // group_size, scaled, starts[:num_segments].long(), mode="sum")
    return sums[:vocab_size].to(dtype)
