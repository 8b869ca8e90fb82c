"""A small model and its steps, and short runs of the trainer with what they logged: for the tests of training.

Used by test_optimizer.py and by the tests whose names begin with test_train.
"""

import csv

import torch

from reference.network.model import ModelConfig, Transformer
from reference.training.optimizer import AdamWConfig
from reference.training.step import StepConfig, TrainStep

CONFIG = ModelConfig(
    vocab_size=37, grid=(4, 4), num_classes=5, dim=24, num_layers=2, num_heads=2, token_dropout=0.0, dropout=0.0,
    class_dropout=0.0,
)  # fmt: skip


def model_of(config=CONFIG, *, fast=True, device="cpu"):
    torch.manual_seed(0)
    model = Transformer(config, fast=fast)
    torch.nn.init.normal_(model.output.weight, std=0.1)  # at zero, the first step would train nothing but itself
    return model.to(device).train()


def batch_of(step, batch_size=6):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(CONFIG.vocab_size, (batch_size, *CONFIG.grid), generator=generator)
    return tokens, torch.randint(CONFIG.num_classes, (batch_size,), generator=generator)


def train_steps(config, adamw=None, *, patches=(2, 2, 1, 1), device="cpu", model=None):
    """Train a few steps; return the step, and the mean loss of each."""
    model = model or model_of(fast=not config.official, device=device)
    step = TrainStep(model, config, adamw or AdamWConfig(), batch_size=6)
    losses = []
    for number, patch in enumerate(patches):
        step.run(*batch_of(number), patch=patch, lr=1e-2 / (number + 1))
        losses.append(step.report().loss)
    return step, losses


def assert_same_weights(step, other, **tolerance):
    expected = other.optimizer.state()["model"]
    for name, weight in step.optimizer.state()["model"].items():
        torch.testing.assert_close(weight, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


FP32 = StepConfig(precision="fp32", compile=False)


def arguments_of(folder, *others):
    """A run of 40 steps, 20 of them at patch 2, with a checkpoint every 8."""
    fixed = ["--model", "tiny", "--epochs", "0.5", "--batch-size", "20", "--workers", "0", "--checkpoint-every", "8"]
    return [*fixed, "--log-every", "5", "--output", str(folder), *others]


def logged(folder, columns=("step", "patch", "lr", "loss", "gradient_norm", "test_nll")):
    with (folder / "log.csv").open(newline="") as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]
