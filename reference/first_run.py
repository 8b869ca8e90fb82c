"""A first run for anyone: train a small model coarse to fine on real images, on a CPU, in a few minutes.

    python -m reference.first_run

trains on the 1,600 images that the repository carries, three times from the same weights: plain next-token training;
coarse to fine, for as many steps, at about 0.6 of that cost; and plain training again, stopped at the cost of coarse to
fine, which is what a fair reader compares it with. It leaves in ``runs/first``

    summary.md          cost and score of each
    loss.png, loss.csv  held-out loss at patch 1 over training time
    samples-*.png       samples, one row per class
    plain/ …            checkpoints and logs; the same command goes on from them, if it was stopped
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch

from npp_kernels import PatchSchedule
from reference.checkpoint import load_model
from reference.codes import load_dataset, load_tokenizer
from reference.config import PRESETS, TrainConfig
from reference.sample import Sampler, save_grid
from reference.score import Likelihood, held_out_likelihood
from reference.train import Run, process_group

matplotlib.use("Agg")
from matplotlib import pyplot as plt

EVALUATIONS = 12  # points of the longest curve
SAMPLES_PER_CLASS = 8
COLOURS = ("#4477aa", "#ee6677", "#999999")


class Way(NamedTuple):
    """One way to train, and what came of it."""

    name: str
    config: TrainConfig
    schedule: PatchSchedule
    log: list[dict[str, str]]
    likelihood: Likelihood

    @property
    def seconds(self) -> float:
        """Time of training."""
        return float(self.log[-1]["train_seconds"])


def relative_cost(schedule: PatchSchedule, run: Run) -> float:
    """Return the operations of a schedule relative to plain training for as many steps."""
    config = run.model.config
    return schedule.relative_cost(
        config.grid, hidden_size=config.dim, num_layers=config.num_layers, vocab_size=config.vocab_size
    )


def train(name: str, config: TrainConfig) -> tuple[Way, float]:
    """Train one way, or what is left of it; return it, and the relative cost of its schedule."""
    print(f"\n{name}: {config.epochs:.2f} epochs", flush=True)
    with process_group() as device:
        run = Run(config, device)
        run.train()
    with (run.folder / "log.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    likelihood = held_out_likelihood(run.model, load_dataset(config.data, "test"))
    return Way(name, config, run.schedule, log, likelihood), relative_cost(run.schedule, run)


def curve(way: Way) -> tuple[list[float], list[float]]:
    """Return the seconds and the held-out losses of a way's evaluations."""
    rows = [row for row in way.log if row["test_nll"]]
    return [float(row["train_seconds"]) for row in rows], [float(row["test_nll"]) for row in rows]


