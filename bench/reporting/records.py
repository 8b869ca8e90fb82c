"""What is kept of a measurement: one frozen record each, and the two files that hold them.

pytest-benchmark writes its JSON at the end of a session; the journal takes a line as soon as a record is made, so that
a run that is cut off loses nothing. Both are read alike.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench.cases.shapes import Workload
from reference.comparison.journal import Journal as JsonLines

WORKLOAD_FIELDS = (
    "operation",
    "model",
    "vocab_size",
    "hidden_size",
    "grid",
    "images",
    "patch",
    "tokens",
    "reduction",
    "host_bound",
)


@dataclass(frozen=True)
class Record:
    """One contender's result on one workload in one direction. Times in seconds, sizes in bytes."""

    operation: str
    model: str
    vocab_size: int
    hidden_size: int
    grid: int
    images: int
    patch: int
    tokens: str
    reduction: str
    host_bound: bool
    direction: str
    dtype: str
    contender: str
    label: str
    median: float
    first_quartile: float
    third_quartile: float
    runs: int
    host_seconds: float | None  # until the host has queued a call; for host-bound workloads
    tokens_per_second: float
    images_per_second: float
    peak_bytes: int | None  # beyond the inputs, gradients included; None without a GPU
    gradient_bytes: int  # of new memory, so 0 for a gradient that lies over the logits
    memory_bytes: int  # that must move to and from device memory
    l2_bytes: int  # that must be read from the L2
    flops: int
    limit: float  # the least time that the machine's measured rates allow
    limit_of: str  # "moving" (at the copy rate and the L2's) or "products" (of matrices, alone, in the same run)
    mean_error: float  # against the reference in fp64

    @property
    def share_of_limit(self) -> float:
        """The limit over the median: 1 is as fast as the machine allows."""
        return self.limit / self.median


@dataclass(frozen=True)
class Refusal:
    """A contender that was not timed, and why: it failed, or its result is not the reference's."""

    workload: str
    direction: str
    contender: str
    reason: str


@dataclass(frozen=True)
class Results:
    """All that one run found."""

    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    records: tuple[Record, ...]
    refusals: tuple[Refusal, ...]
    absent: tuple[str, ...]


class Journal:
    """A file with one JSON object a line, written as the run goes; one that is there already is gone on with.

    Args:
        path: the file.
        header: what the results depend on, and the date.

    Raises:
        ValueError: the file is there, and was made on another machine, with other versions or of another commit.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._lines = JsonLines(path)
        if not self._lines.entries:
            self._lines.add({"header": header})
            return
        made, here = _conditions(self._lines.entries[0]["header"]), _conditions(header)
        differing = [name for name in made if made[name] != here.get(name)]
        if differing:
            was, now = ({name: these.get(name) for name in differing} for these in (made, here))
            raise ValueError(f"{path}: expected a journal of this machine and commit, {now}, got one of {was}")
        self._lines.add({"continued": header["date"]})

    def add(self, entry: Record | Refusal) -> None:
        """Append a record or a refusal."""
        kind = "record" if isinstance(entry, Record) else "refusal"
        self._lines.add({kind: asdict(entry)})


def _conditions(header: dict[str, Any]) -> dict[str, Any]:
    """Return what two parts of a journal must have in common: all but what is measured, and the date."""
    machine = {name: value for name, value in header["machine"].items() if name != "limits"}
    return machine | {"commit": header["commit"].get("id"), "absent": sorted(header["absent"])}


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells an entry from all others: of a refusal the workload's name, of a record its fields."""
    names = ("workload",) if "workload" in entry else WORKLOAD_FIELDS
    return tuple(entry[name] for name in (*names, "direction", "contender"))


def measured_already(path: Path) -> set[tuple[str, str, str]]:
    """Return what a journal has: the workload's name, direction and contender of each entry; nothing without a file."""
    found = set()
    for line in JsonLines(path).entries:
        if "record" in line:
            record = line["record"]
            workload = Workload(**{name: record[name] for name in WORKLOAD_FIELDS}).name
            found.add((workload, record["direction"], record["contender"]))
        elif "refusal" in line:
            found.add(_key(line["refusal"]))
    return found


def _record(values: dict[str, Any]) -> Record:
    return Record(**{entry.name: values[entry.name] for entry in fields(Record)})


def read_results(path: Path) -> Results:
    """Read the JSON of pytest-benchmark, or a journal (``.jsonl``)."""
    if path.suffix == ".jsonl":
        lines = JsonLines(path).entries
        header = lines[0]["header"]
        # A workload that a run was cut off in is measured anew as a whole: the last entry counts.
        records = list({_key(line["record"]): line["record"] for line in lines if "record" in line}.values())
        refusals = list({_key(line["refusal"]): line["refusal"] for line in lines if "refusal" in line}.values())
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        header = {
            "machine": content["machine_info"],
            "commit": content["commit_info"],
            "date": content["datetime"],
            "absent": content["absent"],
        }
        records = [entry["extra_info"]["record"] for entry in content["benchmarks"]]
        refusals = content["refusals"]
    return Results(
        header["machine"],
        header["commit"],
        header["date"],
        tuple(_record(values) for values in records),
        tuple(Refusal(**values) for values in refusals),
        tuple(header["absent"]),
    )
