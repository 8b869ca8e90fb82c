"""Table and plot of what `reference.language` has found."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from reference.comparison.journal import Journal
from reference.comparison.outcomes import COLOURS, spread
from reference.comparison.sample_report import mean_and_error


def read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[int, dict[str, Any]]]]:
    """Read settings, and runs by way and seed."""
    journal = Journal(folder / "language.jsonl")
    header = journal.find(kind="settings")
    if header is None:
        raise FileNotFoundError(f"{journal.path}: expected the journal of a comparison, found none")
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in journal.entries:
        if entry["kind"] == "run":
            runs.setdefault(entry["way"], {})[entry["seed"]] = entry
    return header, runs


def report(folder: Path) -> str:
    """Return what came out as Markdown."""
    header, runs = read(folder)
    config, source = header["config"], header["source"]
    packages = ", ".join(f"{name} {version}" for name, version in source["packages"].items())
    lines = [
        "# Patches of text at equal seconds",
        "",
        f"Llama of {config['num_layers']} layers of {config['hidden_size']}, examples of {config['length']} positions, "
        f"batches of {config['batch_size']}, learning rate {config['lr']:g}; byte-level BPE of {source['vocab_size']} "
        f"tokens on the Python sources of {packages}: {source['bytes'] / 1e6:.1f} MB, "
        f"{source['held_out_bytes'] / 1e6:.2f} held out. {header['device']}.",
        "",
        "| | steps on patches | on tokens | seconds | million tokens | nats per byte |",
        "|---|---|---|---|---|---|",
    ]
    for name, by_seed in runs.items():
        last = [{key: values[-1] for key, values in run["curve"].items()} for run in by_seed.values()]
        coarse, fine = next(iter(by_seed.values()))["steps"]
        cells = [
            name, str(coarse), str(fine), spread([each["seconds"] for each in last], 1),
            f"{last[0]['tokens'] / 1e6:.1f}", spread([each["nats"] for each in last], 4),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "± is the sample standard deviation over seeds; below, the standard error of the mean.", ""]
    for name in [name for name in runs if name != "plain"]:
        shared = sorted(runs[name].keys() & runs.get("plain", {}).keys())
        found = [runs[name][s]["curve"]["nats"][-1] - runs["plain"][s]["curve"]["nats"][-1] for s in shared]
        each = ", ".join(f"{value:+.4f}" for value in found)
        lines.append(f"- {name} minus plain: {mean_and_error(found, 4)} nats per byte ({each})")
    return "\n".join([*lines, "", "![Held-out loss over seconds of training](language.png)", ""])


def plot(folder: Path, path: Path) -> None:
    """Draw the held-out loss over seconds and over tokens: a mean, a thin line for each seed."""
    header, runs = read(folder)
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for axes, along, label in zip(panels, ("seconds", "tokens"), ("seconds of training", "tokens read"), strict=True):
        for (name, by_seed), colour in zip(runs.items(), COLOURS, strict=False):
            curves = [run["curve"] for run in by_seed.values()]
            columns = (zip(*(curve[key] for curve in curves), strict=True) for key in (along, "nats"))
            x, y = ([statistics.mean(point) for point in column] for column in columns)
            axes.plot(x, y, marker="o", markersize=3, color=colour, label=f"{name}: {y[-1]:.4f}")
            coarse = [value for value, patch in zip(x, curves[0]["patch"], strict=True) if patch > 1]
            if coarse:
                axes.axvline(coarse[-1], color=colour, linewidth=0.8, linestyle=":")
            for curve in curves if len(curves) > 1 else []:
                axes.plot(curve[along], curve["nats"], color=colour, linewidth=0.6, alpha=0.5)
        axes.set_xlabel(f"{label} ({header['device']})")
        axes.spines[["top", "right"]].set_visible(False)
    finals = [run["curve"]["nats"][-1] for by_seed in runs.values() for run in by_seed.values()]
    for axes in panels:
        axes.set_ylim(0.95 * min(finals), 1.4 * max(finals))
    panels[0].set_ylabel("held-out nats per byte, single tokens")
    panels[0].legend(frameon=False, title="dotted: single tokens begin", title_fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(folder: Path) -> str:
    """Write report and plot of what is in a folder; return the report."""
    text = report(folder)
    (folder / "language.md").write_text(text, encoding="utf-8")
    plot(folder, folder / "language.png")
    return text
