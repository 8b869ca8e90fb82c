"""Which ids of a vocabulary a rank holds, where a process group shares it out, and the reductions over that group.

The slices of the ranks follow each other in the order of the ranks: rank r holds the ids from ``start`` to ``stop``,
rows of the output layer or of the embedding table. They need not be of one size.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from npp_kernels._checks import described, may_read

# Of `row_checksums`: an odd number, which mixes the low bits, and the bits that fp32 holds.
CHECKSUM_FACTOR = 1_000_003
CHECKSUM_MASK = (1 << 24) - 1
OTHER_ROWS = (
    "groups: expected the same rows on every rank that shares out the vocabulary, got others on some. Where ranks have "
    "rows of their own, as under data parallelism, they need the whole vocabulary each: a DTensor's full_tensor(), or "
    "under FSDP2 a call in the forward of the module that owns the parameter"
)


@dataclass(frozen=True)
class VocabularyShard:
    """A rank's slice of a vocabulary that a process group shares out.

    >>> import torch, torch.distributed as dist
    >>> from npp_kernels import VocabularyShard, patch_cross_entropy
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)    # or by torchrun
    >>> shard = VocabularyShard.of(8)    # every rank says how many ids it holds: once, when the model is built
    >>> shard.start, shard.stop, shard.vocab_size
    (0, 8, 8)
    >>> logits, groups = torch.randn(3, 8), torch.randint(8, (3, 4))    # ids of the whole vocabulary
    >>> patch_cross_entropy(logits, groups, shard=shard).shape
    torch.Size([])
    >>> dist.destroy_process_group()

    It is made once; calls that take it check their tensors against it and exchange no sizes. A `DTensor` that is
    sharded over its vocabulary carries the same knowledge, so that a call with one needs no shard.

    Args:
        sizes: how many ids each rank of the group holds, in the order of its ranks.
        rank: this process's rank in the group.
        group_name: the name of the process group.
    """

    sizes: tuple[int, ...]
    rank: int
    group_name: str

    @classmethod
    def of(cls, size: int, group: dist.ProcessGroup | None = None) -> VocabularyShard:
        """Return the shard of a rank that holds ``size`` ids. All ranks of the group call it: they exchange sizes.

        Args:
            size: how many ids this rank holds, at least 1; the rows of its output layer.
            group: the process group that shares out the vocabulary; all processes where None.

        Raises:
            RuntimeError: there is no process group yet.
            ValueError: this process is not in the group, or a rank holds no id.
            TypeError: ``size`` is not an int.
        """
        group = _checked_group(group)
        sizes: list[object] = [None] * dist.get_world_size(group)
        dist.all_gather_object(sizes, size, group=group)
        return cls.of_sizes(sizes, group)  # type: ignore[arg-type]  # which checks them

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], group: dist.ProcessGroup | None = None) -> VocabularyShard:
        """Return the shard of this rank where the sizes of all ranks are known, without an exchange.

        Args:
            sizes: how many ids each rank holds, the same list on every rank.
            group: the process group; all processes where None.

        Raises:
            RuntimeError, ValueError, TypeError: those of `of`, and a ValueError where there is not one size a rank.
        """
        group = _checked_group(group)
        if len(sizes) != dist.get_world_size(group):
            raise ValueError(f"sizes: expected {dist.get_world_size(group)}, one for each rank, got {list(sizes)}")
        for size in sizes:
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"sizes: expected ints, got {list(sizes)}")
            if size < 1:
                raise ValueError(f"sizes: expected every rank to hold at least one id, got {list(sizes)}")
        return cls(tuple(map(operator.index, sizes)), dist.get_rank(group), group.group_name)

    @property
    def vocab_size(self) -> int:
        """How many ids there are, on all ranks together."""
        return sum(self.sizes)

    @property
    def start(self) -> int:
        """The first id of this rank."""
        return sum(self.sizes[: self.rank])

    @property
    def stop(self) -> int:
        """The id after the last of this rank."""
        return self.start + self.size

    @property
    def size(self) -> int:
        """How many ids this rank holds."""
        return self.sizes[self.rank]

    def check_size(self, name: str, tensor: Tensor, axis: int) -> None:
        """Raise a ValueError unless an axis of a tensor has the size of this rank's slice."""
        if tensor.shape[axis] != self.size:
            raise ValueError(
                f"{name}: expected {self.size} ids on axis {axis}, those of rank {self.rank} in a shard of sizes "
                f"{list(self.sizes)}, got {described(tensor)}"
            )

    def all_reduce(self, tensor: Tensor, operation: str) -> None:
        """Replace ``tensor`` by its ``"max"``, ``"min"`` or ``"sum"`` over the group."""
        self.start_all_reduce(tensor, operation).wait()

    def start_all_reduce(self, tensor: Tensor, operation: str) -> dist.Work:
        """Begin `all_reduce`, and return what has to be waited for."""
        # By name, as PyTorch's own collectives find their group in compiled code.
        group = dist.distributed_c10d._resolve_process_group(self.group_name)  # type: ignore[arg-type]
        work: dist.Work | None = dist.all_reduce(
            tensor, getattr(dist.ReduceOp, operation.upper()), group=group, async_op=True
        )
        assert work is not None  # None only where this process is not in the group
        return work


