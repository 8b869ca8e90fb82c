"""The goals of speed for one GPU, held against the results of one run, row by row.

Every goal is a ratio within the run, so that it means the same on any machine: to the measured limits, to the fastest
other contender, or to the matrix products alone. They were set for an H100 in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.cases.shapes import HIDDEN_SIZES, OPERATIONS, VOCAB_SIZE
from bench.reporting.records import Record, Results
from bench.reporting.tables import OURS, best, with_backward_alone
from reference.comparison.tables import markdown_table

GRID = 16  # of the images that the goals are about


@dataclass(frozen=True)
class Goal:
    """One row: what is asked, and what the run shows; ``value`` is None where the run lacks what it takes."""

    what: str
    asked: float
    value: float | None
    at_most: bool = False  # whether less is better

    @property
    def is_met(self) -> bool:
        """Whether the run meets the goal."""
        if self.value is None:
            return False
        return self.value <= self.asked if self.at_most else self.value >= self.asked


class _Run:
    """The records of a run, picked by what they measure."""

    def __init__(self, results: Results) -> None:
        self._records = results.records
        self._backward = with_backward_alone(results)
        self.copy_rate: float = results.machine["limits"]["copy_bytes_per_second"]

    def pick(self, operation: str, model: str, patch: int, **others: Any) -> list[Record]:
        """Return all contenders' records of one workload, on real tokens and of both passes if nothing else is said."""
        wanted = {"tokens": "real", "direction": "forward_backward", "reduction": "mean", "host_bound": False} | others
        wanted |= {"operation": operation, "model": model, "patch": patch, "grid": GRID}
        return [
            record for record in self._records if all(getattr(record, name) == value for name, value in wanted.items())
        ]

    def backward(self, model: str, patch: int, tokens: str) -> dict[str, tuple[float, int]]:
        """Return the seconds of each contender's backward of `group_mean`, and the bytes that it must move."""
        wanted = (model, patch, tokens, GRID)
        return {
            both.contender: (both.median - forward.median, both.memory_bytes - forward.memory_bytes)
            for both, forward in self._backward
            if (both.model, both.patch, both.tokens, both.grid) == wanted
        }


def _ours(records: Sequence[Record]) -> Record | None:
    return best(record for record in records if record.contender in OURS)


def _share(records: Sequence[Record]) -> float | None:
    ours = _ours(records)
    return None if ours is None else ours.share_of_limit


def _lead(records: Sequence[Record], chosen: Callable[[Record], bool] = lambda _: True) -> float | None:
    """Return how many times as long as ours the fastest other takes."""
    ours = _ours(records)
    other = best(record for record in records if record.contender not in OURS and chosen(record))
    return None if ours is None or other is None else other.median / ours.median


def _is_compiled(contender: str) -> bool:
    return contender.endswith("_compiled")


def _loss_goals(run: _Run) -> Iterator[Goal]:
    name, model = "patch_cross_entropy", f"V{VOCAB_SIZE}"
    for patch, share, lead in ((1, 0.95, 2.0), (2, 0.88, 3.0), (4, 0.70, 8.0)):
        records = run.pick(name, model, patch)
        about = f"`{name}`, V = {VOCAB_SIZE:,}, K = {patch * patch}"
        yield Goal(f"{about}: share of the limit", share, _share(records))
        if patch > 1:
            yield Goal(f"{about}: best other over ours", lead, _lead(records))
        elif (quack := _lead(records, lambda record: record.contender.startswith("quack"))) is not None:
            yield Goal(f"{about}: QuACK over ours", 1.6, quack)
        else:
            compiled = _lead(records, lambda record: _is_compiled(record.contender))
            yield Goal(f"{about}: best torch.compile over ours", lead, compiled)
    for model, patch in (("V128256", 1), ("V262144", 2)):
        about = f"`{name}`, V = {int(model[1:]):,}, K = {patch * patch}"
        yield Goal(f"{about}: share of the limit", 0.88, _share(run.pick(name, model, patch)))
    for patch in (1, 2):
        records = run.pick(name, f"V{VOCAB_SIZE}", patch, reduction="none")
        yield Goal(f'`{name}`, `reduction="none"`, K = {patch * patch}: share of its limit', 0.92, _share(records))


