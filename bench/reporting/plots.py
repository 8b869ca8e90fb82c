"""Results as pictures: throughput and memory at every stage, the share of the limit, and the ratio to each peer.

`bench.reporting.report` draws them for its page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; no window is ever opened

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.cases.contenders import CONTENDERS
from bench.cases.shapes import OPERATIONS
from bench.reporting.records import Record, Results
from bench.reporting.tables import OURS, PASSES, best, cell, contenders_of, groups_of, stages_of

OUR_COLOUR = "#c1272d"
# Muted, told apart in greys too, and none of them near ours.
COLOURS = ("#1f4e79", "#4c9f70", "#8c6bb1", "#e08e0b", "#5aa9c9", "#7f7f7f", "#a0522d", "#2f4f4f", "#b5a642", "#d48fb0")
STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.titlesize": 10,
    "font.size": 9,
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
}
LABEL_GAP = 0.055  # of the axis' height: the least distance of two labels


def _colour(operation: str, name: str) -> str:
    """Return a contender's colour, the same in every plot of an operation whoever else took part."""
    others = [c.name for c in CONTENDERS if c.operation == operation and c.name not in OURS]
    return OUR_COLOUR if name in OURS else COLOURS[others.index(name) % len(COLOURS)]


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each line's label beside its end, moved apart where they would meet."""
    transform = axes.transData + axes.transAxes.inverted()
    last = axes.get_xlim()[1]
    places = sorted((float(transform.transform((last, value))[1]), text, colour) for value, text, colour in ends)
    floor = -1.0
    heights = []
    for height, _, _ in places:
        floor = max(height, floor + LABEL_GAP)
        heights.append(floor)
    excess = max(heights[-1] - 1.02, 0.0) if heights else 0.0
    for height, (_, text, colour) in zip(heights, places, strict=True):
        axes.text(1.01, height - excess, text, color=colour, va="center", fontsize=8, transform=axes.transAxes)


def _stage_lines(axes: Axes, records: Sequence[Record], value: Callable[[Record], float | None]) -> None:
    """Draw one line for each contender over the stages."""
    stages = stages_of(records)
    ends = []
    for name, label in contenders_of(records):
        colour = _colour(records[0].operation, name)
        found = [(index, cell(records, name, patch)) for index, patch in enumerate(stages)]
        points = [(index, value(record)) for index, record in found if record is not None]
        xs = [index for index, height in points if height is not None]
        ys = [height for _, height in points if height is not None]
        if not xs:
            continue
        ours = name in OURS
        dashes = "--" if name == "ours_in_place" or "compiled" in name else "-"
        axes.plot(xs, ys, dashes, color=colour, marker="o", markersize=4, linewidth=2.2 if ours else 1.2)
        ends.append((ys[-1], label, colour))
    axes.set_xticks(range(len(stages)), [f"{patch}x{patch}" for patch in stages])
    axes.set_xlabel("patch, coarse to fine")
    axes.set_xlim(-0.15, len(stages) - 1 + 0.15)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _label_ends(axes, ends)


def _caption(figure: Figure, results: Results, text: str) -> None:
    versions = results.machine["versions"]
    made = f"{results.machine['device']}, torch {versions['torch']}, triton {versions['triton']}, {results.date[:10]}"
    figure.text(0.01, -0.02, f"{text}\n{made}", fontsize=7.5, color="#555555", va="top")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return path


def plot_stages(results: Results, operation: str, folder: Path) -> list[Path]:
    """Draw an operation's throughput and memory at every stage, one file for each shape."""
    records = [record for record in results.records if record.operation == operation]
    paths = []
    for (model, grid, tokens, direction), chosen in groups_of(records).items():
        if direction != "forward_backward" or len(stages_of(chosen)) < 2:
            continue
        with_memory = any(record.peak_bytes is not None for record in chosen)
        figure, panels = plt.subplots(1, 1 + with_memory, figsize=(6.2 * (1 + with_memory), 4.0), squeeze=False)
        _stage_lines(panels[0, 0], chosen, lambda record: record.images_per_second)
        panels[0, 0].set_title("Throughput, images/s (higher is better)", loc="left")
        if with_memory:
            _stage_lines(panels[0, 1], chosen, lambda record: record.peak_bytes and record.peak_bytes / 2**20)
            panels[0, 1].set_title("Peak extra memory, MiB (lower is better)", loc="left")
        shape = f"{model}, {grid} tokens" + (f", {tokens}" if tokens != "none" else "")
        figure.suptitle(f"{operation}, {PASSES[direction]}: {shape}", x=0.01, ha="left", fontsize=11)
        _caption(
            figure, results, f"{chosen[0].dtype}, {chosen[0].images} images; medians; dashed: compiled or in place"
        )
        paths.append(_save(figure, folder / f"{operation}-{model}-{grid}-{tokens}.png"))
    return paths


