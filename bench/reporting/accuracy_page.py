"""The tables of ``docs/accuracy.md``: every figure of them from the records.

`bench.accuracy` calls it, after measuring or for results made before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.cases.accuracy_cases import GAPS, LINEAR, LOSS, MEAN, OFFSETS, OURS, PYTORCH
from bench.reporting.accuracy_records import Record
from bench.reporting.sections import fill_section
from reference.comparison.tables import markdown_table

HOPPER_ROWS = 4096
QUANTITIES = ("loss", "lse", "entropy", "gradient")


def ratios(records: Iterable[Record], contender: str = OURS) -> tuple[float, float] | None:
    """Return the worst ratios to PyTorch's largest and mean error, or to one rounding where PyTorch has less."""
    theirs = {(r.case, r.quantity): r for r in records if r.contender == PYTORCH}
    largest, mean = [], []
    for record in records:
        if record.contender == contender:
            other = theirs[record.case, record.quantity]
            largest.append(record.largest / max(other.largest, other.rounding_largest))
            mean.append(record.mean / max(other.mean, other.rounding_mean))
    return (max(largest), max(mean)) if largest else None


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.2g}" if value < 1e3 else f"{value:.0e}"


def _cell(records: Sequence[Record], contender: str = OURS) -> str:
    found = ratios(records, contender)
    return "-" if found is None else " / ".join(map(_figure, found))


def _contenders(records: Iterable[Record]) -> list[str]:
    return [name for name in dict.fromkeys(r.contender for r in records) if name != PYTORCH]


def _table(
    corner: str, records: Sequence[Record], columns: dict[str, Callable[[Record], bool]], by_dtype: Sequence[str]
) -> str:
    """Lay out the ratios of each quantity; those in ``by_dtype`` apart for fp32 and for 16 bit; nothing of nothing."""
    rows = []
    for contender in _contenders(records):
        for quantity in dict.fromkeys(r.quantity for r in records if r.contender == contender):
            of_quantity = [r for r in records if r.quantity == quantity]
            parts = [("", of_quantity)]
            if quantity in by_dtype:
                parts = [
                    (", fp32", [r for r in of_quantity if r.case.dtype == "fp32"]),
                    (", 16 bit", [r for r in of_quantity if r.case.dtype != "fp32"]),
                ]
            for suffix, part in parts:
                cells = [_cell([r for r in part if holds(r)], contender) for holds in columns.values()]
                name = "" if contender == OURS else f"{contender}: "
                rows.append([f"{name}{quantity}{suffix}", *cells])
    return markdown_table([corner, *columns], rows) if rows else ""


def _at(field: str, value: float) -> Callable[[Record], bool]:
    return lambda record: getattr(record.case, field) == value


def signs(records: Sequence[Record]) -> str:
    """Say how often the loss and the gradient of rows that are sure of their target have a wrong sign."""
    lines = []
    for contender in (OURS, *(name for name in _contenders(records) if name != OURS), PYTORCH):
        chosen = [
            r for r in records if r.contender == contender and r.case.gap is not None and r.case.operation == LOSS
        ]
        losses = [r for r in chosen if r.quantity == "loss"]
        gradients = [r for r in chosen if r.quantity == "gradient" and r.case.dtype == "fp32"]
        if not losses or not gradients:
            continue
        negative = max(r.wrong_sign or 0.0 for r in losses)
        zero = max(r.zero or 0.0 for r in losses)
        wrong = max(r.wrong_sign or 0.0 for r in gradients)
        row_sum = max(r.row_sum or 0.0 for r in gradients)
        lines.append([contender, f"{negative:.0%}", f"{zero:.0%}", f"{wrong:.0%}", f"{row_sum:.1e}"])
    header = [
        "sure of the target, worst case",
        "losses < 0",
        "losses = 0",
        "gradients at the target > 0",
        "row sum, fp32",
    ]
    return markdown_table(header, lines) if lines else ""


def _hopper(records: Sequence[Record]) -> str:
    contenders = [*_contenders(records), PYTORCH]
    rows = []
    for gap in GAPS:
        found = {(r.contender, r.quantity): r for r in records if r.case.gap == gap}
        line = [f"{gap:g}", f"{found[OURS, 'loss'].exact_value:.4e}"]
        for contender in contenders:
            line.append(f"{found[contender, 'loss'].value:.4e}" if (contender, "loss") in found else "-")
            for quantity in ("hidden's gradient", "weight's gradient"):
                record = found.get((contender, quantity))
                line.append("-" if record is None else f"{record.relative:.1e}")
        rows.append(line)
    header = ["gap", "exact loss"]
    for contender in contenders:
        header += [f"{contender}: loss", "hidden", "weight"]
    return markdown_table(header, rows)


def section(about: dict[str, Any], records: Sequence[Record]) -> str:
    """Return all tables of one kind of device."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version != "absent")
    num_cases = len({record.case for record in records})
    parts = [f"{about['device']}, {versions}, {about['date'][:10]}; {len(records)} results of {num_cases} cases."]
    losses = [r for r in records if r.case.operation == LOSS]
    plain = [r for r in losses if r.case.gap is None and not r.case.option]
    columns = {f"+{offset:g}": _at("offset", offset) for offset in OFFSETS}
    parts.append(_table("logits 3 · randn, and", plain, columns, ("gradient",)))
    sure = [r for r in losses if r.case.gap is not None and r.quantity in ("loss", "gradient")]
    columns = {f"gap {gap:g}": _at("gap", gap) for gap in GAPS}
    parts.append(_table("sure of the target by", sure, columns, ("gradient",)))
    parts.append(signs(records))
    rest: list[list[str]] = []
    with_options = [r for r in losses if r.case.option]
    linear = [r for r in records if r.case.operation == LINEAR and r.case.rows < HOPPER_ROWS]
    means = [r for r in records if r.case.operation == MEAN]
    for operation, chosen in ((f"{LOSS}, options", with_options), (LINEAR, linear), (MEAN, means)):
        for contender in _contenders(chosen):
            name = "" if contender == OURS else f"{contender}: "
            for quantity in dict.fromkeys(r.quantity for r in chosen if r.contender == contender):
                by_dtype = [
                    _cell([r for r in chosen if r.quantity == quantity and r.case.dtype == dtype], contender)
                    for dtype in ("fp32", "bf16", "fp16")
                ]
                rest.append([f"{name}`{operation}`: {quantity}", *by_dtype])
    parts.append(markdown_table(["others", "fp32", "bf16", "fp16"], rest) if rest else "")
    large = [r for r in records if r.case.operation == LINEAR and r.case.rows >= HOPPER_ROWS]
    if large:
        parts.append(
            f"{HOPPER_ROWS} rows in bf16: the loss, and the gradients' errors relative to the exact ones, by norm."
        )
        parts.append(_hopper(large))
    return "\n\n".join(part for part in parts if part)


def fill_page(page: Path, about: dict[str, Any], records: Sequence[Record]) -> None:
    """Write a section into the page, between the markers of its kind of device.

    Raises:
        ValueError: the page has no such markers.
    """
    text = page.read_text(encoding="utf-8")
    page.write_text(fill_section(text, about["kind"], section(about, records)), encoding="utf-8")
