"""Measure a training step: time, images/s, model FLOP/s and peak memory, for each model and patch, ours and official.

    python -m reference.step_time --models B,L --patches 4,2,1 --images 64 --json step_time.json

"Official" is the formulation of the official code as it is run there: unfolded embeddings and repeated fp32 logits,
model and loss compiled as a whole, bf16 autocast, fused AdamW, clipping. Both formulations of a cell run one after the
other in one process. A cell that fails is written down as failed, and the next one runs.

``--images 32,max`` measures at 32 images and, for each model, at the largest power of two up to 256 at which every
formulation fits into the memory at the finest patch; where one does not, that is written down and half as many are
tried.

The file is written after each cell, and the same command goes on where it was stopped: cells that were measured on the
same device, with the same PyTorch and options, are kept. ``--again`` measures them anew, after a change of the code
say. At the end, or at once with ``--report``, the table is printed, with the cost of the paper's schedules that follows
from it, and drawn into a PNG beside the file.

Compiling takes most of the time. ``--compile-ahead 8`` first runs every cell once, 8 at a time in processes of their
own, whose results nobody reads: they leave what they compiled in the compiler's cache on disk.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from reference.comparison.step_report import FORMULATIONS, key_of, plot, report
from reference.network.model import SIZES, ModelConfig, Transformer
from reference.training.checkpoint import write_json
from reference.training.optimizer import AdamWConfig
from reference.training.step import SETUP_STEPS, StepConfig, TrainStep

MAX_IMAGES = 256
SETTLING_STEPS = 5  # after set-up, before timing: clocks and caches
MAX = "max"


def step_times(step: TrainStep, patch: int, batch: tuple[torch.Tensor, torch.Tensor], num_steps: int) -> list[float]:
    """Return the milliseconds of steps that follow each other without a pause."""
    if batch[0].device.type != "cuda":
        ends = [time.perf_counter()]
        for _ in range(num_steps):
            step.run(*batch, patch=patch, lr=1e-4)
            ends.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(ends)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step.run(*batch, patch=patch, lr=1e-4)
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def measure(cell: dict[str, Any], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Build the model of a cell, train it for a few steps, and return what was measured."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    official = cell["formulation"] == "official"
    config = ModelConfig.named(cell["model"], vocab_size=options.vocab_size, grid=(options.grid, options.grid))
    torch.manual_seed(0)
    with device:
        model = Transformer(config, fast=not official).train()
        tokens = torch.randint(config.vocab_size, (cell["images"], *config.grid))
        labels = torch.randint(config.num_classes, (cell["images"],))
    step_config = StepConfig(
        precision="autocast" if official else options.precision,
        compile=options.compile == "on",
        official=official,
    )
    started = time.perf_counter()
    step = TrainStep(model, step_config, AdamWConfig(), batch_size=cell["images"])
    for _ in range(SETUP_STEPS + SETTLING_STEPS):
        step.run(tokens, labels, cell["patch"], 1e-4)
    settled = step.report()
    setup_seconds = time.perf_counter() - started
    times = step_times(step, cell["patch"], (tokens, labels), options.steps)
    progress = step.report()
    if not (settled.is_finite and progress.is_finite):
        raise FloatingPointError(f"loss: expected finite numbers, got {settled.loss} and {progress.loss}")
    median = statistics.median(times)
    return {
        "median_ms": median,
        "fastest_ms": min(times),
        "slowest_ms": max(times),
        "steps": len(times),
        "images_per_second": 1e3 * cell["images"] / median,
        "model_tflops_per_second": cell["images"] * config.training_flops(cell["patch"]) / median / 1e9,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "loss": progress.loss,  # after equally many steps on the same batch: the formulations must agree
        "setup_seconds": setup_seconds,
        "precision": step_config.precision,
        "compile": step_config.compile,
    }


def run_cell(cell: dict[str, Any], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure a cell, or write down why it could not be; leave nothing of it behind on the device."""
    try:
        result = measure(cell, options, device)
    except Exception as error:  # whatever fails in one cell, the others are still wanted
        # CUDA itself, and libraries on it, say so in the message of some other exception.
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        result = {"error": f"{type(error).__name__}: {str(error)[:500]}", "out_of_memory": out_of_memory}
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that fails may leave its own behind
    torch.compiler.reset()
    gc.collect()  # the exception's frames, and the step's own cycles, hold the model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return cell | conditions(options, device) | result


