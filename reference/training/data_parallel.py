"""Data parallel training whose step can be one CUDA graph, with an optimizer that is divided among the processes.

Parameters live in buckets: flat tensors, as `FlatAdamW` has them, of a few neighbouring layers each. As soon as the
backward has the last gradient of a bucket, all of them are copied into its flat gradient, and NCCL adds that up over
the processes, on a stream of its own, while the backward goes on. A capture takes both streams, so that a replayed
step overlaps as an ordinary one does, and leaves the host a single launch.

Sharded (ZeRO, stage 1), a process keeps the master weights, moments and moving average of its part of each bucket: it
receives the sum of that part (a reduce-scatter), updates it, and hands the new weights to all others (an all-gather)
while it updates its part of the next bucket. It sends what an all-reduce sends, and updates and remembers one part in
``processes``. The numbers are those of the update that is not sharded, bit for bit, where the backend adds up in the
same order in both; gloo does.

Source: ZeRO (arXiv 1910.02054), section 5.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reference.training.optimizer import BLOCK, AdamWConfig, FlatLayout, Flats, check_tensors, groups_of, scalars_of

# Gradients that a bucket has at least, but for the last: 25 MB in bf16, as DistributedDataParallel has them. Not tuned.
BUCKET_SIZE = 12_500_000

# PyTorch 2.13 has given them other names, and warns of these.
reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Sharing:
    """How the processes share an update.

    ``sharded``: each updates its part of every bucket; or, if false, all of it.
    ``gradient_dtype``: of what is added up over the processes.
    ``parts``: backward passes of a step. Their gradients are added up in fp32, and over the processes once.
    """

    sharded: bool = True
    gradient_dtype: torch.dtype = torch.float32
    parts: int = 1


class Bucket(FlatLayout):
    """Neighbouring parameters whose gradients are added up over the processes together.

    Args:
        named: the parameters, which become views of the bucket's weights.
        dtype: of the model's parameters.
        config: of their update.
        sharing: how the processes share it.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], dtype: torch.dtype, config: AdamWConfig, sharing: Sharing
    ) -> None:
        super().__init__(named, dist.get_world_size() * BLOCK)
        self.config = config
        size = self.end // dist.get_world_size()
        self.parts = [slice(first, first + size) for first in range(0, self.end, size)]  # one for each process
        self.own = self.parts[dist.get_rank()] if sharing.sharded else slice(0, self.end)  # what this process updates
        whole = self.copied()
        master = whole[self.own].clone() if sharing.sharded else whole
        self.weights = whole.to(dtype)  # what the model uses, all of it
        working = None if self.weights is master else self.weights[self.own]
        average = master.clone() if config.ema else None
        self.flats = Flats(master, torch.zeros_like(master), torch.zeros_like(master), working, average)
        self.hand_out(self.weights)
        self.gradient = torch.zeros(self.end, dtype=sharing.gradient_dtype, device=master.device)
        sums_apart = sharing.parts > 1 and sharing.gradient_dtype != torch.float32
        self.sum = torch.zeros_like(whole) if sums_apart else self.gradient
        self._sum_views = self.views(self.sum)
        self.missing = len(self.parameters)  # gradients that the backward has not computed yet

    def take(self, *, first: bool) -> None:
        """Take the gradients of one backward from the parameters, adding them to those of the step's earlier ones."""
        move = torch._foreach_copy_ if first else torch._foreach_add_
        move(self._sum_views, [cast(Tensor, parameter.grad) for parameter in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None  # its memory is the rest of the backward's

    def update(self, scalars: Tensor) -> None:
        """Update this process's part; ``scalars`` as for `adamw_`."""
        self.flats.update([self.gradient[self.own]], [0], scalars, self.config)

    def saved_parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names that checkpoints use, and this process's part of each tensor."""
        yield "model", self.flats.master
        yield "exp_avg", self.flats.moment1
        yield "exp_avg_sq", self.flats.moment2
        if self.flats.average is not None:
            yield "ema", self.flats.average


class DataParallelAdamW:
    """`FlatAdamW` over several processes: gradients are those of all, the update is shared.

    The methods are those of `FlatAdamW`, and as there none waits for the GPU. Every process calls all of them.
    Gradients are added up, not averaged: a loss is to be divided by the targets of all processes.

    Args:
        model: the same in every process; its parameters become views of the optimizer's tensors.
        config: hyperparameters.
        dtype: of the model's parameters. Below fp32, the master weights stay fp32.
        sharing: how the processes share an update.
    """

    def __init__(self, model: nn.Module, config: AdamWConfig, *, dtype: torch.dtype, sharing: Sharing) -> None:
        self.config = config
        self.sharing = sharing
        self.processes = dist.get_world_size()
        buckets = [
            [Bucket(part, dtype, group_config, sharing) for part in divided(named)]
            for named, group_config in groups_of(model, config)
        ]
        # In the order in which backwards complete them; the embeddings come last, behind all norms.
        self.buckets = [*reversed(buckets[0][1:]), *itertools.chain(*buckets[1:]), buckets[0][0]]
        self.group = group_for_captures()
        device = self.buckets[0].weights.device
        self.lr = torch.zeros((), device=device)
        self.updates = torch.zeros((), device=device)  # a tensor, since a replayed graph must count on
        self._part = 0  # of the step's backward passes
        self._sums: list[Any] = []  # the work of adding up a bucket each, in the order of the buckets
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._found_a_gradient, bucket))

    def close(self) -> None:
        """Give back the communicator; the graphs that hold its work must be gone, or NCCL would wait for them."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        self.lr.fill_(lr)

    def collect(self, *, first: bool) -> None:
        """Check that one backward is complete; its gradients were taken while it computed.

        Raises:
            ValueError: a parameter has no gradient.
        """
        assert first == (self._part == 0), "every backward is followed by one call"
        for bucket in self.buckets:
            if bucket.missing:
                names = [n for n, p in zip(bucket.names, bucket.parameters, strict=True) if p.grad is None]
                raise ValueError(f"model: expected a gradient of every parameter, got none of {names[0]}")
            bucket.missing = len(bucket.parameters)
        self._part = (self._part + 1) % self.sharing.parts

    def update(self) -> Tensor:
        """Clip and update; return the norm of the gradient of all processes before clipping."""
        for work in self._sums:
            work.wait()  # the current stream does, not the host
        self._sums = []
        norm = self._norm()
        self.updates.add_(1)
        scalars = scalars_of(norm, self.lr, self.updates, self.config)
        gathers = []
        for bucket in self.buckets:
            bucket.update(scalars)
            if self.sharing.sharded:
                gathers.append(self._hand_out(bucket))
        for work in gathers:
            work.wait()
        return norm

    def exchange(self) -> None:
        """Exchange what a step exchanges, for measurements: the last gradients are lost, the weights stay."""
        works = [self._add_up(bucket) for bucket in self.buckets]
        if self.sharing.sharded:
            works += [self._hand_out(bucket) for bucket in self.buckets]
        for work in works:
            work.wait()

    def exchanged_bytes(self) -> int:
        """Return the bytes that one process sends in a step, by rings, but for the norm's."""
        sent = sum(bucket.gradient.nbytes + (bucket.weights if self.sharing.sharded else bucket.gradient).nbytes
                   for bucket in self.buckets)  # fmt: skip
        return sent * (self.processes - 1) // self.processes

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return what `FlatAdamW.state` returns, whatever the number of processes: all call it, the first receives it.

        A sharded state is gathered in the host's memory.
        """
        state: dict[str, dict[str, Tensor]] = {"counters": {"updates": self.updates}}
        for bucket in self.buckets:
            for name, own in bucket.saved_parts():
                whole = self._gathered(bucket, own) if self.sharing.sharded else own
                if whole is not None:
                    state.setdefault(name, {}).update(bucket.named(whole))
        return state if dist.get_rank() == 0 else {}

    @torch.no_grad()
    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore what `state` returned, in any number of processes; the model's parameters follow."""
        expected: dict[str, dict[str, Tensor]] = {}
        for bucket in self.buckets:
            for name, _ in bucket.saved_parts():
                expected.setdefault(name, {}).update(bucket.named(torch.empty(bucket.end, device="meta")))
        check_tensors(expected, state)
        for bucket in self.buckets:
            for name, own in bucket.saved_parts():
                whole = torch.zeros(bucket.end)
                torch._foreach_copy_(bucket.views(whole), [state[name][parameter] for parameter in bucket.names])
                own.copy_(whole[bucket.own])
                if name == "model":
                    bucket.weights.copy_(whole)
        self.updates.copy_(state["counters"]["updates"])

    def _found_a_gradient(self, bucket: Bucket, parameter: Tensor) -> None:
        """Take what a bucket has once that is complete, and start to add it up over the processes."""
        bucket.missing -= 1
        if bucket.missing:
            return
        bucket.take(first=self._part == 0)
        if self._part < self.sharing.parts - 1:
            return
        if bucket.sum is not bucket.gradient:
            bucket.gradient.copy_(bucket.sum)
        # In the same order in all processes, or they would wait for each other forever.
        while len(self._sums) < len(self.buckets) and not self.buckets[len(self._sums)].missing:
            self._sums.append(self._add_up(self.buckets[len(self._sums)]))

    def _add_up(self, bucket: Bucket) -> Any:
        if self.sharing.sharded:
            own = bucket.gradient[bucket.own]
            return reduce_scatter(own, bucket.gradient, group=self.group, async_op=True)
        return dist.all_reduce(bucket.gradient, group=self.group, async_op=True)

    def _hand_out(self, bucket: Bucket) -> Any:
        return all_gather(bucket.weights, bucket.weights[bucket.own], group=self.group, async_op=True)

    def _norm(self) -> Tensor:
        """Return the norm of all gradients, summed in the same order whether the update is sharded or not."""
        if not self.sharing.sharded:
            parts = [bucket.gradient[bucket.parts[rank]] for rank in range(self.processes) for bucket in self.buckets]
            return torch.linalg.vector_norm(norms_of(parts))
        norms = norms_of([bucket.gradient[bucket.own] for bucket in self.buckets])
        everywhere = norms.new_empty(self.processes * len(norms))
        all_gather(everywhere, norms, group=self.group)
        return torch.linalg.vector_norm(everywhere)

    def _gathered(self, bucket: Bucket, own: Tensor) -> Tensor | None:
        """Return the whole of a sharded tensor in the first process."""
        whole = own.new_empty(bucket.end)
        all_gather(whole, own, group=self.group)
        return whole.cpu() if dist.get_rank() == 0 else None


