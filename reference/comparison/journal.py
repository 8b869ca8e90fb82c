"""A journal of measurements: one JSON line for each, forced to disk, so that a killed run knows what it has.

`reference.claim`, `reference.language` and the scores of samples write one, and go on from it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Journal:
    """The lines of a file, to which more are added.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
    >>> Journal(path).add({"way": "plain", "seed": 0, "nll": 3.0})
    >>> Journal(path).find(way="plain", seed=0)["nll"]
    3.0
    >>> Journal(path).find(way="plain", seed=1) is None
    True

    A last line that a power cut, or a kill, has cut short is left out, and written over.

    Args:
        path: the file; it need not exist.

    Raises:
        ValueError: a line before the last is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self._whole = content.rfind(b"\n") + 1
        self.entries: list[dict[str, Any]] = []
        for number, line in enumerate(content[: self._whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}")
            self.entries.append(entry)

    def add(self, entry: dict[str, Any]) -> None:
        """Add a line."""
        line = (json.dumps(entry) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._whole)
            file.seek(self._whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(line)
        self.entries.append(entry)

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """Return the last entry that has these values, or None."""
        matching = (entry for entry in reversed(self.entries) if all(entry.get(k) == v for k, v in wanted.items()))
        return next(matching, None)


class Budget:
    """Seconds that a command may take, counted from when this is made.

    >>> Budget(None).allows(1e9), Budget(10).allows(20)
    (True, False)
    """

    def __init__(self, seconds: float | None) -> None:
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left; below 0 where it is spent."""
        return self.deadline - time.monotonic()

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long would be over in time."""
        return seconds <= self.left
