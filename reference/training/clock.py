"""The seconds that a run has trained: without evaluations, and with set-up steps counted as long as later ones.

`reference.train` logs them, and comparisons at equal seconds end a run by them.
"""

from __future__ import annotations

import time

import torch

from reference.training.step import SETUP_STEPS


class Clock:
    """The seconds that a run trains; evaluations and checkpoints, between `stop` and `start`, are left out.

    On a GPU the first steps of a stage compile and capture. They count as long as the steps after them take, so that no
    stage seems shorter than it is; what they took is kept apart.
    """

    def __init__(self, device: torch.device, seconds: float, setup_seconds: float) -> None:
        self._device = device
        self._setup_steps = SETUP_STEPS if device.type == "cuda" else 0
        self.seconds = seconds
        self.setup_seconds = setup_seconds  # of the steps that compiled and captured
        self._steps_at_patch = 0
        self._uncounted = 0  # steps whose time is not in `seconds` yet
        self.start()

    def start(self) -> None:
        """Go on after a pause."""
        self._timed_steps, self._started = 0, time.perf_counter()

    def count(self, *, new_stage: bool) -> None:
        """Count a step that was just launched."""
        self._steps_at_patch = 1 if new_stage else self._steps_at_patch + 1
        self._timed_steps += 1
        self._uncounted += 1
        if self._steps_at_patch == self._setup_steps:
            torch.cuda.synchronize(self._device)
            self.setup_seconds += time.perf_counter() - self._started
            self.start()

    def stop(self) -> float:
        """Take the time of the steps since `start`, all of them finished; return how many there were in a second."""
        elapsed = time.perf_counter() - self._started
        if self._steps_at_patch < self._setup_steps:
            self.setup_seconds += elapsed
        elif self._timed_steps:
            self.seconds += elapsed / self._timed_steps * self._uncounted
            self._uncounted = 0
        return self._timed_steps / elapsed
