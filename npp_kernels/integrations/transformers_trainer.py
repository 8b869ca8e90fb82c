"""Hugging Face `Trainer` and TRL's `SFTTrainer` on a `PatchSchedule`: a mix-in for the trainer, and a collator.

They are written so that this file needs no transformers::

    class PatchTrainer(PatchTrainerMixin, transformers.Trainer):     # or trl.SFTTrainer
        pass

    trainer = PatchTrainer(model, arguments, train_dataset=dataset, patch_schedule=PatchSchedule([(4, 800), (1, 1000)]),
                           data_collator=PatchCollator(4, pad_token_id=tokenizer.pad_token_id))
    trainer.train()                  # or trainer.train(resume_from_checkpoint=True), in the middle of a stage

``bf16``, ``torch_compile``, NEFTune, gradient accumulation and DDP are the trainer's own, since it is the model that is
changed (`npp_kernels.integrations.transformers.apply`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npp_kernels.integrations._transformers_batch import IGNORE_INDEX
from npp_kernels.integrations.transformers import apply
from npp_kernels.schedule import PatchSchedule


class PatchTrainerMixin:
    """Train each step on the patch of its stage, and evaluate on single tokens.

    Put it in front of the trainer's class. The stage follows from the trainer's ``global_step`` alone, so that a run
    goes on inside a stage. Scored targets are counted over all micro-batches of a step and all ranks, so that
    accumulation and data parallelism change neither loss nor gradient; an auxiliary loss of experts, a mean over its
    micro-batch, is averaged over both. Evaluation and prediction are the model's own. Logs carry ``patch``.

    Args:
        arguments: those of the trainer, as for all others by name.
        patch_schedule: the stages; its ``total_steps`` are the run's steps.
        normalize: as for `npp_kernels.patch_cross_entropy`.
        slot_weights: likewise; one for each token of every patch above 1.
        lr_options: arguments of `PatchSchedule.lr_factor`, for a learning rate that begins anew with every stage; None
            leaves the trainer's scheduler as it is.

    Raises:
        ValueError: steps of the run that are not the schedule's, or an option of the trainer that replaces the loss or
            the model's forward: ``label_smoothing_factor``, ``compute_loss_func``, ``use_liger_kernel``, TRL's
            ``loss_type="dft"``, more than one GPU in one process, sequences that are split over ranks.
        UnsupportedModelError: see `npp_kernels.integrations.transformers.apply`.
    """

    loss_is_scaled_for_ga: bool | None = True  # we divide by the step's targets ourselves
    # Attributes of the trainer class that this one is mixed into.
    model: Any
    args: Any
    state: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *arguments: Any,
        patch_schedule: PatchSchedule,
        normalize: str = "target",
        slot_weights: Sequence[float] | Tensor | None = None,
        lr_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._check_options()
        self.patch_schedule = patch_schedule
        self.lr_options = lr_options
        self.patched = apply(self.model, 1, normalize=normalize, slot_weights=slot_weights)
        for stage, _ in patch_schedule.boundaries:
            self.patched.patch = stage  # raises for a patch of two axes, or slot weights that do not fit
        self.patched.patch = 1

    def _check_options(self) -> None:
        arguments = self.args
        parallel = getattr(self.accelerator, "parallelism_config", None)
        split = parallel is not None and max(parallel.tp_size, parallel.cp_size, parallel.sp_size) > 1
        refused = {
            "label_smoothing_factor": (arguments.label_smoothing_factor, 0),
            "compute_loss_func": (getattr(self, "compute_loss_func", None), None),
            "use_liger_kernel": (arguments.use_liger_kernel, False),
            "loss_type": (getattr(arguments, "loss_type", "nll"), "nll"),
            "n_gpu": (max(arguments.n_gpu, 1), 1),
            "parallelism_config": ("sequences or weights split over ranks" if split else None, None),
        }
        for name, (value, expected) in refused.items():
            if value != expected:
                raise ValueError(f"{name}: expected {expected!r}, since the loss is that of patches, got {value!r}")

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Begin the stage of the next step, take its micro-batches, and count what they and all ranks will score."""
        self._begin_step()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if not batches:
            return batches, None
        for batch in batches:
            if batch.get("labels") is None:
                raise ValueError(f"labels: expected them in every batch, got {sorted(batch)}")
        counts = torch.stack([self.patched.count(**batch) for batch in batches]).sum(0).to(device)
        return batches, self.accelerator.reduce(counts, reduction="sum")

    def _begin_step(self) -> None:
        schedule, base = self.patch_schedule, self.model
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        if base is not self.patched.model:
            raise ValueError("model_init: expected None, since another model than the patched one is trained")
        if self.state.max_steps != schedule.total_steps:
            raise ValueError(
                f"max_steps: expected the steps of the schedule, {schedule.total_steps}, got {self.state.max_steps}"
            )
        self.patched.patch = schedule.at(self.state.global_step).patch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this micro-batch's part of the step's loss, by what `get_batch_samples` counted."""
        if self.patched.is_paused:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        self.patched.check(**inputs)
        if num_items_in_batch is None:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        # DDP averages over ranks, so each rank's share of the sum is multiplied by their number. What the model adds to
        # its loss is a mean already: the targets' part is therefore scaled up inside, and the whole scaled down after.
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        scale = self.accelerator.num_processes * steps
        outputs = model(**inputs, num_targets=num_items_in_batch / scale)
        loss = outputs["loss"] / steps
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, *arguments: Any, **options: Any) -> Any:
        """Evaluate with the model's own loss on single tokens, and its own logits."""
        with self.patched.paused():
            return super().prediction_step(*arguments, **options)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the trainer's scheduler, or with ``lr_options`` the schedule's own."""
        if self.lr_options is None:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        schedule, options = self.patch_schedule, dict(self.lr_options)
        last = schedule.total_steps - 1  # the scheduler also asks for the step after the last
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda step: schedule.lr_factor(min(step, last), **options),
        )
        return self.lr_scheduler

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log the stage's patch beside the training loss."""
        if "loss" in logs:
            logs = {**logs, "patch": self.patched.patch}
        super().log(logs, *arguments, **options)  # type: ignore[misc]


