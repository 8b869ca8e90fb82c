"""The CUDA side of `StepGraph`: the stream, the memory pool, and what has to be put right when a capture fails."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_SYNC_WARNING = "called a synchronizing"
_HARMLESS_WARNINGS = (
    "Synchronization debug mode is a prototype",
    "This instance was constructed with capturable=True",  # we run the warm-up steps without a graph on purpose
)
_steps_running = 0
_failed_graphs: list[torch.cuda.CUDAGraph] = []  # kept alive: the host allocator still points to them


def runs_step() -> bool:
    """Return whether a step is running that is, or will be, captured: nothing in it may wait for the GPU."""
    return _steps_running > 0


@contextmanager
def _step_running() -> Iterator[None]:
    global _steps_running
    _steps_running += 1
    try:
        yield
    finally:
        _steps_running -= 1


class Recorder:
    """Runs functions on a stream of its own, and captures them there.

    Args:
        device: a CUDA device.
        generators: those that the functions draw from, beside the device's default one.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.device = with_index(device)
        self.stream = torch.cuda.Stream(self.device)
        self.generators = generators
        self._pool: Any = None

    def renew_pool(self) -> None:
        """Take another pool for the next graph: the old one is freed once nothing in it is alive."""
        self._pool = None

    def run(self, function: Callable[[], Any], *, watched: bool) -> tuple[Any, list[str]]:
        """Run a function; return its results, and the places where it waited for the GPU, if watched."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with _step_running(), _collected_warnings(watched) as waits, torch.cuda.stream(self.stream):
            outputs = function()
        current.wait_stream(self.stream)
        return tree_map(cloned, outputs), waits

    def record(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Capture a function, without computing it; return the graph and its static results.

        What the function raised first is raised, and the process is left as it was before.
        """
        errors: list[BaseException] = []

        def remembering() -> Any:
            try:
                return function()
            except BaseException as error:
                errors.append(error)  # kept, since ending the capture will fail too and hide it
                raise

        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            default = torch.cuda.default_generators[self.device.index]
            generators = [default, *self.generators]
            states = [generator.get_state() for generator in generators]
            graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                graph.register_generator_state(generator)
            try:
                # On the stream of the warm-up: code compiled there keeps autograd nodes, and a node stays on the stream
                # on which it was made. Thread-local mode: the pinning thread of a data loader may call CUDA at any
                # time, which must not end this capture.
                with (
                    _step_running(),
                    _no_collection(),
                    torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"),
                ):
                    outputs = remembering()
            except BaseException as error:
                torch.cuda.set_stream(current)  # torch.cuda.graph does not restore it when ending the capture fails
                self._recover(graph, generators, states)
                raise (errors or [error])[0] from None
        return graph, outputs

    def _recover(
        self, graph: torch.cuda.CUDAGraph, generators: Sequence[torch.Generator], states: Sequence[Tensor]
    ) -> None:
        """Undo what a capture that failed leaves behind, in the allocator and in the generators."""
        graph.reset()
        _failed_graphs.append(graph)
        for generator, state in zip(generators, states, strict=True):
            # After a failed capture a generator may still be marked as captured: a new state object clears that.
            fresh = torch.Generator(generator.device)
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
        with suppress(RuntimeError):  # raised where ending the capture has done this already
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            torch._C._cuda_releasePool(self.device.index, self._pool)
        self._pool = None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now, and none inside: a graph or an event that is freed during a capture ends it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _collected_warnings(watched: bool) -> Iterator[list[str]]:
    """Leave out the warnings that a warm-up is expected to give; where watched, list its waits for the GPU."""
    waits: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if watched:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            if watched:
                torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        text = str(warning.message)
        if watched and _SYNC_WARNING in text:
            waits.append(f"one at {warning.filename}:{warning.lineno}")
        elif not text.startswith(_HARMLESS_WARNINGS):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def cloned(output: Any) -> Any:
    """Copy a result that a later step will overwrite."""
    return None if output is None else output.clone()


def with_index(device: torch.device) -> torch.device:
    """Return a CUDA device with its number."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
