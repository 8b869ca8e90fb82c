"""Reports of all parts of `reference.evidence`, and what was predicted beside what came."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from reference.claim import write_report
from reference.comparison import language_report, sample_report
from reference.comparison.journal import Journal
from reference.comparison.outcomes import COLOURS, Outcome, by_way, read_results, spread
from reference.comparison.sample_report import mean_and_error
from reference.comparison.sample_scores import GUIDANCE_OVER_TIME

PREDICTIONS = Path(__file__).parents[2] / "docs" / "claim" / "predictions.json"
BASE = "cifar10"  # the parts on shares and learning rates vary its runs, with the same seeds
VARIED_PARTS = ("share", "learning_rates")


def outcomes_of(output: Path, part: str) -> list[Outcome]:
    """Return the outcomes of a part; of one that varies `BASE`, those of `BASE` too."""
    parts = (BASE, part) if part in VARIED_PARTS else (part,)
    files = [output / name / "results.json" for name in parts]
    return [outcome for file in files if file.exists() for outcome in read_results(file)[1]]


def differences(output: Path, prediction: dict[str, Any]) -> list[float]:
    """Return what was predicted as it came, seed by seed; nothing where it did not run.

    A prediction names a part, a measure (``nll``, ``frechet``, ``nats``), two ways, the first of which is subtracted
    from, and for Fréchet distances the guidance, or null for each way's best.
    """
    part, one, other = prediction["part"], prediction["one"], prediction["other"]
    if prediction["measure"] == "frechet":
        ways = sample_report.of_runs(Journal(output / part / "samples.jsonl").entries)
        return sample_report.paired(ways, one, other, prediction["guidance"])
    if prediction["measure"] == "nats":
        path = output / part / "language.jsonl"
        runs = language_report.read(path.parent)[1] if path.exists() else {}
        ends = {way: {seed: run["curve"]["nats"][-1] for seed, run in by_seed.items()} for way, by_seed in runs.items()}
    else:
        ways_of = by_way(outcomes_of(output, part))
        ends = {way: {run.seed: run.nll for run in runs} for way, runs in ways_of.items()}
    first, second = ends.get(one, {}), ends.get(other, {})
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def predictions_table(output: Path, predictions: Sequence[dict[str, Any]]) -> str:
    """Return predictions beside outcomes as a Markdown table; below 0 the first way is better."""
    lines = [
        "| part | measure | | predicted | because | came | within |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in predictions:
        found = differences(output, each)
        digits = 2 if each["measure"] == "frechet" else 4
        scale = "" if each.get("guidance") is None else f", guidance {each['guidance']:g}"
        within = "" if not found else "yes" if each["low"] <= statistics.mean(found) <= each["high"] else "no"
        cells = [
            each["part"], each["measure"] + scale, f"{each['one']} minus {each['other']}",
            f"{each['low']:+g} to {each['high']:+g}", each["because"], mean_and_error(found, digits), within,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def varied_table(outcomes: Sequence[Outcome], base: str) -> str:
    """Return the scores of ways of equal operations, and their differences to one of them, as a Markdown table."""
    ways = by_way(outcomes)
    heads = ["", "steps", "patches", "operations", "seconds", "nats per token", f"minus {base}"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    of_base = {run.seed: run.nll for run in ways.get(base, [])}
    for name, runs in ways.items():
        first = runs[0]
        found = [run.nll - of_base[run.seed] for run in runs if run.seed in of_base]
        cells = [
            name, str(first.steps), ", ".join(f"{stage['steps']} at {stage['patch']:g}" for stage in first.stages),
            f"{first.operations:.3f}", spread([run.seconds for run in runs], 1), spread([run.nll for run in runs], 4),
            "" if name == base else mean_and_error(found, 4),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_over_time(folder: Path, path: Path) -> None:
    """Draw training loss, held-out loss and Fréchet distance over seconds of training, of the first seed.

    The training loss is drawn where the patch is 1: that of larger patches is another loss.
    """
    outcomes = read_results(folder / "results.json")[1]
    seed = min(outcome.seed for outcome in outcomes)
    points = Journal(folder / "over_time.jsonl").entries
    ends = {
        entry["way"]: entry["frechet"]
        for entry in Journal(folder / "samples.jsonl").entries
        if entry.get("seed") == seed and entry.get("guidance") == GUIDANCE_OVER_TIME
    }
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    chosen = [outcome for outcome in outcomes if outcome.seed == seed]
    for outcome, colour in zip(chosen, itertools.cycle(COLOURS), strict=False):
        style = "--" if "," in outcome.way else "-"
        curve = outcome.curve
        fine = [index for index, patch in enumerate(curve["patch"]) if patch == 1]
        seconds = [curve["seconds"][index] for index in fine]
        panels[0].plot(seconds, [curve["loss"][index] for index in fine], style, marker="o", markersize=3, color=colour)
        panels[1].plot(curve["seconds"], curve["nll"], style, marker="o", markersize=3, color=colour, label=outcome.way)
        run = f"{outcome.way.replace(',', '').replace(' ', '-')}-{seed}"
        found = sorted((entry["seconds"], entry["frechet"]) for entry in points if entry["run"] == run)
        if found:
            panels[2].plot(*zip(*found, strict=True), style, marker="o", markersize=3, color=colour)
        if outcome.way in ends:  # of more samples than the points before, so that it is not joined to them
            panels[2].plot(outcome.seconds, ends[outcome.way], "*", markersize=9, color=colour)
    lowest = min(outcome.nll for outcome in chosen)
    panels[1].set_ylim(lowest - 0.05, lowest + 1.0)
    titles = ("training loss at patch 1, nats per token", "held-out loss at patch 1, nats per token")
    for axes, title in zip(panels, (*titles, "Fréchet distance; star: all samples, at the end"), strict=True):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(f"seconds of training ({outcomes[-1].device})")
        axes.spines[["top", "right"]].set_visible(False)
    panels[2].set_ylim(bottom=0)
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_reports(output: Path, titles: dict[str, str]) -> str:
    """Write the report and plots of each part that is there, and ``outcomes.md``; return the latter."""
    for part, title in titles.items():
        folder = output / part
        if not (folder / "results.json").exists():
            continue
        if part in VARIED_PARTS:
            text = f"# {title}\n\n{varied_table(outcomes_of(output, part), 'two levels')}\n"
        else:
            text = write_report(folder).replace("# Coarse to fine and plain training at equal cost", f"# {title}", 1)
            if Journal(folder / "over_time.jsonl").entries:
                plot_over_time(folder, folder / "over_time.png")
                text += "\n![Losses and Fréchet distance over seconds](over_time.png)\n"
        (folder / "report.md").write_text(text, encoding="utf-8")
    if (output / "language" / "language.jsonl").exists():
        language_report.write_report(output / "language")
    predictions = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    text = f"# Predicted, and what came\n\n{predictions_table(output, predictions)}\n"
    (output / "outcomes.md").write_text(text, encoding="utf-8")
    return text
