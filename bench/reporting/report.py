"""The report of one run: a page of tables, and the plots it shows.

``python -m bench`` writes it after a run, and ``python -m bench report`` from results made before.
"""

from __future__ import annotations

from pathlib import Path

from bench.cases.shapes import OPERATIONS
from bench.reporting.goals import goals_table
from bench.reporting.plots import plot_all
from bench.reporting.records import Results
from bench.reporting.tables import (
    TITLES,
    backward_table,
    operation_tables,
    provenance,
    refusal_list,
    small_table,
    summary_table,
)

METHOD = """\
Every contender was compared with the reference in fp64 before it was timed. The contenders of a table ran in turn; on a
GPU each run is timed by CUDA events after the L2 was flushed by reading. The limit is the time of the bytes that must
move, at the rates measured in the same run; for the output layer it is the time of its matrix products alone, run in
turn with the contenders. A share above 1 is possible where an id recurs: its embedding then comes from an L1, for which
the limit does not allow. Real tokens are Fashion-MNIST images, spread over the vocabulary by a fixed stride: a few ids
dominate."""

GOALS = """\
What was asked of an H100 in bf16, each row a ratio within this run. `docs/tuning.md` says what was tried for those that
are not met, and what stands in the way."""


def write_report(results: Results, folder: Path) -> Path:
    """Write ``report.md`` and its plots into a folder; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = plot_all(results, folder)
    parts = ["# Benchmarks of npp_kernels", provenance(results), METHOD, "## Every stage", summary_table(results)]
    parts += [_picture(path) for path in plots[:2]]
    for operation in OPERATIONS:
        tables = operation_tables(operation, results)
        if not tables:
            continue
        parts.append(f"## {TITLES[operation]}")
        parts += [_picture(path) for path in plots if path.name.startswith(f"{operation}-")]
        parts.append(tables)
        if operation == "group_mean":
            parts += ["### Backward alone, index preparation included", backward_table(results)]
    if any(record.host_bound for record in results.records):
        parts += ["## Small sizes", small_table(results)]
    if results.machine["device_type"] == "cuda":
        parts += ["## Goals", GOALS, goals_table(results)]
    parts += ["## Not timed", refusal_list(results)]
    page = folder / "report.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _picture(path: Path) -> str:
    return f"![{path.stem.replace('-', ' ')}]({path.name})"
