"""What the exchange of gradients and weights costs on paper: its bytes, its time, and what of it a step can hide.

    python -m reference.communication --json docs/distributed/paper.json    # its tables, its figures and a plot beside

Step times of one GPU are measured (``docs/step_time/h100.json``); a line through the smallest and the largest measured
number of images gives those between. The exchange is by rings, as NCCL's: each GPU sends ``(N − 1) / N`` of the
gradients to add them up, and as much again to hand out the new weights, at the pace of the slowest link on the way.
Links count at their full rate, and their latency as nothing. What is bound here is bound in practice; what is hidden
here has to be measured (`reference.scaling`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

from reference.network.model import ModelConfig, Transformer
from reference.training.checkpoint import write_json
from reference.training.data_parallel import divided

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MODELS = {"B": 256, "L": 256, "XL": 128, "XXL": 64}  # and the most images of a GPU that were measured
PATCHES = (4, 2, 1)
GPUS = (8, 16, 64, 256, 1024)
LINKS = (1, 8)  # of a host
GPUS_OF_A_HOST = 8
NVLINK = 450e9  # bytes a second of one GPU, in each direction
LINK = 400e9 / 8  # bytes a second, between hosts
MEMORY = 3.0e12  # bytes a second, read and written, as measured on an H100
UPDATE_BYTES = 30  # of a parameter: 28 for AdamW, 2 for the norm
COPY_BYTES = 4  # of a parameter, whose gradient is copied into a bucket
GRADIENT_BYTES = WEIGHT_BYTES = 2
BACKWARD = 2 / 3  # of forward and backward together, by their operations
HIDDEN = 0.9  # the efficiency that counts as hidden


@dataclass(frozen=True)
class Model:
    """What of a model counts here, and a line for its step time on one GPU, in seconds: ``fixed + per_image · n``."""

    parameters: int
    last_bucket: int  # parameters whose gradients come last, so that no backward hides them
    fixed: float
    per_image: float

    def compute(self, images: float) -> float:
        """Return the seconds of forward and backward."""
        return self.fixed + self.per_image * images - self.parameters * UPDATE_BYTES / MEMORY


@dataclass(frozen=True)
class Step:
    """A step of one GPU of many, in milliseconds."""

    gigabytes: float  # of gradients; the weights have the same
    adding_up: float
    handing_out: float
    backward: float
    milliseconds: float
    efficiency: float  # the step on one GPU, over this one


def seconds_to_exchange(size: float, gpus: int, links: int) -> float:
    """Return the seconds that ``size`` bytes take to be added up, or to be handed out.

    >>> seconds_to_exchange(450e9, 2, 1), seconds_to_exchange(50e9, 16, 1)
    (0.5, 0.9375)
    """
    rate = NVLINK if gpus <= GPUS_OF_A_HOST else min(NVLINK, links * LINK)
    return (gpus - 1) / gpus * size / rate


def step_on_many(model: Model, images: float, gpus: int, links: int, *, parts: int = 1, sharded: bool = True) -> Step:
    """Return a step of ``parts`` backward passes over ``images`` each, in each of so many GPUs.

    Gradients are added up beside the last backward, but for the last bucket; new weights are handed out beside the
    update.
    """
    size = model.parameters * GRADIENT_BYTES
    adding = seconds_to_exchange(size, gpus, links)
    handing = seconds_to_exchange(model.parameters * WEIGHT_BYTES, gpus, links)
    compute = model.compute(images)
    backward = BACKWARD * compute
    update = model.parameters * UPDATE_BYTES / MEMORY
    copy = model.parameters * COPY_BYTES / MEMORY
    if sharded:
        tail, beside, end = adding, backward, max(update / gpus, handing)
    else:
        tail, beside, end = adding + handing, backward, update
    exposed = max(tail - beside, tail * model.last_bucket / model.parameters)
    seconds = parts * compute + copy + exposed + end
    one = parts * compute + update
    return Step(size / 1e9, 1e3 * adding, 1e3 * handing, 1e3 * backward, 1e3 * seconds, one / seconds)


def images_that_hide(model: Model, gpus: int, links: int) -> int:
    """Return the fewest images of a GPU whose backward is as long as adding up the gradients takes."""
    adding = seconds_to_exchange(model.parameters * GRADIENT_BYTES, gpus, links)
    images = (adding / BACKWARD - model.compute(0)) / model.per_image
    return max(math.ceil(images), 1)


def parts_that_hide(model: Model, images: int, gpus: int, links: int) -> int:
    """Return the fewest backward passes of a step whose efficiency is `HIDDEN`."""
    parts = 1
    while step_on_many(model, images, gpus, links, parts=parts).efficiency < HIDDEN:
        parts += 1
    return parts


def read_models(path: Path) -> dict[tuple[str, int], Model]:
    """Return each model at each patch, from a file of `reference.step_time`."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["formulation"] == "ours"]
    models = {}
    for name in MODELS:
        with torch.device("meta"):
            transformer = Transformer(ModelConfig.named(name))
        named = [entry for entry in transformer.named_parameters() if entry[1].ndim >= 2]
        last_bucket = sum(parameter.numel() for _, parameter in next(divided(named)))
        parameters = sum(parameter.numel() for parameter in transformer.parameters())
        for patch in PATCHES:
            times = {c["images"]: c["median_ms"] / 1e3 for c in cells if (c["model"], c["patch"]) == (name, patch)}
            few, many = min(times), max(times)
            per_image = (times[many] - times[few]) / (many - few)
            fixed = times[few] - per_image * few
            models[name, patch] = Model(parameters, last_bucket, fixed, per_image)
    return models


