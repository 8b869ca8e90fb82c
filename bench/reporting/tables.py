"""Results as Markdown: the tables of the report, every figure of them from the records.

`bench.reporting.report` puts them together; other pages take the choice of the best from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.cases.contenders import CONTENDERS
from bench.cases.shapes import OPERATIONS
from bench.reporting.records import Record, Results
from reference.comparison.tables import markdown_table

OURS = ("ours", "ours_in_place")
TITLES = {
    "group_mean": "`group_mean`: gather and mean",
    "patch_mean": "`patch_mean`: mean of embeddings",
    "patch_cross_entropy": "`patch_cross_entropy`: loss on logits",
    "linear_patch_cross_entropy": "`linear_patch_cross_entropy`: output layer and loss",
}
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}


def milliseconds(seconds: float) -> str:
    """Write a time in milliseconds with three significant digits.

    >>> milliseconds(0.000123456), milliseconds(0.0456), milliseconds(12.3456)
    ('0.123', '45.6', '12346')
    """
    value = seconds * 1e3
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"


def size(count: float | None) -> str:
    """Write a number of bytes in MiB; a dash where it is not known."""
    return "-" if count is None else f"{count / 2**20:.1f}"


def best(records: Iterable[Record]) -> Record | None:
    """Return the fastest record, if there is any."""
    return min(records, key=lambda record: record.median, default=None)


def groups_of(records: Iterable[Record]) -> dict[tuple[str, str, str, str], list[Record]]:
    """Sort device-timed records by model, grid, tokens and direction: one table or panel each, over the stages."""
    grouped: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in records:
        if not record.host_bound and record.reduction == "mean":
            key = (record.model, f"{record.grid}x{record.grid}", record.tokens, record.direction)
            grouped.setdefault(key, []).append(record)
    return grouped


def stages_of(records: Iterable[Record]) -> list[int]:
    """Return the patch sizes of records, coarse to fine."""
    return sorted({record.patch for record in records}, reverse=True)


def contenders_of(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Return the names and labels of those that took part, in the order of `bench.cases.contenders`."""
    present = {(record.operation, record.contender) for record in records}
    named = [(c.name, c.label) for c in CONTENDERS if (c.operation, c.name) in present]
    return list(dict.fromkeys(named))


def cell(records: Sequence[Record], contender: str, patch: int) -> Record | None:
    """Return the record of a contender at a stage, if there is one."""
    found = [record for record in records if record.contender == contender and record.patch == patch]
    return found[0] if found else None


def stage_table(records: Sequence[Record], show: Callable[[Record], str]) -> str:
    """Lay out one figure of each contender over the stages."""
    stages = stages_of(records)
    rows = []
    for name, label in contenders_of(records):
        cells = [cell(records, name, patch) for patch in stages]
        shown = ["-" if record is None else show(record) for record in cells]
        rows.append([f"**{label}**", *(f"**{text}**" for text in shown)] if name in OURS else [label, *shown])
    return markdown_table(["", *(f"patch {patch}" for patch in stages)], rows)


def ratio_to_best_other(records: Sequence[Record], patch: int) -> str:
    """Write how many times as long as ours the best other contender takes, and which it is."""
    at_stage = [record for record in records if record.patch == patch]
    ours = best(record for record in at_stage if record.contender in OURS)
    other = best(record for record in at_stage if record.contender not in OURS)
    return "-" if ours is None or other is None else f"{other.median / ours.median:.2f}x ({other.label})"


def _time_and_spread(record: Record) -> str:
    spread = (record.third_quartile - record.first_quartile) / record.median
    return f"{milliseconds(record.median)} ±{spread / 2:.0%}"


def operation_tables(operation: str, results: Results) -> str:
    """Return an operation's tables: for each shape, times, shares of the limit, throughput and memory."""
    records = [record for record in results.records if record.operation == operation]
    parts = []
    for (model, grid, tokens, direction), chosen in groups_of(records).items():
        about = ", ".join(part for part in (f"{tokens} tokens" if tokens != "none" else "", chosen[0].dtype) if part)
        parts.append(f"### {model}, {grid}, {PASSES[direction]} ({about})")
        parts.append("Median time in ms, ± half the interquartile range")
        parts.append(stage_table(chosen, _time_and_spread))
        parts.append("Share of the limit")
        parts.append(stage_table(chosen, lambda record: f"{record.share_of_limit:.2f}"))
        parts.append("Thousand images a second (tokens a second are this times the grid)")
        parts.append(stage_table(chosen, lambda record: f"{record.images_per_second / 1e3:.2f}"))
        if any(record.peak_bytes is not None for record in chosen):
            parts.append("Peak extra memory in MiB, of which the gradients")
            parts.append(stage_table(chosen, lambda r: f"{size(r.peak_bytes)}, {size(r.gradient_bytes)}"))
    special = [record for record in records if record.reduction != "mean"]
    if special:
        parts.append('### `reduction="none"`: a gradient of its own for every target, forward + backward')
        parts.append("Median time in ms, and the share of the limit (logits read twice, gradient written once)")
        parts.append(stage_table(special, lambda r: f"{milliseconds(r.median)}, {r.share_of_limit:.2f}"))
    return "\n\n".join(parts)