def _panels(results: Results) -> list[tuple[str, list[Record]]]:
    """Return what the two overviews show: forward + backward of each operation and shape on real tokens."""
    panels = []
    for operation in OPERATIONS:
        records = [record for record in results.records if record.operation == operation]
        for (model, grid, tokens, direction), chosen in groups_of(records).items():
            if direction == "forward_backward" and tokens != "uniform" and len(stages_of(chosen)) > 1:
                panels.append((f"{operation}\n{model}, {grid}", chosen))
    return panels


def plot_share_of_limit(results: Results, folder: Path) -> Path:
    """Draw how near to the limit we and the best other come, at every stage."""
    panels = _panels(results)
    columns = min(max(len(panels), 1), 4)
    rows = max(-(-len(panels) // columns), 1)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.9 * rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, records) in zip(axes.flat, panels, strict=False):
        stages = stages_of(records)
        for offset, colour, inside in ((-0.2, OUR_COLOUR, True), (0.2, "#9aa5b1", False)):
            for index, patch in enumerate(stages):
                found = best(r for r in records if r.patch == patch and (r.contender in OURS) is inside)
                if found is None:
                    continue
                axis.bar(index + offset, found.share_of_limit, 0.38, color=colour)
                height = found.share_of_limit + 0.02
                shown = f"{found.share_of_limit:.2f}"
                axis.text(index + 1.15 * offset, height, shown, ha="center", fontsize=6.5, color="#333333")
        axis.set_xticks(range(len(stages)), [f"{patch}x{patch}" for patch in stages])
        axis.axhline(1, color="#444444", linewidth=0.8)
        axis.set_title(title, loc="left")
    axes[0, 0].set_ylabel("share of the measured limit")
    figure.suptitle(
        "Share of the limit, forward + backward: npp_kernels (red), best other (grey)", x=0.01, ha="left", fontsize=11
    )
    _caption(figure, results, "limit: bytes that must move at the measured rates, or the matrix products alone")
    return _save(figure, folder / "share-of-limit.png")


def plot_ratios(results: Results, folder: Path) -> Path:
    """Draw how many times our time every other contender takes, at every stage."""
    panels = _panels(results)
    columns = min(max(len(panels), 1), 2)
    rows = max(-(-len(panels) // columns), 1)
    figure, axes = plt.subplots(rows, columns, figsize=(6.4 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, records) in zip(axes.flat, panels, strict=False):
        ours = {
            patch: best(r for r in records if r.patch == patch and r.contender in OURS) for patch in stages_of(records)
        }
        others = [r for r in records if r.contender not in OURS and ours[r.patch] is not None]
        if not others:
            axis.set_visible(False)
            continue

        def ratio(record: Record, ours: dict[int, Record | None] = ours) -> float | None:
            reference = ours[record.patch]
            return None if reference is None else record.median / reference.median

        axis.axhline(1, color=OUR_COLOUR, linewidth=2)  # first, since the labels need the axis' final range
        _stage_lines(axis, others, ratio)
        axis.set_title(title.replace("\n", ": "), loc="left")
        axis.set_ylabel("time / our time")
    figure.suptitle(
        "Ratio to each other contender, forward + backward (red line: npp_kernels)", x=0.01, ha="left", fontsize=11
    )
    _caption(figure, results, "our faster form where there are two; dashed: compiled or in place")
    return _save(figure, folder / "ratios.png")


def plot_all(results: Results, folder: Path) -> list[Path]:
    """Draw everything into a folder; return the files."""
    with plt.rc_context(STYLE):  # type: ignore[arg-type]  # its stubs list every key by name
        overviews = [plot_share_of_limit(results, folder), plot_ratios(results, folder)]
        return overviews + [path for operation in OPERATIONS for path in plot_stages(results, operation, folder)]
