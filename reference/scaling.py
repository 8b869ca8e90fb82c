"""Measure what a step costs on several GPUs, against one: three ways to share it, for each model and patch.

    torchrun --nproc-per-node 2 -m reference.scaling --json runs/scaling.json     # under 300 s on two H100
    python -m reference.scaling --report runs/scaling.json                        # its tables

First process 0 is timed by itself, as on a single GPU, while the others, which have compiled the same, wait; then all
train together, with as many images on each (weak scaling). *Efficiency* is the images a second of all GPUs over that of
one GPU times their number.

    one          the step in a graph, on one GPU
    replicated   the step in a graph, gradients added up in it; every process updates all weights
    sharded      the same, and every process updates its part of them: the trainer's default
    ddp          PyTorch's DistributedDataParallel, without a graph

Beside the times of steps, the table has those of the exchange: ``alone``, when nothing else runs; from a profile of a
few steps, the kernels of NCCL, which include waiting for the other processes; and how much of it no other kernel ran
beside. The file is written before and after each part. A part that is not over after ``--part-limit`` ends the
command, and is left out when the same command is given again, which goes on with the next. No part begins after
``--time-limit``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType

from reference.network.model import SIZES, ModelConfig, Transformer
from reference.step_time import listed, step_times
from reference.training.checkpoint import write_json
from reference.training.data_parallel import DataParallelAdamW
from reference.training.optimizer import AdamWConfig
from reference.training.processes import process_group
from reference.training.step import SETUP_STEPS, StepConfig, TrainStep

WAYS = {"one": "none", "replicated": "replicated", "sharded": "sharded", "ddp": "ddp"}  # and StepConfig's names
CELLS = "B:128,B:256,XL:64,XXL:32"  # models, and images of a GPU
DDP_SETTLING_STEPS = 11  # DistributedDataParallel measures its first ten
SETTLING_STEPS = 4
PROFILED_STEPS = 2
KEY = ("model", "images", "patch", "way", "processes")

Span = tuple[float, float]


def measure(
    step: TrainStep, cell: dict[str, Any], options: argparse.Namespace, waiting: dist.ProcessGroup | None
) -> dict[str, Any] | None:
    """Train for a few steps; return what this process measured, None where it does not take part."""
    on_gpu = step.device.type == "cuda"
    config = step.model.config
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(config.vocab_size, (cell["images"], *config.grid), generator=generator).to(step.device)
    labels = torch.randint(config.num_classes, (cell["images"],), generator=generator).to(step.device)
    started = time.perf_counter()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(SETUP_STEPS + (DDP_SETTLING_STEPS if cell["way"] == "ddp" else SETTLING_STEPS)):
        step.run(tokens, labels, cell["patch"], 1e-4)
    progress = step.report()
    setup_seconds = time.perf_counter() - started
    if not progress.is_finite:
        raise FloatingPointError(f"loss: expected finite numbers, got {progress.loss}")
    dist.barrier(waiting)
    if dist.get_rank() >= cell["processes"]:
        return None
    times = step_times(step, cell["patch"], (tokens, labels), options.steps)
    result = {
        "median_ms": statistics.median(times),
        "fastest_ms": min(times),
        "slowest_ms": max(times),
        "loss": progress.loss,
        "setup_seconds": setup_seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }
    if isinstance(step.optimizer, DataParallelAdamW):
        result |= exchange_alone(step.optimizer, step.device, options.steps)
        if on_gpu and options.profile:
            result |= profiled(step, cell["patch"], (tokens, labels))
    return result


def exchange_alone(optimizer: DataParallelAdamW, device: torch.device, num_steps: int) -> dict[str, float]:
    """Return the milliseconds of the exchange of a step when nothing else runs, and its bytes."""
    times = []
    for _ in range(2 + num_steps):
        synchronize(device)
        started = time.perf_counter()
        optimizer.exchange()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return {"alone_ms": statistics.median(times[2:]), "exchanged_bytes": float(optimizer.exchanged_bytes())}


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profiled(step: TrainStep, patch: int, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Return the milliseconds that NCCL's kernels take in a step, and those of them beside no other kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_STEPS):
            step.run(*batch, patch=patch, lr=1e-4)
        torch.cuda.synchronize()
    spans: dict[bool, list[Span]] = {True: [], False: []}
    for event in profile.events() or ():
        if event.device_type == DeviceType.CUDA:
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    together = covered(spans[True])
    alone = covered([*spans[True], *spans[False]]) - covered(spans[False])
    return {"nccl_ms": together / 1e3 / PROFILED_STEPS, "exposed_ms": alone / 1e3 / PROFILED_STEPS}


def covered(spans: Iterable[Span]) -> float:
    """Return the length of the union of spans.

    >>> covered([(0, 2), (1, 3), (5, 6), (5, 5.5)])
    4.0
    """
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


class Journal:
    """What was measured, in a file that the first process writes, and all know of.

    Args:
        options: of the command line.
        device: where this process measures.
        waiting: a group in which processes wait for each other on the host, so that an idle GPU is idle.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device, waiting: dist.ProcessGroup | None) -> None:
        self.options = options
        self.device = device
        self.waiting = waiting
        self.is_first = dist.get_rank() == 0
        self.cells = read_cells(options.json) if self.is_first else []
        self.failed = False
        self._started = time.monotonic()

    def begins(self, cell: dict[str, Any]) -> bool:
        """Return whether a cell is to be measured now, which the first process decides for all."""
        decision: list[Any] = [None]
        if self.is_first:
            known = next((old for old in self.cells if key_of(old) == key_of(cell)), None)
            seconds = time.monotonic() - self._started
            decision = [known is None and seconds < self.options.time_limit]
            self.failed |= known is None and not decision[0]
            if decision[0]:
                print(f"{seconds:5.0f} s  {', '.join(map(str, key_of(cell)[:4]))}: …", flush=True)
        dist.broadcast_object_list(decision, group=self.waiting)
        return bool(decision[0])

    def write(self, cell: dict[str, Any], result: dict[str, Any]) -> None:
        """Write down what came of a cell, in place of what was written before."""
        if not self.is_first:
            return
        conditions = {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if self.device.type == "cuda" else None,
            "asked": f"{self.options.steps} steps, compile {self.options.compile}, {self.options.precision}",
        }
        self.cells = [old for old in self.cells if key_of(old) != key_of(cell)] + [cell | conditions | result]
        write_json(self.options.json, {"cells": self.cells})

    @contextmanager
    def part(self, cell: dict[str, Any]) -> Iterator[None]:
        """Write that a part has begun, and end the process where it does not end in time."""
        limit = self.options.part_limit
        self.write(cell, {"error": f"not over after {limit:g} s"})

        def end() -> None:
            print(f"stopped: {key_of(cell)} is not over after {limit:g} s; the same command goes on", flush=True)
            os._exit(1)  # the main thread may wait for its GPU for ever

        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def measure(self, step: TrainStep, cell: dict[str, Any]) -> None:
        """Measure a cell, in all processes or in the first."""
        everybody: list[Any] = [None] * dist.get_world_size()
        with self.part(cell):
            dist.all_gather_object(everybody, self._measured(step, cell), group=self.waiting)
        results = [result for result in everybody if result is not None]
        slowest = max(results, key=lambda result: result["median_ms"])
        speed = 1e3 * cell["images"] * cell["processes"] / slowest["median_ms"]
        self.write(cell, slowest | {"images_per_second": speed})

    def _measured(self, step: TrainStep, cell: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return measure(step, cell, self.options, self.waiting)
        except Exception as error:
            self.write(cell, {"error": f"{type(error).__name__}: {str(error)[:300]}"})
            raise


def measure_all(options: argparse.Namespace, device: torch.device) -> Journal:
    """Measure every cell that was asked for, while there is time."""
    waiting = dist.new_group(backend="gloo")
    journal = Journal(options, device, waiting)
    for model, images in options.cells:
        for way in options.ways:
            processes = 1 if way == "one" else dist.get_world_size()
            step: TrainStep | None = None
            for patch in options.patches:
                cell = dict(zip(KEY, (model, images, patch, way, processes), strict=True))
                if not journal.begins(cell):
                    continue
                if step is None:
                    step = step_of(cell, options, device)
                journal.measure(step, cell)
            if step is not None:
                step.close()
            del step
            collect(device)
        torch.compiler.reset()  # all shapes together would be more than the compiler keeps
    return journal


def step_of(cell: dict[str, Any], options: argparse.Namespace, device: torch.device) -> TrainStep:
    """Return the model of a cell, ready to be trained."""
    size = {"vocab_size": options.vocab_size, "grid": (options.grid, options.grid)}
    torch.manual_seed(0)
    with device:
        model = Transformer(ModelConfig.named(cell["model"], **size)).train()
    config = StepConfig(options.precision, compile=options.compile == "on", parallel=WAYS[cell["way"]])
    return TrainStep(model, config, AdamWConfig(), batch_size=cell["images"])


def collect(device: torch.device) -> None:
    """Give back the memory of what is not used any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def key_of(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells a cell from all others."""
    return tuple(cell[name] for name in KEY)


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a file; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []


def report(cells: Sequence[dict[str, Any]]) -> str:
    r"""Return two Markdown tables: steps, and what two levels cost of plain training.

    >>> one = {"model": "B", "images": 128, "patch": 2, "processes": 1, "way": "one", "median_ms": 10.0,
    ...        "images_per_second": 12800.0, "device": "GPU"}
    >>> fine = one | {"patch": 1, "median_ms": 40.0, "images_per_second": 3200.0}
    >>> print(report([one, fine]).split("\n\n")[2])
    | model | images a GPU | GPUs | way | two levels, of plain training |
    |---|---|---|---|---|
    | B | 128 | 1 | one | 0.625 |
    """
    ways = list(WAYS)
    cells = sorted(cells, key=lambda c: (list(SIZES).index(c["model"]), c["images"], -c["patch"], ways.index(c["way"])))
    done = {key_of(cell): cell for cell in cells if "error" not in cell}
    heads = ["model", "images a GPU", "patch", "GPUs", "way", "ms", "images/s", "efficiency", "GiB"]
    heads += ["exchange alone, ms", "NCCL, ms", "beside nothing, ms"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for cell in cells:
        words = [str(cell[name]) for name in ("model", "images", "patch", "processes", "way")]
        if "error" in cell:
            lines.append(f"| {' | '.join(words)} | {cell['error']} |" + " |" * (len(heads) - len(words) - 1))
            continue
        one = done.get((*key_of(cell)[:3], "one", 1))
        efficiency = cell["images_per_second"] / cell["processes"] / one["images_per_second"] if one else None
        words += [f"{cell['median_ms']:.2f}", f"{cell['images_per_second']:.0f}", shown(efficiency, 2)]
        words += [shown(cell.get("peak_gib"), 1)]
        words += [shown(cell.get(name), 2) for name in ("alone_ms", "nccl_ms", "exposed_ms")]
        lines.append(f"| {' | '.join(words)} |")
    lines += ["", f"Device: {', '.join(sorted({cell['device'] for cell in cells}))}.", ""]
    lines += ["| model | images a GPU | GPUs | way | two levels, of plain training |", "|---|---|---|---|---|"]
    for (model, images, patch, way, processes), coarse in done.items():
        fine = done.get((model, images, 1, way, processes))
        if patch == 2 and fine is not None:
            cost = 0.5 + 0.5 * coarse["median_ms"] / fine["median_ms"]  # half of the steps at each patch
            lines.append(f"| {model} | {images} | {processes} | {way} | {cost:.3f} |")
    return "\n".join(lines)


def shown(figure: float | None, digits: int) -> str:
    """Return a figure as the table shows it; a dash where there is none."""
    return "-" if figure is None else f"{figure:.{digits}f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m reference.scaling",
        description="Measure training steps on several GPUs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--cells", default=CELLS, help="models and images of a GPU, with commas")
    parser.add_argument("--patches", default="4,2,1", help="with commas")
    parser.add_argument("--ways", default=",".join(WAYS), help="with commas")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each cell")
    parser.add_argument("--compile", choices=("on", "off"), default="on", help="see StepConfig")
    parser.add_argument("--precision", choices=("bf16", "autocast", "fp32"), default="bf16", help="see StepConfig")
    parser.add_argument("--grid", type=int, default=16, help="tokens on each side")
    parser.add_argument("--vocab-size", type=int, default=16_384, help="of the model")
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True, help="look at NCCL's kernels")
    parser.add_argument("--json", type=Path, default=Path("runs/scaling.json"), help="file of results, added to")
    parser.add_argument("--time-limit", type=float, default=280, help="begin no part after so many seconds")
    parser.add_argument("--part-limit", type=float, default=60, help="end where a part takes more seconds")
    parser.add_argument("--report", type=Path, metavar="JSON", help="print the tables of a file; measure nothing")
    options = parser.parse_args(arguments)
    options.patches, options.ways = listed(int, options.patches), listed(str, options.ways)
    options.cells = [
        (model, int(images)) for model, _, images in (c.partition(":") for c in listed(str, options.cells))
    ]
    for name, asked, allowed in (
        ("cells", [model for model, _ in options.cells], SIZES),
        ("ways", options.ways, WAYS),
    ):
        if unknown := set(asked) - set(allowed):
            parser.error(f"--{name}: expected some of {', '.join(allowed)}, got {min(unknown)}")
    if options.report is None and "RANK" not in os.environ:
        parser.error("expected torchrun, which starts a process for each GPU; or --report")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return 1 where no time was left for a part."""
    options = parse(arguments)
    if options.report is not None:
        print(report(read_cells(options.report)))
        return 0
    with process_group() as device:
        journal = measure_all(options, device)
        if journal.is_first:
            print(report(journal.cells))
            if journal.failed:
                print(f"no time was left for all parts after {options.time_limit:g} s; the same command goes on")
        return int(journal.failed)


if __name__ == "__main__":
    sys.exit(main())
