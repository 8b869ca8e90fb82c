"""The tables and the plot of training steps, made of what `reference.step_time` measured.

That command prints and draws them; ``python -m bench training`` writes the tables into ``docs/training.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from npp_kernels import PatchSchedule
from reference.comparison.tables import markdown_table
from reference.network.model import SIZES

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FORMULATIONS = ("official", "ours")  # in this order: where the official one does not fit, ours need not be compiled
KEY = ("model", "patch", "images", "formulation")
FIGURES = {"ms": "median_ms", "images/s": "images_per_second", "TFLOP/s": "model_tflops_per_second", "GiB": "peak_gib"}
LEVELS = (2, 3, 4)  # of the paper's schedules


def key_of(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells a cell from all others."""
    return tuple(cell[name] for name in KEY)


def step_table(cells: Sequence[dict[str, Any]], formulations: Sequence[str] = FORMULATIONS) -> str:
    """Return the figures of each model, patch and number of images as a Markdown table.

    >>> cell = {"model": "B", "patch": 2, "images": 64, "formulation": "ours", "median_ms": 5.0, "peak_gib": 3.21}
    >>> print(step_table([cell], ["ours"]))
    | model | images | patch | ms, ours | images/s, ours | TFLOP/s, ours | GiB, ours |
    | --- | ---: | ---: | ---: | ---: | ---: | ---: |
    | B | 64 | 2 | 5.00 | - | - | 3.2 |
    """
    found = {key_of(cell): cell for cell in cells}
    first, *others = formulations
    heads = [head for figure in FIGURES for head in (f"{figure}, {first}", *others)]
    rows = []
    for model, patch, images in _rows(found):
        one = [found.get((model, patch, images, formulation), {}) for formulation in formulations]
        rows.append([model, images, patch, *(shown(cell, name) for name in FIGURES.values() for cell in one)])
    return markdown_table(["model", "images", "patch", *heads], rows)


def schedule_table(cells: Sequence[dict[str, Any]]) -> str:
    """Return what coarse-to-fine training costs beside plain training, which follows from the times of its steps.

    >>> cells = [{"model": "B", "patch": p, "images": 64, "formulation": f, "median_ms": ms}
    ...          for p, f, ms in [(1, "ours", 20.0), (2, "ours", 5.0), (1, "official", 25.0)]]
    >>> print(schedule_table(cells))
    | model | images | levels | of our plain training | of the official plain training |
    | --- | ---: | ---: | ---: | ---: |
    | B | 64 | 2 | 0.625 | 0.500 |
    """
    times = {key_of(cell): cell["median_ms"] for cell in cells if "error" not in cell}
    rows = []
    for model, images in dict.fromkeys((model, images) for model, _, images in _rows(times)):
        for levels in LEVELS:
            stages = PatchSchedule.coarse_to_fine(levels, 2**levels).stages
            shares = [(stage.end - stage.start) / stages[-1].end for stage in stages]
            ours = [times.get((model, stage.patch, images, "ours"), math.nan) for stage in stages]
            cost = sum(share * ms for share, ms in zip(shares, ours, strict=True))
            if not math.isnan(cost):
                official = times.get((model, 1, images, "official"), math.nan)
                rows.append([model, images, levels, f"{cost / ours[-1]:.3f}", f"{cost / official:.3f}"])
    header = ["model", "images", "levels", "of our plain training", "of the official plain training"]
    return markdown_table(header, rows)


def report(cells: Sequence[dict[str, Any]]) -> str:
    """Return both tables, and what they were measured on."""
    devices = ", ".join(sorted({cell["device"] for cell in cells}))
    return f"{step_table(cells)}\n\nDevice: {devices}.\n\n{schedule_table(cells)}"


def _rows(keys: Iterable[tuple[Any, ...]]) -> list[tuple[str, int, int]]:
    """Return each model, patch and number of images once: the smallest model first, and the coarsest patch."""
    rows = {(model, patch, images) for model, patch, images, _ in keys}
    return sorted(rows, key=lambda row: (list(SIZES).index(row[0]), row[2], -row[1]))


def shown(cell: dict[str, Any], name: str) -> str:
    """Return a figure of a cell as the table shows it; a dash where there is none."""
    if "error" in cell:
        return ("out of memory" if cell["out_of_memory"] else "failed") if name == "median_ms" else "-"
    figure = cell.get(name)
    if figure is None:
        return "-"
    digits = {"median_ms": 2, "peak_gib": 1}.get(name, 0)
    return f"{figure:.{digits}f}"


def plot(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the time of a step over the patch: a panel for each model, a colour for each number of images."""
    done = [cell for cell in cells if "error" not in cell]
    models = [name for name in SIZES if any(cell["model"] == name for cell in done)]
    figure, panels = plt.subplots(
        1, len(models), figsize=(4.5 * len(models) + 1, 4.2), layout="constrained", squeeze=False, sharey=True
    )
    for axes, model in zip(panels[0], models, strict=True):
        own = [cell for cell in done if cell["model"] == model]
        for colour, images in enumerate(sorted({cell["images"] for cell in own})):
            for formulation, style in (("official", "x--"), ("ours", "o-")):
                line = {c["patch"]: c["median_ms"] for c in own if key_of(c)[2:] == (images, formulation)}
                patches = sorted(line, reverse=True)
                label = f"{images} images, {formulation}"
                axes.plot(patches, [line[p] for p in patches], style, color=f"C{colour}", markersize=5, label=label)
                if formulation == "ours" and 1 in line:
                    ideal = [line[1] / p**2 for p in patches]
                    axes.plot(patches, ideal, ":", color=f"C{colour}", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.invert_xaxis()
        axes.set_xticks(sorted({cell["patch"] for cell in own}), sorted({cell["patch"] for cell in own}))
        axes.set_title(model)
        axes.set_xlabel("patch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel("ms a step (dotted: patch 1 over K)")
    figure.savefig(path, dpi=150)
    plt.close(figure)
