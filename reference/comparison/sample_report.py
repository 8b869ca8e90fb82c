"""Tables and plots of what `reference.comparison.sample_scores` has found."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from reference.comparison.outcomes import COLOURS, spread
from reference.comparison.sample_scores import KEPT_PER_CLASS, kept_name
from reference.sample import save_grid
from reference.tokenizer import Tokenizer

Entry = dict[str, Any]
SHOWN_PER_CLASS = 2  # in the picture of all ways


def of_runs(entries: Sequence[Entry]) -> dict[str, dict[float, dict[int, Entry]]]:
    """Return the scores of samples by way, guidance and seed; real images have no guidance, and are left out."""
    found: dict[str, dict[float, dict[int, Entry]]] = {}
    for entry in entries:
        if "guidance" in entry:
            found.setdefault(entry["way"], {}).setdefault(entry["guidance"], {})[entry["seed"]] = entry
    return {way: dict(sorted(scores.items())) for way, scores in found.items()}


def of_real_images(entries: Sequence[Entry]) -> dict[str, Entry]:
    """Return the scores of real images by name."""
    return {entry["way"]: entry for entry in entries if "guidance" not in entry}


def values(runs: Iterable[Entry], name: str) -> list[float]:
    """Return one score of several runs."""
    return [run[name] for run in runs]


def best_guidance(scores: dict[float, dict[int, Entry]]) -> float:
    """Return the guidance with the smallest mean Fréchet distance, of those that most seeds have."""
    most = max(len(runs) for runs in scores.values())
    whole = {guidance: runs for guidance, runs in scores.items() if len(runs) == most}
    return min(whole, key=lambda guidance: statistics.mean(values(whole[guidance].values(), "frechet")))


def table(entries: Sequence[Entry]) -> str:
    """Return Fréchet distances over guidance, with precision and recall at the best, as a Markdown table."""
    ways = of_runs(entries)
    scales = sorted({guidance for scores in ways.values() for guidance in scores})
    names = [name for name in ("precision", "recall") if any(name in entry for entry in entries)]
    several = len(scales) > 1  # or there is no best one to name
    heads = ["Fréchet distance", *(f"guidance {g:g}" for g in scales), *(["best"] if several else []), *names]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for way, scores in ways.items():
        best = best_guidance(scores)
        cells = [spread(values(scores[g].values(), "frechet"), 2) if g in scores else "" for g in scales]
        of_best = list(scores[best].values())
        shares = [spread(values(of_best, name), 3) if name in of_best[0] else "" for name in names]
        chosen = [f"{best:g}"] if several else []
        lines.append(f"| {' | '.join([way, *cells, *chosen, *shares])} |")
    for name, entry in of_real_images(entries).items():
        shares = [f"{entry[key]:.3f}" if key in entry else "" for key in names]
        blank = [""] * (len(heads) - 2 - len(names))
        cells = [name, f"{entry['frechet']:.2f}", *blank, *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paired(
    ways: dict[str, dict[float, dict[int, Entry]]], one: str, other: str, guidance: float | None, name: str = "frechet"
) -> list[float]:
    """Return differences, seed by seed, at one guidance, or with None at each way's own best."""
    first = ways.get(one, {}).get(best_guidance(ways[one]) if guidance is None and one in ways else guidance, {})  # type: ignore[arg-type]
    second = ways.get(other, {}).get(best_guidance(ways[other]) if guidance is None and other in ways else guidance, {})  # type: ignore[arg-type]
    return [first[seed][name] - second[seed][name] for seed in sorted(first.keys() & second.keys())]


def mean_and_error(differences: Sequence[float], digits: int = 2) -> str:
    """Return mean and standard error.

    >>> mean_and_error([1.0, 2.0, 3.0]), mean_and_error([1.0]), mean_and_error([])
    ('+2.00 ± 0.58', '+1.00', '')
    """
    if not differences:
        return ""
    mean = f"{statistics.mean(differences):+.{digits}f}"
    if len(differences) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(differences) / len(differences) ** 0.5:.{digits}f}"


