"""The losses over a vocabulary that GPUs share out, beside one GPU that has the whole.

    torchrun --nproc_per_node=2 -m bench.vocabulary_parallel --json FILE               # about two minutes on two H100
    torchrun --nproc_per_node=2 -m bench.vocabulary_parallel --rows 64 --vocab 1000 --hidden 32 --runs 3    # on a CPU

Forward and backward, in bfloat16 on a GPU, at Llama 3's vocabulary by default. The contenders:

- ``linear``: `linear_patch_cross_entropy` on the whole weight, on every GPU by itself;
- ``linear, sharded``: the same over the group;
- ``linear, plain``: the output layer on this GPU's slice, and ``logits, plain``;
- ``logits`` and ``logits, sharded``: `patch_cross_entropy` on logits that are there;
- ``logits, plain``: PyTorch with three all-reduces, as trainers write their vocabulary-parallel loss for one target a
  row, on logits in fp32;
- ``exchange``: the all-reduces of ``linear, sharded`` by themselves.

Each is compared with the first of its kind before it is timed. Contenders take turns; a time is the median of the runs,
on the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from npp_kernels import VocabularyShard, linear_patch_cross_entropy, patch_cross_entropy
from npp_kernels.losses.chunks import find_chunks

Step = Callable[[], tuple[Tensor, ...]]  # the loss and the gradients
WARM_UPS = 3


class _PlainLoss(torch.autograd.Function):
    """Mean cross entropy of K targets a row over slices of logits, in PyTorch."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, groups: Tensor, shard: VocabularyShard) -> Tensor:
        logits = logits.float()
        maximum = logits.amax(1, keepdim=True)
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        below = logits - maximum
        softmax = below.exp()
        total = softmax.sum(1, keepdim=True)
        dist.all_reduce(total)
        softmax /= total
        here = (groups >= shard.start) & (groups < shard.stop)
        local = (groups - shard.start).masked_fill(~here, 0)
        target_logits = below.gather(1, local) * here
        dist.all_reduce(target_logits)
        ctx.save_for_backward(softmax, local, here)
        return (total.log() - target_logits).mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, here = ctx.saved_tensors
        grad = (softmax.scatter_add_(1, local, -here.float() / here.shape[1])).mul_(upstream[0] / here.shape[0])
        return grad, None, None


def plain_loss(logits: Tensor, groups: Tensor, shard: VocabularyShard) -> Tensor:
    """Return the mean loss of this rank's ``logits [N, V_r]``; their gradient has their dtype."""
    return _PlainLoss.apply(logits, groups, shard)


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks: the beginning of a layer that is split by columns."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad


def contenders(
    rows: int, options: argparse.Namespace, shard: VocabularyShard, device: torch.device
) -> Iterable[tuple[str, str, Step]]:
    """Yield name, kind and step of each contender; the first of a kind is the one that the others are compared with."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, options.hidden, generator=generator, device=device).to(dtype)
    weight = (0.02 * torch.randn(options.vocab, options.hidden, generator=generator, device=device)).to(dtype)
    groups = torch.randint(options.vocab, (rows, options.group_size), generator=generator, device=device)
    part = weight[shard.start : shard.stop].clone()
    logits = hidden @ weight.t()
    logits_part = logits[:, shard.start : shard.stop].clone()

    def step(function: Callable[..., Tensor], *tensors: Tensor, **more: Any) -> Step:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]

        def run() -> tuple[Tensor, ...]:
            loss = function(*leaves, groups, **more)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        return run

    def plain_linear(hidden: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
        return plain_loss(F.linear(_SumGradient.apply(hidden), weight), groups, shard)

    def exchange() -> tuple[Tensor, ...]:
        for chunk in find_chunks(rows, max(shard.sizes), None, 4 * options.hidden // dtype.itemsize):
            count = chunk.stop - chunk.start
            for numbers, operation in ((1, "max"), (2 + options.group_size, "sum"), (options.hidden, "sum")):
                shard.all_reduce(torch.zeros(numbers, count, device=device), operation)
        return ()

    yield "linear", "linear", step(linear_patch_cross_entropy, hidden, weight)  # type: ignore[arg-type]
    yield "linear, sharded", "linear", step(linear_patch_cross_entropy, hidden, part, shard=shard)  # type: ignore[arg-type]
    yield "linear, plain", "linear", step(plain_linear, hidden, part)
    yield "logits", "logits", step(patch_cross_entropy, logits)  # type: ignore[arg-type]
    yield "logits, sharded", "logits", step(patch_cross_entropy, logits_part, shard=shard)  # type: ignore[arg-type]
    yield "logits, plain", "logits", step(lambda z, groups: plain_loss(z, groups, shard), logits_part)
    yield "exchange", "exchange", exchange


def check(name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], shard: VocabularyShard) -> None:
    """Raise a ValueError unless loss and gradients are those of one process, as near as the dtype allows."""
    for index, (ours, whole) in enumerate(zip(found, expected, strict=True)):
        if ours.shape != whole.shape:  # the gradient of a slice of weights or of logits
            axis = next(axis for axis in range(ours.ndim) if ours.shape[axis] != whole.shape[axis])
            whole = whole.narrow(axis, shard.start, shard.size)
        error = (ours.float() - whole.float()).norm() / whole.float().norm()
        if not error <= 1e-2:
            raise ValueError(f"{name}: expected the result {index} of one process, got one that is off by {error:.1e}")


def timed(step: Step, device: torch.device) -> float:
    """Return the milliseconds of one run, which all ranks begin together."""
    dist.barrier()
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - started)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """Return the most memory that a run takes beyond what is there before; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(
    rows: int, options: argparse.Namespace, shard: VocabularyShard, device: torch.device
) -> list[dict[str, Any]]:
    """Return a record for each contender, the times those of the slowest rank."""
    field = list(contenders(rows, options, shard, device))
    expected: dict[str, tuple[Tensor, ...]] = {}
    for name, kind, step in field:
        check(name, step(), expected.setdefault(kind, step()), shard)
    expected.clear()
    peaks = {name: peak_bytes(step, device) for name, _, step in field}
    times: dict[str, list[float]] = {name: [] for name, _, _ in field}
    for turn in range(WARM_UPS + options.runs):
        for name, _, step in field:
            taken = torch.tensor(timed(step, device), device=device)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if turn >= WARM_UPS:
                times[name].append(taken.item())
    return [
        {"rows": rows, "contender": name, "ms": statistics.median(runs), "fastest": min(runs), "slowest": max(runs),
         "peak_bytes": peaks[name]}
        for name, runs in times.items()
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measure all numbers of rows, print a table, and write the file."""
    parser = argparse.ArgumentParser(prog="bench.vocabulary_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        world, rank = dist.get_world_size(), dist.get_rank()
        step = -(-options.vocab // world)
        sizes = [max(min(options.vocab - other * step, step), 0) for other in range(world)]
        shard = VocabularyShard.of_sizes(sizes)
        records = [record for rows in options.rows for record in measure(rows, options, shard, device)]
        if rank:
            return
        for record in records:
            peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:10.0f} MiB"
            print(f"{record['rows']:7d} rows  {record['contender']:16s} {record['ms']:9.3f} ms {peak}")
        if options.json:
            name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
            about = {"device": name, "ranks": world, "torch": torch.__version__, "vocab": options.vocab}
            about |= {"hidden": options.hidden, "group_size": options.group_size}
            options.json.write_text(json.dumps({**about, "records": records}, indent=1) + "\n")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
