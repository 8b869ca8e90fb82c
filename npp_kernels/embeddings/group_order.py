"""The order that the backward of `group_mean` sums by, made once where the groups are made.

The order is a matter of the ids alone: no embedding and no gradient is looked at. What is made here and what the
backward makes for itself are the same numbers, so the gradient has the same bits either way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from npp_kernels._checks import asks_to_read, check_groups, check_id_range, check_same_device, described
from npp_kernels._dispatch import runs_kernels
from npp_kernels.embeddings.segments import Segments, find_segments
from npp_kernels.embeddings.torch_path import torch_segments


class GroupOrder(NamedTuple):
    """The positions of each id in some groups, sorted for the backward of `group_mean`; `order_groups` makes it.

    >>> import torch, npp_kernels
    >>> order = npp_kernels.order_groups(torch.tensor([[2, 0], [2, 1]]), vocab_size=3)
    >>> order.keys.tolist(), order.positions.tolist(), order.starts.tolist()
    ([0, 1, 2, 2], [[1, 3], [0, 2]], [0, 1, 2, 4])
    >>> order.to("cpu").ignore_index is None
    True

    The positions of id ``v``, ascending, are ``positions.flatten()[starts[v]:starts[v + 1]]``. A data loader collates
    and pins it like any named tuple of tensors.
    """

    keys: Tensor  # [num_ids], int32: sorted ids; those that do not count are vocab_size, last
    positions: Tensor  # the shape of the groups, int32: where each key stood in the flattened groups
    starts: Tensor  # [vocab_size + 1], int32
    ignore_index: int | None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> GroupOrder:
        """Return the same order on ``device``; arguments as those of `torch.Tensor.to`."""
        keys, positions, starts = (
            tensor.to(device, non_blocking=non_blocking) for tensor in (self.keys, self.positions, self.starts)
        )
        return GroupOrder(keys, positions, starts, self.ignore_index)

    def pin_memory(self) -> GroupOrder:
        """Return the same order in pinned memory, from which a copy to a GPU runs beside other work."""
        keys, positions, starts = (tensor.pin_memory() for tensor in (self.keys, self.positions, self.starts))
        return GroupOrder(keys, positions, starts, self.ignore_index)


def order_groups(groups: Tensor, vocab_size: int, *, ignore_index: int | None = None) -> GroupOrder:
    """Sort the ids of groups for the backward of `group_mean`, which then has no sorting to do.

    >>> import torch, npp_kernels
    >>> table = torch.zeros(5, 2, requires_grad=True)
    >>> groups = torch.tensor([[1, 2], [1, 4]])
    >>> order = npp_kernels.order_groups(groups, vocab_size=5)  # for instance where a data loader makes the groups
    >>> npp_kernels.group_mean(table, groups, order=order).sum().backward()
    >>> table.grad[:, 0].tolist()
    [0.0, 1.0, 0.5, 0.0, 0.5]

    It pays where it runs beside other work, as in the worker of a data loader, or where one order serves several
    backwards. In the step itself, and used once, it costs what it saves.

    Args:
        groups: ``[..., K]``, int32 or int64, fewer than 2³¹ ids: the very groups that `group_mean` will be given, so
            ``groups[:, :-1]`` where the last one is no input. Their dtype may differ from those.
        vocab_size: the rows of the table.
        ignore_index: as in the call of `group_mean`; the ``padding_idx`` of a `PatchEmbedding`.

    Returns:
        A `GroupOrder` on the device of ``groups``, the same one on every device.

    Raises:
        TypeError: ``groups`` of another dtype, or a ``vocab_size`` that is not an int.
        ValueError: a ``vocab_size`` below 1, or, with `check_ids` on, a bad id on a GPU.
        IndexError: an id out of range, on the CPU. On a GPU it is in no segment.

    Numerics:
        Exact. The gradient of the table is, bit for bit, what it is without the order.

    Memory:
        8 bytes for every id and 4 for every row of the table; while it is made, 8 to 16 more for every id.
    """
    check_groups(groups)
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise TypeError(f"vocab_size: expected an int, got {vocab_size!r}")
    if vocab_size < 1:
        raise ValueError(f"vocab_size: expected at least 1, got {vocab_size}")
    check_id_range(groups, vocab_size, ignore_index)
    flat = groups.reshape(-1).contiguous()
    find = find_segments if runs_kernels(groups) and flat.numel() else torch_segments
    keys, positions, starts = (part.to(torch.int32) for part in find(flat, vocab_size, ignore_index))
    return GroupOrder(keys, positions.view(groups.shape), starts, ignore_index)


def check_order(order: GroupOrder, groups: Tensor, vocab_size: int, ignore_index: int | None) -> None:
    """Raise unless ``order`` is one of such groups; with `check_ids` on, also unless it is that of these groups."""
    if not isinstance(order, GroupOrder):
        raise TypeError(f"order: expected a GroupOrder, as order_groups makes it, or None, got {type(order).__name__}")
    shapes = {"keys": (groups.numel(),), "positions": tuple(groups.shape), "starts": (vocab_size + 1,)}
    for name, shape in shapes.items():
        tensor = getattr(order, name)
        if tensor.dtype != torch.int32:
            raise TypeError(f"order: expected {name} of int32, got {described(tensor)}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"order: expected {name} {shape} for groups {tuple(groups.shape)} and a table of {vocab_size} rows, "
                f"got {described(tensor)}"
            )
        check_same_device("order", tensor, "groups", groups)
    if order.ignore_index != ignore_index:
        raise ValueError(f"order: expected ignore_index={ignore_index}, as in this call, got {order.ignore_index}")
    if asks_to_read(groups):
        right = order_groups(groups, vocab_size, ignore_index=ignore_index)
        if not all(torch.equal(getattr(order, name), getattr(right, name)) for name in shapes):
            raise ValueError("order: expected what order_groups makes of these groups, got that of others")


def as_segments(order: GroupOrder) -> Segments:
    """Return an order as what the backward works with."""
    return Segments(order.keys.contiguous(), order.positions.reshape(-1).contiguous(), order.starts.contiguous())
