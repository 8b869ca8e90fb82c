"""Vocabularies that are no multiple of 16, wide rows and few rows: the code as it is beside what it replaced.

    python -m bench.odd_vocabularies                  # all parts, under eight minutes on an H100
    python -m bench.odd_vocabularies products loss    # some of them; --small for a look on a CPU

``products``: the three matrix products of the linear loss alone, with rows of logits as PyTorch makes them, with a pad
behind each row, and with a pad that the products count in. ``linear`` and ``loss``: both losses on odd vocabularies and
on the next multiple of 16, before and now. ``chunks``: time and memory of the linear loss by ``chunk_rows``. ``wide``:
rows of 512 KiB, programs half a row apart or not. ``few``: 1,024 and 256 rows, by how many programs look at the
upstream gradient.

Every figure is a median of runs taken in turn, in µs; nothing is timed whose loss and gradients were not compared with
those of the code before.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.timing.clocks import Candidate, Clock, make_clock, run_in_turn
from bench.timing.limits import measure_limits
from bench.timing.measure import peak_bytes
from npp_kernels import linear_patch_cross_entropy, patch_cross_entropy
from npp_kernels.losses import chunks, exponentials, gradient_kernels, row_kernels, row_layout
from reference.comparison.tables import markdown_table

PARTS = ("products", "linear", "chunks", "loss", "wide", "few")
Run = Callable[[], Any]


@contextmanager
def as_before() -> Iterator[None]:
    """Run the losses without pads, without wide loads of ragged rows, and exponentials for multiples of 8 only."""
    serves = exponentials.serves_exponentials

    def served(hidden: Tensor, weight: Tensor, *others: Any) -> bool:
        return weight.shape[0] % 8 == 0 and serves(hidden, weight, *others)

    with (
        mock.patch.object(chunks, "ALIGNMENT", 1),
        mock.patch.object(chunks, "serves_exponentials", served),
        mock.patch.object(row_kernels, "is_ragged", return_value=False),
        mock.patch.object(gradient_kernels, "is_ragged", return_value=False),
    ):
        yield


def before(run: Run) -> Run:
    """Return the same run with the code as it was."""

    def patched() -> Any:
        with as_before():
            return run()

    return patched


def with_setting(run: Run, module: Any, name: str, value: Any) -> Run:
    """Return the same run with another constant."""

    def patched() -> Any:
        with mock.patch.object(module, name, value):
            return run()

    return patched


def medians(clock: Clock, runs: Sequence[Run]) -> list[float]:
    """Return the median of each run in µs, timed in turn."""
    return [1e6 * statistics.median(seconds) for seconds in run_in_turn(clock, [Candidate(run) for run in runs])]


def check_equal(results: Sequence[Sequence[Tensor]], what: str) -> None:
    """Compare results with the first ones, within a few roundings of 16 bits."""
    first, *others = results
    for other in others:
        for expected, found in zip(first, other, strict=True):
            error = (found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)
            if not error <= 2**-6:
                raise AssertionError(f"{what}: expected equal results, got a difference of {error:.2e} of their norm")


def alone(result: Any) -> Tensor:
    """Return a loss that came without statistics."""
    if not isinstance(result, Tensor):
        raise TypeError(f"result: expected a loss alone, got {type(result).__name__}")
    return result


def make_groups(vocab_size: int, num_rows: int, group_size: int, device: torch.device) -> Tensor:
    """Return targets of which few ids are many, as in images."""
    ids = torch.rand(num_rows, group_size, device=device).pow(4) * vocab_size
    return ids.long().clamp(max=vocab_size - 1)


class Bench:
    """The machine, and the parts."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.clock = make_clock(device)
        self.device, self.small = device, small
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.copy_rate = measure_limits(self.clock, self.dtype).copy_bytes_per_second

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Return normal random numbers."""
        return (scale * torch.randn(*shape, device=self.device)).to(self.dtype)

    def three_products(self, hidden: Tensor, weight: Tensor, logits: Tensor) -> list[Run]:
        """Return the products of the linear loss on one chunk, where ``logits`` has room for it."""
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.empty_like(weight)
        return [
            lambda: torch.mm(hidden, weight.t(), out=logits),
            lambda: torch.mm(logits, weight, out=grad_hidden),
            lambda: torch.mm(logits.t(), hidden, out=grad_weight),
        ]

    def products(self) -> None:
        """Print what a pad does for the products."""
        rows = 64 if self.small else 4096
        table = []
        for vocab_size, hidden_size in ((50257, 768), (50272, 768), (50257, 2048), (50264, 768), (32001, 4096)):
            hidden, weight = self.random(rows, hidden_size), self.random(vocab_size, hidden_size, scale=0.05)
            padded_size = -(-vocab_size // 64) * 64
            padded_weight = torch.nn.functional.pad(weight, (0, 0, 0, padded_size - vocab_size))
            ways = [
                self.three_products(hidden, weight, hidden.new_empty(rows, vocab_size)),
                self.three_products(hidden, weight, row_layout.empty_rows(rows, vocab_size, hidden)),
                self.three_products(hidden, padded_weight, hidden.new_zeros(rows, padded_size)),
            ]
            times = medians(self.clock, [run for way in ways for run in way])
            for index, name in enumerate(("as they come", "pad behind rows", "pad counted in")):
                three = times[3 * index : 3 * index + 3]
                rate = 3 * 2 * rows * vocab_size * hidden_size / sum(three) / 1e6
                cells = [f"{time:.0f}" for time in (*three, sum(three))]
                table.append([f"{vocab_size:,}", str(hidden_size), name, *cells, f"{rate:.0f}"])
        header = ["V", "D", "rows of logits", "logits", "d hidden", "d weight", "together", "TFLOP/s"]
        print(f"\n## Products alone, {rows:,} rows\n\n{markdown_table(header, table)}", flush=True)

    def linear(self) -> None:
        """Print the linear loss over its products alone."""
        table = []
        sizes = [(16384, 1), (4096, 4), (1024, 16)] if not self.small else [(64, 4)]
        for vocab_size in (32000, 50257, 50272, 151936, 262144):
            for num_rows, group_size in sizes:
                if num_rows * vocab_size > 2**31 and vocab_size > 100000:
                    num_rows //= 2
                hidden, weight = self.random(num_rows, 768), self.random(vocab_size, 768, scale=0.05)
                groups = make_groups(vocab_size, num_rows, group_size, self.device)
                leaves = [hidden.requires_grad_(), weight.requires_grad_()]

                def run(leaves: list[Tensor] = leaves, groups: Tensor = groups) -> tuple[Tensor, ...]:
                    loss = alone(linear_patch_cross_entropy(leaves[0], leaves[1], groups))
                    return loss.detach(), *torch.autograd.grad(loss, leaves)

                check_equal([before(run)(), run()], f"linear, V = {vocab_size}")
                rows = min(num_rows, 4096)
                logits = row_layout.empty_rows(rows, vocab_size, hidden)
                three = self.three_products(hidden[:rows].detach(), weight.detach(), logits)
                old, now, *products = medians(self.clock, [before(run), run, *three])
                products_time = sum(products) * num_rows / rows
                cells = [f"{time:.0f}" for time in (products_time, old, now)]
                shares = [f"{products_time / time:.2f}" for time in (old, now)]
                table.append([f"{vocab_size:,}", f"{num_rows:,}", str(group_size), *cells, *shares])
                del leaves, hidden, weight, logits, three, run
        header = ["V", "rows", "K", "products (padded)", "before", "now", "share before", "share now"]
        print(f"\n## Linear loss, forward + backward, D = 768\n\n{markdown_table(header, table)}", flush=True)

    def chunks(self) -> None:
        """Print what the linear loss takes by the rows of a chunk: time, and memory beside the gradients."""
        table = []
        num_rows, vocab_size = (256, 512) if self.small else (16384, 16384)
        for hidden_size in (768, 1536):
            leaves = [self.random(num_rows, hidden_size), self.random(vocab_size, hidden_size, scale=0.05)]
            groups = make_groups(vocab_size, num_rows, 1, self.device)
            given = [leaf.requires_grad_() for leaf in leaves]

            def run(rows: int | None, given: list[Tensor] = given, groups: Tensor = groups) -> tuple[Tensor, ...]:
                loss = alone(linear_patch_cross_entropy(given[0], given[1], groups, chunk_rows=rows))
                return torch.autograd.grad(loss, given)

            choices = (None, 4096, 2000, 1190, 1024)
            times = medians(self.clock, [partial(run, rows) for rows in choices])
            for rows, time in zip(choices, times, strict=True):
                peak = peak_bytes(Candidate(partial(run, rows)), self.device)
                beside = None if peak is None else (peak - sum(2 * leaf.numel() for leaf in leaves)) / 2**20
                row = 2 * vocab_size + 6 * hidden_size
                gradient = 2 * vocab_size * hidden_size
                said = max(2 * gradient, gradient + (rows or 4096) * row) / 2**20
                measured = "-" if beside is None else f"{beside:.0f}"
                table.append([str(hidden_size), str(rows), f"{time:.0f}", measured, f"{said:.0f}"])
        header = ["D", "chunk_rows", "time", "MiB beside the gradients", "as the docstring says"]
        print(f"\n## Chunks, {num_rows:,} rows, V = {vocab_size:,}\n\n{markdown_table(header, table)}", flush=True)

    def loss(self) -> None:
        """Print the loss on the caller's logits, on odd vocabularies and the next multiples of 16."""
        table = []
        for vocab_size, num_rows, group_size in (
            (50257, 8192, 1), (50257, 2048, 4), (50257, 512, 16), (50260, 2048, 4), (32001, 4096, 1), (16383, 16384, 1),
            (16383, 4096, 4), (16383, 1024, 16), (128257, 4096, 1),
        ):  # fmt: skip
            num_rows = 16 if self.small else num_rows
            for kind in ("forward", "forward + backward", "in place", "none"):
                runs = []
                for size in (vocab_size, -(-vocab_size // 16) * 16):
                    logits = self.random(num_rows, size, scale=2.0)
                    groups = make_groups(size, num_rows, group_size, self.device)
                    run = self.loss_run(kind, logits, groups)
                    if kind != "in place":  # which leaves other logits behind
                        check_equal([before(run)(), run()], f"loss, V = {size}, {kind}")
                    runs += [before(run), run] if size == vocab_size else [run]
                old, now, even = medians(self.clock, runs)
                passes = {"forward": 1, "none": 3}.get(kind, 2)
                limit = passes * num_rows * vocab_size * self.dtype.itemsize / self.copy_rate * 1e6
                cells = [f"{vocab_size:,}", f"{num_rows:,}", str(group_size), kind]
                cells += [f"{old:.1f}", f"{now:.1f}", f"{even:.1f}", f"{now / even:.3f}"]
                table.append([*cells, f"{limit / old:.2f}", f"{limit / now:.2f}"])
        header = ["V", "rows", "K", "", "before", "now", "next multiple of 16", "now over that", "share before", "now"]
        print(f"\n## Loss on logits\n\n{markdown_table(header, table)}", flush=True)

    def loss_run(self, kind: str, logits: Tensor, groups: Tensor) -> Run:
        """Return a run of the loss on logits, which returns what it found."""
        if kind == "forward":
            return lambda: (alone(patch_cross_entropy(logits, groups)),)
        leaf = logits.requires_grad_()
        reduction = "none" if kind == "none" else "mean"
        upstream = torch.rand(groups.shape, device=self.device) if kind == "none" else None

        def run() -> tuple[Tensor, Tensor]:
            given = leaf.view_as(leaf) if kind == "in place" else leaf
            loss = alone(patch_cross_entropy(given, groups, reduction=reduction, inplace_backward=kind == "in place"))
            return loss.detach(), torch.autograd.grad(loss, given, upstream)[0]

        return run

    def wide(self) -> None:
        """Print what it does that programs run half a row apart."""
        table = []
        for vocab_size, num_rows in ((262144, 2048), (200064, 2048), (128256, 4096), (151936, 4096), (262147, 2048)):
            num_rows = 8 if self.small else num_rows
            for kind in ("forward + backward", "in place"):
                run = self.loss_run(
                    kind,
                    self.random(num_rows, vocab_size, scale=2.0),
                    make_groups(vocab_size, num_rows, 4, self.device),
                )
                apart = with_setting(run, row_kernels, "STAGGERED_BYTES", 0)
                if kind != "in place":
                    check_equal([run(), apart()], f"wide, V = {vocab_size}")
                times = medians(self.clock, [run, apart])
                limit = 2 * num_rows * vocab_size * self.dtype.itemsize / self.copy_rate * 1e6
                cells = [f"{time:.0f}" for time in times] + [f"{limit / time:.2f}" for time in times]
                table.append([f"{vocab_size:,}", f"{num_rows:,}", kind, *cells])
        header = ["V", "rows", "", "together", "half a row apart", "share together", "share apart"]
        print(f"\n## Wide rows, K = 4\n\n{markdown_table(header, table)}", flush=True)

    def few(self) -> None:
        """Print what few rows take, by how many programs a multiprocessor look at the upstream gradient."""
        table = []
        counts = (8, 4, 2, 1)
        for vocab_size, num_rows, group_size in ((16384, 1024, 16), (16384, 256, 64), (16384, 4096, 4)):
            num_rows = 16 if self.small else num_rows
            logits, groups = (
                self.random(num_rows, vocab_size),
                make_groups(vocab_size, num_rows, group_size, self.device),
            )
            kept = self.loss_run("forward + backward", logits, groups)
            in_place = self.loss_run("in place", logits.detach().clone(), groups)
            runs = [with_setting(run, gradient_kernels, "IDLE_PROGRAMS", n) for run in (kept, in_place) for n in counts]
            limit = 2 * num_rows * vocab_size * self.dtype.itemsize / self.copy_rate * 1e6
            times = medians(self.clock, runs)
            table.append([f"{num_rows:,}", str(group_size), f"{limit:.1f}", *(f"{time:.1f}" for time in times)])
        header = ["rows", "K", "limit", *(f"{n}" for n in counts), *(f"in place, {n}" for n in counts)]
        print(f"\n## Few rows, V = 16,384, programs that look\n\n{markdown_table(header, table)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.odd_vocabularies", description="Time odd vocabularies.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--small", action="store_true", help="few rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"parts: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    torch.manual_seed(0)
    bench = Bench(torch.device(options.device), options.small)
    print(f"Copy rate {bench.copy_rate / 1e12:.2f} TB/s, {bench.dtype}; µs", flush=True)
    for part in options.parts or PARTS:
        getattr(bench, part)()


if __name__ == "__main__":
    main()
