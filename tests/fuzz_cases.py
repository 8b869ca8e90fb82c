"""Hypothesis strategies: what anybody might pass to the operations, as small recipes that tensors are made from.

A case is a handful of words and a seed. Hypothesis chooses and shrinks these; the numbers come from the seed. Sizes and
options come from short lists, so that a kernel compiled for one case serves many others.
"""

import itertools
import math
import random
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from tests.conftest import INTERPRETED
from tests.inputs import peaky_logits, skewed_ids

SEEDS = st.integers(0, 2**31 - 1)
LEADING = st.sampled_from([(7,), (), (1,), (2, 3), (24,), (0,), (2, 0, 3)])
KERNEL_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # which the interpreter truncates
DTYPES = [*KERNEL_DTYPES, torch.float64]  # float64 takes the PyTorch path everywhere
LAYOUTS = ["contiguous", "offset", "stepped", "transposed", "expanded"]

# Vocabulary and group size: one id; few; odd and even; more than the narrow blocks below hold.
LOSS_SIZES = [(33, 4), (64, 1), (2, 3), (1, 2), (300, 5), (75, 16)]
# What is in a row of logits.
LOGITS = [
    "peaky",
    "constant",
    "confident",
    "unsure",
    "masked",
    "masked target",
    "plus infinity",
    "nan",
    "minus infinity",
]
OFFSETS = [0.0, 100.0, -1000.0, 1e5, 1e8]
TARGETS = ["skewed", "repeated", "some ignored", "all ignored", "one row ignored", "distinct"]
UPSTREAMS = ["one", "ordinary", "zero", "negative", "huge", "uneven", "some zero"]


def _option_sets():
    """Return which options are on together: a fixed sample of what the losses accept, for kernels depend on it."""
    switches = ["slot_weights", "class_weight", "label_smoothing", "z_loss", "softcap", "token_scaling", "num_targets"]
    whole = []
    for reduction, on in itertools.product(
        ["target", "row", "slot", "sum", "none"], itertools.product([False, True], repeat=len(switches))
    ):
        chosen = {name for name, is_on in zip(switches, on, strict=True) if is_on}
        if reduction != "target" and "num_targets" in chosen:
            continue
        if reduction == "none" and chosen & {"slot_weights", "z_loss"}:
            continue
        whole.append((reduction, frozenset(chosen)))
    plain = [(reduction, frozenset()) for reduction in ["target", "row", "slot", "sum", "none"]]
    return plain + random.Random(0).sample(whole, 43)


OPTION_SETS = _option_sets()


class LossCase(NamedTuple):
    """A call of one of the losses."""

    seed: int
    leading: tuple
    sizes: tuple  # vocabulary, group size
    dtype: torch.dtype
    layouts: tuple  # of logits or hidden states, groups, and an upstream by target
    logits: str
    offset: float
    targets: str
    upstream: str
    options: tuple  # reduction or normalisation, and the names of what is on
    extreme: bool  # whether options have their outermost values
    small_ids: bool
    ignore_index: int
    inplace: bool
    stats: bool
    wide_rows: bool  # through the kernel for rows that do not fit into registers

    def rows_differ(self):
        """Return whether rows are not copies of one another, so that a mean over them says more than one."""
        return self.layouts[0] != "expanded" and self.logits != "constant"


LOSS_CASES = st.builds(
    LossCase,
    seed=SEEDS,
    leading=LEADING,
    sizes=st.sampled_from(LOSS_SIZES),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    logits=st.sampled_from(LOGITS),
    offset=st.sampled_from(OFFSETS),
    targets=st.sampled_from(TARGETS),
    upstream=st.sampled_from(UPSTREAMS),
    options=st.sampled_from(OPTION_SETS),
    extreme=st.booleans(),
    small_ids=st.booleans(),
    ignore_index=st.sampled_from([-100, -1, 2**31 - 1]),
    inplace=st.booleans(),
    stats=st.booleans(),
    wide_rows=st.booleans(),
)


class LinearCase(NamedTuple):
    """What a loss on hidden states takes beside a `LossCase`."""

    loss: LossCase
    hidden_size: int
    bias: bool
    chunk_rows: int | None
    wanted: tuple  # whether hidden states, weight and bias want a gradient
    weight_layout: str