def differences(entries: Sequence[Entry], coarse: Sequence[str], plain: Sequence[str]) -> str:
    """Return coarse to fine minus plain as a Markdown table; below 0 coarse to fine is better."""
    ways = of_runs(entries)
    scales = sorted({guidance for scores in ways.values() for guidance in scores})
    heads = [f"guidance {guidance:g}" for guidance in scales]
    lines = [f"| Fréchet distance | {' | '.join(heads)} | each at its best |", "|---" * (len(scales) + 2) + "|"]
    for one, other in itertools.product(coarse, plain):
        cells = [mean_and_error(paired(ways, one, other, guidance)) for guidance in [*scales, None]]
        if any(cells):
            lines.append(f"| {one} minus {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(entries: Sequence[Entry], path: Path) -> None:
    """Draw the Fréchet distance over guidance, and recall over precision; a thin line for each seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for (way, scores), colour in zip(of_runs(entries).items(), itertools.cycle(COLOURS), strict=False):
        scales = list(scores)
        means = [statistics.mean(values(scores[g].values(), "frechet")) for g in scales]
        style = "--" if "," in way else "-"
        left.plot(scales, means, style, marker="o", markersize=3, color=colour, label=f"{way}: {min(means):.2f}")
        seeds = sorted({seed for runs in scores.values() for seed in runs})
        for seed in seeds if len(seeds) > 1 else []:
            points = [(g, scores[g][seed]["frechet"]) for g in scales if seed in scores[g]]
            left.plot(*zip(*points, strict=True), style, color=colour, linewidth=0.6, alpha=0.5)
        if all("precision" in run for runs in scores.values() for run in runs.values()):
            shares = [[statistics.mean(values(scores[g].values(), n)) for g in scales] for n in ("precision", "recall")]
            right.plot(*shares, style, marker="o", markersize=3, color=colour)
            for scale, x, y in zip(scales, *shares, strict=True):
                right.annotate(f"{scale:g}", (x, y), fontsize=6, textcoords="offset points", xytext=(3, 3))
    for (name, entry), style in zip(of_real_images(entries).items(), ("-", ":"), strict=False):
        left.axhline(entry["frechet"], color="black", linewidth=0.8, linestyle=style)
        place = (0.99, entry["frechet"])
        left.annotate(
            f"{name}: {entry['frechet']:.2f}", place, xycoords=("axes fraction", "data"), fontsize=8, ha="right",
            textcoords="offset points", xytext=(0, 3),
        )  # fmt: skip
        if "precision" in entry:
            right.plot(entry["precision"], entry["recall"], "k" + ("s" if style == "-" else "^"), label=name)
    left.set_ylim(bottom=0)
    left.set_xlabel("guidance")
    left.set_ylabel("Fréchet distance, EfficientNet-Lite0 features")
    left.legend(frameon=False, title="smallest mean", fontsize=8)
    right.set_xlabel("precision; numbers: guidance")
    right.set_ylabel("recall")
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def picture(entries: Sequence[Entry], folder: Path, tokenizer: Tokenizer, path: Path) -> None:
    """Write kept samples of the first seed as a PNG: a row for each way, at its best guidance, two of each class.

    Args:
        entries: of the journal.
        folder: where `reference.comparison.sample_scores.SampleObserver` kept them.
        tokenizer: makes images of them.
        path: of the PNG.
    """
    rows = []
    for way, scores in of_runs(entries).items():
        best = best_guidance(scores)
        name = kept_name(way, min(scores[best]), best)
        if (folder / name).exists():
            kept = np.load(folder / name)
            whole = kept[: len(kept) // KEPT_PER_CLASS * KEPT_PER_CLASS]
            shown = whole.reshape(-1, KEPT_PER_CLASS, *kept.shape[1:])[:, :SHOWN_PER_CLASS]
            rows.append(shown.reshape(-1, *kept.shape[1:]))
    if rows:
        columns = min(len(row) for row in rows)
        save_grid(path, tokenizer.decode(np.concatenate([row[:columns] for row in rows])), columns=columns)
