"""A whole training step as one CUDA graph for each stage.

A coarse stage has short sequences, and its kernels are over before the host has launched the next ones. Replaying the
whole step (forward, backward, clipping, update) as one graph leaves the host a single launch, so that a coarse step
takes the time that its work takes.

A graph keeps addresses and numbers, not names: it reads the tensors, and repeats the Python numbers, that it saw when
it was captured. What would go wrong without a word is looked for here, before the capture or at it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map

from npp_kernels._recorder import Recorder, cloned, with_index
from npp_kernels.vocabulary_shard import is_dtensor

WARMUP_STEPS = 3  # these compile and allocate; the last one is also searched for what a graph refuses
DDP_WARMUP_STEPS = 11  # DistributedDataParallel measures its first ten steps; a graph must not contain that

# Entries of a parameter group that only schedulers use; a step does not read them.
_UNUSED_BY_A_STEP = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr"}
_WAITS = (
    ".item(), .tolist(), .cpu(), print or if on a tensor, nonzero, a copy from memory that is not pinned, a GradScaler "
    "with an optimizer that is not fused"
)


class _Written(NamedTuple):
    """What a captured step of an optimizer writes and repeats."""

    optimizer: Optimizer
    state: Any  # kept alive, so that no other object gets the same address
    groups: Any
    places: list[int]  # of the parameters
    numbers: dict[str, Any]


@dataclass
class _Stage:
    """What belongs to one set of options and shapes."""

    options: tuple[tuple[str, Hashable], ...]
    buffers: list[Tensor]
    warm_steps: int = 0
    graph: Any = None
    outputs: Any = None
    written: list[_Written] = field(default_factory=list)  # one for each optimizer, as it was when captured


class StepGraph:
    """Run a training step as a CUDA graph: captured once for each patch and set of shapes, replayed after that.

    >>> import torch
    >>> from npp_kernels import StepGraph
    >>> device = "cuda" if torch.cuda.is_available() else "cpu"
    >>> model = torch.nn.Linear(4, 1).to(device)
    >>> lr = torch.tensor(0.1, device=device)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr, capturable=device == "cuda")
    >>> def step(x, y, *, patch):
    ...     loss = (model(x) - y).square().mean()
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad(set_to_none=True)
    ...     return loss
    >>> train = StepGraph(step, optimizers=optimizer)
    >>> x, y = torch.randn(8, 4, device=device), torch.randn(8, 1, device=device)
    >>> losses = [train(x, y, patch=2) for _ in range(20)]
    >>> bool(losses[-1] < losses[0])
    True

    Every call trains once, on its own batch: the first ``warmup`` calls of each patch and set of shapes run the step as
    it is, the next captures it and replays it once, later ones copy their batch to where the graph reads it, and
    replay. N calls compute what N calls of ``step`` compute. On the CPU each call runs the step.

    The step: it takes tensors, and options such as ``patch=`` by name. It does all that a batch needs, with no look at
    a value on the way, and returns a tensor, or a tree of tensors, that the caller may keep. ``autocast`` is entered
    inside it. Set the learning rate, count and log between the calls: Python in the step runs in the warm-up and at the
    capture only. Modules stay in the mode (``train()``) in which they were captured.

    - *Gradients*: ``zero_grad(set_to_none=True)`` at the start or the end of the step, or ``set_to_none=False``. After
      a call ``.grad`` belongs to the graphs: return what you need of it, such as its norm.
    - *Learning rate*: a tensor on the GPU. PyTorch's schedulers fill it in place; ``lr.fill_(value)`` does so by hand.
    - *Accumulation*: all micro-batches inside the step; or an option such as ``update=False`` for the calls that only
      add, with ``zero_grad(set_to_none=False)``, so that all graphs add to the same gradients.
    - *Moving averages*: in the step (``torch._foreach_lerp_``), or by an ordinary call after it.
      ``swa_utils.AveragedModel`` reads its count on the host: call it outside.
    - *Random numbers*: the default generator counts on from step to step, as without a graph; give others as
      ``generators``. A run that is resumed warms up again and equals one that was not stopped.
    - *Loading*: after ``optimizer.load_state_dict``, and where a parameter has got other memory
      (``parameter.data = ...``), the graphs are made anew by themselves.
    - *DistributedDataParallel*: warm-up is 11 steps where a process group exists. Set
      ``TORCH_NCCL_ASYNC_ERROR_HANDLING=0`` before the group is made, and wrap the model on StepGraph's stream:
      ``with torch.cuda.stream(train.stream): model = DistributedDataParallel(model)``.
    - *Other collectives*: captured with the step, what NCCL does on its own stream included, if the step waits for all.
      ``release()`` the graphs before ``destroy_process_group``, which would wait for them.
    - *FSDP2* (``fully_shard``), and whatever else makes a `DTensor` of a parameter: refused on a GPU before the first
      update, since no graph of it was tried. ``enabled=False`` runs such a step as it is.
    - ``torch.compile`` in its default mode goes well inside; ``mode="reduce-overhead"`` makes graphs of its own.

    Args:
        step: the function.
        optimizers: those that it steps, checked before the first step; others are found, and checked, as they step in
            the warm-up. They have to be capturable, with a learning rate that is a tensor, and other numbers that stay
            those of the capture. A capture that fails leaves the gradients of their parameters alone.
        warmup: calls before a capture, at least 2; None for 3, or 11 where `torch.distributed` is initialized.
        max_graphs: how many graphs there may be at a time: one for each patch and set of shapes. One more is an error,
            since batches of ever new shapes would be captured for ever.
        release_past: as soon as a call brings new options, release the graphs of all others: for stages that follow
            each other, as in coarse-to-fine training.
        generators: CUDA generators beside the default one that the step draws from.
        device: where the step runs; None for the device of the first CUDA tensor among the arguments, else of the
            optimizers' parameters. Arguments from elsewhere are copied there (from pinned memory, without waiting).
        enabled: False runs the step as it is, to compare.

    Raises:
        TypeError: an argument is not a tensor, an option cannot be hashed, the step returns something else than
            tensors.
        ValueError: an optimizer cannot be captured; an argument is out of its range.
        RuntimeError: the step cannot be captured; a number of an optimizer has changed since; more graphs than
            ``max_graphs``. The process goes on: the same StepGraph may be called again.

    Numerics:
        The same kernels on the same numbers: bit for bit what the step computes without a graph.

    Memory:
        The graphs of all patches share one pool, so that together they need what the largest needs, beside outputs and
        batches. `release` gives it back when no graph is left.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        optimizers: Optimizer | Sequence[Optimizer] = (),
        warmup: int | None = None,
        max_graphs: int = 8,
        release_past: bool = False,
        generators: Sequence[torch.Generator] = (),
        device: torch.device | str | None = None,
        enabled: bool = True,
    ) -> None:
        if warmup is not None and warmup < 2:
            raise ValueError(f"warmup: expected at least 2, got {warmup}")
        if max_graphs < 1:
            raise ValueError(f"max_graphs: expected at least 1, got {max_graphs}")
        self.step = step
        self.optimizers = tuple(optimizers) if isinstance(optimizers, Iterable) else (optimizers,)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(f"optimizers: expected torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.warmup = warmup
        self.max_graphs = max_graphs
        self.release_past = release_past
        self.generators = tuple(generators)
        self.device = None if device is None else torch.device(device)
        self.enabled = enabled
        self._stages: dict[Hashable, _Stage] = {}
        self._recorder: Recorder | None = None

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream of warm-up and capture, on which `DistributedDataParallel` has to be made."""
        device = self.device or torch.device("cuda", torch.cuda.current_device())
        return self._recorder_on(device).stream

    @property
    def captured(self) -> list[dict[str, Any]]:
        """The options of each graph that there is now.

        >>> StepGraph(lambda x, patch: x)
        StepGraph(captured=[])
        """
        return [dict(stage.options) for stage in self._stages.values() if stage.graph is not None]

    def __repr__(self) -> str:
        return f"StepGraph(captured={self.captured})"

    def __call__(self, *tensors: Tensor, **options: Hashable) -> Any:
        """Train on one batch; return what the step returned, detached."""
        for position, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"argument {position}: expected a tensor, got {type(tensor).__name__}; options go by name"
                )
            if tensor.requires_grad:
                raise ValueError(
                    f"argument {position}: expected a tensor without requires_grad, which no graph can have"
                )
        device = self._device_of(tensors)
        if not (self.enabled and self._captures_on(device)):
            if self.device is not None:
                tensors = tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)
            return tree_map(_detached, self.step(*tensors, **options))
        assert device is not None
        return self._run(self._recorder_on(device), device, tensors, options)

    def release(self, **options: Hashable) -> None:
        """Release the graphs whose options are those given: ``release(patch=4)``; all of them where none is given."""
        if not options:
            self._stages.clear()
        for key, stage in list(self._stages.items()):
            if options.items() <= dict(stage.options).items():
                del self._stages[key]
        if self._recorder is not None and not self.captured:
            self._recorder.renew_pool()

    def _device_of(self, tensors: Sequence[Tensor]) -> torch.device | None:
        if self.device is not None:
            return self.device
        parameters = (p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"])
        first = next(chain((tensor for tensor in tensors if tensor.is_cuda), parameters), None)
        return None if first is None else first.device

    def _captures_on(self, device: torch.device | None) -> bool:
        return device is not None and device.type == "cuda"

    def _recorder_on(self, device: torch.device) -> Recorder:
        if self._recorder is None:
            self._recorder = Recorder(device, self.generators)
        return self._recorder

    def _run(
        self, recorder: Recorder, device: torch.device, tensors: Sequence[Tensor], options: dict[str, Hashable]
    ) -> Any:
        if torch.is_autocast_enabled("cuda"):
            raise RuntimeError(
                "autocast: expected it to be entered inside the step, got a call inside of it: the casts that it keeps "
                "would be those of the capture"
            )
        stage = self._stage_of(device, tensors, options)
        if stage.graph is not None:
            stage = self._checked(stage, device, tensors, options)
        for buffer, tensor in zip(stage.buffers, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        if stage.graph is None and stage.warm_steps < self._warmup_steps():
            return self._warm_up(recorder, stage)
        if stage.graph is None:
            self._capture(recorder, stage)
        stage.graph.replay()
        return tree_map(cloned, stage.outputs)

    def _stage_of(self, device: torch.device, tensors: Sequence[Tensor], options: dict[str, Hashable]) -> _Stage:
        """Return the stage of these options and shapes, a new one where there is none."""
        named = tuple(sorted(options.items()))
        key = (named, tuple((tensor.shape, tensor.dtype) for tensor in tensors))
        try:
            if key in self._stages:
                return self._stages[key]
        except TypeError as error:
            raise TypeError(f"options: expected values that can be hashed, got {options}; tensors go first") from error
        if self.release_past and any(stage.options != named for stage in self._stages.values()):
            self.release()
        if len(self._stages) >= self.max_graphs:
            known = [dict(stage.options) | {"shapes": [tuple(b.shape) for b in stage.buffers]} for stage in
                     self._stages.values()]  # fmt: skip
            raise RuntimeError(
                f"max_graphs: expected at most {self.max_graphs} sets of options and shapes, got another, {options} "
                f"with shapes {[tuple(tensor.shape) for tensor in tensors]}, beside {known}: drop incomplete batches "
                "(drop_last=True), release() what is over, or raise max_graphs"
            )
        self._check_optimizers(device, self.optimizers)
        buffers = [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in tensors]
        return self._stages.setdefault(key, _Stage(named, buffers))

    def _warmup_steps(self) -> int:
        if self.warmup is not None:
            return self.warmup
        return DDP_WARMUP_STEPS if dist.is_available() and dist.is_initialized() else WARMUP_STEPS

    def _warm_up(self, recorder: Recorder, stage: _Stage) -> Any:
        """Compute one step on the side stream, as capture will, so that nothing is set up for the first time in it."""
        rates = self._rates()
        versions = [rate._version for rate in rates]
        watched = stage.warm_steps == self._warmup_steps() - 1
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_: self._take_note_of(optimizer, recorder.device))
        try:
            outputs, waits = recorder.run(lambda: self._compute(stage), watched=watched)
        finally:
            hook.remove()
        if waits:
            raise RuntimeError(
                f"step: expected no wait for the GPU, since a graph cannot hold one, got {'; '.join(waits)}. Usual: "
                f"{_WAITS}. This call trained on its batch"
            )
        if versions != [rate._version for rate in rates]:
            raise RuntimeError(
                "optimizers: expected a learning rate that is set between the calls, got one that the step itself "
                "sets: a graph would set the same one in every call. This call trained on its batch"
            )
        stage.warm_steps += 1
        return outputs

    def _capture(self, recorder: Recorder, stage: _Stage) -> None:
        parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        try:
            stage.graph, stage.outputs = recorder.record(lambda: self._compute(stage))
        except BaseException as error:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient  # the failed capture never computed its gradients
            self.release()  # earlier graphs share the failed one's pool and random state
            if not isinstance(error, RuntimeError):
                raise
            what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise RuntimeError(
                f"step: expected one that a CUDA graph can hold, for {dict(stage.options)}, got {what}. Usual: it "
                f"waits for the GPU ({_WAITS}); an optimizer is not capturable=True; an earlier forward that is still "
                "alive, or a DistributedDataParallel that was not made on StepGraph.stream, ties it to the default "
                "stream. Nothing was computed by this call; enabled=False runs the step as it is"
            ) from error
        stage.written = [_written_by(optimizer) for optimizer in self.optimizers]

    def _compute(self, stage: _Stage) -> Any:
        outputs = self.step(*stage.buffers, **dict(stage.options))
        return tree_map(_detached, outputs)

    def _checked(
        self, stage: _Stage, device: torch.device, tensors: Sequence[Tensor], options: dict[str, Hashable]
    ) -> _Stage:
        """Return the stage if its graph still computes what the step would; a new one if the optimizer was loaded."""
        for then in stage.written:
            now = _written_by(then.optimizer)
            if now.state is not then.state or now.groups is not then.groups or now.places != then.places:
                self.release()  # load_state_dict replaces the tensors that the graphs write
                return self._stage_of(device, tensors, options)
            for name, value in now.numbers.items():
                was = then.numbers.get(name)
                if was is value or (not isinstance(was, Tensor) and not isinstance(value, Tensor) and was == value):
                    continue
                raise RuntimeError(
                    f"optimizers: expected {name} as it was when the step was captured, {was}, got {value}: the graph "
                    "holds the old one. Set a tensor in place (lr.fill_(value)), or release() and capture anew"
                )
        return stage

    def _rates(self) -> list[Tensor]:
        rates = [group.get("lr") for optimizer in self.optimizers for group in optimizer.param_groups]
        return [rate for rate in rates if isinstance(rate, Tensor)]

    def _take_note_of(self, optimizer: Optimizer, device: torch.device) -> None:
        """Check an optimizer that is about to step, if nobody has named it."""
        if all(optimizer is not known for known in self.optimizers):
            self._check_optimizers(device, (optimizer,))
            self.optimizers += (optimizer,)

    def _check_optimizers(self, device: torch.device, optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            name = type(optimizer).__name__
            for number, group in enumerate(optimizer.param_groups):
                where = f"group {number} of {name}"
                if any(is_dtensor(parameter) for parameter in group["params"]):
                    raise ValueError(
                        f"optimizers: expected parameters that are plain tensors, got a DTensor in {where}: graphs of "
                        "steps with FSDP2 (fully_shard) are not supported. enabled=False runs the step as it is"
                    )
                if group.get("capturable") is False:
                    raise ValueError(f"optimizers: expected capturable=True, got capturable=False in {where}")
                lr = group.get("lr")
                if lr is not None and not (isinstance(lr, Tensor) and lr.device == with_index(device)):
                    came = f"a tensor on {lr.device}" if isinstance(lr, Tensor) else f"the number {lr}"
                    raise ValueError(
                        f"optimizers: expected a learning rate that is a tensor on {device}, since a graph would keep "
                        f"a number for ever, got {came} in {where}: {name}(..., lr=torch.tensor({float(lr)}, "
                        f'device="{device.type}"))'
                    )


def _written_by(optimizer: Optimizer) -> _Written:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = [parameter.data_ptr() for parameter in parameters if type(parameter) is nn.Parameter]
    numbers = {
        f"{name} of group {index}": value
        for index, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name not in _UNUSED_BY_A_STEP
    }
    return _Written(optimizer, optimizer.state, optimizer.param_groups, places, numbers)


def _detached(output: Any) -> Any:
    if output is None:
        return None
    if not isinstance(output, Tensor):
        raise TypeError(
            f"step: expected tensors to be returned, got {type(output).__name__}: a number is read from the GPU, which "
            "a graph cannot do, or is that of the capture for ever"
        )
    return output.detach()