class PatchCollator:
    """Make a batch whose documents begin at multiples of ``patch``, each padded on the right.

    >>> collator = PatchCollator(4, pad_token_id=0)
    >>> batch = collator([{"input_ids": [5, 6, 7, 8, 9]}, {"input_ids": [1, 2, 3]}])
    >>> batch["input_ids"].tolist()
    [[5, 6, 7, 8, 9, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    >>> batch = PatchCollator(2, pad_token_id=0, flatten=True)([{"input_ids": [5, 6, 7]}, {"input_ids": [1, 2]}])
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 0, 1, 2]], [[0, 1, 2, 3, 0, 1]])

    An example has ``input_ids`` and may have ``labels``, unshifted, -100 where they do not count. One that holds
    several documents says so by ``seq_lengths``, as TRL's packing does, which needs ``flatten``.

    Args:
        patch: the largest patch of the run; every other divides it.
        pad_token_id: what fills up; it is never scored.
        flatten: one row of all documents, told apart by ``position_ids`` that begin anew, as transformers'
            ``DataCollatorWithFlattening`` makes it; else one row for each, with an ``attention_mask``.

    Raises:
        TypeError, ValueError: an argument or an example that does not fit.
    """

    def __init__(self, patch: int, pad_token_id: int, *, flatten: bool = False) -> None:
        for name, value, least in (("patch", patch, 1), ("pad_token_id", pad_token_id, 0)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.patch, self.pad_token_id, self.flatten = patch, pad_token_id, flatten

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of these examples."""
        documents = [document for example in examples for document in self._documents(example)]
        if not documents:
            raise ValueError("examples: expected at least one document, got none")
        if self.flatten:
            return self._flat(documents)
        length = max(2 * self.patch, *(self._padded(len(ids)) for ids, _ in documents))
        shape = (len(documents), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE_INDEX),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for row, (ids, labels) in enumerate(documents):
            batch["input_ids"][row, : len(ids)] = ids
            batch["labels"][row, : len(ids)] = labels
            batch["attention_mask"][row, : len(ids)] = 1
        return batch

    def _flat(self, documents: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        sizes = [self._padded(len(ids)) for ids, _ in documents]
        sizes[-1] += max(2 * self.patch - sum(sizes), 0)  # a single patch has nothing that predicts it
        batch = {
            "input_ids": torch.full((1, sum(sizes)), self.pad_token_id),
            "labels": torch.full((1, sum(sizes)), IGNORE_INDEX),
            "position_ids": torch.cat([torch.arange(size) for size in sizes]).unsqueeze(0),
        }
        begin = 0
        for (ids, labels), size in zip(documents, sizes, strict=True):
            batch["input_ids"][0, begin : begin + len(ids)] = ids
            batch["labels"][0, begin + 1 : begin + len(ids)] = labels[1:]  # nothing predicts the first token
            begin += size
        return batch

    def _padded(self, length: int) -> int:
        return -(-length // self.patch) * self.patch

    def _documents(self, example: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        ids = torch.as_tensor(example["input_ids"], dtype=torch.long)
        labels = torch.as_tensor(example.get("labels", ids), dtype=torch.long)
        if ids.ndim != 1 or labels.shape != ids.shape:
            raise ValueError(f"labels: expected as many as input_ids {tuple(ids.shape)}, got {tuple(labels.shape)}")
        lengths = example.get("seq_lengths")
        if lengths is None or len(lengths) == 1:
            return [(ids, labels)] if len(ids) else []
        if not self.flatten:
            raise ValueError(f"seq_lengths: expected one document without flatten=True, got {len(lengths)}")
        lengths = [int(length) for length in lengths]
        if sum(lengths) != len(ids):
            raise ValueError(f"seq_lengths: expected the sum {len(ids)}, got {sum(lengths)}")
        return list(zip(ids.split(lengths), labels.split(lengths), strict=True))
