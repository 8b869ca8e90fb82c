"""A training step of the official NPP code: its own forward, the patched one, and both as a graph of the whole step.

    python -m bench.trainer_step --official DIR --json FILE      # under four minutes on an H100

``DIR`` holds the folders ``autoregressive/`` and ``utils/`` of github.com/PKU-YuanGroup/Next-Patch-Prediction. Read are
``autoregressive/models/gpt.py``, ``utils/drop_path.py`` and ``utils/patchify.py``. The model, its dropout, autocast to
bfloat16, clipping and fused AdamW are those of its training script, the batch is random and the same for all.

Three modes: ``compile`` is `torch.compile` as the script has it, ``graph`` the same compiled model under
`npp_kernels.StepGraph`, ``reduce-overhead`` `torch.compile(mode="reduce-overhead")`. Most of the time goes into
compiling; ``--compile-ahead N`` does that first, for the compiler's cache on disk. Each part runs in a process of its
own, as a user's does: what a process has compiled and measured before may slow its host. It is timed after its loss was
compared with the official one's. The file is written after each; a part that fails or for which no time is left is
written down as such, and the others go on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npp_kernels import StepGraph
from npp_kernels.integrations.llamagen import apply, coarse_rotary_table

CONTENDERS = ("official", "patched")
SIZES = {"B": (12, 12, 768), "L": (24, 16, 1024), "tiny": (2, 2, 64)}  # layers, heads, width
SETTLING_STEPS = 10
MIN_STEPS = 20
PART_SECONDS = 60  # that the last part may take beyond the time limit
# Of a process that compiles ahead: by itself each would start a process of the compiler's for every core.
ALONE = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}


def make_model(options: argparse.Namespace, device: torch.device) -> Any:
    """Return their model, with the dropout of their training script."""
    from autoregressive.models import gpt  # from --official

    layers, heads, width = SIZES[options.size]
    torch.manual_seed(0)
    config = gpt.ModelArgs(
        n_layer=layers, n_head=heads, dim=width, vocab_size=16384, block_size=256, num_classes=1000, cls_token_num=1,
        model_type="c2i", resid_dropout_p=0.1, ffn_dropout_p=0.1, token_dropout_p=0.1,
    )  # fmt: skip
    model = gpt.Transformer(config).to(device).train()
    nn.init.normal_(model.output.weight, std=0.02)  # at zero every arithmetic gives the same loss
    return model


@contextmanager
def _targets_unfold() -> Iterator[None]:
    """Let their code cut ids into patches without the compiler: PyTorch's own `F.unfold` takes no integers."""
    from autoregressive.models import gpt  # from --official

    theirs = getattr(gpt, "target_patchify", None)
    if theirs is not None:
        gpt.target_patchify = lambda ids, **options: theirs(ids.double(), **options).long()
    try:
        yield
    finally:
        if theirs is not None:
            gpt.target_patchify = theirs


