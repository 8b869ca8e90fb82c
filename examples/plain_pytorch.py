"""Coarse to fine in a training loop of one's own, in plain PyTorch; on a GPU each stage's step is one CUDA graph.

    python -m examples.plain_pytorch            # half a minute on one core of a CPU

It prints the loss and the time of each stage. The last stage is next-token prediction, on which both count.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples import images
from npp_kernels import PatchSchedule, StepGraph, group_mean, group_tokens, linear_patch_cross_entropy


class Model(nn.Module):
    """A causal transformer on images of tokens; it sees a class first, then one vector for each patch."""

    def __init__(self, dim: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(images.VOCAB_SIZE, dim)
        self.classes = nn.Embedding(images.NUM_CLASSES, dim)
        self.rows, self.columns = (nn.Parameter(0.02 * torch.randn(size, dim)) for size in images.GRID)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, images.VOCAB_SIZE, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(math.prod(images.GRID)))

    def loss(self, tokens: Tensor, labels: Tensor, patch: int) -> Any:
        """Score every token of each patch, from the class and the patches before."""
        groups = group_tokens(tokens, patch)  # [B, P, K]: once, and used twice
        means = group_mean(self.embedding.weight, groups[:, :-1])  # [B, P - 1, D]
        # A patch has the position of its place in the coarse grid.
        rows, columns = self.rows[: tokens.shape[1] // patch], self.columns[: tokens.shape[2] // patch]
        places = (rows[:, None] + columns[None]).flatten(0, 1)
        hidden = torch.cat((self.classes(labels)[:, None], means), dim=1) + places
        length = hidden.shape[1]
        hidden = self.body(hidden, mask=self.mask[:length, :length], is_causal=True)  # type: ignore[index]
        return linear_patch_cross_entropy(hidden, self.head.weight, groups)  # logits [B, P, K, V] never exist


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print a line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--levels", type=int, default=3, help="stages: patches 4, 2, 1; 1 is plain training")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, labels = images.load()
    model = Model().to(device)
    schedule = PatchSchedule.coarse_to_fine(options.levels, options.steps)

    # A graph holds addresses: the learning rate is a tensor, and the optimizer keeps its count on the device.
    lr = torch.tensor(3e-3, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, capturable=device.type == "cuda")

    def step(tokens: Tensor, labels: Tensor, *, patch: int) -> Tensor:
        loss = model.loss(tokens, labels, patch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    train = StepGraph(step, optimizers=optimizer, release_past=True)  # on a CPU it calls the function
    print(f"{schedule.relative_cost(images.GRID):.2f} of the cost of {options.steps} plain steps")
    for stage in schedule.stages:
        started, losses = time.perf_counter(), []
        for number in range(stage.start, stage.end):
            lr.fill_(3e-3 * schedule.lr_factor(number, warmup_steps=5, decay_ratio=0.2, end_factor=0.1))
            chosen = torch.randint(100, len(tokens), (8,))
            batch = tokens[chosen].to(device), labels[chosen].to(device)
            losses.append(train(*batch, patch=stage.patch))
        mean = torch.stack(losses[-10:]).mean().item()  # the only wait for the device
        seconds = (time.perf_counter() - started) / len(losses)
        print(f"patch {stage.patch}: {len(losses)} steps, loss {mean:.3f} nats a token, {1e3 * seconds:.0f} ms a step")
    with torch.no_grad():
        held_out = model.eval().loss(tokens[:100].to(device), labels[:100].to(device), 1)
    frequencies = torch.bincount(tokens.flatten()) / tokens.numel()
    print(
        f"held out, patch 1: {held_out.item():.3f} nats a token; by frequency alone "
        f"{torch.special.entr(frequencies).sum().item():.3f}"
    )


if __name__ == "__main__":
    main()
