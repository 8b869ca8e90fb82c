"""The cases in which errors are measured: offsets, confidence, dtypes, vocabularies, options.

`bench.accuracy` measures each; `bench.reporting.accuracy_page` has a column or a row for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

OURS, PYTORCH = "npp_kernels", "PyTorch"
LOSS, LINEAR, MEAN = "patch_cross_entropy", "linear_patch_cross_entropy", "group_mean"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OFFSETS = (0.0, 100.0, 1000.0, 1e5, 1e8)
GAPS = (0.0, 5.0, 10.0, 15.0, 20.0, 24.0, 30.0)
OPTIONS: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "softcap": {"softcap": 30.0},
    "all three": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 30.0},
    "class weights": {"class_weight": None, "label_smoothing": 0.1},  # drawn for the vocabulary, see `_options`
}
# The elements of logits that a case has, the most rows, and the vocabularies.
SIZES = {"cpu": (2**21, 10_000), "cuda": (2**25, 16_384), "interpreter": (2**12, 64)}
VOCAB_SIZES = {"cpu": (2, 33, 512, 50_257, 262_144), "cuda": (2, 33, 512, 50_257, 262_144), "interpreter": (2, 33, 600)}
SINGLE_VOCAB_SIZE = {"cpu": 512, "cuda": 512, "interpreter": 33}
WIDE_VOCAB_SIZE = 2**15  # from here on, fewer offsets and gaps


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs."""

    operation: str
    dtype: str
    vocab_size: int
    rows: int
    group_size: int = 1
    hidden_size: int = 0
    offset: float = 0.0  # added to every logit
    gap: float | None = None  # how far the first target stands above logits of deviation 0.5; None: deviation 3, no gap
    option: str = ""  # of `OPTIONS`


def _rows(kind: str, vocab_size: int, group_size: int = 1) -> int:
    elements, rows = SIZES[kind]
    return max(min(elements // (vocab_size * group_size), rows), 4)


def _loss_cases(kind: str, dtypes: Sequence[str]) -> Iterator[Case]:
    small = SINGLE_VOCAB_SIZE[kind]
    for dtype in dtypes:
        offsets = [offset for offset in OFFSETS if offset <= torch.finfo(DTYPES[dtype]).max]
        # On a GPU most of the time goes into compiling: 16 bit is bf16 there, and fp16 one vocabulary.
        few = kind == "cuda" and dtype == "fp16"
        for vocab_size in (small,) if few else VOCAB_SIZES[kind]:
            case, wide = Case(LOSS, dtype, vocab_size, _rows(kind, vocab_size)), vocab_size >= WIDE_VOCAB_SIZE
            yield from (replace(case, offset=offset) for offset in offsets if not wide or offset in (0.0, 1000.0, 1e8))
            yield from (replace(case, gap=gap) for gap in GAPS if not wide or gap in (20.0, 30.0))
            if not wide:
                yield from (replace(case, gap=gap, offset=1000.0) for gap in (10.0, 20.0))
        for group_size in () if few else (4, 16):
            case = Case(LOSS, dtype, small, _rows(kind, small, group_size), group_size)
            yield from (replace(case, offset=offset) for offset in offsets)
            yield from (replace(case, gap=gap) for gap in (10.0, 20.0))
        for option in () if few else OPTIONS:
            case = Case(LOSS, dtype, small, _rows(kind, small, 4), 4, option=option)
            yield from (replace(case, offset=offset) for offset in (0.0, 1000.0))


def _linear_cases(kind: str, dtypes: Sequence[str]) -> Iterator[Case]:
    vocab_size, rows, hidden_size = (67, 16, 16) if kind == "interpreter" else (1000, 512, 64)
    for dtype in dtypes:
        for group_size in (1, 4):
            case = Case(LINEAR, dtype, vocab_size, rows, group_size, hidden_size)
            yield from (replace(case, gap=gap) for gap in (None, *GAPS))
    if kind == "cuda":  # so large that exponentials take the place of logits on a Hopper GPU
        yield from (Case(LINEAR, "bf16", 16_384, 4096, 1, 768, gap=gap) for gap in (None, *GAPS))


def cases_of(kind: str, *, quick: bool = False) -> list[Case]:
    """Return what is measured on a kind of device: "cpu", "cuda" or "interpreter"."""
    dtypes = ["fp32", "fp16"] if kind == "interpreter" else list(DTYPES)  # the interpreter truncates bf16
    if quick:
        loss = Case(LOSS, "fp32", 33, 16, 2)
        cases = [loss, replace(loss, offset=1000.0), replace(loss, gap=20.0), replace(loss, option="z-loss")]
        return [*cases, Case(LINEAR, "fp32", 33, 16, 2, 8, gap=10.0), Case(MEAN, "fp16", 20, 16, 4, 8)]
    cases = [*_loss_cases(kind, dtypes), *_linear_cases(kind, dtypes)]
    rows, hidden_size = (16, 32) if kind == "interpreter" else (4096, 256)
    return cases + [Case(MEAN, dtype, 500, rows, size, hidden_size) for dtype in dtypes for size in (1, 4, 16)]
