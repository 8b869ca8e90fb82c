"""What a training run is asked for: the paper's table as defaults, a preset for each size, the command line.

`reference.train` reads its command line with it; comparisons make a `TrainConfig` for each of their runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from npp_kernels import PatchSchedule
from reference.network.model import SIZES, ModelConfig
from reference.training.optimizer import AdamWConfig
from reference.training.step import GRADIENTS, PARALLEL, PRECISIONS, StepConfig


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Return a field with what the command line says of it."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the defaults are the paper's (NPP, arXiv 2412.15321, table of hyperparameters)."""

    model: str = option("B", "size of the model", tuple(SIZES))
    data: str = option(
        "", "what to train on, as reference.tokens.codes names it: embedded, fashion_mnist, codes:DIR, npz:FILE, …"
    )
    output: str = option("runs/train", "folder of checkpoints and logs; a run that stopped there goes on")
    levels: int = option(2, "stages, coarse to fine: 1 is plain next-token training, 2 is patches 2 and 1, and so on")
    rate: float = option(0.5, "each stage ends at this part of the end of the next")
    epochs: float = option(300.0, "length of the run; a fraction is allowed")
    batch_size: int = option(256, "images of a step, over all processes and accumulated parts")
    accumulate: int = option(1, "backward passes in a step")
    lr: float = option(1e-4, "peak learning rate")
    end_lr: float = option(1e-5, "learning rate at the end of each stage")
    warmup_epochs: float = option(5.0, "linear warm-up at the start of each stage")
    decay_ratio: float = option(0.2, "part of each stage over which the learning rate decays, linearly")
    weight_decay: float = option(0.05, "of everything but the norms")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.95, "of AdamW")
    clip: float = option(1.0, "largest norm of the gradient; 0 for no limit")
    dropout: float = option(0.1, "of embeddings, attention and feed-forward")
    drop_path: float = option(0.0, "stochastic depth of the last layer; dropout in the layers is then off")
    class_dropout: float = option(0.1, "of the class, for classifier-free guidance")
    guidance: float = option(2.0, "scale of classifier-free guidance, for sampling from the checkpoint")
    ema: float = option(0.0, "decay of the moving average of the weights; 0 for none. The log is of the raw weights")
    precision: str = option("auto", "auto is bf16 on a GPU and fp32 elsewhere", ("auto", *PRECISIONS))
    compile: str = option("auto", "compile the layers; auto does on a GPU", ("auto", "on", "off"))
    graph: bool = option(True, "one CUDA graph for each stage")
    parallel: str = option(
        "sharded",
        "several processes: sharded optimizer, replicated optimizer, fsdp for a model that one GPU cannot hold, or "
        "PyTorch's ddp for comparison; the last two without a graph",
        PARALLEL,
    )
    gradients: str = option(
        "auto", "what gradients are added up in over the processes; auto is the dtype of the model", GRADIENTS
    )
    official: bool = option(False, "the official code's formulation and optimizer, for comparison")
    seed: int = option(0, "of weights, data order, augmentation and dropout")
    workers: int = option(2, "processes that read code directories; 0 for none")
    log_every: int = option(50, "steps between lines of the log, and between checks for NaN")
    evaluate_every: int = option(
        0, "steps between evaluations on the test split at patch 1, and at the end; 0 for none"
    )
    checkpoint_every: int = option(1000, "steps between checkpoints")
    lost_after: float = option(
        20.0, "seconds without a sign of life after which another process counts as lost; 0 for never"
    )
    tensorboard: bool = option(False, "write TensorBoard events as well as the CSV log")

    def model_config(self, vocab_size: int, grid: tuple[int, int], num_classes: int) -> ModelConfig:
        """Return the model of this run, on data of these dimensions."""
        return ModelConfig.named(
            self.model,
            vocab_size=vocab_size,
            grid=grid,
            num_classes=num_classes,
            token_dropout=self.dropout,
            dropout=0.0 if self.drop_path else self.dropout,
            drop_path=self.drop_path,
            class_dropout=self.class_dropout,
        )

    def step_config(self, device_type: str) -> StepConfig:
        """Return how this run computes its steps on a kind of device."""
        on_gpu = device_type == "cuda"
        automatic_precision = "fp32" if not on_gpu else "autocast" if self.official else "bf16"
        return StepConfig(
            precision=automatic_precision if self.precision == "auto" else self.precision,
            compile=on_gpu if self.compile == "auto" else self.compile == "on",
            graph=self.graph and on_gpu,
            accumulate=self.accumulate,
            official=self.official,
            parallel=self.parallel,
            gradients=self.gradients,
        )

    def adamw_config(self) -> AdamWConfig:
        """Return the optimizer's settings."""
        return AdamWConfig(self.beta1, self.beta2, self.weight_decay, self.clip, self.ema)

    def schedule(self, steps_per_epoch: int) -> PatchSchedule:
        """Return the stages of this run."""
        return PatchSchedule.coarse_to_fine(self.levels, math.floor(self.epochs * steps_per_epoch), self.rate)

    def lr_at(self, step: int, schedule: PatchSchedule, steps_per_epoch: int) -> float:
        """Return the learning rate of a step."""
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        return self.lr * schedule.lr_factor(step, warmup_steps, self.decay_ratio, self.end_lr / self.lr)


