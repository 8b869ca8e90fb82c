"""Checkpoints that survive being killed at any moment, and models read from them or from the official ones.

A checkpoint is written beside its name, forced to disk, and renamed: under its name there is never half of one. The
last two are kept, and reading falls back to the older where the newer is damaged: the checksums of the archive's parts,
which PyTorch writes and does not look at, are compared with what is read.

    step-00001000.pt    model, ema, exp_avg, exp_avg_sq    fp32, by the official names
                        counters, sums, step, seconds, …   where the run is
                        random                             state of the random generators, for each process
                        data                               what the images were, as `TokenDataset.fingerprint` says
                        model_config, train_config         as plain dictionaries

Neither file depends on how many processes there were, but for ``random``. A model that FSDP has sharded is written by
all of them, into a folder: ``step-00001000.sharded`` holds the tensors, as `torch.distributed.checkpoint` writes them,
and the rest in ``run.pt``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from reference.network.model import SIZES, ModelConfig, Transformer

KEPT = 2
_NAME = re.compile(r"step-(\d{8})\.(pt|sharded)")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


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
    with written_whole(path) as file:  # one partial name for each step, so a killed attempt is written over
        torch.save(state, file)
    _sync_folder(folder)
    _remove_what_is_over(folder)
    return path


def save_sharded(folder: Path, trained: dict[str, Any], rest: dict[str, Any]) -> Path:
    """Write sharded tensors, each process its parts, and what else belongs to the step ``rest["step"]``; all call it.

    Args:
        folder: of the run, the same for all processes.
        trained: as `TrainStep.state` returns it, with dictionaries of tensors that may be sharded.
        rest: the rest of the state, of which the first process's is written.
    """
    tensors = {part: value for part, value in trained.items() if isinstance(value, dict)}
    rest = rest | {name: value for name, value in trained.items() if name not in tensors}
    is_first = dist.get_rank() == 0
    path = folder / f"step-{rest['step']:08d}.sharded"
    partial = path.with_suffix(".partial")
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    distributed_checkpoint.save(tensors, checkpoint_id=partial)
    if is_first:
        sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
        with written_whole(partial / "run.pt") as file:
            torch.save({**rest, "sizes": sizes}, file)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        _sync_folder(folder)
        _remove_what_is_over(folder)
    dist.barrier()
    return path


def _remove_what_is_over(folder: Path) -> None:
    """Remove all but the last two checkpoints, and what a killed process has left of one."""
    for path in (*checkpoints(folder)[:-KEPT], *folder.glob("step-*.partial")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of results, which is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name once all of it is on disk, and not at all where that fails.

    Raises:
        OSError: the disk is full, or does not take it for another reason; what was written of it is removed.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        # PyTorch's writer ends in an error of its own, "unexpected pos", which hides the one that it came from.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise OSError(
            cause.errno, f"cannot be written, {cause.strerror}; what was there is unchanged", str(path)
        ) from error


def read(path: Path, *, mmap: bool = False, sharded: bool = False) -> dict[str, Any]:
    """Read a checkpoint, ours or another, on the CPU.

    Args:
        path: the file, or the folder of a sharded one.
        mmap: map its tensors in place of reading them; they are then not compared with their checksums.
        sharded: leave the tensors of a sharded one where they are, and return their folder as "sharded".

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or no checkpoint.
    """
    if path.is_dir():
        return _read_sharded(path, whole=not sharded)
    try:
        is_archive = zipfile.is_zipfile(path)  # files of long ago are none, and have no checksums
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
                damaged = None if mmap or packed else archive.testzip()
            if packed:  # which could fill the memory a thousandfold
                raise ValueError(f"its part {packed[0]} is packed, where PyTorch stores it as it is")
            if damaged is not None:
                raise ValueError(f"its part {damaged} is not what was written, by its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_archive)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
        raise ValueError(f"{path}: expected a whole checkpoint, it cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a checkpoint, which is a dictionary, got a {type(state).__name__}")
    return state


def _read_sharded(path: Path, *, whole: bool) -> dict[str, Any]:
    """Read the folder of a sharded checkpoint, whose files must have the sizes that they were written with."""
    state = read(path / "run.pt") if (path / "run.pt").exists() else {}
    for name, size in state.pop("sizes", {"run.pt": 0}).items():
        found = (path / name).stat().st_size if (path / name).exists() else 0
        if found != size or not size:
            raise ValueError(f"{path}: expected a whole checkpoint, but {name} has {found} of {size} bytes")
    if not whole:
        return {**state, "sharded": path}
    with TemporaryDirectory(dir=path.parent) as folder:  # where there is room for one, there should be for another
        dcp_to_torch_save(path, Path(folder) / "whole.pt")
        return {**state, **read(Path(folder) / "whole.pt")}


def load_latest(folder: Path, *, sharded: bool = False) -> dict[str, Any] | None:
    """Read the newest checkpoint of a folder that can be read, on the CPU; None where there is no checkpoint at all.

    The folder of a sharded checkpoint is its own newest. ``sharded`` is `read`'s.

    Raises:
        RuntimeError: there are checkpoints, and none can be read.
    """
    found = [folder] if _NAME.fullmatch(folder.name) else checkpoints(folder)
    for path in reversed(found):
        try:
            return read(path, sharded=sharded)
        except ValueError as error:  # noqa: PERF203 - at most a few files
            print(f"{error}\n{path} cannot be read, trying the one before", file=sys.stderr)
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
        ValueError: what is there is damaged, not a checkpoint of this architecture, or has weights that are not finite.
    """
    path = Path(path)
    if path.is_dir():
        state = load_latest(path)
        if state is None:
            raise FileNotFoundError(f"{path}: expected checkpoints named step-*.pt, found none")
    else:
        state = read(path)
    parts = ("ema", "model", "state_dict") if ema else ("model", "state_dict")
    weights = next((state[part] for part in parts if state.get(part)), state)
    try:
        model = Transformer(_config_of(state, weights, grid), fast=fast)
        model.load_state_dict(weights)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a checkpoint of this architecture: {error}") from error
    if strange := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise ValueError(f"{path}: expected finite weights, got infinities or NaN in {strange[0]}")
    return model.eval()


