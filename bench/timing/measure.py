"""The measurement of one workload: its inputs made, its contenders checked, those that passed timed in turn.

`bench.timing.session` asks for it once for each workload.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases.contenders import Contender, Function
from bench.cases.inputs import Inputs, make_inputs
from bench.cases.oracle import check_result, expected
from bench.cases.shapes import Workload
from bench.reporting.records import WORKLOAD_FIELDS, Record, Refusal
from bench.timing.clocks import Candidate, Clock, run_back_to_back, run_in_turn
from bench.timing.limits import Limits, demands, products

Entry = tuple[Contender, str]  # a contender and a direction
Result = tuple[Tensor, Sequence[Tensor]]  # an output and the gradients, if any
Outcome = tuple[Record, list[float]] | Refusal  # a record with the seconds of each run


def bound(function: Function, contender: Contender, inputs: Inputs, direction: str) -> Callable[[], Result]:
    """Return a call of a contender's function that needs no arguments."""
    ids = (getattr(inputs, contender.ids),) if contender.ids else ()
    if direction == "forward":
        detached = [leaf.detach() for leaf in inputs.leaves]

        def forward() -> Result:
            with torch.no_grad():
                return function(*detached, *ids), ()

        return forward
    if contender.returns_gradients:
        return lambda: function(*inputs.leaves, *ids)

    def forward_backward() -> Result:
        output = function(*inputs.leaves, *ids)
        return output, torch.autograd.grad(output, inputs.leaves, inputs.upstream)

    return forward_backward


def gradient_bytes(result: Result, inputs: Inputs) -> int:
    """Return the bytes of the gradients that are memory of their own, and not the inputs' or the upstream's."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (*inputs.leaves, inputs.upstream) if tensor is not None}
    _, gradients = result
    return sum(g.numel() * g.element_size() for g in gradients if g.untyped_storage().data_ptr() not in given)


def peak_bytes(candidate: Candidate, device: torch.device) -> int | None:
    """Return the most memory that a run holds beyond what is allocated already; None without a GPU."""
    if device.type != "cuda":
        return None
    candidate.prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    candidate.run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class _Admitted:
    """A contender that passed, how to time it, and what was learnt without a clock."""

    contender: Contender
    direction: str
    candidate: Candidate
    mean_error: float
    gradient_bytes: int
    peak_bytes: int | None


class Measurement:
    """One workload being measured: `run` checks every entry and times those that passed."""

    def __init__(self, workload: Workload, clock: Clock, limits: Limits, dtype: torch.dtype) -> None:
        self.workload = workload
        self.clock = clock
        self.limits = limits
        self.dtype = dtype
        self.inputs = make_inputs(workload, clock.device, dtype)
        self.oracle = expected(workload, self.inputs)
        self._functions: dict[str, Function] = {}

    def run(self, entries: Sequence[Entry]) -> dict[tuple[str, str], Outcome]:
        """Check and time the entries; return what came of each, by contender and direction."""
        if any(contender.overwrites for contender, _ in entries):
            self.inputs.keep()
        if any(contender.compiled for contender, _ in entries):
            # Shapes compiled for earlier workloads would count towards the compiler's limit of recompilations, past
            # which it falls back to eager mode without a word.
            torch.compiler.reset()
        outcomes: dict[tuple[str, str], Outcome] = {}
        admitted = []
        for contender, direction in entries:
            entry = self._admit(contender, direction)
            if isinstance(entry, Refusal):
                outcomes[contender.name, direction] = entry
            else:
                admitted.append(entry)
        for entry, times, host_seconds, products_alone in self._times(admitted):
            record = self._record(entry, times, host_seconds, products_alone)
            outcomes[entry.contender.name, entry.direction] = (record, times)
        return outcomes

    def _function(self, contender: Contender) -> Function:
        """Build a contender's function, once for both directions."""
        if contender.name not in self._functions:
            function = contender.build(self.workload)
            # dynamic=False: one shape, compiled for it alone, is a compiler's strongest form.
            self._functions[contender.name] = torch.compile(function, dynamic=False) if contender.compiled else function
        return self._functions[contender.name]

    def _admit(self, contender: Contender, direction: str) -> _Admitted | Refusal:
        """Check an entry against the oracle; whatever others' code raises, the rest is still measured."""
        try:
            return self._checked(contender, direction)
        except Exception as error:
            lines = f"{type(error).__name__}: {error}".splitlines()
            return Refusal(self.workload.name, direction, contender.name, lines[0])

    def _checked(self, contender: Contender, direction: str) -> _Admitted:
        """Return an entry that is the oracle's equal; raise what goes wrong."""
        run = bound(self._function(contender), contender, self.inputs, direction)
        candidate = Candidate(run, self.inputs.restore) if contender.overwrites else Candidate(run)
        try:
            result = run()
            mean_error = check_result(result, self.oracle, self.dtype)
            new_bytes = gradient_bytes(result, self.inputs)
            del result
            peak = peak_bytes(candidate, self.clock.device)
        finally:
            candidate.prepare()
        return _Admitted(contender, direction, candidate, mean_error, new_bytes, peak)

    def _times(self, admitted: Sequence[_Admitted]) -> Iterator[tuple[_Admitted, list[float], float | None, float]]:
        """Yield each entry with the seconds of its runs, of the host, and of the matrix products alone (or 0)."""
        candidates = [entry.candidate for entry in admitted]
        if self.workload.host_bound:
            samples, host_seconds = run_back_to_back(self.clock, candidates)
            for entry, times, seconds in zip(admitted, samples, host_seconds, strict=True):
                yield entry, times, seconds, 0.0
            return
        alone = {}
        if self.workload.operation == "linear_patch_cross_entropy":
            alone = {entry.direction: products(self.workload, self.inputs, entry.direction) for entry in admitted}
        samples = run_in_turn(self.clock, [*candidates, *map(Candidate, alone.values())])
        medians = dict(zip(alone, map(statistics.median, samples[len(candidates) :]), strict=True))
        for entry, times in zip(admitted, samples, strict=False):
            yield entry, times, None, medians.get(entry.direction, 0.0)

    def _record(
        self, entry: _Admitted, times: Sequence[float], host_seconds: float | None, products_alone: float
    ) -> Record:
        """Return the record of a timed entry."""
        workload = self.workload
        element_bytes = self.inputs.leaves[0].element_size()
        passes = demands(workload, entry.direction, element_bytes, self.inputs.tokens.unique().numel())
        median = statistics.median(times)
        first_quartile, _, third_quartile = statistics.quantiles(times, n=4, method="inclusive")
        return Record(
            **{name: getattr(workload, name) for name in WORKLOAD_FIELDS},
            direction=entry.direction,
            dtype=str(self.dtype).removeprefix("torch."),
            contender=entry.contender.name,
            label=entry.contender.label,
            median=median,
            first_quartile=first_quartile,
            third_quartile=third_quartile,
            runs=len(times),
            host_seconds=host_seconds,
            tokens_per_second=workload.num_tokens / median,
            images_per_second=workload.images / median,
            peak_bytes=entry.peak_bytes,
            gradient_bytes=entry.gradient_bytes,
            memory_bytes=sum(demand.memory_bytes for demand in passes),
            l2_bytes=sum(demand.l2_bytes for demand in passes),
            flops=sum(demand.flops for demand in passes),
            limit=products_alone or sum(demand.seconds(self.limits) for demand in passes),
            limit_of="products" if products_alone else "moving",
            mean_error=entry.mean_error,
        )
