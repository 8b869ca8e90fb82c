"""README's figures: one table of what is gained, where it was measured, and two pictures. Nothing of it is typed.

``python -m bench readme`` reads the committed results of the operations and of training steps, writes the sections of
README between their markers, and the pictures into ``docs/pictures/``; `tests/test_pages.py` holds them to the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.reporting.pictures import idea_picture, step_picture
from bench.reporting.records import Record, Results, read_results
from bench.reporting.sections import fill_section
from bench.reporting.tables import OURS, best
from npp_kernels import PatchSchedule
from reference.comparison.tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "h100.jsonl"
STEPS = ROOT / "docs" / "step_time" / "h100.json"
PICTURES = ROOT / "docs" / "pictures"

OFFICIAL = ("official_compiled", "official_eager")  # the better of the two that was timed stands for that code
STEP_MODEL, STEP_IMAGES = "B", 64  # of the paper's models the one that is timed at four patches
LARGEST_MODEL, LARGEST_IMAGES = "XXL", 64
LEVELS = 3


class Steps(NamedTuple):
    """Training steps as `reference.step_time` measured them, by model, images, patch and formulation."""

    cells: dict[tuple[str, int, int, str], dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Steps:
        """Read the file of `reference.step_time`; cells that failed are left out."""
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return cls({(c["model"], c["images"], c["patch"], c["formulation"]): c for c in cells if "error" not in c})

    def figure(self, model: str, images: int, patch: int, formulation: str, name: str = "median_ms") -> float | None:
        """Return one figure of a cell; None where it was not measured."""
        return self.cells.get((model, images, patch, formulation), {}).get(name)

    def mean_of_stages(self, model: str, images: int, formulation: str, levels: int) -> float | None:
        """Return the milliseconds of a step in the mean over a coarse-to-fine run."""
        stages = PatchSchedule.coarse_to_fine(levels, 2**levels).stages
        total = 0.0
        for stage in stages:
            assert isinstance(stage.patch, int)
            milliseconds = self.figure(model, images, stage.patch, formulation)
            if milliseconds is None:
                return None
            total += (stage.end - stage.start) * milliseconds
        return total / stages[-1].end


class Gain(NamedTuple):
    """One row of the table: less is better in each of its figures."""

    what: str
    unit: str
    official: float | None
    ours: float | None
    other: float | None = None  # the best of all others
    other_name: str = ""

    def cells(self) -> list[str]:
        """Return the row as text; a dash where nothing was measured."""
        before = [figure for figure in (self.official, self.other) if figure is not None]
        ratio = "-"
        if before and self.ours:
            gain = min(before) / self.ours
            ratio = f"{gain:.0f}x" if gain >= 10 else f"{gain:.1f}x" if gain >= 1 else f"{gain:.2f}x"
        other = self._shown(self.other) + (f" ({self.other_name})" if self.other is not None else "")
        return [self.what, self._shown(self.official), other, f"**{self._shown(self.ours)}**", ratio]

    def _shown(self, figure: float | None) -> str:
        """Write a figure with three significant digits and its unit.

        >>> Gain("a step", "ms", 23.21, 0.0345).cells()
        ['a step', '23.2 ms', '-', '**0.035 ms**', '673x']
        """
        if figure is None:
            return "-"
        decimals = 0 if figure >= 100 else 1 if figure >= 10 else 2 if figure >= 1 else 3
        return f"{figure:,.{decimals}f} {self.unit}"


def _step_gains(steps: Steps) -> list[Gain]:
    model, images = STEP_MODEL, STEP_IMAGES
    rows = []
    for patch in (8, 4, 2, 1):
        official, ours = (steps.figure(model, images, patch, who) for who in ("official", "ours"))
        rows.append(Gain(f"training step of {model}, patch {patch}", "ms", official, ours))
    official, ours = (steps.mean_of_stages(model, images, who, LEVELS) for who in ("official", "ours"))
    rows.append(Gain(f"the same in the mean of a run in {LEVELS} stages", "ms", official, ours))
    official, ours = (steps.figure(LARGEST_MODEL, LARGEST_IMAGES, 1, who, "peak_gib") for who in ("official", "ours"))
    rows.append(Gain(f"peak memory of a step of {LARGEST_MODEL}, patch 1", "GiB", official, ours))
    return rows


def _operation_gain(
    results: Results, workload: tuple[str, str, int], what: str, unit: str, value: Callable[[Record], float | None]
) -> Gain:
    """Return the row of a figure of an operation, forward and backward; ``workload`` is operation, model, patch."""
    host_bound = unit == "µs"
    records = [
        record
        for record in results.records
        if (record.operation, record.model, record.patch) == workload
        and record.direction == "forward_backward"
        and record.tokens != "uniform"
        and record.reduction == "mean"
        and record.host_bound is host_bound
    ]

    def least(chosen: Sequence[Record]) -> tuple[float | None, str]:
        found = [(figure, record.label) for record in chosen if (figure := value(record)) is not None]
        return min(found, default=(None, ""))

    # Our figure is that of our faster form: the table does not pick the time of one form and the memory of another.
    ours = best(record for record in records if record.contender in OURS)
    official, _ = least([record for record in records if record.contender in OFFICIAL])
    other, name = least([record for record in records if record.contender not in (*OURS, *OFFICIAL)])
    return Gain(what, unit, official, None if ours is None else value(ours), other, name)


def gains(results: Results, steps: Steps) -> list[Gain]:
    """Return the rows of README's table."""

    def milliseconds(record: Record) -> float:
        return record.median * 1e3

    def mebibytes(record: Record) -> float | None:
        return None if record.peak_bytes is None else record.peak_bytes / 2**20

    def host(record: Record) -> float | None:
        return None if record.host_seconds is None else record.host_seconds * 1e6

    linear = "linear_patch_cross_entropy"
    return [
        *_step_gains(steps),
        _operation_gain(results, ("group_mean", "B", 4), "`group_mean`, patch 4", "ms", milliseconds),
        _operation_gain(
            results, ("patch_cross_entropy", "V16384", 4), "`patch_cross_entropy`, patch 4", "ms", milliseconds
        ),
        _operation_gain(results, (linear, "B", 4), f"`{linear}`, patch 4", "ms", milliseconds),
        _operation_gain(results, (linear, "B", 1), "the same, patch 1", "ms", milliseconds),
        _operation_gain(results, (linear, "B", 1), "its memory, gradients included", "MiB", mebibytes),
        _operation_gain(results, (linear, "B", 4), "its time on the host for one image, eager", "µs", host),
    ]


