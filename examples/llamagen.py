"""LlamaGen's and the official NPP training loop, with one line more: `apply(model)`.

    python -m examples.llamagen                 # half a minute on one core of a CPU
    python -m examples.llamagen --official DIR  # their own model, where DIR holds their code; needs a GPU

It trains the same model twice, with its own forward and with the patched one, and prints loss and time of each stage.
Both compute the same thing: the losses agree until rounding, which Adam amplifies, tells the runs apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples import images
from examples.llamagen_model import Transformer
from npp_kernels import StepGraph
from npp_kernels.integrations.llamagen import apply, coarse_rotary_table, official_schedule

BATCH_SIZE = 8


def make_model(official: str | None) -> Any:
    """Return a small model: the stand-in, or theirs."""
    torch.manual_seed(0)
    if official is None:
        return Transformer(vocab_size=images.VOCAB_SIZE, dim=64, n_layer=2, n_head=2, dropout=0.1, class_dropout=0.1)
    sys.path.insert(0, official)
    from autoregressive.models.gpt import ModelArgs  # type: ignore[import-not-found]
    from autoregressive.models.gpt import Transformer as Theirs

    return Theirs(ModelArgs(dim=64, n_layer=2, n_head=2, vocab_size=images.VOCAB_SIZE, num_classes=10))


def train(model: Any, epochs: int, *, patched: bool, device: torch.device) -> list[float]:
    """Train as their script does; print a line for each stage, and return their losses."""
    tables = {p: coarse_rotary_table(model, p).to(device) for p in (1, 2, 4)}
    model = model.to(device).train()
    if patched:
        apply(model)  # the line
    tokens, labels = images.load()
    steps_per_epoch = 10  # theirs: int(len(dataset) / global_batch_size)
    schedule = official_schedule(levels=3, epochs=epochs, steps_per_epoch=steps_per_epoch)

    lr = torch.tensor(1e-3, device=device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05, fused=on_gpu, capturable=on_gpu)

    def step(z_indices: Tensor, c_indices: Tensor, *, patch: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            _, loss = model(
                cond_idx=c_indices, idx=z_indices, targets=z_indices, p=patch, patch_size=patch**2,
                freqs_cis=tables[patch],
            )  # fmt: skip
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    run = StepGraph(step, optimizers=optimizer, release_past=True, enabled=patched)
    results = []
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for stage in schedule.stages:
        started, losses = time.perf_counter(), []
        for number in range(stage.start, stage.end):
            lr.fill_(1e-3 * schedule.lr_factor(number, warmup_steps=5, decay_ratio=0.2, end_factor=0.1))
            chosen = torch.randint(len(tokens), (BATCH_SIZE,), generator=generator)
            batch = tokens[chosen].flatten(1).to(device), labels[chosen].to(device)
            losses.append(run(*batch, patch=stage.patch))
        results.append(torch.stack(losses[-10:]).mean().item())
        seconds = (time.perf_counter() - started) / len(losses)
        name = "patched" if patched else "its own"
        print(
            f"{name}, patch {stage.patch}: {len(losses)} steps, loss {results[-1]:.4f}, {1e3 * seconds:.0f} ms a step"
        )
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with the model's own forward, and with the patched one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="of 10 steps")
    parser.add_argument("--official", metavar="DIR", help="a folder with their autoregressive/ and utils/")
    options = parser.parse_args(arguments)
    if options.official is not None and not Path(options.official, "autoregressive/models/gpt.py").exists():
        parser.error(f"--official: expected a folder with autoregressive/models/gpt.py, got {options.official}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own, ours = (
        train(make_model(options.official), options.epochs, patched=patched, device=device) for patched in (False, True)
    )
    print("difference of the stages' losses:", *(f"{abs(a - b) / a:.1e}" for a, b in zip(own, ours, strict=True)))


if __name__ == "__main__":
    main()
