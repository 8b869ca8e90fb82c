"""TorchTitan (0.3): phases of a run on patches of K consecutive tokens, then on single tokens. Needs ``torchtitan``.

A recipe of a ``config_registry`` becomes one of patches::

    def llama3_8b_patches() -> Trainer.Config:
        config = llama3_8b()
        return with_patches(config, PatchSchedule([(4, 600), (1, config.training.steps)]))

The trainer groups every batch before it counts its labels, builds masks, or cuts anything into chunks; from there on
shapes say all there is to know. Tokens ``[B, P, K]`` are averaged by the embedding, targets ``[B, P, K]``, shifted
already, are scored by the loss, and ``[B, L]`` is what it always was. So accumulation, ranks, `ChunkedLossWrapper`
and the validator, which gets no groups, work as they are, and the stage follows from the step alone.

``config.loss = LinearPatchLoss.Config()`` in a recipe, one of patches or not, makes one of output layer and loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.distributed import cudagraph
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.deepseek_v3.mtp import MTPDecoder
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from npp_kernels.embeddings.group_mean import group_mean
from npp_kernels.integrations._packed import group_packed
from npp_kernels.integrations._torchtitan_losses import LinearPatchLoss, PatchLoss
from npp_kernels.schedule import PatchSchedule

__all__ = ["LinearPatchLoss", "PatchEmbedding", "PatchLoss", "PatchTrainer", "group_batch", "with_patches"]

PLAIN_FORWARDS = (Decoder.forward, MTPDecoder.forward)  # they call tok_embeddings on the tokens, once
REFUSED_DEGREES = ("tensor_parallel_degree", "context_parallel_degree", "pipeline_parallel_degree")


class PatchEmbedding(Embedding):
    """TorchTitan's ``Embedding``, which averages the K tokens of a patch where it gets patches.

    >>> import torch
    >>> embedding = PatchEmbedding.Config(num_embeddings=512, embedding_dim=64).build()
    >>> embedding(torch.randint(512, (2, 8, 4))).shape, embedding(torch.randint(512, (2, 32))).shape
    (torch.Size([2, 8, 64]), torch.Size([2, 32, 64]))

    Raises:
        ValueError: patches under tensor parallelism.
        TypeError, IndexError: those of `npp_kernels.group_mean`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):
        """That of ``Embedding``."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[B, P, D]`` for ``[B, P, K]``, and what ``Embedding`` returns for ``[B, L]``."""
        if input.ndim == 2:
            return cast(Tensor, super().forward(input))
        if self.tp_group is not None:
            raise ValueError("tensor_parallel_degree: expected 1 for patches, got a table that is split by vocabulary")
        return group_mean(self.weight, input).clone()  # FSDP2 hooks what a module returns, which must not be a view


class PatchTrainer(Trainer):
    """TorchTitan's trainer, on the patch of the schedule at each step. `with_patches` makes its config.

    Besides grouping the batches, it begins CUDA graphs anew at a stage, whose shapes are others, and counts the
    operations of a token by the stage, so that MFU stays true.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """A `Trainer.Config` with stages.

        Args:
            patches: pairs ``(patch, until_step)`` as for `npp_kernels.PatchSchedule`, to the end of the run.

        Raises:
            ValueError: the stages do not end with the run, a patch has more than one axis or does not fit
                ``training.seq_len`` and the chunks of the loss, or the run has parts that patches do not work with.
        """

        patches: list[tuple[int, int]] = dataclasses.field(default_factory=list)

        def __post_init__(self) -> None:
            Trainer.Config.__post_init__(self)
            check_config(self)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.schedule = PatchSchedule(config.patches)
        self.patch: int | None = None  # of the last step; None before the first one, and after a checkpoint is loaded

    def batch_generator(
        self, data_iterable: Iterable[tuple[dict[str, Tensor], Tensor]]
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the data loader's batches, grouped by the stage of the step that asks for them."""
        for inputs, labels in super().batch_generator(data_iterable):
            yield group_batch(inputs, labels, self._scheduled_patch())

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """Do one step, on the patch of its stage."""
        patch = self._scheduled_patch()
        if patch != self.patch:
            self._begin_stage(patch)
        super().train_step(data_iterator)

    def _scheduled_patch(self) -> int:
        """Return the patch of the step in progress, which the trainer counts from 1."""
        return _one_axis(self.schedule.at(self.step - 1).patch)

    def _begin_stage(self, patch: int) -> None:
        logger.info(f"Patches of {patch} from step {self.step}")
        self.patch = patch
        rows = self.config.training.seq_len // patch
        _, flops_per_row = self.model_config.get_nparams_and_flops(self.model_parts[0], rows)
        self.metrics_processor.num_flops_per_token = flops_per_row // patch
        if not self.config.training.disable_cuda_graphs:
            # A graph has the shapes of one stage. Gradients and optimizer state were allocated outside of it, and stay.
            cudagraph.cudagraph_teardown()
            self.fwd_bwd_fn = cudagraph.wrap_with_cuda_graph(self._forward_backward_body)


