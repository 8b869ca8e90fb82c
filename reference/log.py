"""The log of a training run: one line for every report, in ``log.csv`` and in TensorBoard events."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

COLUMNS = (
    "step", "epoch", "stage", "patch", "lr", "loss", "gradient_norm", "images_per_second", "train_seconds",
    "setup_seconds", "test_nll", "test_nll_error",
)  # fmt: skip


class Log:
    """The log of a run as ``log.csv``, and as TensorBoard events where they are asked for."""

    def __init__(self, folder: Path, first_step: int, tensorboard: bool) -> None:
        self._events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "tensorboard: expected the package, found none: pip install tensorboard"
                ) from error
            self._events = SummaryWriter(str(folder), purge_step=first_step + 1)
        path = folder / "log.csv"
        # Lines after the checkpoint that the run goes on from will be computed, and written, again.
        kept = []
        if path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= first_step]
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self._writer.writerows(kept)
        self._file.flush()

    def write(self, row: dict[str, Any]) -> None:
        """Write one line."""
        self._writer.writerow(row)
        self._file.flush()
        if self._events is not None:
            for name in COLUMNS[1:]:
                if row[name] is not None:
                    self._events.add_scalar(name, row[name], row["step"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()