def _checked_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("group: expected a process group, got none: call torch.distributed.init_process_group first")
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group: expected a process group that this process is in, got {group!r}")
    return group


def is_dtensor(value: object) -> bool:
    """Return whether ``value`` is a `DTensor`, without importing what nobody has imported."""
    return type(value).__name__ == "DTensor" and isinstance(value, Tensor)


def local_slice(name: str, tensor: Tensor, axis: int, shard: VocabularyShard | None) -> tuple[Tensor, VocabularyShard]:
    """Return this rank's slice of a `DTensor` that is sharded on ``axis``, and the shard that follows from it.

    Args:
        name: the argument's, for messages.
        tensor: a `DTensor`.
        axis: the one of the vocabulary.
        shard: what the caller gave, which has to agree, or None.

    Raises:
        TypeError: the tensor is placed otherwise.
        ValueError: it contradicts the caller's shard, or a rank has no id.
    """
    from torch.distributed.tensor import Shard  # already imported, since the caller has a DTensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    axis %= tensor.ndim
    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != axis:
        raise TypeError(
            f"{name}: expected a plain tensor, or a DTensor with the placement Shard({axis}) on a mesh of one axis, "
            f"got {placements} on {mesh}. Pass {name}.full_tensor() where every rank needs the whole, or "
            f"{name}.redistribute(...); under FSDP2, call the function in the forward of the module that owns the "
            "parameter, where only the axes of its other parallelism are left"
        )
    vocab_size, num_ranks = tensor.shape[axis], mesh.size()
    step = -(-vocab_size // num_ranks)  # as torch.chunk cuts: equal slices, and a smaller one at the end
    sizes = [max(min(vocab_size - rank * step, step), 0) for rank in range(num_ranks)]
    found = VocabularyShard.of_sizes(sizes, mesh.get_group())
    if shard is not None and shard != found:
        raise ValueError(f"shard: expected that of {name}, {found}, or None, got {shard}")
    local = tensor.to_local()  # type: ignore[attr-defined]
    found.check_size(name, local, axis)
    return local, found


def row_checksums(groups: Tensor) -> Tensor:
    """Return a whole number below 2²⁴ for each row of ``groups [N, K]``, which fp32 holds: equal for equal rows."""
    slots = torch.arange(groups.shape[1], device=groups.device)
    return (groups.long() * (2 * slots + 1) * CHECKSUM_FACTOR).sum(1) & CHECKSUM_MASK


def check_same_rows(groups: Tensor, shard: VocabularyShard) -> None:
    """Raise a ValueError on every rank where ranks have other ``groups [N, K]``; where `may_read` lets it look."""
    if not may_read(groups):
        return
    checksum = row_checksums(groups).sum()
    both = torch.stack([checksum, -checksum])
    shard.all_reduce(both, "max")
    if both[0] != -both[1]:
        raise ValueError(OTHER_ROWS)


def find_vocab_size(name: str, tensor: Tensor, axis: int, shard: VocabularyShard | None) -> int:
    """Return the size of the whole vocabulary, of which an axis of a tensor is all, or this rank's slice.

    Raises:
        TypeError: the shard is none.
        ValueError: the tensor is not of the slice's size.
    """
    if shard is None:
        return tensor.shape[axis]
    if not isinstance(shard, VocabularyShard):
        raise TypeError(f"shard: expected a VocabularyShard or None, got {type(shard).__name__}")
    shard.check_size(name, tensor, axis)
    return shard.vocab_size


def whole_tensor(name: str, tensor: Tensor) -> Tensor:
    """Return the plain tensor behind a `DTensor` that every rank has whole; its gradient is whole on every rank too.

    Raises:
        TypeError: it is placed otherwise.
    """
    from torch.distributed.tensor import Replicate

    placements = tensor.placements  # type: ignore[attr-defined]
    if not all(isinstance(placement, Replicate) for placement in placements):
        raise TypeError(
            f"{name}: expected a plain tensor, or a DTensor with the placement Replicate() beside a vocabulary that is "
            f"sharded, got {placements}; pass {name}.redistribute(placements=[Replicate()]), or {name}.full_tensor()"
        )
    whole: Tensor = tensor.to_local(grad_placements=placements)  # type: ignore[attr-defined]
    return whole


# A reduction as one operator: torch.compile must neither reorder it nor trace into it.
@torch.library.custom_op("npp_kernels::sum_over_ranks", mutates_args=())
def _sum_over_ranks(tensor: Tensor, group_name: str) -> Tensor:
    total = tensor.clone()
    VocabularyShard((), 0, group_name).all_reduce(total, "sum")
    return total


@_sum_over_ranks.register_fake
def _(tensor: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(tensor)


def sum_over_ranks(tensor: Tensor, shard: VocabularyShard) -> Tensor:
    """Return the sum of a tensor over the group of a shard, in place where nobody traces."""
    if torch.compiler.is_compiling():
        total: Tensor = _sum_over_ranks(tensor, shard.group_name)
        return total
    shard.all_reduce(tensor, "sum")
    return tensor
