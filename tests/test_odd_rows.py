"""Vocabularies that are no multiple of 16: pads behind rows that are ours, and rows that start between two loads."""

import pytest
import torch

from npp_kernels.losses import chunks, row_layout
from tests.test_linear_patch_cross_entropy import check as check_linear
from tests.test_linear_patch_cross_entropy import make_inputs
from tests.test_patch_cross_entropy import make_groups


def whole(rows):
    """Return rows together with their pads."""
    stride = rows.stride(0)
    return rows.as_strided((rows.shape[0], stride), (stride, 1))


@pytest.fixture
def poisoned(monkeypatch):
    """Return the rows that a call makes room for: full of NaN at first, pads included."""
    made = []

    def empty_rows(num_rows, vocab_size, like):
        rows = row_layout.empty_rows(num_rows, vocab_size, like)
        whole(rows).fill_(float("nan"))
        made.append(rows)
        return rows

    monkeypatch.setattr(chunks, "empty_rows", empty_rows)
    return made


@pytest.mark.parametrize(
    ("vocab_size", "itemsize", "stride"),
    [(50257, 2, 50304), (50264, 2, 50304), (50272, 2, 50272), (1, 4, 64), (16384, 2, 16384)],
)
def test_rows_are_padded_where_they_must_be(vocab_size, itemsize, stride):
    like = torch.empty(0, dtype={2: torch.bfloat16, 4: torch.float32}[itemsize], device="meta")
    rows = row_layout.empty_rows(3, vocab_size, like)
    assert rows.shape == (3, vocab_size)
    assert rows.stride() == (stride, 1)
    assert stride * itemsize % 16 == 0


@pytest.mark.parametrize("vocab_size", [75, 72, 5])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01}], ids=str
)
@pytest.mark.parametrize("bias", [False, True])
def test_pads_are_neither_read_nor_written(device, vocab_size, options, bias, poisoned):
    inputs = make_inputs(23, 16, vocab_size, device, bias=bias)
    groups = make_groups(vocab_size, 23, 4, device)
    groups[0, 0], groups[1, 1] = vocab_size - 1, 0
    upstream = torch.rand(groups.shape) if options.get("reduction") == "none" else torch.tensor(1.7)
    check_linear(inputs, groups, upstream.to(device), chunk_rows=10, **options)
    # The PyTorch path has no loads to align.
    assert bool(poisoned) == chunks.runs_kernels(inputs[0])
    for rows in poisoned:
        assert rows.isfinite().all()
        assert whole(rows)[:, vocab_size:].isnan().all()
