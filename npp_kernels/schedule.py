"""Coarse-to-fine training: which patch a step uses, at which learning rate, and what the whole run costs.

Everything is a function of the step, so a run that stops inside a stage goes on from the step alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from npp_kernels.grouping import Patch, resolve_grid, resolve_patch

MAX_LEVELS = 4


@dataclass(frozen=True)
class Stage:
    """One stage of a schedule: the steps from ``start`` up to, not including, ``end`` train on ``patch``.

    >>> from npp_kernels import PatchSchedule
    >>> PatchSchedule.coarse_to_fine(levels=2, total_steps=100).at(70)
    Stage(index=1, patch=1, start=50, end=100)
    """

    index: int
    patch: int | tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class PatchSchedule:
    """The stages of a coarse-to-fine training run.

    >>> from npp_kernels import PatchSchedule
    >>> schedule = PatchSchedule([(4, 1000), ((1, 2), 2000), (1, 4000)])
    >>> schedule.at(1500).patch, schedule.total_steps
    ((1, 2), 4000)
    >>> schedule == PatchSchedule([(4, 1000), ((1, 2), 2000), (1, 4000)])
    True

    Args:
        boundaries: pairs ``(patch, until_step)`` in order: a patch, an int or a tuple as for `group_tokens`, trains up
            to, not including, ``until_step``. The steps increase strictly.

    Raises:
        TypeError: a patch or a step is not of its type.
        ValueError: no stage, a patch smaller than 1, steps that do not increase.
    """

    boundaries: tuple[tuple[int | tuple[int, ...], int], ...]

    def __init__(self, boundaries: Sequence[tuple[Patch, int]]) -> None:
        normal: list[tuple[int | tuple[int, ...], int]] = []
        for entry in boundaries:
            if not isinstance(entry, Sequence) or len(entry) != 2:
                raise TypeError(f"boundaries: expected pairs (patch, until_step), got {entry!r}")
            patch, until_step = entry
            sizes = resolve_patch(patch, None)
            until = _integer("until_step", until_step)
            previous = normal[-1][1] if normal else 0
            if until <= previous:
                raise ValueError(f"boundaries: expected until_step above {previous} for patch {patch}, got {until}")
            normal.append((patch if isinstance(patch, int) else sizes, until))
        if not normal:
            raise ValueError("boundaries: expected at least one stage, got none")
        object.__setattr__(self, "boundaries", tuple(normal))

    @classmethod
    def coarse_to_fine(cls, levels: int, total_steps: int, rate: float = 0.5) -> PatchSchedule:
        """Return the paper's schedule: patches that halve, each stage ending at a power of ``rate`` of the run.

        >>> from npp_kernels import PatchSchedule
        >>> PatchSchedule.coarse_to_fine(levels=3, total_steps=400).boundaries
        ((4, 100), (2, 200), (1, 400))

        Args:
            levels: number of stages, 1 to 4; the patches are the last ``levels`` of 8, 4, 2, 1.
            total_steps: steps of the whole run.
            rate: stage i from the end (counted from 0) ends at ``⌊rate^i · total_steps⌋``; between 0 and 1.

        Raises:
            TypeError: ``levels`` or ``total_steps`` is not an integer.
            ValueError: an argument is out of its range, or ``total_steps`` leaves a stage without a step.

        Source:
            NPP (arXiv 2412.15321), section 3; official training script, ``--patch-level`` and ``--epoch-rate``, whose
            boundaries are whole epochs.
        """
        levels = _integer("levels", levels)
        total_steps = _integer("total_steps", total_steps)
        if not 1 <= levels <= MAX_LEVELS:
            raise ValueError(f"levels: expected 1 to {MAX_LEVELS}, got {levels}")
        if total_steps < 1:
            raise ValueError(f"total_steps: expected at least 1, got {total_steps}")
        if not 0 < rate < 1:
            raise ValueError(f"rate: expected a number between 0 and 1, got {rate}")
        boundaries = [(2**level, int(total_steps * rate**level)) for level in reversed(range(levels))]
        ends = [until for _, until in boundaries]
        if any(end <= start for start, end in zip([0, *ends], ends, strict=False)):
            raise ValueError(
                f"total_steps: expected enough for a step in each of {levels} stages at rate {rate}, "
                f"got {total_steps}, which ends them at {ends}"
            )
        return cls(boundaries)

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run."""
        return self.boundaries[-1][1]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, in order."""
        starts = (0, *(until for _, until in self.boundaries))
        return tuple(Stage(i, patch, starts[i], until) for i, (patch, until) in enumerate(self.boundaries))

    def at(self, step: int) -> Stage:
        """Return the stage that trains ``step``, counted from 0.

        >>> from npp_kernels import PatchSchedule
        >>> PatchSchedule([(2, 30), (1, 100)]).at(30)
        Stage(index=1, patch=1, start=30, end=100)

        Raises:
            TypeError: ``step`` is not an integer.
            IndexError: ``step`` is negative, or not below ``total_steps``.
        """
        step = _integer("step", step)
        if 0 <= step < self.total_steps:
            for stage in self.stages:
                if step < stage.end:
                    return stage
        raise IndexError(f"step: expected 0 to {self.total_steps - 1}, got {step}")

    def lr_factor(self, step: int, warmup_steps: int, decay_ratio: float, end_factor: float) -> float:
        """Return the factor of the peak learning rate at ``step``; each stage warms up, stays there, and decays.

        >>> from npp_kernels import PatchSchedule
        >>> schedule = PatchSchedule([(2, 100), (1, 200)])
        >>> [round(schedule.lr_factor(step, 10, 0.2, 0.1), 3) for step in (0, 5, 10, 79, 90, 99, 100, 150)]
        [0.0, 0.5, 1.0, 1.0, 0.55, 0.145, 0.0, 1.0]

        With ``t`` steps done in a stage of ``n``, the factor is the smaller of ``t / warmup_steps`` and
        ``end_factor + (1 − end_factor) · min(1, (n − t) / (decay_ratio · n))``; where warm-up and decay would overlap
        in a short stage, they meet below 1.

        Args:
            step: the step, counted from 0.
            warmup_steps: steps of each stage over which the factor rises linearly from 0; 0 for none.
            decay_ratio: the last part of each stage over which it falls linearly, 0 to 1; 0 for none.
            end_factor: what it falls to at the end of the stage, 0 to 1.

        Raises:
            IndexError: ``step`` is outside the run.
            ValueError: an argument is out of its range.

        Source:
            NPP (arXiv 2412.15321), official training script, ``create_scheduler``.
        """
        stage = self.at(step)
        if _integer("warmup_steps", warmup_steps) < 0:
            raise ValueError(f"warmup_steps: expected at least 0, got {warmup_steps}")
        if not 0 <= decay_ratio <= 1:
            raise ValueError(f"decay_ratio: expected 0 to 1, got {decay_ratio}")
        if not 0 <= end_factor <= 1:
            raise ValueError(f"end_factor: expected 0 to 1, got {end_factor}")
        done = step - stage.start
        warmup = min(1.0, done / warmup_steps) if warmup_steps else 1.0
        decay_steps = decay_ratio * (stage.end - stage.start)
        remaining = min(1.0, (stage.end - step) / decay_steps) if decay_steps else 1.0
        return min(warmup, end_factor + (1 - end_factor) * remaining)

    def relative_cost(
        self,
        grid: Sequence[int],
        *,
        hidden_size: int | None = None,
        num_layers: int | None = None,
        vocab_size: int | None = None,
    ) -> float:
        """Return the cost of the run relative to plain next-token training at the same number of steps.

        >>> from npp_kernels import PatchSchedule
        >>> schedule = PatchSchedule.coarse_to_fine(levels=2, total_steps=1000)
        >>> schedule.relative_cost((16, 16))
        0.625
        >>> round(schedule.relative_cost((16, 16), hidden_size=768, num_layers=12, vocab_size=16384), 3)
        0.623

        A step of ``P`` groups costs ``P`` by tokens alone. With the model's dimensions, it costs the operations of a
        Llama-style transformer, forward and backward:
        ``6·P·(12·L·D² + D·V)`` in the linear layers and ``6·L·D·P·(P + 1)`` in causal attention.

        Args:
            grid: the size of the grid in tokens, ``(H, W)``, ``(T, H, W)`` or ``(L,)``.
            hidden_size: D, the width of the transformer.
            num_layers: L, its number of layers.
            vocab_size: V, the rows of its output layer.

        Raises:
            ValueError: a patch of the schedule does not fit the grid, or some of the model's dimensions are missing or
                smaller than 1.

        Numerics:
            A count of operations, not of time: a kernel that expands the loss, or a step that waits for launches,
            costs more in a coarse stage than it says.
        """
        dimensions = {"hidden_size": hidden_size, "num_layers": num_layers, "vocab_size": vocab_size}
        given = {name: _integer(name, value) for name, value in dimensions.items() if value is not None}
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if given and len(given) < len(dimensions):
            missing = sorted(dimensions.keys() - given.keys())
            raise ValueError(f"{missing[0]}: expected together with {', '.join(given)}, got None")

        def step_cost(positions: int) -> int:
            if not given:
                return positions
            width, layers, vocab = given["hidden_size"], given["num_layers"], given["vocab_size"]
            linear = 6 * positions * (12 * layers * width**2 + width * vocab)
            return linear + 6 * layers * width * positions * (positions + 1)

        grid = tuple(grid)
        cost = 0
        for stage in self.stages:
            sizes = resolve_patch(stage.patch, grid)
            resolve_grid("grid", grid, sizes, grid)
            cost += (stage.end - stage.start) * step_cost(math.prod(grid) // math.prod(sizes))
        return cost / (self.total_steps * step_cost(math.prod(grid)))


def _integer(name: str, value: object) -> int:
    """Return ``value`` as an int, or raise a TypeError that names the argument."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    return operator.index(value)
