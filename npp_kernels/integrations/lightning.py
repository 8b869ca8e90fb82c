"""Lightning: a callback that moves a module through the stages of a `PatchSchedule`.

It is written as a mix-in, so that this file needs no Lightning (whose package has two names)::

    class Stages(PatchStages, lightning.pytorch.Callback):
        pass

    trainer = lightning.pytorch.Trainer(max_steps=schedule.total_steps, callbacks=[Stages(schedule, warmup_steps=500)])

The module's ``training_step`` reads ``self.patch``, and groups its tokens by it.
"""

from __future__ import annotations

from typing import Any

from npp_kernels.schedule import PatchSchedule


class PatchStages:
    """Set ``module.patch`` and the learning rate before every batch, from the trainer's step alone.

    >>> from npp_kernels import PatchSchedule
    >>> stages = PatchStages(PatchSchedule([(2, 100), (1, 400)]), warmup_steps=10, decay_ratio=0.2, end_factor=0.1)
    >>> stages.schedule.at(100).patch
    1

    The learning rate of each parameter group is the one that it was made with, times `PatchSchedule.lr_factor`. The
    first is kept in the group as ``initial_lr``, where a run that goes on from a checkpoint finds it. Use no other
    scheduler, and one optimizer: Lightning counts the steps of all.

    Args:
        schedule: the stages; the trainer's ``max_steps`` is its ``total_steps``.
        warmup_steps: see `PatchSchedule.lr_factor`, as for the others.
        decay_ratio: the last part of each stage, over which the learning rate falls.
        end_factor: what it falls to.

    Raises:
        IndexError: a step past the end of the schedule.
    """

    def __init__(
        self, schedule: PatchSchedule, *, warmup_steps: int = 0, decay_ratio: float = 0.0, end_factor: float = 1.0
    ) -> None:
        self.schedule = schedule
        self.lr_options = (warmup_steps, decay_ratio, end_factor)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Set the stage and the learning rate of the step that this batch belongs to."""
        module.patch = self.schedule.at(trainer.global_step).patch
        factor = self.schedule.lr_factor(trainer.global_step, *self.lr_options)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
