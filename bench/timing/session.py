"""One benchmark session: its device, the machine's description, and the workloads measured as tests ask for them.

`bench.conftest` makes the session, and `bench.test_operations` asks it for each contender's result.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.cases.contenders import PACKAGES, Contender, absent_packages
from bench.cases.shapes import Workload
from bench.reporting.records import Journal, Refusal
from bench.timing.clocks import make_clock
from bench.timing.limits import Limits, measure_limits
from bench.timing.measure import Measurement, Outcome

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def resolve_device(asked: str) -> torch.device:
    """Return the device of ``--device``: "auto", "cuda" or "cpu"."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked, torch.cuda.current_device()) if asked == "cuda" else torch.device(asked)


def versions() -> dict[str, str]:
    """Return the versions of what takes part, by package; "absent" where one is not installed."""
    # A wheel may write its name with underscores.
    installed = {
        distribution.name.replace("_", "-"): distribution.version for distribution in importlib.metadata.distributions()
    }
    return {name: installed.get(name, "absent") for name in ("torch", "triton", *PACKAGES.values())}


def cpu_name() -> str:
    """Return what the CPU calls itself, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver_version() -> str:
    """Return the version of NVIDIA's driver, where its tool is there to ask."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    asked = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return asked.stdout.partition("\n")[0].strip() or "unknown"


def describe_machine(device: torch.device, limits: Limits) -> dict[str, Any]:
    """Return what results depend on: the device, its measured limits, and the versions."""
    described: dict[str, Any] = {
        "device": cpu_name(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
        "limits": asdict(limits),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "driver": _driver_version(),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
        }
    return described


class Session:
    """What the tests of a session share: the clock, the limits, the journal, and the workload measured last."""

    def __init__(self, device: torch.device, journal: Path, commit: dict[str, Any]) -> None:
        self.dtype = DTYPES[device.type]
        self.clock = make_clock(device)
        self.limits = measure_limits(self.clock, self.dtype)
        self.machine = describe_machine(device, self.limits)
        self.refusals: list[Refusal] = []
        now = datetime.now(timezone.utc).isoformat()
        header = {"machine": self.machine, "commit": commit, "date": now, "absent": absent_packages()}
        self._journal = Journal(journal, header)
        self._measured: Workload | None = None
        self._outcomes: dict[tuple[str, str], Outcome] = {}

    def outcomes(self, workload: Workload, entries: Sequence[tuple[Contender, str]]) -> dict[tuple[str, str], Outcome]:
        """Return what came of a workload's entries, measured when they are first asked for."""
        if self._measured != workload:
            self._measured = workload
            self._outcomes = Measurement(workload, self.clock, self.limits, self.dtype).run(entries)
            for outcome in self._outcomes.values():
                entry = outcome if isinstance(outcome, Refusal) else outcome[0]
                if isinstance(entry, Refusal):
                    self.refusals.append(entry)
                self._journal.add(entry)
            if self.clock.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._outcomes
