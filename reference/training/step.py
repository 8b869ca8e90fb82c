"""One training step: forward, loss, backward, clipping, update and moving average, as one CUDA graph for each stage.

`npp_kernels.StepGraph` captures and replays it. The learning rate lives in a tensor that never moves; sums of the loss
and of the gradient's norm stay on the device until somebody asks for them. Nothing in a step waits for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from npp_kernels import StepGraph, group_tokens
from npp_kernels.grouping import Patch
from reference.network.model import Block, Transformer
from reference.training.data_parallel import DataParallelAdamW, Sharing
from reference.training.fsdp import shard
from reference.training.optimizer import AdamWConfig, FlatAdamW
from reference.training.torch_adamw import TorchAdamW

WARMUP_STEPS = 3  # ordinary steps of a stage before its graph is captured
PRECISIONS = ("bf16", "autocast", "fp32")
PARALLEL = ("sharded", "replicated", "fsdp", "ddp")  # what a run may ask for
GRADIENTS = ("auto", "bf16", "fp32")
SETUP_STEPS = WARMUP_STEPS + 1  # and the one that captures: steps of a stage that take longer than later ones


@dataclass(frozen=True)
class StepConfig:
    """How a step is computed.

    ``precision``: ``"bf16"`` keeps the model in bf16 and master weights in fp32; ``"autocast"`` keeps the model and its
    residual stream in fp32 and multiplies matrices in bf16, as the official code does; ``"fp32"``.

    ``compile``: compile a layer, for all to share. That is as fast as the whole model, for less set-up: around the
    layers are a few kernels, and the loss, one operation. The official formulation is compiled as a whole.

    ``parallel``: what several processes do (`PARALLEL`). ``"sharded"`` and ``"replicated"`` are `DataParallelAdamW`'s;
    ``"fsdp"`` shards the model as well, for one that a GPU cannot hold; ``"ddp"`` is PyTorch's own
    `DistributedDataParallel`, for comparison. The last two run without a graph. ``"none"``: a process trains by itself.

    ``gradients``: the dtype in which they are added up over the processes; ``"auto"`` is the model's.
    """

    precision: str = "bf16"
    compile: bool = True
    graph: bool = True  # ignored without a GPU
    accumulate: int = 1  # backward passes in a step, each over its part of the batch
    official: bool = False  # the official code's optimizer, and no graph
    parallel: str = "sharded"
    gradients: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("precision", PRECISIONS), ("parallel", (*PARALLEL, "none")), ("gradients", GRADIENTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1, got {self.accumulate}")
        if self.official and self.precision == "bf16":
            raise ValueError("precision: expected autocast or fp32 with the official formulation, got 'bf16'")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's parameters."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype in which gradients are added up over the processes."""
        return {"auto": self.dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[self.gradients]


@dataclass(frozen=True)
class Progress:
    """Means over the steps since the last report."""

    loss: float  # nats per target of the stage's patch
    gradient_norm: float
    steps: int

    @property
    def is_finite(self) -> bool:
        """Whether no loss and no gradient of these steps was NaN or infinite."""
        return abs(self.loss) < float("inf") and abs(self.gradient_norm) < float("inf")


class Loss(nn.Module):
    """The model's loss as a forward, which is what `DistributedDataParallel` wraps."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """Return the loss; the arguments are those of `Transformer.loss`."""
        return self.model.loss(*arguments, **options)


class TrainStep:
    """Trains a model, one batch a call.

    >>> import torch
    >>> from reference.network.model import ModelConfig, Transformer
    >>> model = Transformer(ModelConfig.named("tiny", vocab_size=512, grid=(4, 4), num_classes=10))
    >>> step = TrainStep(model, StepConfig(precision="fp32", compile=False), AdamWConfig(), batch_size=2)
    >>> step.run(torch.randint(512, (2, 4, 4)), torch.tensor([3, 7]), patch=2, lr=1e-4)
    >>> round(step.report().loss, 3)
    6.238

    Args:
        model: on its device already; its parameters become views of the optimizer's tensors. Under FSDP it may be on
            the host, and goes to this process's device layer by layer.
        config: how a step is computed.
        adamw: hyperparameters of the optimizer.
        batch_size: images of a step in this process, a multiple of ``config.accumulate``.
    """

    def __init__(self, model: Transformer, config: StepConfig, adamw: AdamWConfig, *, batch_size: int) -> None:
        if batch_size % config.accumulate:
            raise ValueError(f"batch_size: expected a multiple of accumulate = {config.accumulate}, got {batch_size}")
        self.processes = dist.get_world_size() if dist.is_initialized() and config.parallel != "none" else 1
        if config.official and self.processes > 1:
            raise ValueError(f"official: expected one process, got {self.processes}")
        if config.parallel == "fsdp" and not dist.is_initialized():
            raise ValueError("parallel: expected fsdp under torchrun, got it without; one process is enough")
        self.model = model
        self.config = config
        self.is_sharded = config.parallel == "fsdp"  # the model itself, and not only the optimizer's state
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        self._loss: Callable[..., Tensor] = model.loss
        if config.compile and config.official:
            self._loss = torch.compile(model.loss, **options)
        elif config.compile and not self.is_sharded:
            model.run_layer = torch.compile(Block.forward, **options)
        self.optimizer = self._make_optimizer(adamw)
        # Ours adds gradients up over the processes; FSDP and DistributedDataParallel average them.
        self.averages = self.is_sharded or config.parallel == "ddp"
        if config.parallel == "ddp" and self.processes > 1:
            self._loss = DistributedDataParallel(Loss(model), gradient_as_bucket_view=True)

        device = model.output.weight.device
        self.device = device
        self.num_targets = batch_size * math.prod(model.config.grid)  # of all parts: each adds its share of the mean
        self.sums = torch.zeros(2, device=device)  # of the losses and of the gradient's norms since the last report
        self.summed_steps = 0

        self._run = StepGraph(
            self._compute,
            warmup=WARMUP_STEPS,
            release_past=True,
            device=device,
            enabled=config.graph and not (config.official or self.is_sharded or (self.averages and self.processes > 1)),
        )

    def _make_optimizer(self, adamw: AdamWConfig) -> FlatAdamW | DataParallelAdamW | TorchAdamW:
        config, model = self.config, self.model
        if self.is_sharded:
            shard(model, config.dtype, config.gradient_dtype, compile=config.compile)
        if self.is_sharded or config.official:
            return TorchAdamW(model, adamw)
        if self.processes > 1 and config.parallel != "ddp":
            sharing = Sharing(config.parallel == "sharded", config.gradient_dtype, config.accumulate)
            return DataParallelAdamW(model, adamw, dtype=config.dtype, sharing=sharing)
        return FlatAdamW(model, adamw, dtype=config.dtype, accumulate=config.accumulate > 1)

    def close(self) -> None:
        """Release the graphs, and what they hold on to."""
        self._run.release()
        if isinstance(self.optimizer, DataParallelAdamW):
            self.optimizer.close()

    def run(self, tokens: Tensor, labels: Tensor, patch: Patch, lr: float) -> None:
        """Train on one batch: tokens ``[B, H, W]`` and labels ``[B]``, on any device (pinned memory copies best)."""
        if tokens.numel() != self.num_targets:
            raise ValueError(f"tokens: expected the {self.num_targets} of a batch, got shape {tuple(tokens.shape)}")
        self.optimizer.set_lr(lr)
        self._run(tokens, labels, patch=patch)
        self.summed_steps += 1

    def report(self) -> Progress:
        """Wait for the device, and return the means since the last report."""
        loss, norm = (self._sums_of_all() / max(self.summed_steps, 1)).tolist()
        progress = Progress(loss, norm, self.summed_steps)
        self.sums.zero_()
        self.summed_steps = 0
        return progress

    def precision(self) -> AbstractContextManager[object]:
        """Return the context in which the model computes."""
        if self.config.precision != "autocast":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint needs of the step: the optimizer's state, and the sums of the next report.

        Every process calls it. What it returns does not depend on how many there are; only the first has all of it,
        or, where the model is sharded, each its part.
        """
        return {**self.optimizer.state(), "sums": self._sums_of_all(), "summed_steps": self.summed_steps}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.optimizer.load(state)
        self.sums.copy_(state["sums"])
        if self.processes > 1 and not self.averages and dist.get_rank() != 0:
            self.sums[0] = 0.0  # each process has its share of the losses
        self.summed_steps = state["summed_steps"]

    def _sums_of_all(self) -> Tensor:
        """Return the sums over all processes: of the loss, and of the norm, which all of them know."""
        if self.processes == 1:
            return self.sums
        sums = self.sums.clone()
        dist.all_reduce(sums)
        return sums / sums.new_tensor([self.processes if self.averages else 1, self.processes])

    def _compute(self, tokens: Tensor, labels: Tensor, *, patch: Patch) -> None:
        """Compute one step."""
        parts = self.config.accumulate
        num_targets = self.num_targets * (1 if self.averages else self.processes)
        for part, (images, classes) in enumerate(zip(tokens.chunk(parts), labels.chunk(parts), strict=True)):
            if self.is_sharded:
                cast(FSDPModule, self.model).set_requires_gradient_sync(part == parts - 1)
            groups = group_tokens(images, patch, grid=self.model.config.grid)
            with self.precision():
                loss = self._loss(groups, classes, patch, num_targets=num_targets)
            loss.backward()
            self.sums[0].add_(loss.detach())
            self.optimizer.collect(first=part == 0)
        self.sums[1].add_(self.optimizer.update())
