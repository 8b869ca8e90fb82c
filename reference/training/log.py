"""The log of a training run: one line for every report, in ``log.csv`` and in TensorBoard events.

`reference.train` writes it, and goes on with it after a stop.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from pathlib import Path
from typing import Any

from reference.training.checkpoint import written_whole

COLUMNS = (
    "step", "epoch", "stage", "patch", "lr", "loss", "gradient_norm", "images_per_second", "train_seconds",
    "setup_seconds", "test_nll", "test_nll_error", "test_weights",
)  # fmt: skip
_COLUMNS_BEFORE = COLUMNS[:-1]  # logs of before `test_weights`


class Log:
    """The log of a run as ``log.csv``, and as TensorBoard events where they are asked for.

    Args:
        folder: of the run.
        first_step: steps that the checkpoint has, from which the run goes on; later lines will be written again.
        tensorboard: write events too.

    Raises:
        ValueError: there is a ``log.csv`` that is no log of this trainer's.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool) -> None:
        path = folder / "log.csv"
        kept = [row for row in read_log(path) if int(row["step"]) <= first_step]
        self._events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "tensorboard: expected the package, found none: pip install tensorboard"
                ) from error
            self._events = SummaryWriter(str(folder), purge_step=first_step + 1)
        with written_whole(path) as file:  # killed here, a run still has the lines that it had
            file.write(_lines([dict(zip(COLUMNS, COLUMNS, strict=True)), *kept]))
        self._file = path.open("ab")

    def write(self, row: dict[str, Any]) -> None:
        """Write one line."""
        self._file.write(_lines([row]))
        self._file.flush()
        if self._events is not None:
            for name in COLUMNS[1:]:
                if isinstance(row[name], int | float):
                    self._events.add_scalar(name, row[name], row["step"])

    def sync(self) -> None:
        """Force the lines to disk: a checkpoint that follows never knows of steps that the log has lost."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_log(path: Path) -> list[dict[str, str]]:
    """Read a log, up to the last whole line; nothing where there is none.

    A power cut may leave a last line without its end, or a file system's zeros in its place.

    Raises:
        ValueError: it is another file, or a line before the last is broken.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    header = ",".join(COLUMNS).encode()
    lines = [line.split(",") for line in whole.decode(errors="replace").splitlines()]
    if not lines and header.startswith(content.rstrip(b"\0\r")):
        return []  # cut within its first line
    if not lines or tuple(lines[0]) not in (COLUMNS, _COLUMNS_BEFORE):
        raise ValueError(
            f"{path}: expected a log of this trainer's, with the columns {', '.join(COLUMNS)}, got another file; "
            "choose another --output, or move the file away"
        )
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(lines[0]) or not (line[0].isascii() and line[0].isdigit()):
            raise ValueError(
                f"{path}, line {number}: expected {len(lines[0])} columns and a step, got {','.join(line)!r}"
            )
    if len(whole) < len(content):
        print(f"{path}: its last line was cut short, and is left out", file=sys.stderr)
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, COLUMNS, restval="").writerows(rows)
    return text.getvalue().encode()
