"""Milliseconds of a training step of a Llama of about 100M parameters from transformers, before and after.

    python -m bench.transformers_step --output results.json     # a GPU; --small for a look on a CPU

Forward under autocast, backward, clipping, fused AdamW; 16 sequences of 1,024 tokens, as the model's own loss takes
them, and patched. Forms of one mode take turns, so that clock and heat are shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import npp_kernels
from npp_kernels.integrations.transformers import apply

WARM_UP, ROUNDS = 10, 15
MODES = ["eager", "layers compiled", "StepGraph", "layers compiled, StepGraph"]


def make_model(small: bool, device: str) -> Any:
    """Return a Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, vocabulary = (64, 2, 512) if small else (768, 12, 32000)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.to(device).train()


def make_step(model: Any, patched: Any, graph: bool) -> Callable[..., torch.Tensor]:
    """Return a user's step, of tokens and the patch; as a CUDA graph where asked for."""
    device = next(model.parameters()).device.type
    cuda = device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-4, device=device), fused=cuda, capturable=cuda)

    # A cache keeps the model from looking whether sequences are packed, which waits for the GPU; without a graph it
    # only costs time, and compiled layers compile anew for each of its layers.
    options = {} if patched is not None else {"use_cache": graph}

    def step(ids: torch.Tensor, *, patch: int) -> torch.Tensor:
        if patched is not None:
            patched.patch = patch
        with torch.autocast(device, torch.bfloat16):
            loss: torch.Tensor = model(input_ids=ids, labels=ids, **options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return npp_kernels.StepGraph(step, optimizers=optimizer) if graph else step


def clock(steps: Mapping[str, Callable[..., Any]], cuda: bool) -> dict[str, list[float]]:
    """Return the milliseconds of each form's steps, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            if cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - begin))
    return times


def peak_memory(step: Callable[..., Any], cuda: bool) -> float | None:
    """Return the GiB that one step takes beyond what is held before it."""
    if not cuda:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(mode: str, small: bool, device: str) -> list[dict[str, Any]]:
    """Return one record for each form of a mode: the model's own loss, patched at 1, patched at 4."""
    cuda = device == "cuda"
    batch, length = (2, 64) if small else (16, 1024)
    steps = {}
    for form, patch in (("own loss", 1), ("patched", 1), ("patched", 4)):
        model = make_model(small, device)
        patched = None if form == "own loss" else apply(model, patch)
        if mode.startswith("layers compiled"):
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        step = make_step(model, patched, graph=mode.endswith("StepGraph"))
        ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
        steps[f"{form}, patch {patch}"] = lambda step=step, ids=ids, patch=patch: step(ids, patch=patch)
    times = clock(steps, cuda)
    return [
        {
            "mode": mode,
            "form": name,
            "ms": statistics.median(found),
            "spread_ms": [min(found), max(found)],
            "peak_gib": peak_memory(steps[name], cuda),
            "tokens_per_second": batch * length / statistics.median(found) * 1000,
        }
        for name, found in times.items()
    ]


def _line(record: Mapping[str, Any]) -> str:
    if "error" in record:
        return f"{record['mode']:26} failed: {record['error']}"
    memory = "" if record["peak_gib"] is None else f"{record['peak_gib']:7.2f} GiB"
    return f"{record['mode']:26} {record['form']:18} {record['ms']:8.2f} ms{memory}"


def main() -> int:
    """Measure each mode that there is, print a line for each form, and write the records."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="a file for the records, in JSON")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a look on a CPU")
    parser.add_argument("--modes", nargs="*", help=f"one or more of {MODES}; default: all")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        parser.error("expected a GPU; --small runs a tiny model on the CPU")
    modes = options.modes or MODES
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    conditions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in make_model(options.small, "cpu").parameters()),
    }
    records: list[dict[str, Any]] = []
    started = time.perf_counter()
    for mode in modes:
        torch.compiler.reset()  # the layers of a form must not fall back for what those before compiled
        try:
            measured = measure(mode, options.small, device)
        except Exception as error:  # written down, and the other modes go on
            measured = [{"mode": mode, "error": repr(error)}]
        for record in measured:
            records.append({"device": name, **record})
            print(f"{time.perf_counter() - started:5.0f} s  {_line(record)}", flush=True)
        text = json.dumps(conditions | {"records": records}, indent=1)
        if options.output:
            Path(options.output).write_text(text + "\n", encoding="utf-8")
    if not options.output:
        print(text)
    return 1 if any("error" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
