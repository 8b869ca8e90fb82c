"""Every workload, contender and direction as one benchmark; the contenders of a workload are measured in turn.

pytest bench/ --benchmark-only                     # the default selection
pytest bench/ --benchmark-only --matrix=full       # every model, grid and kind of tokens
pytest bench/ --benchmark-only -k "group_mean and patch2"
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from bench.cases.contenders import BY_NAME, CONTENDERS, Contender
from bench.cases.shapes import Workload, selection
from bench.reporting.records import Record, Refusal
from bench.timing.session import Session, resolve_device

# Compilers and other packages warn as they please: their warnings are shown, but no reason not to time them.
pytestmark = pytest.mark.filterwarnings("default")


class ReplayClock:
    """A clock for pytest-benchmark that goes forward by what was measured, and by nothing else."""

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        """Return the time."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


CLOCK = ReplayClock()


def measured_time() -> float:
    """Return the time of the replay clock: the timer that pytest-benchmark is given."""
    return CLOCK.read()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each workload, direction and contender; a workload's tests stand together."""
    device_type = resolve_device(metafunc.config.getoption("--device")).type
    workloads = selection(metafunc.config.getoption("--matrix"), device_type)
    cases = [
        pytest.param(workload, direction, contender.name, id=f"{workload.name}-{direction}-{contender.name}")
        for workload in workloads
        for direction in workload.directions
        for contender in CONTENDERS
        if contender.takes_part(workload, direction, device_type)
    ]
    metafunc.parametrize(("workload", "direction", "contender"), cases)


def entries_of(workload: Workload, items: list[pytest.Item]) -> list[tuple[Contender, str]]:
    """Return the contenders and directions of a workload that this session has selected."""
    chosen: list[dict[str, Any]] = [item.callspec.params for item in items if isinstance(item, pytest.Function)]
    return [
        (BY_NAME[workload.operation, params["contender"]], params["direction"])
        for params in chosen
        if params["workload"] == workload
    ]


@pytest.fixture
def measured(
    request: pytest.FixtureRequest, session: Session, workload: Workload, direction: str, contender: str
) -> tuple[Record, list[float]]:
    """What was measured; a contender that was refused ends its test here: an error if it is ours, else an xfail."""
    outcome = session.outcomes(workload, entries_of(workload, request.session.items))[contender, direction]
    if isinstance(outcome, Refusal):
        if contender.startswith("ours"):
            pytest.fail(outcome.reason, pytrace=False)
        pytest.xfail(outcome.reason)
    return outcome


# `measured` is set up first, since it stands first: pytest-benchmark objects to a fixture of its own that goes unused.
@pytest.mark.benchmark(timer=measured_time)
def test_operation(
    measured: tuple[Record, list[float]], benchmark: Any, workload: Workload, direction: str, contender: str
) -> None:
    record, times = measured
    benchmark.group = f"{workload.name} {direction}"
    benchmark.extra_info["record"] = asdict(record)
    replayed = iter(times)
    benchmark.pedantic(lambda: CLOCK.advance(next(replayed)), rounds=len(times))
    # What the report shows must be what pytest-benchmark's own statistics say.
    assert benchmark.stats.stats.median == pytest.approx(record.median)