# What a size changes. B to XXL have the paper's guidance scales; tiny and small train in minutes on a CPU, on what the
# repository carries; S and M in half a minute and a minute on a large GPU, on images by the ten thousand.
PRESETS = {
    "tiny": TrainConfig(
        model="tiny", data="embedded", epochs=10, batch_size=32, lr=3e-3, end_lr=3e-4, warmup_epochs=0.5
    ),
    "small": TrainConfig(
        model="small", data="embedded", epochs=6, batch_size=32, lr=3e-3, end_lr=3e-4, warmup_epochs=0.5, guidance=1.5
    ),
    "S": TrainConfig(model="S", epochs=16, lr=1e-3, end_lr=1e-4, warmup_epochs=0.5, guidance=1.5),
    "M": TrainConfig(model="M", epochs=16, lr=1e-3, end_lr=1e-4, warmup_epochs=0.5, guidance=1.5),
    "B": TrainConfig(model="B", guidance=2.0),
    "L": TrainConfig(model="L", guidance=1.75),
    "XL": TrainConfig(model="XL", guidance=1.75),
    "XXL": TrainConfig(model="XXL", guidance=1.65),
}

# What may change between the parts of one run without changing its numbers.
FREE_TO_CHANGE = {
    "output", "workers", "log_every", "evaluate_every", "checkpoint_every", "lost_after", "tensorboard", "guidance",
}  # fmt: skip
# And what changes roundings only, as the number of processes does.
FREE_TO_CHANGE |= {"parallel"}


def options_parser(prog: str, description: str, leave_out: Collection[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with an option for each field of `TrainConfig` that is not left out."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for entry in fields(TrainConfig):
        if entry.name in leave_out:
            continue
        name, text = "--" + entry.name.replace("_", "-"), entry.metadata["help"]
        if isinstance(entry.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=entry.default, help=text)
        else:
            kind, choices = type(entry.default), entry.metadata["choices"]
            parser.add_argument(name, type=kind, choices=choices, default=entry.default, help=text)
    return parser


def read_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **defaults: Any
) -> tuple[TrainConfig, argparse.Namespace]:
    """Read a command line: a run, and all options.

    The run is the preset of ``--model``, changed by ``defaults`` and then by the options that are given.
    """
    preset = replace(PRESETS[parser.parse_args(arguments).model], **defaults)
    parser.set_defaults(**vars(preset))
    options = parser.parse_args(arguments)
    config = replace(preset, **{entry.name: getattr(options, entry.name) for entry in fields(TrainConfig)})
    return config, options


def require_data(parser: argparse.ArgumentParser, config: TrainConfig) -> None:
    """End with the parser's message where neither the preset nor an option says what to train on."""
    if not config.data:
        parser.error("--data is needed with this --model: embedded, fashion_mnist, codes:DIR or npz:FILE")


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Read a run from the command line: the preset of ``--model``, changed by the other options.

    >>> parse(["--model", "XL", "--data", "codes:DIR", "--levels", "3"]).guidance
    1.75
    """
    parser = options_parser("python -m reference.train", "Train a class-conditional image model coarse to fine.")
    config, _ = read_options(parser, arguments)
    require_data(parser, config)
    return config
