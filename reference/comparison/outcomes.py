"""What came of training runs: the file that keeps it, tables, a plot.

`reference.claim` and `reference.first_run` train the runs.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

from reference.training.checkpoint import write_json
from reference.training.config import FREE_TO_CHANGE, TrainConfig

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("#4477aa", "#ee6677", "#228833", "#666666", "#bbaa44")
# What may differ between the runs of a comparison, or between its parts. Evaluations may not: the points of all curves
# are at the same steps.
VARIED = {"output", "seed", "levels"} | FREE_TO_CHANGE - {"evaluate_every"}


@dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    way: str
    seed: int
    levels: int
    steps: int
    epochs: float
    operations: float  # relative to full plain training
    stages: list[dict[str, Any]]  # patch, steps and seconds of each
    setup_seconds: float  # compiling and capturing; not in the seconds of training
    # step, seconds, held-out nats per token at patch 1, their standard error over images; and since when the training
    # loss is kept, the patch and the mean loss on it of the last steps
    curve: dict[str, list[float]]
    num_images: int  # held out
    device: str
    versions: dict[str, str]
    wall_seconds: float = 0.0  # from the start to the last score, all included

    @property
    def seconds(self) -> float:
        """Time of training."""
        return self.curve["seconds"][-1]

    @property
    def nll(self) -> float:
        """Held-out nats per token at the end."""
        return self.curve["nll"][-1]


def read_results(path: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """Read the settings and the outcomes in a file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["settings"], [Outcome(**outcome) for outcome in content["outcomes"]]


class Results:
    """The outcomes of a comparison in a file, which is replaced as a whole with each of them.

    Args:
        path: the file; it need not exist.
        config: full plain training.
        ways: what is compared, as `reference.claim.Way`.

    Raises:
        ValueError: the file is that of another comparison.
    """

    def __init__(self, path: Path, config: TrainConfig, ways: Sequence[Any]) -> None:
        self.path = path
        self.settings = {name: value for name, value in asdict(config).items() if name not in VARIED}
        self.settings["ways"] = [
            {name: value for name, value in asdict(way).items() if value is not None} for way in ways
        ]
        self.outcomes: list[Outcome] = []
        if path.exists():
            saved, self.outcomes = read_results(path)
            for name, value in self.settings.items():
                if saved[name] != value:
                    raise ValueError(
                        f"{name}: expected {saved[name]!r}, as in {path}, got {value!r}; "
                        "choose another --output for another comparison"
                    )

    def of_seed(self, seed: int) -> dict[str, Outcome]:
        """Return the outcomes of one seed by the name of the way."""
        return {outcome.way: outcome for outcome in self.outcomes if outcome.seed == seed}

    def add(self, outcome: Outcome) -> None:
        """Add an outcome and write the file."""
        self.outcomes.append(outcome)
        content = {"settings": self.settings, "outcomes": [asdict(each) for each in self.outcomes]}
        write_json(self.path, content)