def gain_table(results: Results, steps: Steps) -> str:
    """Return the gains as Markdown."""
    header = ["", "official code", "best other", "npp_kernels", "gain"]
    return markdown_table(header, [gain.cells() for gain in gains(results, steps)])


def origin(results: Results, steps: Steps) -> str:
    """Say in one paragraph what was measured, on what, and with which versions."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version != "absent")
    devices = ", ".join(sorted({cell["device"] for cell in steps.cells.values()}))
    torches = ", ".join(sorted({str(cell["torch"]) for cell in steps.cells.values()}))
    return (
        f"Operations, forward and backward in bf16: {machine['device']}, {versions}, commit "
        f"{str(results.commit.get('id', 'unknown'))[:12]}, {results.date[:10]}. Steps of {STEP_IMAGES} images of "
        f"16x16 tokens: {devices}, torch {torches}."
    )


SECTIONS: dict[str, Callable[[Results, Steps], str]] = {"origin": origin, "gains": gain_table}


def fill_sections(text: str, results: Results, steps: Steps) -> str:
    """Write each section of `SECTIONS` that the text has markers of; the rest stays as it is.

    Raises:
        ValueError: a marker has no end or names no section, or there is none at all.
    """
    names = re.findall(r"<!-- results:(\w+) -->", text)
    if not names:
        raise ValueError("expected a marker such as <!-- results:gains --> in the text, found none")
    for name in names:
        if name not in SECTIONS:
            raise ValueError(f"results:{name}: expected one of {', '.join(SECTIONS)}")
        text = fill_section(text, name, SECTIONS[name](results, steps))
    return text


def pictures(steps: Steps) -> dict[str, str]:
    """Return the pictures of README, by file name."""
    panels = [(STEP_MODEL, STEP_IMAGES, (8, 4, 2, 1)), (LARGEST_MODEL, LARGEST_IMAGES, (4, 2, 1))]
    drawn = []
    for model, images, patches in panels:
        bars = []
        for patch in patches:
            official, ours = (steps.figure(model, images, patch, who) for who in ("official", "ours"))
            bars.append((patch, official, ours))
        drawn.append((f"{model}, {images} images", bars))
    return {"idea.svg": idea_picture(), "step_time.svg": step_picture(drawn)}


def write_readme(page: Path, results_file: Path = RESULTS, steps_file: Path = STEPS, folder: Path = PICTURES) -> None:
    """Write the sections of a page, and the pictures into a folder."""
    results, steps = read_results(results_file), Steps.read(steps_file)
    page.write_text(fill_sections(page.read_text(encoding="utf-8"), results, steps), encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in pictures(steps).items():
        (folder / name).write_text(drawing, encoding="utf-8")
