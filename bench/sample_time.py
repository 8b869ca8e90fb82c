"""Milliseconds a token of `reference.sample`, by kernels, in PyTorch, and compiled.

    python -m bench.sample_time --json FILE                         # under a minute on an H100
    python -m bench.sample_time --cells B:64 --top-k 2000 --top-p 0.9

A cell is a size of the model and a number of images, on 16×16 tokens. Weights are random, which changes no time. Three
ways: ``kernels``, `Sampler` as it is; ``plain``, the same without kernels, PyTorch's operations in a CUDA graph;
``compiled``, that with `torch.compile` around the model, for the first cell alone, since compiling takes most of the
time. One call samples a whole batch; the first is not timed, the median of the others is reported. The file is written
after each part; for what ``--limit`` leaves no time, it says so.

With each cell stand the bytes that a token has to move on average: the weights, what is filled of the cache of keys and
values, noise and logits once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reference.network.model import SIZES, ModelConfig, Transformer
from reference.sample import Sampler, positive

WAYS = ("kernels", "plain", "compiled")
COMPILING_SECONDS = 30.0  # not begun with less time left


def read_cell(text: str) -> tuple[str, int]:
    """Read ``SIZE:IMAGES``."""
    size, _, images = text.partition(":")
    if size not in SIZES or not images.isdigit() or int(images) < 1:
        raise argparse.ArgumentTypeError(f"expected SIZE:IMAGES, as B:64, with one of {', '.join(SIZES)}, got {text!r}")
    return size, int(images)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sample_time", description="Time the sampler.")
    cells = [("B", 64), ("B", 256), ("XL", 64)]
    parser.add_argument("--cells", type=read_cell, nargs="+", default=cells, help="SIZE:IMAGES; B:64 B:256 XL:64")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS), help="what to time; all by default")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--top-k", type=positive)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--calls", type=positive, default=3, help="timed calls of each part")
    parser.add_argument("--limit", type=float, default=55.0, help="seconds after which no part is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args(arguments)


def bytes_of_a_token(model: Transformer, images: int, rows: int) -> dict[str, int]:
    """Return the bytes that each token of a batch moves, on average over the positions."""
    config, element = model.config, model.output.weight.element_size()
    tables = model.tok_embeddings.weight.numel() + model.cls_embedding.embedding_table.weight.numel()
    weights = element * (sum(parameter.numel() for parameter in model.parameters()) - tables)
    positions = config.grid[0] * config.grid[1]
    # At position t, t keys and values are read and one is written: (P + 1) / 2 on average.
    cache = element * rows * config.num_layers * 2 * config.dim * (positions + 1) // 2
    choice = 2 * element * rows * config.vocab_size + 2 * 4 * images * config.vocab_size
    return {"weights": weights, "cache": cache, "logits and noise": choice}


def time_way(model: Transformer, way: str, images: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the milliseconds a token of one way, and how many kernels it launches where that is known."""
    drawing = {"guidance": options.guidance, "top_k": options.top_k, "top_p": options.top_p}
    sampler = Sampler(model, batch_size=images, fast=way == "kernels", **drawing)
    if way == "kernels" and sampler.kernels is None:
        return {"skipped": "no kernels serve this device and model"}
    if way == "compiled":
        torch.compiler.reset()
        sampler.decode = torch.compile(model.decode, fullgraph=True, dynamic=False)
    device = torch.device(options.device)
    labels = torch.arange(images, device=device) % model.config.num_classes
    generator = torch.Generator(device).manual_seed(0)
    seconds = []
    for _ in range(options.calls + 1):
        start = time.perf_counter()
        tokens = sampler(labels, generator).cpu()  # which waits for the device
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    return {
        "ms_a_token": 1e3 * median / tokens[0].numel(),
        "images_per_second": images / median,
        "first_call_seconds": seconds[0],
        "seconds": seconds[1:],
        "launches": sampler.kernels.launches if sampler.kernels else None,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time all parts, and write the results after each."""
    end = time.monotonic() + options.limit
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "torch": torch.__version__,
        "options": {name: getattr(options, name) for name in ("guidance", "top_k", "top_p", "calls")},
        "parts": [],
    }
    order = [(cell, way) for way in WAYS for cell in options.cells if way != "compiled" or cell == options.cells[0]]
    models: dict[str, Transformer] = {}  # one at a time
    for (size, images), way in order:
        if way not in options.ways:
            continue
        part: dict[str, Any] = {"size": size, "images": images, "way": way}
        left = end - time.monotonic()
        if left < (COMPILING_SECONDS if way == "compiled" else 0):
            part["skipped"] = f"{left:.0f} of {options.limit:.0f} seconds were left"
        else:
            if size not in models:
                models.clear()
                with device:
                    models[size] = Transformer(ModelConfig.named(size))
            model = models[size].to(torch.bfloat16 if on_gpu else torch.float32)
            part["bytes"] = bytes_of_a_token(model, images, images if options.guidance == 1 else 2 * images)
            part |= time_way(model, way, images, options)
        results["parts"].append(part)
        print({name: value for name, value in part.items() if name != "seconds"}, file=sys.stderr)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    measure(parse())
