"""The positions of each id, in a stable order: both ways to sort, on kernels, against torch's stable sort."""

import pytest
import torch

from npp_kernels.embeddings import segments
from tests.inputs import skewed_ids


def check(ids, vocab_size, ignore_index=None):
    """Compare with a stable sort, exactly: the order inside each segment is part of the contract."""
    found = segments.find_segments(ids, vocab_size, ignore_index)
    keys = ids.long()
    counted = (keys >= 0) & (keys < vocab_size)
    if ignore_index is not None:
        counted &= keys != ignore_index
    keys = torch.where(counted, keys, vocab_size)
    expected, order = torch.sort(keys, stable=True)
    assert torch.equal(found.keys.long(), expected)
    assert torch.equal(found.order.long(), order)
    starts = torch.searchsorted(expected, torch.arange(vocab_size + 1, device=ids.device))
    assert torch.equal(found.starts.long(), starts)


@pytest.mark.parametrize(
    ("num_ids", "vocab_size"),
    [
        (1, 1),
        (31, 7),  # less than a block
        (200, 300),  # more ids than places
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rank_sort(kernel_device, num_ids, vocab_size, dtype):
    check(skewed_ids(vocab_size, (num_ids,), dtype=dtype, device=kernel_device), vocab_size)


@pytest.mark.parametrize(
    ("num_ids", "vocab_size"),
    [
        (1300, 100),  # one pass, several tiles, the last one short
        (1300, 16384),  # two passes
        (700, 70000),  # three passes
        (3000, 256),  # the sentinel alone makes a second pass
    ],
)
def test_radix_sort(kernel_device, monkeypatch, num_ids, vocab_size):
    monkeypatch.setattr(segments, "RANK_SORT_LIMIT", 0)
    check(skewed_ids(vocab_size, (num_ids,), device=kernel_device), vocab_size)


@pytest.mark.parametrize("limit", [0, 8192])
def test_ids_that_count_nowhere_come_last(kernel_device, monkeypatch, limit):
    monkeypatch.setattr(segments, "RANK_SORT_LIMIT", limit)
    ids = skewed_ids(50, (600,), device=kernel_device)
    ids[::7] = -100
    ids[::11] = 50
    ids[3] = 2**40
    check(ids, 50)
    check(ids, 50, ignore_index=25)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ids", [8193, 65536, 1_000_003])
@pytest.mark.parametrize("vocab_size", [512, 16384, 262144])
def test_large(num_ids, vocab_size):
    check(skewed_ids(vocab_size, (num_ids,), device="cuda"), vocab_size)
    check(torch.randint(vocab_size, (num_ids,), device="cuda"), vocab_size)
    check(torch.full((num_ids,), vocab_size - 1, device="cuda"), vocab_size)