LINEAR_CASES = st.builds(
    LinearCase,
    loss=LOSS_CASES,
    hidden_size=st.sampled_from([16, 1, 40]),
    bias=st.booleans(),
    chunk_rows=st.sampled_from([None, 1, 3, 5]),
    wanted=st.sampled_from([(True, True, True), (True, False, True), (False, True, False)]),
    weight_layout=st.sampled_from(LAYOUTS[:-1]),
)


class MeanCase(NamedTuple):
    """A call of `group_mean`."""

    seed: int
    leading: tuple
    sizes: tuple  # vocabulary, hidden size, group size
    dtype: torch.dtype
    out_dtype: torch.dtype | None
    layouts: tuple  # of table, groups, upstream
    ids: str
    values: str
    ignore_index: int | None
    small_ids: bool


MEAN_CASES = st.builds(
    MeanCase,
    seed=SEEDS,
    leading=st.sampled_from([(7,), (), (1,), (2, 3), (160,), (0,), (2, 0, 3)]),
    sizes=st.sampled_from([(20, 16, 4), (50, 33, 1), (1, 8, 3), (9, 5, 16)]),
    dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from([None, None, *DTYPES]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    ids=st.sampled_from(["skewed", "repeated", "distinct", "all ignored"]),
    values=st.sampled_from(["ordinary", "large", "with infinities", "with nan", "zero"]),
    ignore_index=st.sampled_from([None, -100, 0]),
    small_ids=st.booleans(),
)


class PatchCase(NamedTuple):
    """A call of `patch_mean`, or of the functions on ids."""

    seed: int
    batch: tuple
    patch: tuple
    counts: tuple  # patches along each axis
    hidden_size: int
    dtype: torch.dtype
    layouts: tuple  # of embeddings, and of the upstream
    flat: bool
    values: str


def looks_like_a_grid(case):
    """Return whether flat tokens of a case end in the sizes of its grid, and are so taken for one, or are empty."""
    grid = tuple(count * step for count, step in zip(case.counts, case.patch, strict=True))
    flat = (*case.batch, math.prod(grid))
    return 0 in flat or (len(grid) > 1 and flat[-len(grid) :] == grid)


PATCH_CASES = (
    st.integers(1, 3)
    .flatmap(
        lambda rank: st.builds(
            PatchCase,
            seed=SEEDS,
            batch=st.sampled_from([(2,), (), (0,), (2, 1)]),
            patch=st.tuples(*[st.sampled_from([2, 1, 3])] * rank),
            counts=st.tuples(*[st.sampled_from([2, 1, 3, 0])] * rank),
            hidden_size=st.sampled_from([8, 1, 37]),
            dtype=st.sampled_from(DTYPES),
            layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
            flat=st.booleans(),
            values=st.sampled_from(["ordinary", "large", "with infinities", "with nan", "zero"]),
        )
    )
    .filter(lambda case: not case.flat or not looks_like_a_grid(case))
)


class SegmentCase(NamedTuple):
    """A call of `find_segments`."""

    seed: int
    num_ids: int
    vocab_size: int
    ids: str
    ignored: bool
    radix: bool
    small_ids: bool


SEGMENT_CASES = st.builds(
    SegmentCase,
    seed=SEEDS,
    num_ids=st.sampled_from([200, 1, 31, 513, 1300]),
    vocab_size=st.sampled_from([50, 1, 256, 300, 16384, 70000]),
    ids=st.sampled_from(["skewed", "repeated", "distinct", "out of range"]),
    ignored=st.booleans(),
    radix=st.booleans(),
    small_ids=st.booleans(),
)


def laid_out(values, layout):
    """Return the same values with other strides; expanded ones repeat the first of them along the first axis."""
    if layout == "expanded" and values.ndim and values.shape[0]:
        return values[:1].clone().expand(values.shape)
    if layout == "transposed" and values.ndim > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout in ("offset", "stepped") and values.ndim:
        room = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 3), 17)
        step = 2 if layout == "stepped" else 1
        view = room[..., 3 : 3 + step * values.shape[-1] : step]
        return view.copy_(values)
    return values.contiguous()


