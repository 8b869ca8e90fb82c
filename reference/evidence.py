"""All measurements behind docs/claim.md, as parts that were chosen, and predicted, before any of them ran.

    python -m reference.evidence cifar10 overfit --data runs/data --budget 570 --output runs/evidence

runs parts one after the other until the seconds are spent; the same command goes on. `PARTS` says what each is. In
``--data`` are ``cifar10_tokens.npz`` and ``fashion_60k.npz``, as `docs/claim.md` says how to make them. Each part has
a folder of its own, with the figures as JSON, a report and plots;

    python -m reference.evidence --report --output runs/evidence

makes all reports and plots of what is there, and ``outcomes.md``: what was predicted (`docs/claim/predictions.json`),
beside what came.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference import language
from reference.claim import GUIDANCE_SCALES, TWO_LEVELS, WAYS, Way, run_comparison
from reference.comparison.evidence_report import write_reports
from reference.comparison.journal import Budget
from reference.training.checkpoint import written_whole
from reference.training.config import PRESETS, TrainConfig
from reference.training.processes import Stopped, process_group

SAME_OPERATIONS = WAYS[3]
THREE_WAYS = (WAYS[0], TWO_LEVELS, SAME_OPERATIONS)
SMALL_SUBSET = 20_000  # training images on which a model of 15 million parameters overfits
SETUP_SECONDS = 30.0  # to read the data and score real images, before the first run: no part begins with less left
PEAK_RATES = (5e-4, 2e-3)  # beside the 1e-3 of all other parts


@dataclass(frozen=True)
class Part:
    """One comparison: what is trained, and how it is scored."""

    title: str
    data: str  # a form of reference.tokens.codes, with a file in the folder of the data
    config: TrainConfig
    ways: tuple[Way, ...] = WAYS
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 0
    guidance_scales: tuple[float, ...] = GUIDANCE_SCALES
    over_time: int = 0

    def tiny(self) -> Part:
        """Return the same on a model and a length that a CPU takes in seconds, to see that it runs."""
        config = replace(PRESETS["tiny"], batch_size=20, epochs=2.0, warmup_epochs=0.1, evaluate_every=1)
        samples, over_time = min(self.samples, 20), min(self.over_time, 10)
        return replace(self, config=config, seeds=self.seeds[:2], samples=samples, over_time=over_time)


S = replace(PRESETS["S"], epochs=14.0, evaluate_every=500)
S_AT_THE_END = replace(S, evaluate_every=100_000)  # scored once, for where the curve is of no interest
PARTS = {
    "cifar10": Part("CIFAR-10, 5 million parameters", "npz_mirrored:cifar10_tokens.npz", S, samples=10_000),
    "fashion_mnist": Part(
        "Fashion-MNIST, 5 million parameters", "npz_mirrored:fashion_60k.npz", replace(S, epochs=12.0), samples=10_000
    ),
    "overfit": Part(
        "CIFAR-10, 20,000 images, 15 million parameters, to overfitting", "npz:cifar10_20k.npz",
        replace(PRESETS["M"], epochs=24.0), THREE_WAYS, samples=10_000, guidance_scales=(1.5,), over_time=5_000,
    ),
    "largest": Part(
        "CIFAR-10, 86 million parameters", "npz_mirrored:cifar10_tokens.npz",
        replace(PRESETS["B"], epochs=7.0, lr=6e-4, end_lr=6e-5, warmup_epochs=0.5, evaluate_every=195), THREE_WAYS,
        seeds=(0,), samples=10_000, guidance_scales=(1.5,), over_time=2_500,
    ),
    "share": Part(
        "How much of the run is coarse, and how many levels: CIFAR-10, equal operations",
        "npz_mirrored:cifar10_tokens.npz", S_AT_THE_END,
        (
            Way("two levels, coarse 0.25", 2, "operations", rate=0.25),
            Way("two levels, coarse 0.75", 2, "operations", rate=0.75),
            Way("four levels", 4, "operations"),
        ),
    ),
    "learning_rates": Part(
        "Learning rates: CIFAR-10, equal operations", "npz_mirrored:cifar10_tokens.npz", S_AT_THE_END,
        tuple(
            Way(f"{name}, rate {lr:g}", levels, "operations", lr=lr)
            for name, levels in (("plain", 1), ("two levels", 2), ("three levels", 3)) for lr in PEAK_RATES
        ),
        seeds=(0,),
    ),
}  # fmt: skip
LANGUAGE = "language"


def run_part(name: str, data: Path, output: Path, device: torch.device, budget: Budget, *, tiny: bool = False) -> None:
    """Run what is missing of a part.

    Args:
        name: of `PARTS`, or ``"language"``.
        data: folder of the token files.
        output: folder of all parts.
        device: where to.
        budget: seconds.
        tiny: a small model for a short time, to see that it runs.

    Raises:
        Stopped: the budget is spent.
    """
    if name == LANGUAGE:
        text_config = language.TINY if tiny else language.LanguageConfig()
        language.compare(text_config, (0, 1, 2)[: 2 if tiny else 3], output / name, device, budget)
        return
    part = PARTS[name].tiny() if tiny else PARTS[name]
    kind, _, file = part.data.partition(":")
    if file == "cifar10_20k.npz" and not (data / file).exists():
        write_subset(data / "cifar10_tokens.npz", data / file, SMALL_SUBSET)
    config = replace(part.config, data=f"{kind}:{data / file}", output=str(output / name))
    run_comparison(
        config, part.ways, part.seeds, device, samples=part.samples, guidance_scales=part.guidance_scales,
        over_time=part.over_time, budget=budget,
    )  # fmt: skip


def write_subset(whole: Path, path: Path, number: int) -> None:
    """Write the first training images of a token file, and all the rest of it."""
    with np.load(whole) as arrays:
        parts: dict[str, Any] = dict(arrays)
    for name in ("train", "train_labels"):
        parts[name] = parts[name][:number]
    parts.pop("train_images", None)
    with written_whole(path) as file:
        np.savez_compressed(file, **parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run parts, and write what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m reference.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join([*PARTS, LANGUAGE])}, in order")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="folder of the token files")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"), help="folder of the results")
    parser.add_argument("--budget", type=float, help="seconds after which to stop; the same command goes on")
    parser.add_argument("--tiny", action="store_true", help="a tiny model for a short time, to see that it runs")
    parser.add_argument("--report", action="store_true", help="make all reports and plots of what is there")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - {*PARTS, LANGUAGE}:
        parser.error(f"parts: expected of {', '.join([*PARTS, LANGUAGE])}, got {', '.join(sorted(unknown))}")
    if not options.parts and not options.report:
        parser.error("nothing to do: name parts, or give --report")
    budget, stopped = Budget(options.budget), False
    with process_group() as device:
        for name in options.parts:
            try:
                if not budget.allows(0.0 if options.tiny else SETUP_SECONDS):
                    raise Stopped
                run_part(name, options.data, options.output, device, budget, tiny=options.tiny)
            except Stopped:  # noqa: PERF203 - a few parts, the later of which may have runs that fit
                stopped = True
                print(f"{name}: not complete", flush=True)
    if options.report:
        print(write_reports(options.output, {name: part.title for name, part in PARTS.items()}))
    if stopped:
        raise Stopped


if __name__ == "__main__":
    main()
