"""Whether all processes of a run are alive, which no collective says where a CUDA graph holds it.

A process that is killed leaves the others waiting for it: on the GPU, inside of a graph, where neither NCCL's own
watchdog nor its timeouts look, while their hosts wait for the GPU. A thread of each process therefore counts on in the
store that the processes have met in, and watches the next one's count. That takes two requests every few seconds,
however many processes there are. Who sees that another has stopped counting tells all, and each ends itself: what its
GPU waits for never comes, so that nothing else can end it.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

BEAT_SECONDS = 2.0
CONNECT_SECONDS = 60

_runs = itertools.count()  # of this process, which every process counts alike


class Heartbeat:
    """Watches the other processes of the default group while this context is open; nothing where there are none.

    A process that leaves the context because of an error says so, and the others stop at once.

    Args:
        lost_after: seconds without a sign of life after which a process counts as lost; 0 for never.
    """

    def __init__(self, lost_after: float) -> None:
        self.lost_after = lost_after
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.is_on = self.processes > 1 and lost_after > 0
        if not self.is_on:
            return
        self.rank = dist.get_rank()
        self._watched = (self.rank + 1) % self.processes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        # A connection of its own: one that waits in the other threads' would hold this one up.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=CONNECT_SECONDS))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives what it restarts
        self._store = dist.PrefixStore(f"heartbeat/{attempt}/{next(_runs)}", store)

    def __enter__(self) -> Heartbeat:
        if self.is_on:
            self._store.set(f"alive/{self.rank}", "0")
            self._store.get(f"alive/{self._watched}")  # waits until it is there
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.is_on:
            return
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            # Perhaps another process is gone, which collectives tell in words of their own. The thread finds out which,
            # and ends the process.
            print(
                f"process {self.rank} waits to hear whether another is lost, because of: {error}",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(self.lost_after + 3 * BEAT_SECONDS)
        is_regular = error is None or isinstance(error, SystemExit)
        if is_regular:
            dist.barrier()  # the process that keeps the store must not go before the others
        self._ended.set()
        self._thread.join()
        if not is_regular:
            self._tell(f"process {self.rank} stopped: {type(error).__name__}: {error}")
            time.sleep(2 * BEAT_SECONDS)  # until all have read it: this process may be the one that keeps the store

    def _watch(self) -> None:
        """Count on, and watch the next process's count, until the context is left."""
        count, now, seen, since = 0, b"", b"", time.monotonic()
        while not self._ended.wait(BEAT_SECONDS):
            count += 1
            try:
                self._store.set(f"alive/{self.rank}", str(count))
                now = self._store.get(f"alive/{self._watched}")
                verdict = self._store.get("verdict").decode() if self._store.check(["verdict"]) else ""
            except RuntimeError as error:
                if self._ended.wait(BEAT_SECONDS):
                    return
                verdict = f"the process that keeps the store, at {os.environ['MASTER_ADDR']}, is gone: {error}"
            if now != seen:
                seen, since = now, time.monotonic()
            if not verdict and time.monotonic() - since > self.lost_after:
                verdict = f"process {self._watched} has given no sign of life for {self.lost_after:g} s"
                self._tell(verdict)
            if verdict:
                print(
                    f"stopped: {verdict}; the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # not sys.exit: the main thread may wait for its GPU, which waits for the lost process's

    def _tell(self, verdict: str) -> None:
        """Tell all processes why the run ends, unless the store is gone, which tells them too."""
        with suppress(RuntimeError):
            self._store.set("verdict", verdict)