def make_ids(kind, shape, vocab_size, ignore_index):
    """Return ids ``[..., K]``; ``ignore_index`` may be None, and then nothing is ignored."""
    ids = skewed_ids(vocab_size, shape)
    if kind == "repeated":
        ids = ids[..., :1].expand(shape).clone()
    if kind == "distinct":
        ids = torch.arange(ids.numel()).view(shape) % vocab_size
    if ignore_index is None:
        return ids
    if kind == "all ignored":
        ids.fill_(ignore_index)
    if kind == "some ignored":
        ids[torch.rand(shape) < 0.4] = ignore_index
    if kind == "one row ignored" and ids.numel():
        ids.view(-1, shape[-1])[-1] = ignore_index
    return ids


def make_logits(case, targets):
    """Return logits ``[N, V]`` in fp32 for ``targets [N, K]``, before they are rounded to the dtype of the case."""
    (num_rows, _), (vocab_size, _) = targets.shape, case.sizes
    safe = targets.masked_fill(targets == case.ignore_index, 0)
    logits = peaky_logits(num_rows, vocab_size)
    if case.logits == "constant":
        logits = torch.full_like(logits, 0.75)
    if case.logits == "confident":
        logits = torch.randn(num_rows, vocab_size).scatter(
            1, safe[:, :1], float(random.Random(case.seed).choice([9, 16, 30]))
        )
    if case.logits == "unsure":
        logits = 0.01 * torch.randn(num_rows, vocab_size)
    offset = case.offset if abs(case.offset) < torch.finfo(case.dtype).max else 1000.0
    logits += offset
    if not num_rows:
        return logits
    row = case.seed % num_rows
    if case.logits == "masked":
        masked = torch.rand(vocab_size) < 0.5
        masked[safe.flatten()] = False
        logits[:, masked] = float("-inf")
    if case.logits == "masked target":
        logits[row, safe[row, 0]] = float("-inf")
    if case.logits == "plus infinity":
        logits[row, case.seed % vocab_size] = float("inf")
    if case.logits == "nan":
        logits[row, case.seed % vocab_size] = float("nan")
    if case.logits == "minus infinity":
        logits[row] = float("-inf")
    return logits


def make_values(kind, shape):
    """Return embeddings ``[..., D]`` in fp32."""
    values = torch.randn(shape)
    if kind == "zero":
        values.zero_()
    if kind == "large":
        values *= 20000.0
    if kind in ("with infinities", "with nan") and values.numel() > 1:
        places = torch.rand(shape) < 0.05
        odd = torch.tensor([float("inf"), float("-inf")])[torch.randint(2, shape)]
        values[places] = odd[places] if kind == "with infinities" else float("nan")
    return values


def make_upstream(kind, shape):
    """Return the upstream gradient: for a number, of the kinds that a number can be."""
    upstream = {
        "one": torch.ones(shape),
        "ordinary": torch.full(shape, 1.7),
        "zero": torch.zeros(shape),
        "negative": torch.full(shape, -3.0),
        "huge": torch.full(shape, 1e6),
        "uneven": torch.randn(shape),
        "some zero": torch.rand(shape),
    }[kind]
    if kind == "some zero":
        upstream[torch.rand(shape) < 0.5] = 0
    return upstream


def make_options(case, group_size, vocab_size):
    """Return the keyword arguments of a loss."""
    name, on = case.options
    options = {"ignore_index": case.ignore_index}
    options |= {"reduction": name} if name in ("sum", "none") else {"normalize": name}
    # A target of weight zero may cost infinitely much, where plain formulas have 0 · inf.
    zeros = case.logits not in ("masked target", "plus infinity", "minus infinity")
    zeros = zeros and not (case.logits == "masked" and "label_smoothing" in on)
    if "slot_weights" in on:
        weights = torch.rand(group_size)
        if case.extreme and zeros:
            weights[0] = 0
        options["slot_weights"] = weights.tolist() if case.seed % 2 else weights
    if "class_weight" in on:
        options["class_weight"] = torch.rand(vocab_size)
        if case.extreme and zeros:
            options["class_weight"][::2] = 0
    if "label_smoothing" in on:
        options["label_smoothing"] = 1.0 if case.extreme else 0.1
    if "z_loss" in on:
        options["z_loss"] = 10.0 if case.extreme else 1e-3
    if "softcap" in on:
        options["softcap"] = 0.5 if case.extreme else 30.0
    if "token_scaling" in on:
        options["token_scaling"] = True
    if "num_targets" in on:
        options["num_targets"] = torch.tensor(0.0 if case.extreme else 7.0) if case.seed % 2 else 13
    return options
