"""What an order that is made ahead saves `group_mean`, and what making it costs, in µs.

    python -m bench.group_order             # under a minute on an H100; --small for a look on a CPU

It is no contender of `python -m bench run`, where all that a way has to do to its ids is timed with it. Here the parts
stand side by side: forward + backward, without an order and with one; the preparation on the device and, in one thread,
on the CPU, as a data loader's worker makes it; and the copy from pinned memory, beside the batch. The shares are of the
limit of forward + backward: as it is without an order, with an order that costs nothing on the device, and with one
that the step itself makes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch

from bench.cases.inputs import make_inputs
from bench.cases.shapes import HIDDEN_SIZES, VOCAB_SIZE, Workload
from bench.timing.clocks import Candidate, Clock, CpuClock, make_clock, run_in_turn
from bench.timing.limits import Limits, demands, measure_limits
from npp_kernels import group_mean, order_groups
from reference.comparison.tables import markdown_table

HEADER = ("D", "tokens", "K", "without", "with", "prepared here", "on the CPU", "copied", "shares of the limit")


def medians(clock: Clock, runs: Sequence[Callable[[], object]]) -> list[float]:
    """Return the median seconds of each run, timed in turn."""
    return [statistics.median(seconds) for seconds in run_in_turn(clock, [Candidate(run) for run in runs])]


def measure(workload: Workload, clock: Clock, limits: Limits, dtype: torch.dtype) -> list[str]:
    """Return the table's line of a workload, once the gradients have turned out to be the same."""
    inputs = make_inputs(workload, clock.device, dtype)
    (table,), groups, host_groups = inputs.leaves, inputs.groups, inputs.groups.cpu()
    order, host_order = (order_groups(ids, workload.vocab_size) for ids in (groups, host_groups))
    if clock.device.type == "cuda":
        host_order = host_order.pin_memory()

    def without_order() -> torch.Tensor:
        return torch.autograd.grad(group_mean(table, groups), table, inputs.upstream)[0]

    def with_order() -> torch.Tensor:
        return torch.autograd.grad(group_mean(table, groups, order=order), table, inputs.upstream)[0]

    if not torch.equal(without_order(), with_order()):
        raise AssertionError(f"{workload.name}: the order changes the gradient")
    without, given, prepared, copied = medians(
        clock,
        [
            without_order,
            with_order,
            lambda: order_groups(groups, workload.vocab_size),
            lambda: host_order.to(clock.device, non_blocking=True),
        ],
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (on_host,) = medians(CpuClock(torch.device("cpu")), [lambda: order_groups(host_groups, workload.vocab_size)])
    finally:
        torch.set_num_threads(threads)
    needed = demands(workload, "forward_backward", table.element_size(), len(groups.unique()))
    limit = sum(demand.seconds(limits) for demand in needed)
    shares = " · ".join(f"{limit / seconds:.2f}" for seconds in (without, given, given + prepared))
    times = (f"{1e6 * seconds:.1f}" for seconds in (without, given, prepared, on_host, copied))
    return [str(workload.hidden_size), workload.tokens, str(workload.group_size), *times, shares]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the parts and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.group_order", description="Time an order of groups.")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--small", action="store_true", help="4 images, 64 columns, one patch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    clock = make_clock(torch.device(options.device))
    dtype = torch.bfloat16 if clock.device.type == "cuda" else torch.float32
    limits = measure_limits(clock, dtype)
    images = 4 if options.small else options.images
    sizes = [64] if options.small else [HIDDEN_SIZES["B"], HIDDEN_SIZES["XXL"]]
    patches = [2] if options.small else [1, 2, 4, 8]
    rows = [
        measure(Workload("group_mean", "order", VOCAB_SIZE, size, 16, images, patch, tokens), clock, limits, dtype)
        for size in sizes
        for tokens in ("real", "uniform")
        for patch in patches
    ]
    print("Forward + backward and the parts of an order, µs, medians.\n")
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
