"""Vocabularies that are no multiple of 16: pads behind rows that are ours, and rows that start between two loads."""

import pytest
import torch

import npp_kernels
from npp_kernels.losses import chunks, gradient_kernels, row_kernels, row_layout
from tests.conftest import INTERPRETED
from tests.inputs import peaky_logits
from tests.test_linear_patch_cross_entropy import check as check_linear
from tests.test_linear_patch_cross_entropy import make_inputs
from tests.test_patch_cross_entropy import check, make_groups


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


@pytest.fixture(params=["registers", "blocks"])
def kernel(request, monkeypatch):
    """Rows in a program's registers, and the same rows through the kernel for wider ones, in several blocks."""
    if request.param == "blocks":
        monkeypatch.setattr(row_kernels, "MAX_BLOCK_BYTES", 512 if INTERPRETED else 8192)
        monkeypatch.setattr(row_kernels, "MAX_OPTIONS_BYTES", 256 if INTERPRETED else 8192)
        monkeypatch.setattr(gradient_kernels, "GRADIENT_BLOCK", 64 if INTERPRETED else 2048)
    return request.param


def make_ragged(vocab_size, num_rows, device, dtype=torch.float32):
    """Return logits and groups; each row is sure of one id, of those at its edges and beside them, or of none."""
    logits = peaky_logits(num_rows, vocab_size, dtype=torch.float32, device=device)
    groups = make_groups(vocab_size, num_rows, 4, device)
    places = [0, 1, 6, 7, 8, -1, -2, -7, -8, -9, vocab_size // 2]
    for row in range(num_rows - 3):
        place = places[row % len(places)] % vocab_size
        logits[row, place] += 25
        groups[row, row % 4] = place
    return logits.to(dtype), groups


def ragged_sizes():
    """Return odd vocabularies: smaller than a load, then of all kinds that leave few elements before and behind it."""
    return [3, 301, 310] if INTERPRETED else [3, 301, 8191, 50257, 50260]


@pytest.mark.parametrize("vocab_size", ragged_sizes())
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.1, "softcap": 50.0, "z_loss": 0.01}],
    ids=str,
)
@pytest.mark.usefixtures("kernel")
def test_rows_that_start_anywhere(device, vocab_size, options):
    check(*make_ragged(vocab_size, 14, device), **options)


@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (not INTERPRETED))
@pytest.mark.usefixtures("kernel")
def test_rows_of_two_bytes_an_element_that_start_anywhere(device, dtype):
    logits, groups = make_ragged(ragged_sizes()[1], 14, device, dtype)
    check(logits, groups)
    check(logits, groups, label_smoothing=0.2, class_weight=torch.rand(logits.shape[1], device=device))


@pytest.mark.parametrize("stride", [301, 307, 320])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("kernel")
def test_what_lies_between_rows_is_neither_read_nor_written(device, stride, reduction):
    logits, groups = make_ragged(301, 16, device)
    between = torch.full((18, stride), float("nan"), device=device)
    rows = between[1:-1, :301]
    rows.copy_(logits)
    assert row_layout.is_ragged(rows, rows)
    leaf, view = logits.requires_grad_(), rows.detach().requires_grad_()
    expected = npp_kernels.patch_cross_entropy(leaf, groups, reduction=reduction)
    found = npp_kernels.patch_cross_entropy(view, groups, reduction=reduction, inplace_backward=True)
    torch.testing.assert_close(found, expected)
    for loss in (expected, found):
        (2 * loss).sum().backward()
    torch.testing.assert_close(rows, leaf.grad)  # which has overwritten the logits
    between[1:-1, :301] = float("nan")
    assert between.isnan().all()


@pytest.mark.parametrize("vocab_size", [300, 320])
def test_programs_that_are_half_a_row_apart(device, vocab_size, monkeypatch):
    """Of those that start together every second one waits; the last of them for more than will ever come."""
    monkeypatch.setattr(row_kernels, "MAX_BLOCK_BYTES", 512 if INTERPRETED else 8192)
    monkeypatch.setattr(row_kernels, "STAGGERED_BYTES", 0)
    monkeypatch.setattr(row_kernels, "num_multiprocessors", lambda logits: 6)
    logits, groups = make_ragged(vocab_size if INTERPRETED else 100 * vocab_size, 14, device)
    leaf, plain = (logits.clone().requires_grad_() for _ in range(2))
    loss = npp_kernels.patch_cross_entropy(leaf, groups)
    monkeypatch.setattr(row_kernels, "STAGGERED_BYTES", None)
    expected = npp_kernels.patch_cross_entropy(plain, groups)
    assert torch.equal(loss, expected)
    assert torch.equal(*torch.autograd.grad(loss, leaf), *torch.autograd.grad(expected, plain))


def test_rows_are_ragged_only_where_logits_and_gradient_start_alike():
    def rows(vocab_size, stride):
        return torch.empty(4, stride, device="meta")[:, :vocab_size]

    assert row_layout.is_ragged(rows(50257, 50257), rows(50257, 50257))
    assert row_layout.is_ragged(rows(50257, 50304), None)
    assert row_layout.is_ragged(rows(16384, 16387), rows(16384, 16387))
    assert not row_layout.is_ragged(rows(16384, 16387), rows(16384, 16384))
    assert not row_layout.is_ragged(rows(50257, 50304), rows(50257, 50257))
    assert not row_layout.is_ragged(rows(50272, 50272), rows(50272, 50272))
    assert not row_layout.is_ragged(rows(16384, 16400), rows(16384, 16384))