def with_patches(config: Trainer.Config, schedule: PatchSchedule) -> PatchTrainer.Config:
    """Return the config of the same run on patches: another trainer, embedding and loss, everything else as it is.

    >>> from npp_kernels import PatchSchedule
    >>> from torchtitan.models.llama3.config_registry import llama3_debugmodel
    >>> config = with_patches(llama3_debugmodel(), PatchSchedule([(4, 3), (1, 10)]))  # of its 10 steps
    >>> config.patches, type(config.loss.loss_fn).__qualname__
    ([(4, 3), (1, 10)], 'PatchLoss.Config')

    Parameters keep their names, so that checkpoints go back and forth between both configs.

    Args:
        config: a recipe of `torchtitan.trainer.Trainer`; it is not changed. A ``loss`` that is a `LinearPatchLoss`
            stays.
        schedule: the stages, of ``config.training.steps`` steps together.

    Raises:
        TypeError: the trainer, loss or embedding is not TorchTitan's own: what else it does would be lost.
        ValueError: the model looks at its tokens in other ways, or what `PatchTrainer.Config` refuses.
    """
    if type(config) is not Trainer.Config:
        raise TypeError(f"config: expected a torchtitan.trainer.Trainer.Config, got {type(config).__qualname__}")
    if config.model_spec is None:
        raise ValueError("config: expected a model_spec, got None")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values["model_spec"] = dataclasses.replace(config.model_spec, model=_patched_model(config.model_spec.model))
    values["loss"] = _patched_loss(config.loss)
    patches = [(_one_axis(patch), until_step) for patch, until_step in schedule.boundaries]
    return PatchTrainer.Config(**values, patches=patches)


def _one_axis(patch: int | tuple[int, ...]) -> int:
    sizes = (patch,) if isinstance(patch, int) else patch
    if len(sizes) != 1:
        raise ValueError(f"patches: expected one axis, as text has, got {patch}")
    return sizes[0]


def _patched_model(model: Any) -> Any:
    if getattr(model._owner, "forward", None) not in PLAIN_FORWARDS or getattr(model, "mtp_layers", None):
        raise ValueError(
            "model: expected a decoder whose forward gives its tokens to tok_embeddings and to nothing else, "
            f"got {type(model).__qualname__}"
        )
    table = model.tok_embeddings
    if type(table) is not Embedding.Config:
        raise TypeError(f"model.tok_embeddings: expected an Embedding.Config, got {type(table).__qualname__}")
    values = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    return dataclasses.replace(model, tok_embeddings=PatchEmbedding.Config(**values))


def _patched_loss(loss: BaseLoss.Config) -> BaseLoss.Config:
    if type(loss) is LinearPatchLoss.Config:
        return loss
    if type(loss) is ChunkedLossWrapper.Config:
        return dataclasses.replace(loss, loss_fn=_patched_loss(loss.loss_fn))
    if type(loss) is not CrossEntropyLoss.Config:
        raise TypeError(f"loss: expected a CrossEntropyLoss.Config, chunked or not, got {type(loss).__qualname__}")
    return PatchLoss.Config()


def check_config(config: PatchTrainer.Config) -> None:
    """Raise a ValueError where stages do not fit the rest of a config; see `PatchTrainer.Config`."""
    schedule = PatchSchedule(config.patches)
    if schedule.total_steps != config.training.steps:
        raise ValueError(
            f"patches: expected stages up to training.steps, {config.training.steps}, got {schedule.total_steps}"
        )
    seq_len = config.training.seq_len
    num_chunks = config.loss.num_chunks if isinstance(config.loss, ChunkedLossWrapper.Config) else 1
    for stage in schedule.stages:
        if seq_len % (_one_axis(stage.patch) * num_chunks):
            raise ValueError(
                f"patches: expected sizes that divide training.seq_len, {seq_len}, into patches for each of the loss's "
                f"{num_chunks} chunks, got {stage.patch}"
            )
    for name in REFUSED_DEGREES:
        degree = getattr(config.parallelism, name)
        if degree != 1:
            raise ValueError(f"parallelism.{name}: expected 1 for a run on patches, got {degree}")
    if config.parallelism.spmd_backend == "full_dtensor":
        raise ValueError("parallelism.spmd_backend: expected spmd_types or partial_dtensor, got full_dtensor")
    if config.debug.spmd_typechecking:
        raise ValueError(
            "debug.spmd_typechecking: expected False, since our operations declare no SPMD types, got True"
        )


def group_batch(inputs: dict[str, Tensor], labels: Tensor, patch: int) -> tuple[dict[str, Tensor], Tensor]:
    """Group a batch of TorchTitan's data loaders; documents begin where ``positions`` are 0, and are not mixed.

    >>> import torch
    >>> tokens = torch.randint(512, (2, 33))
    >>> batch = {"input": tokens[:, :-1], "positions": torch.arange(32).expand(2, 32)}
    >>> inputs, targets = group_batch(batch, tokens[:, 1:], 4)
    >>> inputs["input"].shape, inputs["positions"].shape, targets.shape
    (torch.Size([2, 8, 4]), torch.Size([2, 8]), torch.Size([2, 8, 4]))

    A patch of 1 returns what came.

    Raises:
        ValueError: ``inputs`` have more than tokens and positions, or what `group_packed` raises.
        TypeError: those of `group_packed`.
    """
    if patch == 1:
        return inputs, labels
    more = sorted(inputs.keys() - {"input", "positions"})
    if more:
        raise ValueError(f"inputs: expected input and positions, which can be grouped, got {', '.join(more)} as well")
    positions = inputs.get("positions")
    groups, targets, places = group_packed(inputs["input"], labels, patch, positions=positions)
    return ({"input": groups} if positions is None else {"input": groups, "positions": places}), targets
