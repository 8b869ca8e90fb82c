"""Coarse to fine in Lightning: the trainer is theirs, the stages come from a callback.

    pip install '.[integrations]'
    python -m examples.lightning_images         # a third of a minute on one core of a CPU

It prints loss and time of each stage, and the validation loss, which is at patch 1 throughout.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from examples import images
from examples.plain_pytorch import Model
from npp_kernels import PatchSchedule
from npp_kernels.integrations.lightning import PatchStages


class Stages(PatchStages, pl.Callback):
    """The callback: the mix-in first."""


class Report(pl.Callback):
    """Prints a line at the end of each stage."""

    def __init__(self, schedule: PatchSchedule) -> None:
        self.schedule = schedule
        self.losses: list[Tensor] = []
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss; at the end of a stage, print."""
        self.losses.append(outputs["loss"].detach())
        stage = self.schedule.at(trainer.global_step - 1)
        if trainer.global_step == stage.end:
            loss, seconds = torch.stack(self.losses[-10:]).mean().item(), time.perf_counter() - self.started
            milliseconds = 1e3 * seconds / len(self.losses)
            print(f"patch {stage.patch}: {len(self.losses)} steps, loss {loss:.3f}, {milliseconds:.0f} ms a step")
            self.losses, self.started = [], time.perf_counter()


class Module(pl.LightningModule):
    """Reads `self.patch`, which the callback sets, and nothing else of the schedule."""

    patch: int

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss at the stage's patch."""
        return self.model.loss(*batch, self.patch)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the loss at patch 1."""
        self.log("validation_loss", self.model.loss(*batch, self.patch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the one optimizer; the callback sets its learning rate."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print a line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    tokens, labels = images.load()
    schedule = PatchSchedule.coarse_to_fine(levels=3, total_steps=options.steps)
    trainer = pl.Trainer(
        max_steps=schedule.total_steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=[Stages(schedule, warmup_steps=5, decay_ratio=0.2, end_factor=0.1), Report(schedule)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accelerator="auto",
        devices=1,
    )
    train_loader = DataLoader(TensorDataset(tokens[100:], labels[100:]), batch_size=8, shuffle=True)
    held_out = DataLoader(TensorDataset(tokens[:100], labels[:100]), batch_size=50)
    module = Module()
    trainer.fit(module, train_loader, held_out)
    trainer.validate(module, held_out, verbose=False)
    print(f"held out, patch 1: {trainer.callback_metrics['validation_loss'].item():.3f} nats a token")


if __name__ == "__main__":
    main()