class Part:
    """One contender at one patch: the model, its batch, and the step of the training script."""

    def __init__(self, options: argparse.Namespace, contender: str, patch: int, mode: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.patch = patch
        self.model = make_model(options, self.device)
        self.table = coarse_rotary_table(self.model, patch).to(self.device)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(16384, (options.images, 256), generator=generator).to(self.device)
        self.labels = torch.randint(1000, (options.images,), generator=generator).to(self.device)
        self.forward: Callable[..., Any] = self.model
        fine = self.model.freqs_cis
        expected = self.loss_of_one_image()
        self.model.freqs_cis = fine  # their forward puts its own there
        if contender == "patched":
            apply(self.model)
            ours = self.loss_of_one_image()
            if not abs(ours - expected) <= 2e-3 * expected:
                raise ValueError(f"loss: expected the official one, {expected}, got {ours} at patch {patch}")
        self.forward = torch.compile(self.model, mode="reduce-overhead" if mode == "reduce-overhead" else None)
        on_gpu = self.device.type == "cuda"
        lr = torch.tensor(1e-4, device=self.device)
        parameters = list(self.model.parameters())
        self.theirs = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=on_gpu)
        self.capturable = torch.optim.AdamW(parameters, lr, weight_decay=0.05, fused=on_gpu, capturable=on_gpu)
        self.optimizer: torch.optim.Optimizer = self.theirs
        self.marks = mode == "reduce-overhead"

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, as the training script computes it."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.forward(
                cond_idx=labels, idx=tokens, targets=tokens, p=self.patch, patch_size=self.patch**2,
                freqs_cis=self.table,
            )[1]  # fmt: skip

    @torch.no_grad()
    def loss_of_one_image(self) -> float:
        """Return the loss of the first image, with the same dropout each time, without the compiler."""
        torch.manual_seed(2)
        with _targets_unfold():
            return self.loss(self.tokens[:1], self.labels[:1]).item()

    def step(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Train on one batch."""
        if self.marks:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.loss(tokens, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach().clone()


def measure(step: Callable[[Tensor, Tensor], Tensor], part: Part, seconds: float) -> dict[str, Any]:
    """Return the median time of steps that follow each other without a pause, and the last loss."""
    batch = part.tokens, part.labels
    started = time.perf_counter()
    for _ in range(SETTLING_STEPS):
        loss = step(*batch)
    settling = loss.item()  # waits
    set_up = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(3):
        step(*batch).item()
    count = max(MIN_STEPS, int(3 * seconds / (time.perf_counter() - started)))
    if part.device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            loss = step(*batch)
            event.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
    else:
        moments = [time.perf_counter()]
        for _ in range(count):
            loss = step(*batch)
            moments.append(time.perf_counter())
        times = [1e3 * (end - start) for start, end in itertools.pairwise(moments)]
    return {
        "median_ms": statistics.median(times),
        "fastest_ms": min(times),
        "slowest_ms": max(times),
        "steps": count,
        "loss": [settling, loss.item()],
        "set_up_seconds": set_up,
    }


def memory() -> dict[str, float]:
    """Return the peak since the last reset, and what the process has taken."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def run_part(options: argparse.Namespace, contender: str, patch: int, mode: str) -> list[dict[str, Any]]:
    """Measure one contender at one patch; ``compile`` and ``graph`` are two cells from one compiled model."""
    cells: list[dict[str, Any]] = []
    name = {"contender": contender, "patch": patch}
    current = mode
    try:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        part = Part(options, contender, patch, mode)
        train = StepGraph(part.step, optimizers=part.capturable)
        on_gpu = part.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()  # the model was made on another stream than it runs on
        # Compiled code keeps its autograd nodes on the stream of its first run: let that be the stream of the capture.
        with torch.cuda.stream(train.stream) if on_gpu and mode == "compile" else nullcontext():
            if options.warm:
                for _ in range(2):
                    part.step(part.tokens, part.labels).item()
                return []
            cells.append(name | {"mode": mode} | measure(part.step, part, options.seconds) | memory())
        if mode == "compile":
            current = "graph"
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            part.optimizer = part.capturable
            cells.append(name | {"mode": current} | measure(train, part, options.seconds) | memory())
    except Exception as error:  # whatever fails in one part, the others are still wanted
        cells.append(name | {"mode": current, "error": f"{type(error).__name__}: {str(error)[:600]}"})
    return cells


Name = tuple[str, int, str]  # of a part: contender, patch, mode


def _command(options: argparse.Namespace, part: Name) -> list[str]:
    words = ["--official", str(options.official), "--images", str(options.images), "--size", options.size]
    words += ["--seconds", str(options.seconds), "--only", ":".join(map(str, part))]
    return [sys.executable, "-m", "bench.trainer_step", *words]


def run_apart(options: argparse.Namespace, part: Name, limit: float) -> list[dict[str, Any]]:
    """Run a part in a process of its own; what ends it is written down."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.json"
        try:
            done = subprocess.run(
                [*_command(options, part), "--json", str(path)],
                timeout=limit,
                capture_output=True,
                text=True,
                check=False,
            )
            reason = f"ended with status {done.returncode}: {done.stderr[-500:]}"
        except subprocess.TimeoutExpired:
            reason = f"not over after {limit:.0f} s"
        if path.exists():
            cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
            return cells
    contender, patch, mode = part
    return [{"contender": contender, "patch": patch, "mode": mode, "error": reason}]


def compile_ahead(options: argparse.Namespace, parts: Sequence[Name], limit: float) -> None:
    """Compile all parts at once, in processes of their own; what fails here fails again later, and is written down."""

    def run(part: Name) -> None:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*_command(options, part), "--warm"], timeout=limit, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, check=False, env=os.environ | ALONE,
            )  # fmt: skip

    with ThreadPoolExecutor(options.compile_ahead) as pool:
        list(pool.map(run, parts))


def report(cells: Sequence[dict[str, Any]]) -> str:
    """Return a table of the times, and what two levels cost of plain training."""
    times = {(cell["contender"], cell["mode"], cell["patch"]): cell.get("median_ms") for cell in cells}
    patches = sorted({cell["patch"] for cell in cells})
    lines = ["| ms a step | " + " | ".join(f"patch {patch}" for patch in patches) + " | two levels / plain |"]
    lines.append("|---" * (len(patches) + 2) + "|")
    for contender, mode in dict.fromkeys((cell["contender"], cell["mode"]) for cell in cells):
        row = [times.get((contender, mode, patch)) for patch in patches]
        plain, coarse = (times.get((contender, mode, patch)) for patch in (1, 2))
        ratio = f"{(plain + coarse) / (2 * plain):.3f}" if plain and coarse else "-"
        shown = " | ".join("-" if value is None else f"{value:.2f}" for value in row)
        lines.append(f"| {contender}, {mode} | {shown} | {ratio} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all parts that there is time for; return 0 where each of them has a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="the folder with autoregressive/ and utils/")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--size", choices=SIZES, default="B")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--patches", default="4,2,1", help="in this order")
    parser.add_argument("--modes", default="compile,reduce-overhead", help="compile also measures graph")
    parser.add_argument("--seconds", type=float, default=2.5, help="of steps for each time, and at least 20 steps")
    parser.add_argument("--compile-ahead", type=int, default=6, help="processes that compile first; 0 for none")
    parser.add_argument("--time-limit", type=float, default=230.0, help="seconds; no part begins after that")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not (options.official / "autoregressive" / "models" / "gpt.py").exists():
        parser.error(f"--official: expected a folder with autoregressive/models/gpt.py, got {options.official}")
    sys.path.insert(0, str(options.official))
    if options.only:
        contender, patch, mode = options.only.split(":")
        cells = run_part(options, contender, int(patch), mode)
        if options.json:
            options.json.write_text(json.dumps(cells), encoding="utf-8")
        return 0

    started = time.monotonic()
    patches, modes = [int(patch) for patch in options.patches.split(",")], options.modes.split(",")
    parts = [(contender, patch, mode) for mode in modes for patch in patches for contender in CONTENDERS]
    if options.compile_ahead:
        compile_ahead(options, parts, limit=options.time_limit / 2)
        print(f"{time.monotonic() - started:5.0f} s  compiled ahead", flush=True)
    cells = []
    on_gpu = torch.cuda.is_available()
    for contender, patch, mode in parts:
        seconds = time.monotonic() - started
        if seconds > options.time_limit:
            new = [
                {"contender": contender, "patch": patch, "mode": mode, "error": f"no time left after {seconds:.0f} s"}
            ]
        else:
            new = run_apart(options, (contender, patch, mode), limit=options.time_limit - seconds + PART_SECONDS)
        for cell in new:
            outcome = cell.get("error") or f"{cell['median_ms']:.2f} ms, losses {cell['loss']}"
            print(
                f"{time.monotonic() - started:5.0f} s  {contender}, patch {patch}, {cell['mode']}: {outcome}",
                flush=True,
            )
        cells += new
        if options.json:
            conditions = {
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
                "torch": torch.__version__,
                "size": options.size,
                "images": options.images,
            }
            options.json.write_text(json.dumps(conditions | {"cells": cells}, indent=1), encoding="utf-8")
    print(report(cells))
    return int(any("error" in cell for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