def write_curves(ways: list[Way], folder: Path) -> None:
    """Write the evaluations of all ways as a table and as a plot."""
    columns = ("step", "patch", "train_seconds", "loss", "test_nll")
    with (folder / "loss.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("way", *columns))
        for way in ways:
            writer.writerows((way.name, *(row[column] for column in columns)) for row in way.log if row["test_nll"])

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for way, colour in zip(ways, COLOURS, strict=True):
        seconds, losses = curve(way)
        axes.plot(seconds, losses, marker="o", markersize=3, color=colour, label=way.name)
        axes.annotate(f"{losses[-1]:.3f}", (seconds[-1], losses[-1]), (5, 4), textcoords="offset points", color=colour)
        for stage in way.schedule.stages[1:]:
            at = next(float(row["train_seconds"]) for row in way.log if int(row["step"]) == stage.start)
            axes.axvline(at, color=colour, linewidth=0.8, linestyle=":")
            place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "top", "fontsize": 8}
            axes.text(at, 1.0, f" patch {stage.patch}", color=colour, **place)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("held-out loss at patch 1, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    axes.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=150)
    plt.close(figure)


def write_samples(way: Way, path: Path) -> None:
    """Sample every class from the newest checkpoint of a way."""
    model = load_model(way.config.output)
    tokenizer = load_tokenizer(way.config.data)
    assert tokenizer is not None, "the embedded tokens come with their tokenizer"
    labels = torch.arange(model.config.num_classes).repeat_interleave(SAMPLES_PER_CLASS)
    sampler = Sampler(model, batch_size=len(labels), guidance=way.config.guidance)
    tokens = sampler(labels, torch.Generator().manual_seed(way.config.seed), progress=True)
    save_grid(path, tokenizer.decode(tokens.numpy()), columns=SAMPLES_PER_CLASS)


def summary(ways: list[Way], costs: list[float]) -> str:
    """Return cost and score of all ways as Markdown; costs are operations relative to the first."""
    lines = [
        "# A first run: cost and score",
        "",
        f"Model `{ways[0].config.model}`, {ways[0].config.data} images, batches of {ways[0].config.batch_size}, seed "
        f"{ways[0].config.seed}, on {torch.get_num_threads()} threads. Held-out images: "
        f"{ways[0].likelihood.num_images}, scored at patch 1.",
        "",
        "| | steps | patches | operations | seconds | time | nats per token | bits per image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, cost in zip(ways, costs, strict=True):
        score = way.likelihood
        patches = ", ".join(str(stage.patch) for stage in way.schedule.stages)
        lines.append(
            f"| {way.name} | {way.schedule.total_steps} | {patches} | {cost:.3f} | {way.seconds:.1f} | "
            f"{way.seconds / ways[0].seconds:.3f} | {score.nats_per_token:.4f} | "
            f"{score.bits_per_image:.1f} ± {score.standard_error:.1f} |"
        )
    lines += [
        "",
        "Operations and time are relative to plain training. Time is that of a clock on the wall: on a busy "
        "machine, trust the operations. The ± is the standard error over the held-out images, not "
        "over runs: one run of each says little about which is better. Plain training at the same cost is the fair "
        "comparison with coarse to fine; full plain training costs more.",
        "",
        "![Held-out loss over training time](loss.png)",
        "",
    ]
    for way in ways:
        lines += [f"Samples, {way.name}:", "", f"![Samples, {way.name}]({samples_name(way)})", ""]
    return "\n".join(lines)


def samples_name(way: Way) -> str:
    """Return the file name of a way's samples."""
    return f"samples-{Path(way.config.output).name}.png"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    preset = PRESETS["small"]
    parser = argparse.ArgumentParser(
        prog="python -m reference.first_run",
        description="Train a small model on real images, plain and coarse to fine, on any machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/first"), help="folder of the results")
    parser.add_argument("--levels", type=int, choices=(2, 3, 4), default=2, help="stages of coarse to fine")
    parser.add_argument("--model", choices=tuple(PRESETS), default=preset.model, help="size of the model")
    parser.add_argument("--epochs", type=float, default=preset.epochs, help="length of full plain training")
    parser.add_argument("--seed", type=int, default=preset.seed, help="of everything")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all ways, and write what came out."""
    options = parse(arguments)
    preset = replace(
        PRESETS["small"], model=options.model, epochs=options.epochs, seed=options.seed, workers=0, log_every=10
    )
    steps_per_epoch = len(load_dataset(preset.data, "train")) // preset.batch_size
    every = max(1, round(options.epochs * steps_per_epoch / EVALUATIONS))

    def way(name: str, folder: str, **others: Any) -> tuple[Way, float]:
        return train(name, replace(preset, output=str(options.output / folder), evaluate_every=every, **others))

    plain, _ = way("plain", "plain", levels=1)
    coarse, cost = way("coarse to fine", "coarse-to-fine", levels=options.levels)
    control, _ = way("plain, stopped at the same cost", "plain-same-cost", levels=1, epochs=options.epochs * cost)
    ways = [plain, coarse, control]
    costs = [1.0, cost, control.schedule.total_steps / plain.schedule.total_steps]
    write_curves(ways, options.output)
    for each in ways:
        write_samples(each, options.output / samples_name(each))
    text = summary(ways, costs)
    (options.output / "summary.md").write_text(text, encoding="utf-8")
    print("\n" + "\n".join(text.splitlines()[4:11]))
    print(f"\nwritten: {options.output / 'summary.md'}, loss.png, loss.csv and samples beside it")


if __name__ == "__main__":
    main()
