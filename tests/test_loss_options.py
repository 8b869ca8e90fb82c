"""The options that both losses share, by themselves: the ends of their ranges, their defaults, what they become."""

import inspect
import math

import pytest
import torch

import npp_kernels
from npp_kernels.losses.options import LossOptions, check_chunk_rows
from npp_kernels.losses.targets import find_targets

GROUPS = torch.tensor([[0, 1], [2, -100]])
LIKE = torch.zeros(2, 5)


@pytest.mark.parametrize(
    "options",
    [
        *({"label_smoothing": 0}, {"label_smoothing": 1}, {"softcap": 1e-30}, {"slot_weights": [0.0, 1e30]}),
        *({"num_targets": 0}, {"ignore_index": 0}, {"reduction": "none"}, {"reduction": "sum", "z_loss": 1}),
        *({"normalize": "slot", "slot_weights": torch.zeros(2)}, {"normalize": "row"}, {"class_weight": torch.ones(5)}),
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_in_them(options):
    LossOptions(**options).check()
    LossOptions(**options).check_sizes(2, 5, LIKE)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("label_smoothing", (-0.01, 1.01, math.nan)),
        ("z_loss", (-0.01, math.inf, math.nan)),
        ("softcap", (-1.0, 0.0, math.inf, math.nan)),
        ("num_targets", (-0.01, math.inf, math.nan)),
        ("slot_weights", ([-0.01], [math.inf], [math.nan])),
    ],
)
def test_beyond_the_ends_of_the_ranges(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            LossOptions(**{name: value}).check()


def test_rows_of_a_chunk():
    for rows in (None, 1, 4096):
        check_chunk_rows(rows)
    for rows in (0, -1, 2.0):
        with pytest.raises(ValueError, match="chunk_rows: expected an int of at least 1 or None"):
            check_chunk_rows(rows)


@pytest.mark.parametrize("function", ["patch_cross_entropy", "linear_patch_cross_entropy"])
def test_defaults_are_the_same_everywhere(function):
    parameters = inspect.signature(getattr(npp_kernels, function)).parameters
    found = {name: parameters[name].default for name in LossOptions._fields if name in parameters}
    assert found == {name: value for name, value in LossOptions._field_defaults.items() if name in found}
    assert len(found) == len(LossOptions._fields)
    assert parameters["return_stats"].default is False
    LossOptions().check()


def test_plain_targets_are_those_without_options():
    """A kernel is compiled otherwise for them."""

    def is_plain(**options):
        targets, _ = find_targets(GROUPS, LossOptions(reduction="none", **options), LIKE)
        return targets.is_plain

    assert is_plain() is True
    for options in ({"label_smoothing": 0.1}, {"softcap": 5.0}, {"class_weight": torch.ones(5)}):
        assert is_plain(**options) is False
    assert find_targets(GROUPS, LossOptions(reduction="sum"), LIKE)[0].is_plain is True
    for options in ({}, {"reduction": "sum", "slot_weights": [1.0, 2.0]}, {"reduction": "sum", "z_loss": 0.1}):
        assert find_targets(GROUPS, LossOptions(**options), LIKE)[0].is_plain is False
