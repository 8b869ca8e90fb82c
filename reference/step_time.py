"""Measure a training step: time, images/s, model FLOP/s and peak memory, for each model and patch, ours and official.

    python -m reference.step_time --models B,L --patches 4,2,1 --images 64 --json step_time.json

"Official" is the formulation of the official code as it is run there: unfolded embeddings and repeated fp32 logits,
model and loss compiled as a whole, bf16 autocast, fused AdamW, clipping. Both formulations of a cell run one after the
other in one process. A cell that fails (for want of memory, say) is written down as failed, and the next one runs.

The file is written after each cell. Where it exists, its cells are kept, and those measured again are replaced, so that
a long table can be made in parts; each cell names its device. At the end, or at once with ``--report``, the table is
printed, with the cost of the paper's schedules that follows from it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from npp_kernels import PatchSchedule
from reference.model import SIZES, ModelConfig, Transformer
from reference.optimizer import AdamWConfig
from reference.step import SETUP_STEPS, StepConfig, TrainStep

FORMULATIONS = ("ours", "official")
SETTLING_STEPS = 5  # after set-up, before timing: clocks and caches
KEY = ("model", "patch", "images", "formulation")


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
        compile="off" if options.compile == "off" else "model" if official else options.compile,
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
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
    }


def run_cell(cell: dict[str, Any], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure a cell, or write down why it could not be; leave nothing of it behind on the device."""
    try:
        result = measure(cell, options, device)
    except Exception as error:  # whatever fails in one cell, the others are still wanted
        result = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    gc.collect()  # the exception's frames, and the step's own cycles, hold the model
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return cell | result


def write(path: Path, cells: list[dict[str, Any]]) -> None:
    """Write all cells; the file is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"cells": cells}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def report(cells: list[dict[str, Any]]) -> str:
    r"""Return the cells, and the schedules' cost in time that follows from them, as Markdown tables.

    >>> cells = [{"model": "B", "patch": p, "images": 64, "formulation": f, "median_ms": ms, "images_per_second": 1.0,
    ...           "model_tflops_per_second": 1.0, "peak_gib": None, "device": "GPU"}
    ...          for p, f, ms in [(1, "ours", 20.0), (2, "ours", 5.0), (1, "official", 25.0)]]
    >>> print(report(cells).split("\n\n")[1])
    | model | images | levels | of our plain training | of the official plain training |
    |---|---|---|---|---|
    | B | 64 | 2 | 0.625 | 0.500 |
    """
    lines = [
        "| model | images | patch | formulation | ms | images/s | model TFLOP/s | peak GiB | device |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        name = f"| {cell['model']} | {cell['images']} | {cell['patch']} | {cell['formulation']} |"
        if "error" in cell:
            lines.append(f"{name} {cell['error'].splitlines()[0][:80]} | | | | |")
            continue
        peak = "" if cell["peak_gib"] is None else f"{cell['peak_gib']:.1f}"
        speed = f"{cell['images_per_second']:.0f} | {cell['model_tflops_per_second']:.0f}"
        lines.append(f"{name} {cell['median_ms']:.2f} | {speed} | {peak} | {cell['device']} |")
    lines += ["", "| model | images | levels | of our plain training | of the official plain training |"]
    lines.append("|---|---|---|---|---|")
    times = {tuple(cell[name] for name in KEY): cell["median_ms"] for cell in cells if "error" not in cell}
    for model, images in dict.fromkeys((cell["model"], cell["images"]) for cell in cells):
        for levels in (2, 3, 4):
            stages = PatchSchedule.coarse_to_fine(levels, 2**levels).stages
            shares = [(stage.end - stage.start) / stages[-1].end for stage in stages]
            ours = [times.get((model, stage.patch, images, "ours"), math.nan) for stage in stages]
            cost = sum(share * ms for share, ms in zip(shares, ours, strict=True))
            if not math.isnan(cost):
                official = times.get((model, 1, images, "official"), math.nan)
                lines.append(f"| {model} | {images} | {levels} | {cost / ours[-1]:.3f} | {cost / official:.3f} |")
    return "\n".join(lines)


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
    parser.add_argument("--images", default="64", help="images of a step; several with commas")
    parser.add_argument("--formulations", default=",".join(FORMULATIONS), help="with commas")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each cell")
    parser.add_argument("--compile", choices=("model", "blocks", "off"), default="model", help="ours; see StepConfig")
    parser.add_argument("--precision", choices=("bf16", "autocast"), default="bf16", help="ours; see StepConfig")
    parser.add_argument("--grid", type=int, default=16, help="tokens on each side")
    parser.add_argument("--vocab-size", type=int, default=16_384, help="of the model")
    parser.add_argument("--json", type=Path, default=Path("runs/step_time.json"), help="file of results, added to")
    parser.add_argument("--report", action="store_true", help="print the table of the file; measure nothing")
    options = parser.parse_args(arguments)
    options.models, options.formulations = listed(str, options.models), listed(str, options.formulations)
    options.patches, options.images = listed(int, options.patches), listed(int, options.images)
    for name, allowed in (("models", tuple(SIZES)), ("formulations", FORMULATIONS)):
        if unknown := set(getattr(options, name)) - set(allowed):
            parser.error(f"--{name}: expected some of {', '.join(allowed)}, got {min(unknown)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return 1 where a cell failed."""
    options = parse(arguments)
    cells = json.loads(options.json.read_text(encoding="utf-8"))["cells"] if options.json.exists() else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    wanted = [] if options.report else itertools.product(options.models, options.images, options.patches)
    failed = False
    for model, images, patch in wanted:
        for formulation in options.formulations:
            cell = {"model": model, "patch": patch, "images": images, "formulation": formulation}
            cell = run_cell(cell, options, device)
            failed |= "error" in cell
            outcome = cell.get("error") or f"{cell['median_ms']:.2f} ms, {cell['setup_seconds']:.0f} s of set-up"
            print(f"{model}, {images} images, patch {patch}, {formulation}: {outcome}", flush=True)
            cells = [old for old in cells if any(old[name] != cell[name] for name in KEY)] + [cell]
            write(options.json, cells)
    print(report(cells))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
