"""Checkpoints that survive being killed at any moment, and models read from them or from the official ones.

A checkpoint is written beside its name, forced to disk, and renamed: under its name there is never half of one. The
last two are kept, and reading falls back to the older where the newer is damaged.

    step-00001000.pt    model, ema, exp_avg, exp_avg_sq    fp32, by the official names
                        counters, sums, step, seconds, …   where the run is
                        random                             state of the random generators, for each process
                        model_config, train_config         as plain dictionaries
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from reference.model import SIZES, ModelConfig, Transformer

KEPT = 2
_NAME = re.compile(r"step-(\d{8})\.pt")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Write ``state`` under the name of its ``state["step"]``, and remove all but the last two checkpoints.

    >>> import tempfile, torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> for step in (10, 20, 30):
    ...     path = save(folder, {"step": step, "model": {"weight": torch.ones(2)}})
    >>> [path.name for path in checkpoints(folder)]
    ['step-00000020.pt', 'step-00000030.pt']
    >>> load_latest(folder)["step"]
    30
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']:08d}.pt"
    partial = path.with_suffix(".partial")  # one name for each step, so a killed attempt is written over
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(folder)
    for old in checkpoints(folder)[:-KEPT]:
        old.unlink()
    for abandoned in folder.glob("step-*.partial"):
        abandoned.unlink()
    return path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of results, which is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def load_latest(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint of a folder that can be read, on the CPU; None where there is no checkpoint at all.

    Raises:
        RuntimeError: there are checkpoints, and none can be read.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: PERF203 - a damaged file raises whatever its first wrong byte leads to
            print(f"{path} cannot be read, trying the one before: {error}", file=sys.stderr)
    if found:
        raise RuntimeError(f"{folder}: none of its {len(found)} checkpoints can be read")
    return None


def load_model(
    path: str | Path, *, grid: tuple[int, int] = (16, 16), ema: bool = True, fast: bool = True
) -> Transformer:
    """Read a model, in evaluation mode, fp32, on the CPU, from a checkpoint of ours or an official one.

    ``load_model("runs/b/step-00001000.pt")`` or ``load_model("c2i_B_256.pt")``.

    Args:
        path: a checkpoint; a folder of ours means its newest.
        grid: tokens on each axis, which an official checkpoint does not say: ``(16, 16)`` at 256×256 pixels.
        ema: take the moving average where there is one.
        fast: as for `Transformer`.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: what is there is not a checkpoint of this architecture.
    """
    path = Path(path)
    if path.is_dir():
        state = load_latest(path)
        if state is None:
            raise FileNotFoundError(f"{path}: expected checkpoints named step-*.pt, found none")
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    parts = ("ema", "model", "state_dict") if ema else ("model", "state_dict")
    weights = next((state[part] for part in parts if state.get(part)), state)
    if "model_config" in state:
        fields = state["model_config"]
        config = ModelConfig(**{**fields, "grid": tuple(fields["grid"])})
    else:
        config = config_of_weights(weights, grid)
    model = Transformer(config, fast=fast)
    model.load_state_dict(weights)
    return model.eval()


def config_of_weights(weights: dict[str, torch.Tensor], grid: tuple[int, int]) -> ModelConfig:
    """Read the dimensions of a model off its weights; the number of heads is that of its named size."""
    needed = ("tok_embeddings.weight", "cls_embedding.embedding_table.weight")
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"weights: expected a class-conditional LlamaGen model, {missing[0]} is missing")
    vocab_size, dim = weights["tok_embeddings.weight"].shape
    num_layers = sum(name.endswith(".attention.wqkv.weight") for name in weights)
    heads = [heads for size_dim, size_layers, heads in SIZES.values() if (size_dim, size_layers) == (dim, num_layers)]
    if not heads:
        raise ValueError(
            f"weights: expected the dimensions of one of {', '.join(SIZES)}, got dim {dim} and {num_layers} layers"
        )
    num_classes = weights["cls_embedding.embedding_table.weight"].shape[0] - 1
    return ModelConfig(vocab_size, grid, num_classes, dim, num_layers, heads[0])


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk: without it, a power cut may bring the old name back."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