def rows_of(models: dict[tuple[str, int], Model]) -> list[dict[str, Any]]:
    """Return what the tables and the plot show: a row for each model, patch, number of GPUs and of links."""
    rows = []
    for (name, patch), model in models.items():
        for links in LINKS:
            for gpus in GPUS:
                images = MODELS[name]
                row = {"model": name, "patch": patch, "images": images, "links": links, "gpus": gpus}
                row |= asdict(step_on_many(model, images, gpus, links))
                row["efficiency_replicated"] = step_on_many(model, images, gpus, links, sharded=False).efficiency
                row["images_that_hide"] = images_that_hide(model, gpus, links)
                row["parts_that_hide"] = parts_that_hide(model, images, gpus, links)
                rows.append(row)
    return rows


def bytes_table(models: dict[tuple[str, int], Model]) -> str:
    """Return bytes and times of one exchange, which are those of every patch."""
    heads = [f"{gpus} GPUs" + (f", {links} link{'s' * (links > 1)}" if gpus > GPUS_OF_A_HOST else "")
             for gpus, links in times_shown()]  # fmt: skip
    lines = [f"| model | parameters | GB, bf16 | {' | '.join(heads)} |", "|" + "---|" * (3 + len(heads))]
    for name in MODELS:
        parameters = models[name, 1].parameters
        size = parameters * GRADIENT_BYTES
        times = [f"{1e3 * seconds_to_exchange(size, gpus, links):.1f}" for gpus, links in times_shown()]
        lines.append(f"| {name} | {parameters / 1e6:.0f}M | {size / 1e9:.2f} | {' | '.join(times)} |")
    return "\n".join(lines)


def times_shown() -> list[tuple[int, int]]:
    """Return the numbers of GPUs and links of `bytes_table`; within a host, links do not count."""
    return [(gpus, links) for links in reversed(LINKS) for gpus in GPUS if gpus > GPUS_OF_A_HOST or links == LINKS[-1]]


def steps_table(rows: Iterable[dict[str, Any]], links: int) -> str:
    """Return the efficiencies with so many links, what hides the exchange in backward, and in how many parts."""
    rows = [row for row in rows if row["links"] == links]
    heads = [f"{gpus} GPUs" for gpus in GPUS]
    lines = [f"| model | patch | images a GPU | backward, ms | {' | '.join(heads)} | images that hide it | parts |"]
    lines += ["|" + "---|" * (6 + len(heads))]
    for name in MODELS:
        for patch in PATCHES:
            own = [row for row in rows if (row["model"], row["patch"]) == (name, patch)]
            words = [name, str(patch), str(own[0]["images"]), f"{own[0]['backward']:.1f}"]
            words += [f"{row['efficiency']:.2f}" for row in own]
            words += [str(own[-1]["images_that_hide"]), str(own[-1]["parts_that_hide"])]
            lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def measured_table(models: dict[tuple[str, int], Model], cells: Sequence[dict[str, Any]]) -> str:
    """Return efficiencies that `reference.scaling` measured, beside those on paper."""
    done = [cell for cell in cells if "error" not in cell and cell["model"] in MODELS and cell["patch"] in PATCHES]
    one = {(c["model"], c["images"], c["patch"]): c["images_per_second"] for c in done if c["way"] == "one"}
    lines = ["| model | images a GPU | patch | GPUs | way | measured | on paper |", "|---|---|---|---|---|---|---|"]
    for cell in done:
        key = cell["model"], cell["images"], cell["patch"]
        if cell["way"] in ("sharded", "replicated") and key in one:
            measured = cell["images_per_second"] / cell["processes"] / one[key]
            model, is_sharded = models[cell["model"], cell["patch"]], cell["way"] == "sharded"
            paper = step_on_many(model, cell["images"], cell["processes"], max(LINKS), sharded=is_sharded).efficiency
            words = [*map(str, key), str(cell["processes"]), cell["way"], f"{measured:.2f}", f"{paper:.2f}"]
            lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the efficiency over the number of GPUs: a panel for each model, a colour for each patch."""
    figure, panels = plt.subplots(1, len(MODELS), figsize=(4 * len(MODELS), 3.8), layout="constrained", sharey=True)
    for axes, name in zip(panels, MODELS, strict=True):
        for colour, patch in enumerate(PATCHES):
            for links, style in zip(LINKS, ("x--", "o-"), strict=True):
                own = [r for r in rows if (r["model"], r["patch"], r["links"]) == (name, patch, links)]
                label = f"patch {patch}, {links} link{'s' * (links > 1)} a host"
                axes.plot(
                    [row["gpus"] for row in own], [row["efficiency"] for row in own], style, color=f"C{colour}",
                    markersize=4, label=label,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(GPUS, GPUS)
        axes.set_ylim(0, 1.35)
        axes.set_title(f"{name}, {MODELS[name]} images a GPU")
        axes.set_xlabel("GPUs")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("speed of a GPU among many, over one alone")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write figures and plot, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m reference.communication",
        description="What the exchange of gradients and weights costs on paper.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=Path, default=Path("docs/step_time/h100.json"), help="measured step times")
    parser.add_argument("--json", type=Path, help="file to write the figures to; the plot goes beside it")
    parser.add_argument("--measured", type=Path, help="file of reference.scaling to compare with, and nothing else")
    options = parser.parse_args(arguments)
    models = read_models(options.steps)
    if options.measured is not None:
        print(measured_table(models, json.loads(options.measured.read_text(encoding="utf-8"))["cells"]))
        return 0
    rows = rows_of(models)
    if options.json is not None:
        write_json(options.json, {"rows": rows})
        plot(rows, options.json.with_suffix(".png"))
    print("\n\n".join([bytes_table(models), *(steps_table(rows, links) for links in reversed(LINKS))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
