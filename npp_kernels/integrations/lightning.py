"""Lightning: a callback that moves a module through the stages of a `PatchSchedule`.

It is written as a mix-in, so that this file needs no Lightning (whose package has two names)::

    class Stages(PatchStages, lightning.pytorch.Callback):    # in this order
        pass

    trainer = lightning.pytorch.Trainer(max_steps=schedule.total_steps, callbacks=[Stages(schedule, warmup_steps=500)])

The module's ``training_step`` and ``validation_step`` read ``self.patch``, and group their tokens by it::

    groups = group_tokens(tokens, self.patch, grid=(16, 16))
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from npp_kernels.grouping import Patch
from npp_kernels.schedule import PatchSchedule

_HOOKS = (
    "on_fit_start", "on_train_batch_start", "on_validation_start", "on_test_start", "on_predict_start", "state_dict",
    "load_state_dict",
)  # fmt: skip


class PatchStages:
    """Set ``module.patch`` and the learning rate before every batch, from the trainer's step alone.

    >>> from npp_kernels import PatchSchedule
    >>> stages = PatchStages(PatchSchedule([(2, 100), (1, 400)]), warmup_steps=10, decay_ratio=0.2, end_factor=0.1)
    >>> stages.schedule.at(100).patch
    1

    The learning rate of each parameter group is the one that it was made with, times `PatchSchedule.lr_factor`. The
    first is kept in the group as ``initial_lr``, where a run that goes on from a checkpoint finds it; one that is a
    tensor is set in place. Validation, test and prediction are at ``validation_patch``. The number of the stage and
    the patch's size (its longest side) are logged as ``stage`` and ``patch``. A checkpoint holds the schedule.

    At the start of ``fit`` it is refused that the run is longer or shorter than the schedule (but for
    ``fast_dev_run``), that another scheduler would set the learning rate too, and more than one optimizer, of which
    Lightning counts the steps of all.

    Args:
        schedule: the stages; the trainer's ``max_steps`` is its ``total_steps``.
        warmup_steps: see `PatchSchedule.lr_factor`, as for the others.
        decay_ratio: the last part of each stage, over which the learning rate falls.
        end_factor: what it falls to.
        validation_patch: the patch outside of training; 1 is what the model is for in the end.

    Raises:
        TypeError: the class names ``Callback`` before this mix-in, whose hooks would then never be called.
        ValueError: at the start of ``fit``, as above; or a checkpoint of another schedule.
    """

    def __init__(
        self,
        schedule: PatchSchedule,
        *,
        warmup_steps: int = 0,
        decay_ratio: float = 0.0,
        end_factor: float = 1.0,
        validation_patch: Patch = 1,
    ) -> None:
        self.schedule = schedule
        self.lr_options = (warmup_steps, decay_ratio, end_factor)
        self.validation_patch = validation_patch

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in _HOOKS:
            owner = next(base for base in cls.__mro__ if name in vars(base))
            if not issubclass(owner, PatchStages):
                raise TypeError(
                    f"bases: expected PatchStages before {owner.__name__}, got {owner.__name__}.{name} in its place: "
                    f"class {cls.__name__}(PatchStages, {owner.__name__})"
                )

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Refuse a run that would not be what the schedule says."""
        if len(trainer.optimizers) != 1:
            raise ValueError(f"optimizers: expected one, got {len(trainer.optimizers)}")
        if trainer.lr_scheduler_configs:
            names = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
            raise ValueError(f"lr_scheduler: expected none beside PatchStages, which sets the rate, got {names}")
        steps = trainer.estimated_stepping_batches
        if steps != self.schedule.total_steps and not trainer.fast_dev_run:
            raise ValueError(
                f"max_steps: expected the {self.schedule.total_steps} steps of the schedule, got a run of {steps}: "
                "Trainer(max_steps=schedule.total_steps, max_epochs=-1)"
            )

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Set the stage and the learning rate of the step that this batch belongs to."""
        stage = self.schedule.at(trainer.global_step)
        module.patch = stage.patch
        factor = self.schedule.lr_factor(trainer.global_step, *self.lr_options)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                lr = group["lr"]
                if isinstance(lr, Tensor):
                    lr.copy_(group.setdefault("initial_lr", lr.clone()) * factor)
                else:
                    group["lr"] = group.setdefault("initial_lr", lr) * factor
        size = stage.patch if isinstance(stage.patch, int) else max(stage.patch)
        module.log_dict({"stage": float(stage.index), "patch": float(size)}, batch_size=1)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Set the patch of validation; the next training batch sets its own again."""
        module.patch = self.validation_patch

    def on_test_start(self, trainer: Any, module: Any) -> None:
        """Set the patch of validation."""
        module.patch = self.validation_patch

    def on_predict_start(self, trainer: Any, module: Any) -> None:
        """Set the patch of validation."""
        module.patch = self.validation_patch

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: the stages, and how the learning rate goes."""
        return {"boundaries": list(self.schedule.boundaries), "lr_options": list(self.lr_options)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint of another schedule."""
        for name, value in self.state_dict().items():
            if state_dict[name] != value:
                raise ValueError(f"{name}: expected those of the checkpoint, {state_dict[name]}, got {value}")