def _config_of(state: dict[str, Any], weights: Any, grid: tuple[int, int]) -> ModelConfig:
    """Return the dimensions of a checkpoint's model, which ours says and an official one does not."""
    if not isinstance(weights, dict):
        raise ValueError(f"weights: expected a dictionary of tensors, got a {type(weights).__name__}")
    for name, weight in weights.items():
        if weight.numel() * weight.itemsize > weight.untyped_storage().nbytes():
            raise ValueError(f"{name} of the shape {tuple(weight.shape)} is more than its contents")
    if "model_config" in state:
        fields = state["model_config"]
        config = ModelConfig(**{**fields, "grid": tuple(fields["grid"])})
        # Compared before a model is made, which would take the memory of what is only claimed.
        claimed = (config.vocab_size, config.dim), config.num_classes + 1, config.num_layers
        found = _sizes_of(weights)
        if claimed != found:
            raise ValueError(f"model_config: expected the sizes of the weights, {found}, got {claimed}")
        return config
    return config_of_weights(weights, grid)


def _sizes_of(weights: dict[str, torch.Tensor]) -> tuple[tuple[int, ...], int, int]:
    """Return the shape of the embeddings, the rows of the classes' table, and the number of layers."""
    return (
        tuple(weights["tok_embeddings.weight"].shape),
        weights["cls_embedding.embedding_table.weight"].shape[0],
        sum(name.endswith(".attention.wqkv.weight") for name in weights),
    )


def config_of_weights(weights: dict[str, torch.Tensor], grid: tuple[int, int]) -> ModelConfig:
    """Read the dimensions of a model off its weights; the number of heads is that of its named size."""
    needed = ("tok_embeddings.weight", "cls_embedding.embedding_table.weight")
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"weights: expected a class-conditional LlamaGen model, {missing[0]} is missing")
    (vocab_size, dim), class_rows, num_layers = _sizes_of(weights)
    heads = [heads for size_dim, size_layers, heads in SIZES.values() if (size_dim, size_layers) == (dim, num_layers)]
    if not heads:
        raise ValueError(
            f"weights: expected the dimensions of one of {', '.join(SIZES)}, got dim {dim} and {num_layers} layers"
        )
    return ModelConfig(vocab_size, grid, class_rows - 1, dim, num_layers, heads[0])


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk: without it, a power cut may bring the old name back."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
