"""Timing: one clock for each kind of device, and the candidates of a workload run in turn on it.

On a GPU a run is timed by CUDA events. Before each, a buffer of many times the L2's size is read: nothing that the run
reads is in the cache, and while the GPU is busy with that, the host queues the run, so that what is timed is the GPU's
work and not the launching. The buffer is read and not overwritten, because a write leaves the cache full of lines that
the run then has to write back: on an H100 a copy of 34 MB took 27.5 µs after a write, and 21.6 after a read. On the CPU
a run is timed by the host's clock, with the caches as they are.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

WARM_UP_RUNS = 3
# A forward and backward in eager mode takes a slow host up to 2 ms to queue. Flushing 16 times an H100's L2 of 50 MB
# keeps the GPU busy for a quarter of a millisecond, so it is done several times.
FLUSH_L2_MULTIPLE = 16
FLUSHES = 10

# Back-to-back timing of small workloads: rounds, and calls in each: at most so many that a GPU lets all their launches
# queue up, and fewer where they are slow.
HOST_ROUNDS = 15
MAX_HOST_CALLS = 50
HOST_ROUND_SECONDS = 0.02


def _nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Candidate:
    """Something to time, and what has to be put right before each run, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], None] = _nothing


class CudaClock:
    """Times runs on a GPU with events, after flushing its L2."""

    budget_seconds = 0.5
    min_rounds, max_rounds = 7, 50

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = FLUSH_L2_MULTIPLE * torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.zeros(max(size, 2**28) // 4, dtype=torch.int32, device=device)

    def synchronize(self) -> None:
        """Wait until the GPU has nothing to do."""
        torch.cuda.synchronize(self.device)

    def time(self, candidate: Candidate) -> float:
        """Return the seconds of one run."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        candidate.prepare()
        for _ in range(FLUSHES):
            self._flushed.max()
        start.record()
        candidate.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class CpuClock:
    """Times runs on the CPU with the host's clock."""

    budget_seconds = 0.5
    min_rounds, max_rounds = 3, 11

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Do nothing: the CPU's work is done when a call returns."""

    def time(self, candidate: Candidate) -> float:
        """Return the seconds of one run."""
        candidate.prepare()
        start = time.perf_counter()
        candidate.run()
        return time.perf_counter() - start


Clock = CudaClock | CpuClock


def make_clock(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock(device)


def turns(counts: Sequence[int]) -> Iterator[int]:
    """Yield candidates by index, one run each in turn, until each has had its number of runs.

    Each turn has an order of its own: on a CPU a run is slower after one that used much memory, and faster after one
    that left memory of the size it needs.

    >>> list(turns([3, 1, 2]))
    [0, 2, 1, 2, 0, 0]
    """
    order = random.Random(0)
    for turn in range(max(counts, default=0)):
        remaining = [index for index, count in enumerate(counts) if turn < count]
        order.shuffle(remaining)
        yield from remaining


def run_in_turn(clock: Clock, candidates: Sequence[Candidate]) -> list[list[float]]:
    """Time candidates in turn, so that a machine that drifts drifts for all; return the seconds of each one's runs.

    Each has as many runs as its share of the clock's budget allows, within the clock's bounds.
    """
    counts = []
    for candidate in candidates:
        estimate = statistics.median(clock.time(candidate) for _ in range(WARM_UP_RUNS))
        counts.append(min(max(int(clock.budget_seconds / max(estimate, 1e-9)), clock.min_rounds), clock.max_rounds))
    samples: list[list[float]] = [[] for _ in candidates]
    gc.collect()
    gc.disable()
    try:
        for index in turns(counts):
            samples[index].append(clock.time(candidates[index]))
    finally:
        gc.enable()
    return samples


def run_back_to_back(clock: Clock, candidates: Sequence[Candidate]) -> tuple[list[list[float]], list[float]]:
    """Time small candidates as a loop in eager mode would run them: by the host, without flushing or waiting.

    Returns:
        The wall-clock seconds of a call, averaged over the calls of a round, for each round of each candidate; and each
        candidate's median seconds until the host had queued a call, which is what Python and launching cost.
    """
    wall: list[list[float]] = [[] for _ in candidates]
    host: list[list[float]] = [[] for _ in candidates]
    calls = []
    for candidate in candidates:
        estimate = statistics.median(clock.time(candidate) for _ in range(WARM_UP_RUNS))
        calls.append(min(max(int(HOST_ROUND_SECONDS / max(estimate, 1e-9)), 1), MAX_HOST_CALLS))
    gc.collect()
    gc.disable()
    try:
        for index in turns([HOST_ROUNDS] * len(candidates)):
            clock.synchronize()
            start = time.perf_counter()
            for _ in range(calls[index]):
                candidates[index].run()
            queued = time.perf_counter()
            clock.synchronize()
            wall[index].append((time.perf_counter() - start) / calls[index])
            host[index].append((queued - start) / calls[index])
    finally:
        gc.enable()
    return wall, [statistics.median(times) for times in host]