def divided(named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Yield neighbouring parameters, bucket by bucket; those of one layer stay together, as SwiGLU needs them."""
    bucket: list[tuple[str, nn.Parameter]] = []
    for _, layer in itertools.groupby(named, key=lambda entry: layer_of(entry[0])):
        bucket += layer
        if sum(parameter.numel() for _, parameter in bucket) >= BUCKET_SIZE:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def layer_of(name: str) -> str:
    """Return the part of a parameter's name that says in which layer it is.

    >>> layer_of("layers.3.attention.wo.weight"), layer_of("output.weight")
    ('layers.3', 'output')
    """
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered[0] if numbered else name.partition(".")[0]


def norms_of(tensors: list[Tensor]) -> Tensor:
    """Return the norm of each tensor."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))


def group_for_captures() -> dist.ProcessGroup | None:
    """Return the processes' group for what a graph may hold; None for the default one.

    NCCL orders what one of its communicators does. With one of their own, graphs never meet what is launched between
    them: reports, checkpoints. Its kernels go first where both streams have some to launch, since all processes wait
    for them.
    """
    if dist.get_backend() != "nccl":
        return None
    return cast(
        dist.ProcessGroup, dist.new_group(pg_options=dist.ProcessGroupNCCL.Options(is_high_priority_stream=True))
    )