def conditions(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return what a measurement holds for, beside its cell."""
    return {
        "grid": options.grid,
        "vocab_size": options.vocab_size,
        "asked": f"{options.steps} steps, {options.compile}, {options.precision}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def command_of(cell: dict[str, Any], options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command that runs one cell once, and keeps its results in ``folder``."""
    one = {"models": cell["model"], "patches": cell["patch"], "images": cell["images"]}
    one |= {
        "formulations": cell["formulation"],
        "steps": 1,
        "json": folder / f"{'-'.join(map(str, cell.values()))}.json",
    }
    same = {name: getattr(options, name) for name in ("compile", "precision", "grid", "vocab_size")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (one | same).items()]
    return [sys.executable, "-m", "reference.step_time", *words]


class Table:
    """The cells of a file, and what of it this command has still to measure.

    Args:
        options: of the command line.
        device: where to measure.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options = options
        self.device = device
        path = options.json
        self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []
        self.failed = False  # a cell, and not for want of memory
        self.stopped = False  # by the time limit
        self._measured: set[tuple[Any, ...]] = set()  # by this command
        self._started = time.monotonic()

    def get(self, model: str, images: int, patch: int, formulation: str) -> dict[str, Any] | None:
        """Return a cell, measured now if it has to be; None where no time is left for it."""
        cell = {"model": model, "patch": patch, "images": images, "formulation": formulation}
        known = self._find(cell)
        if self._is_kept(known):
            return known
        seconds = time.monotonic() - self._started
        if seconds > self.options.time_limit:
            self.stopped = True
            return None
        name = f"{model}, {images} images, patch {patch}, {formulation}"
        print(f"{seconds:5.0f} s  {name}: …", flush=True)
        cell = run_cell(cell, self.options, self.device)
        self.failed |= not cell.get("out_of_memory", True)
        outcome = cell.get("error") or f"{cell['median_ms']:.2f} ms, {cell['setup_seconds']:.0f} s of set-up"
        print(f"{time.monotonic() - self._started:5.0f} s  {name}: {outcome}", flush=True)
        self.cells = [old for old in self.cells if old is not known] + [cell]
        self._measured.add(key_of(cell))
        write_json(self.options.json, {"cells": self.cells})
        return cell

    def _find(self, cell: dict[str, Any]) -> dict[str, Any] | None:
        return next((old for old in self.cells if key_of(old) == key_of(cell)), None)

    def _is_kept(self, known: dict[str, Any] | None) -> bool:
        if known is None:
            return False
        if key_of(known) in self._measured:
            return True
        if self.options.again or not known.get("out_of_memory", True):
            return False
        return all(known.get(name) == value for name, value in conditions(self.options, self.device).items())

    def compile_ahead(self, processes: int) -> None:
        """Run every cell that is still to be measured once, for the compiler's cache; what fails here fails later."""

        def run(command: list[str]) -> None:
            left = max(self.options.time_limit - (time.monotonic() - self._started), 0)
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, check=False, timeout=left if left < math.inf else None)

        with TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
            cells = [cell for cell in self._asked() if not self._is_kept(self._find(cell))]
            commands = [command_of(cell, self.options, Path(folder)) for cell in cells]
            list(tqdm(pool.map(run, commands), total=len(commands), desc="compiling ahead", unit="cell"))

    def _asked(self) -> Iterator[dict[str, Any]]:
        """Yield the cells that were asked for; the most images that may fit, where that is what was asked for."""
        options = self.options
        for model, asked in itertools.product(options.models, options.images):
            images = MAX_IMAGES if asked == MAX else int(asked)
            for patch, formulation in itertools.product(options.patches, options.formulations):
                yield {"model": model, "patch": patch, "images": images, "formulation": formulation}

    def measure(self) -> None:
        """Measure every cell that was asked for, while there is time."""
        for model, asked in itertools.product(self.options.models, self.options.images):
            images = self.largest(model) if asked == MAX else int(asked)
            for patch, formulation in itertools.product(self.options.patches, self.options.formulations):
                if images is None or self.get(model, images, patch, formulation) is None:
                    break

    def largest(self, model: str) -> int | None:
        """Return the largest number of images that fits; None where not even one does, or no time is left."""
        images = MAX_IMAGES
        while images and not self.stopped:
            cells = (self.get(model, images, min(self.options.patches), name) for name in self.options.formulations)
            if all(cell is not None and not cell.get("out_of_memory", False) for cell in cells):
                return images
            images //= 2
        return None


def listed(kind: type, text: str) -> list[Any]:
    """Split a comma-separated option."""
    return [kind(part) for part in text.split(",") if part]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m reference.step_time",
        description="Measure training steps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", default="B", help=f"of {', '.join(SIZES)}, with commas")
    parser.add_argument("--patches", default="4,2,1", help="with commas")
    parser.add_argument("--images", default="64", help="images of a step, with commas; max for the most that fit")
    parser.add_argument("--formulations", default=",".join(FORMULATIONS), help="with commas")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each cell")
    parser.add_argument("--compile", choices=("on", "off"), default="on", help="both; see StepConfig")
    parser.add_argument("--precision", choices=("bf16", "autocast"), default="bf16", help="ours; see StepConfig")
    parser.add_argument("--grid", type=int, default=16, help="tokens on each side")
    parser.add_argument("--vocab-size", type=int, default=16_384, help="of the model")
    parser.add_argument("--json", type=Path, default=Path("runs/step_time.json"), help="file of results, added to")
    parser.add_argument("--again", action="store_true", help="measure again what the file holds already")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="start no cell after so many seconds")
    parser.add_argument(
        "--compile-ahead", type=int, default=0, metavar="PROCESSES", help="fill the compiler's cache first, in so many"
    )
    parser.add_argument("--report", action="store_true", help="print and draw the table of the file; measure nothing")
    options = parser.parse_args(arguments)
    options.models, options.formulations = listed(str, options.models), listed(str, options.formulations)
    options.patches, options.images = listed(int, options.patches), listed(str, options.images)
    if wrong := [images for images in options.images if images != MAX and not images.isdecimal()]:
        parser.error(f"--images: expected numbers or {MAX}, got {wrong[0]}")
    for name, allowed in (("models", tuple(SIZES)), ("formulations", FORMULATIONS)):
        if unknown := set(getattr(options, name)) - set(allowed):
            parser.error(f"--{name}: expected some of {', '.join(allowed)}, got {min(unknown)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return 1 where a cell failed or no time was left for it."""
    options = parse(arguments)
    torch.set_float32_matmul_precision("high")
    table = Table(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not options.report:
        if options.compile_ahead > 0:
            table.compile_ahead(options.compile_ahead)
        table.measure()
    print(report(table.cells))
    if any("error" not in cell for cell in table.cells):
        plot(table.cells, options.json.with_suffix(".png"))
    if table.stopped:
        print(f"stopped after {options.time_limit:g} s; the same command goes on")
    return 1 if table.failed or table.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
