"""One record for each error that was measured, and the file in ``bench/results/`` that keeps them.

`bench.accuracy` writes them; `bench.reporting.accuracy_page` makes its tables of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.cases.accuracy_cases import Case


@dataclass(frozen=True)
class Record:
    """The errors of one result of one contender, absolute, against fp64."""

    case: Case
    contender: str
    quantity: str
    elements: int
    largest: float
    mean: float
    rounding_largest: float  # what one rounding of the exact result to its dtype may take
    rounding_mean: float
    value: float  # the mean of the result
    exact_value: float  # the mean of the exact result
    relative: float  # the error's norm over the exact result's
    wrong_sign: float | None = None  # losses below 0; gradients at the target above 0: the share of rows
    zero: float | None = None  # losses of 0
    row_sum: float | None = None  # the largest sum of a row of the gradient, over the sum of its magnitudes


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Read what was written: what it was made on and with, and the records."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["about"], [
        Record(Case(**entry["case"]), **result) for entry in content["cases"] for result in entry["results"]
    ]


def _written(record: Record) -> dict[str, Any]:
    """Return a record without its case, and figures with four digits."""
    fields = {name: value for name, value in vars(record).items() if name != "case" and value is not None}
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in fields.items()}


def write_records(path: Path, about: dict[str, Any], records: Sequence[Record]) -> None:
    """Write what `read_records` reads: a line for each case."""
    by_case: dict[Case, list[dict[str, Any]]] = {}
    for record in records:
        by_case.setdefault(record.case, []).append(_written(record))
    lines = [json.dumps({"case": asdict(case), "results": results}) for case, results in by_case.items()]
    text = ",\n".join(lines)
    new = path.with_name(f"{path.name}.new")  # in whose place the old file stays until all is written
    new.write_text(f'{{"about": {json.dumps(about)}, "cases": [\n{text}\n]}}\n', encoding="utf-8")
    new.replace(path)