def by_way(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes of each way, in the order in which the ways came."""
    return {name: [each for each in outcomes if each.way == name] for name in dict.fromkeys(o.way for o in outcomes)}


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and sample standard deviation.

    >>> spread([1.0, 2.0, 4.0], 2), spread([1.0], 2)
    ('2.33 ± 1.53', '1.00')
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Return cost and score of each way as a Markdown table; operations and time are relative to the first way."""
    lines = [
        "| | steps | patches | operations | seconds | time | nats per token | error over images | set-up seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ways = by_way(outcomes)
    plain = {each.seed: each for each in next(iter(ways.values()))}
    for name, runs in ways.items():
        first = runs[0]
        steps = sorted({run.steps for run in runs})
        cells = [
            name,
            f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0]),
            ", ".join(f"{stage['patch']:g}" for stage in first.stages),
            f"{statistics.mean(run.operations for run in runs):.3f}",
            spread([run.seconds for run in runs], 1),
            f"{statistics.mean(run.seconds / plain[run.seed].seconds for run in runs):.3f}",
            spread([run.nll for run in runs], 4),
            f"{statistics.mean(run.curve['error'][-1] for run in runs):.4f}",
            f"{statistics.mean(run.setup_seconds for run in runs):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(outcomes: Sequence[Outcome]) -> str:
    """Return coarse to fine minus plain, seed by seed, as a Markdown table; below 0 coarse to fine is better."""
    ways = by_way(outcomes)
    coarse = [name for name, runs in ways.items() if runs[0].levels > 1]
    plain = [name for name, runs in ways.items() if runs[0].levels == 1]
    seeds = sorted({outcome.seed for outcome in outcomes})
    scores = {(outcome.way, outcome.seed): outcome.nll for outcome in outcomes}
    heads = [f"seed {seed}" for seed in seeds]
    lines = [f"| nats per token | {' | '.join(heads)} | mean ± standard error |", "|---" * (len(seeds) + 2) + "|"]
    for one, other in itertools.product(coarse, plain):
        paired = [seed for seed in seeds if (one, seed) in scores and (other, seed) in scores]
        values = {seed: scores[one, seed] - scores[other, seed] for seed in paired}
        cells = [f"{values[seed]:+.4f}" if seed in values else "" for seed in seeds]
        mean = f"{statistics.mean(values.values()):+.4f}" if values else ""
        if len(values) > 1:
            mean += f" ± {statistics.stdev(values.values()) / len(values) ** 0.5:.4f}"
        lines.append(f"| {one} minus {other} | {' | '.join(cells)} | {mean} |")
    return "\n".join(lines)


def report(settings: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """Return all that came out, as a page of Markdown."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    last = outcomes[-1]
    of_versions = ", ".join(f"{name} {version}" for name, version in last.versions.items() if version)
    return "\n".join(
        [
            "# Coarse to fine and plain training at equal cost",
            "",
            f"Model `{settings['model']}`, data `{settings['data']}`, batches of {settings['batch_size']}, learning "
            f"rate {settings['lr']:g} to {settings['end_lr']:g}, dropout {settings['dropout']:g}; full plain training "
            f"is {settings['epochs']:g} epochs. Seeds: {', '.join(map(str, seeds))}. Scored at patch 1 on "
            f"{last.num_images} held-out images.",
            "",
            f"Device: {last.device}; {of_versions}.",
            "",
            table(outcomes),
            "",
            "± is the sample standard deviation over seeds; operations and time are relative to full plain training. "
            "Seconds are those of training, without evaluations, checkpoints and set-up (compiling, capturing).",
            "",
            differences(outcomes),
            "",
            "Below 0 coarse to fine is better. Both runs of a difference have the same seed: weights, data order, "
            "augmentation.",
            "",
            "![Held-out loss over seconds of training](nll.png)",
            "",
        ]
    )


def mean_curve(runs: Sequence[Outcome]) -> tuple[list[float], list[float]]:
    """Return seconds and held-out losses, each point the mean over the seeds; runs may end at different steps."""
    points = [*range(min(len(run.curve["step"]) for run in runs) - 1), -1]
    seconds, losses = (
        [statistics.mean(run.curve[name][point] for run in runs) for point in points] for name in ("seconds", "nll")
    )
    return seconds, losses


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the held-out loss over seconds: the mean of each way, a thin line for each seed; whole, and near the end."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    ways = by_way(outcomes)
    for axes in panels:
        for (name, runs), colour in zip(ways.items(), itertools.cycle(COLOURS), strict=False):
            seconds, losses = mean_curve(runs)
            style = "--" if runs[0].levels == 1 and runs[0].operations < 1 else "-"
            axes.plot(seconds, losses, style, marker="o", markersize=3, color=colour, label=f"{name}: {losses[-1]:.3f}")
            if len(runs) > 1:
                for run in runs:
                    axes.plot(run.curve["seconds"], run.curve["nll"], style, color=colour, linewidth=0.6, alpha=0.5)
            ends = itertools.accumulate(
                statistics.mean(run.stages[index]["seconds"] for run in runs) for index in range(runs[0].levels - 1)
            )
            for end in ends:
                axes.axvline(end, color=colour, linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"seconds of training ({outcomes[-1].device})")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08)
    finals = [mean_curve(runs)[1][-1] for runs in ways.values()]
    width = max(max(finals) - min(finals), 1e-3)
    panels[1].set_ylim(min(finals) - 0.5 * width, max(finals) + 2.5 * width)
    panels[0].set_ylabel("held-out loss at patch 1, nats per token")
    panels[0].legend(frameon=False)
    panels[1].set_title("near the end; dotted: a finer patch begins", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