def small_table(results: Results) -> str:
    """Return the table of small sizes: microseconds of a call in eager mode, and of the host alone."""
    small = [record for record in results.records if record.host_bound]
    rows = []
    for record in small:
        host = "-" if record.host_seconds is None else f"{record.host_seconds * 1e6:.0f}"
        name = f"`{record.operation}`, {PASSES[record.direction]}, {record.label}"
        rows.append([name, f"{record.median * 1e6:.0f}", host])
    return markdown_table(["one 16x16 image, patch 4, eager", "µs a call", "µs until queued"], rows)


def summary_table(results: Results) -> str:
    """Return our times at every stage: of the limit, and against the best other contender."""
    rows = []
    for operation in OPERATIONS:
        records = [record for record in results.records if record.operation == operation]
        for (model, grid, tokens, direction), chosen in groups_of(records).items():
            for patch in stages_of(chosen):
                ours = best(r for r in chosen if r.patch == patch and r.contender in OURS)
                if ours is None:
                    continue
                shape = f"{model}, {grid}" + (f", {tokens}" if tokens != "none" else "")
                rows.append(
                    [
                        f"`{operation}`, {PASSES[direction]}",
                        shape,
                        str(patch),
                        ours.label,
                        milliseconds(ours.median),
                        f"{ours.share_of_limit:.2f}",
                        ratio_to_best_other(chosen, patch),
                    ]
                )
    header = ["operation", "shape", "patch", "form", "ms", "share of limit", "best other takes"]
    return markdown_table(header, rows)


def with_backward_alone(results: Results) -> list[tuple[Record, Record]]:
    """Return the records of `group_mean` of both passes, each with that of its forward alone.

    The difference is what the backward costs; it counts the preparation of the indices wherever a contender does it.
    """
    records = [record for record in results.records if record.operation == "group_mean" and not record.host_bound]

    def key(record: Record) -> tuple[Any, ...]:
        return record.model, record.grid, record.tokens, record.patch, record.contender

    forward = {key(record): record for record in records if record.direction == "forward"}
    both = [record for record in records if record.direction == "forward_backward"]
    return [(record, forward[key(record)]) for record in both if key(record) in forward]


def backward_table(results: Results) -> str:
    """Return what the backward of `group_mean` costs: forward + backward less the forward alone."""
    grouped: dict[tuple[str, int, str], list[Record]] = {}
    seconds = {}
    for record, forward in with_backward_alone(results):
        grouped.setdefault((record.model, record.grid, record.tokens), []).append(record)
        seconds[record] = record.median - forward.median

    parts = []
    for (model, grid, tokens), chosen in grouped.items():
        parts.append(f"{model}, {grid}x{grid}, {tokens} tokens: forward + backward less forward, in ms")
        parts.append(stage_table(chosen, lambda record: milliseconds(seconds[record])))
    return "\n\n".join(parts)


def provenance(results: Results) -> str:
    """Say on what, with what and when the results were made, and what the machine's limits are."""
    machine = results.machine
    limits = machine["limits"]
    l2 = limits["l2_bytes_per_second"]
    rates = [
        f"copy {limits['copy_bytes_per_second'] / 1e12:.3g} TB/s (read + written)",
        f"L2 read {l2 / 1e12:.3g} TB/s" if l2 else "",
        f"matrix product {limits['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version != "absent")
    lines = [
        f"- Device: {machine['device']}"
        + (f", driver {machine['driver']}, CUDA {machine['cuda']}" if "driver" in machine else ", no GPU"),
        f"- Versions: Python {machine['python']}, {versions}",
        f"- Commit {str(results.commit.get('id', 'unknown'))[:12]}, {results.date[:10]}",
        "- Measured limits: " + ", ".join(rate for rate in rates if rate),
    ]
    if results.absent:
        lines.append(f"- Absent contenders (not installed): {', '.join(results.absent)}")
    return "\n".join(lines)


def refusal_list(results: Results) -> str:
    """List who was not timed, and why."""
    lines = [f"- `{r.contender}` on {r.workload}, {PASSES[r.direction]}: {r.reason}" for r in results.refusals]
    return "\n".join(lines) or "None: every contender that is installed agrees with the reference."