def _mean_goals(run: _Run) -> Iterator[Goal]:
    name = "group_mean"
    # 70 µs at D = 768, K = 4 on a machine that copies 3.0 TB/s; elsewhere the same share of what must be moved there.
    share_of_copy = (2 * VOCAB_SIZE * 768 * 2 / 3.0e12) / 70e-6
    for model in ("B", "XXL"):
        for patch in (1, 2, 4):
            about = f"`{name}`, D = {HIDDEN_SIZES[model]:,}, K = {patch * patch}"
            for tokens in ("real", "uniform"):
                records = run.pick(name, model, patch, tokens=tokens, direction="forward")
                yield Goal(f"{about}, {tokens}, forward: share of the limit", 0.80, _share(records))
                if patch > 1:
                    yield Goal(f"{about}, {tokens}, forward: best other over ours", 4.0, _lead(records))
            backward = {tokens: run.backward(model, patch, tokens) for tokens in ("real", "uniform")}
            for tokens, costs in backward.items():
                if "ours" not in costs:
                    continue
                what, (ours, moved) = f"{about}, {tokens}, backward", costs["ours"]
                ratios = {contender: seconds / ours for contender, (seconds, _) in costs.items()}
                yield Goal(f"{what}: share of the copy rate", share_of_copy, moved / run.copy_rate / ours)
                yield Goal(f"{what}: `F.embedding_bag` over ours", 6.0, ratios.get("embedding_bag"))
                compiled = min((ratios[contender] for contender in ratios if _is_compiled(contender)), default=None)
                yield Goal(f"{what}: best torch.compile over ours", 2.5, compiled)
            if all("ours" in costs for costs in backward.values()):
                ratio = backward["real"]["ours"][0] / backward["uniform"]["ours"][0]
                yield Goal(f"{about}, backward: real over uniform", 1.3, ratio, at_most=True)


def _linear_goals(run: _Run) -> Iterator[Goal]:
    name = "linear_patch_cross_entropy"
    asked = (("B", 1, 1.10), ("XXL", 1, 1.06), ("B", 2, 1.12), ("B", 4, 1.30))
    for model, patch, ratio in (*asked, ("Llama3-1B", 1, 1.08), ("Llama3-1B", 2, 1.08)):
        ours = _ours(run.pick(name, model, patch))
        rows = 0 if ours is None else ours.images * ours.grid**2 // patch**2
        about = f"`{name}`, {model}, K = {patch * patch}, {rows:,} rows"
        value = None if ours is None else 1 / ours.share_of_limit
        yield Goal(f"{about}: ours over the products alone", ratio, value, at_most=True)
    for model in ("B", "XXL"):
        ours = _ours(run.pick(name, model, 1))
        extra = None if ours is None or ours.peak_bytes is None else (ours.peak_bytes - ours.gradient_bytes) / 2**20
        yield Goal(f"`{name}`, {model}, K = 1: MiB beside the gradients", 96, extra, at_most=True)


def _is_eager_torch(record: Record) -> bool:
    return record.contender in ("official_eager", "honest_eager", "embedding_bag", "average_pool")


def _small_goals(run: _Run) -> Iterator[Goal]:
    for name in OPERATIONS:
        model = f"V{VOCAB_SIZE}" if name == "patch_cross_entropy" else "B"
        tokens = "none" if name == "patch_mean" else "real"
        for direction in ("forward", "forward_backward"):
            records = run.pick(name, model, 4, tokens=tokens, direction=direction, host_bound=True)
            what = f"`{name}`, one image, {direction.replace('_', ' + ')}"
            yield Goal(f"{what}: best eager torch over ours", 1.0, _lead(records, _is_eager_torch))
            ours = _ours(records)
            host = None if ours is None or ours.host_seconds is None else ours.host_seconds * 1e6
            yield Goal(f"{what}: µs of the host", 30, host, at_most=True)


def goals(results: Results) -> list[Goal]:
    """Return every goal with what the results say of it."""
    run = _Run(results)
    return [*_loss_goals(run), *_mean_goals(run), *_linear_goals(run), *_small_goals(run)]


def goals_table(results: Results) -> str:
    """Return the goals as Markdown, with how many are met."""
    held = [goal for goal in goals(results) if goal.value is not None]
    rows = [
        [
            goal.what,
            f"{'≤' if goal.at_most else '≥'} {goal.asked:.3g}",
            f"{goal.value:.3g}",
            "met" if goal.is_met else "**not met**",
        ]
        for goal in held
    ]
    met = sum(goal.is_met for goal in held)
    table = markdown_table(["goal", "asked", "measured", ""], rows)
    return f"{met} of {len(held)} are met.\n\n{table}"
