"""A few training steps in each way in which processes share them, for `test_data_parallel`.

    torchrun --nproc-per-node 2 -m tests.parallel_runs FOLDER [WAY ...]

Each process writes what came out of each way to ``FOLDER/WAY-RANK.pt``.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import reference.training.data_parallel
from reference.network.model import ModelConfig, Transformer
from reference.training.optimizer import AdamWConfig
from reference.training.processes import process_group
from reference.training.step import StepConfig, TrainStep

# Every parameter's size is a multiple of 64, as the attention's kernels on a GPU want it; no dropout, so that the
# numbers do not depend on who draws. Buckets of 20,000 make four of it.
CONFIG = ModelConfig(
    vocab_size=96, grid=(4, 4), num_classes=5, dim=64, num_layers=3, num_heads=2, token_dropout=0.0, dropout=0.0,
    class_dropout=0.0,
)  # fmt: skip
BUCKET_SIZE = 20_000
ADAMW = AdamWConfig(clip=0.2, weight_decay=0.3, ema=0.9)  # the gradient's norm is about 1: clipping acts
PATCHES = (2,) * 6 + (1,) * 6  # on a GPU, three of each are without a graph
IMAGES = 12


def options(**others):
    return {"precision": "fp32", "compile": False, **others}


WAYS = {
    "sharded": options(),
    "sharded again": options(),
    "replicated": options(parallel="replicated"),
    "ddp": options(parallel="ddp"),
    "fsdp": options(parallel="fsdp"),
    "fsdp parts": options(parallel="fsdp", accumulate=3),
    "bf16 sharded": options(precision="bf16"),
    "bf16 replicated": options(precision="bf16", parallel="replicated"),
    "bf16 fp32 gradients": options(precision="bf16", gradients="fp32"),
    "bf16 without a graph": options(precision="bf16", graph=False),
    "bf16 compiled": options(precision="bf16", compile=True),
    "sharded parts": options(accumulate=3),
    "bf16 sharded parts": options(precision="bf16", accumulate=3),
    "bf16 replicated parts": options(precision="bf16", accumulate=3, parallel="replicated"),
}


def model_on(device):
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    torch.nn.init.normal_(model.output.weight, std=0.1)  # at zero, the first step would train nothing but itself
    return model.to(device).train()


def batch_of(step, rank=0, processes=1):
    """Return this process's part of a step's batch."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(CONFIG.vocab_size, (IMAGES, *CONFIG.grid), generator=generator)
    labels = torch.randint(CONFIG.num_classes, (IMAGES,), generator=generator)
    part = slice(rank * IMAGES // processes, (rank + 1) * IMAGES // processes)
    return tokens[part], labels[part]


def trained(device, **options):
    """Train; return losses, norms of gradients, the state, which only the first process has, the weights, and more."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    step = TrainStep(model_on(device), StepConfig(**options), ADAMW, batch_size=IMAGES // processes)
    losses, norms, gradients = [], [], {}
    for number, patch in enumerate(PATCHES):
        step.run(*batch_of(number, rank, processes), patch=patch, lr=1e-2 / (number + 1))
        progress = step.report()
        losses.append(progress.loss)
        norms.append(progress.gradient_norm)
        if number == 0:  # the first moments are the gradient times a number that is the same for all
            gradients = {name: whole(tensor) for name, tensor in step.state().get("exp_avg", {}).items()}
    weights = {name: whole(parameter) for name, parameter in step.model.named_parameters()}
    state = {
        part: {name: whole(tensor) for name, tensor in tensors.items()} if isinstance(tensors, dict) else tensors
        for part, tensors in step.state().items()
    }
    graphs = {"captured": len(step._run.captured), "asks for graphs": step._run.enabled}
    step.close()
    results = {"losses": losses, "norms": norms, "gradients": gradients, "state": state, "weights": weights}
    return {**results, **graphs}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def main():
    reference.training.data_parallel.BUCKET_SIZE = BUCKET_SIZE
    folder, *ways = sys.argv[1:]
    with process_group() as device:
        for way in ways or WAYS:
            result = trained(device, **WAYS[way])
            torch.save(result, Path(folder) / f"{way}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
