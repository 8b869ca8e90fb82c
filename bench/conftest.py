"""How pytest runs the benchmarks: options, the shared session, the progress bar, and what is added to the JSON."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from bench.cases.contenders import absent_packages
from bench.reporting.records import measured_already
from bench.timing.session import Session, resolve_device

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmarks."""
    group = parser.getgroup("npp_kernels benchmarks")
    group.addoption("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to run; default: auto")
    group.addoption("--matrix", choices=("default", "full"), default="default", help="which workloads to measure")
    group.addoption(
        "--journal",
        type=Path,
        default=Path("runs") / f"bench-{datetime.now():%Y%m%d-%H%M%S}.jsonl",
        metavar="FILE.jsonl",
        help="every result is written here as soon as it is made; a file of a run that was cut off is gone on with; "
        "default: runs/bench-DATE.jsonl",
    )
    group.addoption("--progress", action="store_true", help="show a progress bar instead of pytest's marks")


def pytest_configure(config: pytest.Config) -> None:
    """Check the device before anything is collected, and set up the progress bar."""
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device=cuda: expected a CUDA device, found none")
    if config.getoption("--progress"):
        config.pluginmanager.register(ProgressBar(), "npp-kernels-progress")


@pytest.hookimpl(trylast=True)  # after pytest's own -k and --deselect
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the workloads of which the journal has everything; the contenders of one are measured together."""
    cases: dict[pytest.Item, dict[str, Any]] = {
        item: item.callspec.params
        for item in items
        if isinstance(item, pytest.Function) and "workload" in item.fixturenames
    }
    found = measured_already(config.getoption("--journal"))
    unfinished = {
        case["workload"]
        for case in cases.values()
        if (case["workload"].name, case["direction"], case["contender"]) not in found
    }
    done = {item for item, case in cases.items() if case["workload"] not in unfinished}
    if done:
        config.hook.pytest_deselected(items=list(done))
        items[:] = [item for item in items if item not in done]


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    """The session that all benchmarks share; its first use measures the machine's limits."""
    commit = pytestconfig.hook.pytest_benchmark_generate_commit_info(config=pytestconfig)
    device = resolve_device(pytestconfig.getoption("--device"))
    made = Session(device, pytestconfig.getoption("--journal"), commit)
    pytestconfig.stash[SESSION] = made
    return made


class ProgressBar:
    """A bar over all benchmarks, in place of pytest's dots; it names what is being measured."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Start the bar when the number of benchmarks is known."""
        self._bar = tqdm(total=len(session.items), unit="benchmark", file=sys.stderr, dynamic_ncols=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Name the benchmark that starts."""
        if self._bar is not None:
            self._bar.set_postfix_str(nodeid.partition("[")[2].rstrip("]").replace("-", " "))

    def pytest_runtest_logfinish(self) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update()

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Leave out pytest's own mark of a test; its summary at the end keeps its words."""
        if report.when != "call" and report.passed:
            return "", "", ""
        category = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        return category, "", category.upper()

    def pytest_sessionfinish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say where the results are, and what to do with them."""
    if SESSION in config.stash:
        path = config.getoption("--journal")
        terminalreporter.write_line(f"results: {path}; their report: python -m bench report {path} --out FOLDER")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Say what the results depend on, and leave out the host's name."""
    machine_info.pop("node", None)
    if SESSION in config.stash:
        machine_info.update(config.stash[SESSION].machine)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Add who was absent and who was refused; a workload goes by its name, since its record says the rest."""
    for entry in output_json["benchmarks"]:
        entry["params"] = {key: getattr(value, "name", value) for key, value in entry["params"].items()}
    session = config.stash.get(SESSION, None)
    output_json["absent"] = absent_packages()
    output_json["refusals"] = [vars(refusal) for refusal in session.refusals] if session else []
