"""A language model that trains on bags of tokens first, and on single tokens then.

PatchTrain (arXiv 2407.12665) and Token-Superposition Training: for the first part of a run, K tokens in a row enter as
the mean of their embeddings, and each bag predicts the K tokens of the next. A sequence of L tokens then takes L / K
positions. The text is this repository's own pages, byte by byte.

    python -m examples.bags_of_text             # half a minute on one core of a CPU

It trains once with bags and once without, for the same number of positions, and prints both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npp_kernels import PatchSchedule, StepGraph, group_mean, group_tokens, linear_patch_cross_entropy

ROOT = Path(__file__).parents[1]
VOCAB_SIZE, LENGTH, BATCH_SIZE, BAG = 256, 128, 8, 4


class Model(nn.Module):
    """A causal transformer over positions, each of them a token or a bag of tokens."""

    def __init__(self, dim: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, VOCAB_SIZE, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def loss(self, tokens: Tensor, patch: int | tuple[int, ...]) -> Any:
        """Score every token of the next bag."""
        groups = group_tokens(tokens, patch, grid=tokens.shape[-1:])  # a text has one axis: 4 and (4,) are the same
        hidden = group_mean(self.embedding.weight, groups[:, :-1])
        length = hidden.shape[1]
        mask = self.mask[:length, :length]  # type: ignore[index]
        hidden = self.body(hidden + self.positions[:length], mask=mask, is_causal=True)
        # "slot": the mean over the places of a bag, as both papers have it; slot_weights= lets later ones count less.
        return linear_patch_cross_entropy(hidden, self.head.weight, groups[:, 1:], normalize="slot")


def train(name: str, schedule: PatchSchedule, text: Tensor, held_out: Tensor) -> float:
    """Train a model; print a line for each stage; return the held-out loss of single tokens."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model().to(device)
    lr = torch.tensor(3e-3, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, capturable=device.type == "cuda")

    def step(tokens: Tensor, *, patch: tuple[int, ...]) -> Tensor:
        loss = model.loss(tokens, patch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    run = StepGraph(step, optimizers=optimizer, release_past=True)
    for stage in schedule.stages:
        started, losses = time.perf_counter(), []
        for number in range(stage.start, stage.end):
            lr.fill_(3e-3 * schedule.lr_factor(number, warmup_steps=10, decay_ratio=0.3, end_factor=0.1))
            starts = torch.randint(len(text) - LENGTH, (BATCH_SIZE, 1))
            losses.append(run(text[starts + torch.arange(LENGTH)].to(device), patch=stage.patch))
        loss = torch.stack(losses[-20:]).mean().item()
        seconds = (time.perf_counter() - started) / len(losses)
        print(f"{name}, bags of {stage.patch}: {len(losses)} steps, loss {loss:.3f}, {1e3 * seconds:.0f} ms a step")
    with torch.no_grad():
        return model.eval().loss(held_out.to(device), (1,)).item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with bags and without, on equally many positions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=120, help="of plain training; with bags half of the cost is theirs"
    )
    options = parser.parse_args(arguments)
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    everything = torch.tensor(list("\n".join(page.read_text(encoding="utf-8") for page in pages).encode()))
    kept = len(everything) // 10 // LENGTH * LENGTH
    text, held_out = everything[:-kept], everything[-kept:].view(-1, LENGTH)

    fine = options.steps // 2  # a bag step has a quarter of the positions, so BAG times as many cost the other half
    with_bags = PatchSchedule([((BAG,), BAG * (options.steps - fine)), ((1,), BAG * (options.steps - fine) + fine)])
    for name, schedule in (("plain", PatchSchedule([((1,), options.steps)])), ("bags", with_bags)):
        print(f"{name}: {train(name, schedule, text, held_out):.3f} nats a byte, held out")


if __name__ == "__main__":
    main()
