"""The tables of ``docs/training.md`` that have committed data: every figure of them from ``docs/step_time/``.

``python -m bench training`` writes them, after `reference.step_time` has measured; `tests/test_pages.py` holds the page
to the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.reporting.readme import ROOT, STEPS
from bench.reporting.sections import fill_section
from reference.comparison.step_report import schedule_table, step_table

PAGE = ROOT / "docs" / "training.md"
ONE_LAYER = STEPS.with_name("h100-one-layer.json")  # a later run, in which one layer is compiled in place of four


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a file of `reference.step_time`."""
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells


def fill_page(text: str) -> str:
    """Write each table between its markers; the rest of the page stays as it is."""
    cells = read_cells(STEPS)
    text = fill_section(text, "steps", step_table(cells))
    text = fill_section(text, "schedules", schedule_table(cells))
    return fill_section(text, "one_layer", step_table(read_cells(ONE_LAYER), ["ours"]))


def write_page(page: Path = PAGE) -> None:
    """Write the tables into the page."""
    page.write_text(fill_page(page.read_text(encoding="utf-8")), encoding="utf-8")
