"""Checks that operations share: the switch in the environment, modules in the place of their weights, shared memory."""

import pytest
import torch

from npp_kernels import group_mean, linear_patch_cross_entropy
from npp_kernels._checks import read_switch, rows_overlap


def test_a_module_in_the_place_of_its_weight():
    groups = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^table: expected a torch.Tensor, got Embedding: pass module\.weight"):
        group_mean(torch.nn.Embedding(8, 4), groups)
    with pytest.raises(TypeError, match=r"^weight: expected a torch.Tensor, got Linear: pass module\.weight"):
        linear_patch_cross_entropy(torch.zeros(2, 4), torch.nn.Linear(4, 8), groups)


@pytest.mark.parametrize("word", ["1", "true", "True", "YES", "on", " 1 "])
def test_switch_on(monkeypatch, word):
    monkeypatch.setenv("NPP_KERNELS_CHECK", word)
    assert read_switch("NPP_KERNELS_CHECK")


@pytest.mark.parametrize("word", ["", "0", "false", "FALSE", "no", "Off", " "])
def test_switch_off(monkeypatch, word):
    monkeypatch.setenv("NPP_KERNELS_CHECK", word)
    assert not read_switch("NPP_KERNELS_CHECK")


def test_switch_that_is_not_set(monkeypatch):
    monkeypatch.delenv("NPP_KERNELS_CHECK", raising=False)
    assert not read_switch("NPP_KERNELS_CHECK")


@pytest.mark.parametrize("word", ["2", "fasle", "-1"])
def test_switch_of_neither_word(monkeypatch, word):
    monkeypatch.setenv("NPP_KERNELS_CHECK", word)
    with pytest.raises(ValueError, match=f"NPP_KERNELS_CHECK: expected 1, true, yes or on, .* got '{word}'"):
        read_switch("NPP_KERNELS_CHECK")


@pytest.mark.parametrize(
    ("size", "stride", "overlap"),
    [
        ((3, 4), (4, 1), False),
        ((3, 4), (1, 3), False),  # transposed
        ((3, 4), (5, 1), False),  # a slice
        ((3, 4), (3, 1), True),  # the last of a row is the first of the next
        ((3, 4), (1, 1), True),
        ((3, 4), (0, 1), True),  # expanded
        ((1, 4), (0, 1), False),  # which a single row cannot be
        ((0, 4), (0, 1), False),
        ((2, 3, 4), (12, 4, 1), False),
        ((2, 3, 4), (11, 4, 1), True),
    ],
)
def test_elements_that_share_memory(size, stride, overlap):
    tensor = torch.empty_strided(size, stride)
    assert rows_overlap(tensor) is overlap
    places = [sum(i * step for i, step in zip(index, stride, strict=True)) for index in torch.ones(size).nonzero()]
    assert (len({int(place) for place in places}) < len(places)) is overlap
