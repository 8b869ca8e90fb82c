"""What the machine allows: its rates, measured in the same session, and what each workload must move and multiply.

The limit of a pass is the greater of its device-memory bytes at the copy rate and its L2 bytes at the L2's read rate.
That of the linear loss is the time of its matrix products alone, run in turn with the contenders.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.cases.inputs import Inputs
from bench.cases.shapes import Workload
from bench.timing.clocks import Candidate, Clock, run_in_turn

ID_BYTES = 8  # ids are int64


@dataclass(frozen=True)
class Limits:
    """The measured rates of a machine."""

    copy_bytes_per_second: float  # read and written
    l2_bytes_per_second: float | None  # None without a GPU
    matmul_flops_per_second: float


@dataclass(frozen=True)
class Demand:
    """What one pass must move at least, and multiply."""

    memory_bytes: int
    l2_bytes: int = 0
    flops: int = 0

    def seconds(self, limits: Limits) -> float:
        """Return the least time that moving takes."""
        memory = self.memory_bytes / limits.copy_bytes_per_second
        return max(memory, self.l2_bytes / limits.l2_bytes_per_second if limits.l2_bytes_per_second else 0.0)


def demands(workload: Workload, direction: str, element_bytes: int, distinct_ids: int) -> list[Demand]:
    """Return what the passes of a workload must move: of the forward, and of the backward where there is one.

    Args:
        workload: what is computed.
        direction: "forward" or "forward_backward".
        element_bytes: bytes of an element of the leaves.
        distinct_ids: how many different ids the workload's tokens have: the rows of the table that are read.
    """
    width = workload.hidden_size * element_bytes
    id_bytes = ID_BYTES * workload.num_tokens
    if workload.operation == "group_mean":
        forward = Demand(distinct_ids * width + id_bytes + workload.rows * width, workload.num_tokens * width)
        # Each gradient row comes from memory once, and from the L2 once for each of its tokens; the table's gradient
        # is dense, so all of it is written.
        backward = Demand(workload.rows * width + id_bytes + workload.vocab_size * width, workload.num_tokens * width)
    elif workload.operation == "patch_mean":
        forward = backward = Demand((workload.num_tokens + workload.rows) * width)
    elif workload.operation == "patch_cross_entropy":
        logits = workload.rows * workload.vocab_size * element_bytes
        forward = Demand(logits + id_bytes)
        # With a scalar upstream the gradient can be written while the logits are read. Where every target has a
        # gradient of its own, the backward has to read them again.
        backward = Demand(logits if workload.reduction == "mean" else 2 * logits + id_bytes)
    else:
        product = 2 * workload.rows * workload.vocab_size * workload.hidden_size
        operands = (workload.rows + workload.vocab_size) * width
        forward = Demand(operands + id_bytes, flops=product)
        backward = Demand(operands, flops=2 * product)
    return [forward] if direction == "forward" else [forward, backward]


def products(workload: Workload, inputs: Inputs, direction: str) -> Callable[[], None]:
    """Return a function that runs the matrix products of the linear loss and nothing else."""
    hidden, weight = (leaf.detach() for leaf in inputs.leaves)
    logits = hidden.new_empty(workload.rows, workload.vocab_size)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if direction == "forward_backward":
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.T, hidden, out=grad_weight)

    return run


def measure_limits(clock: Clock, dtype: torch.dtype) -> Limits:
    """Measure the rates of the clock's device."""
    device = clock.device
    on_gpu = device.type == "cuda"
    source = torch.empty(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    works: list[tuple[Callable[[], object], float]] = [
        (lambda: target.copy_(source), 2 * source.numel()),
        (lambda: torch.mm(left, right, out=out), 2 * size**3),
    ]
    if on_gpu:
        from bench.timing.l2_rate import l2_reader

        works.append(l2_reader(device))
    samples = run_in_turn(clock, [Candidate(run) for run, _ in works])
    rates = [amount / statistics.median(times) for times, (_, amount) in zip(samples, works, strict=True)]
    return Limits(rates[0], rates[2] if on_gpu else None, rates[1])
