"""The processes of a training run: who takes part, that no other run uses its folder, and how a scheduler stops it.

`reference.train` and every command that runs for long begin with it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

# The status of a run that was asked to stop, and saved: sysexits' EX_TEMPFAIL, "try again later".
STOPPED = 75
# A killed run's reading processes keep its lock until they notice, which PyTorch lets them do every five seconds.
LOCK_SECONDS = 15

# What file systems without locks answer: some that many machines share are set up that way.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP}


class Stopped(SystemExit):
    """The run was asked to stop, and has saved; where nobody catches it, the process ends with `STOPPED`."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the other processes where torchrun started this one; yield the device of this process."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32, as in the official code
    if "RANK" not in os.environ:
        yield device
        return
    # Long, since the others wait while the first process evaluates. A lost process is found by the heartbeat.
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timedelta(hours=2), device_id=device if on_gpu else None
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; of several processes the first does.

    The operating system gives the lock back when the process ends, however it does.

    Raises:
        BlockingIOError: another run is in the folder.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        text = "output: expected a folder that no other run uses, got one in which a run is going on"
        raise BlockingIOError(errno.EAGAIN, text, str(folder)) from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        print(f"{folder}: its file system has no locks; nothing keeps a second run out", file=sys.stderr)
        yield
        return
    try:
        yield
    finally:
        lock.release()


class Termination:
    """Whether a scheduler has asked the run to stop, with SIGTERM, while this context is open."""

    def __init__(self) -> None:
        self.is_asked = False
        self._before: Any = None

    def __enter__(self) -> Termination:
        # Python lets no other thread handle signals; a run in one ends as any process does.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def is_asked_anywhere(self, device: torch.device) -> bool:
        """Return whether any process was asked, which all of them call at the same step."""
        asked = torch.tensor(float(self.is_asked), device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True


def leave_stopping_to_the_run(worker: int) -> None:
    """Set up a reading process: a scheduler signals all processes, and the run reads on until it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
