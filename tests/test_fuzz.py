"""Cases that nobody thought of: every operation, on whatever Hypothesis makes up, against the reference in fp64.

The suite runs a fixed few; ``python -m tests.fuzz --cases 100000`` runs as many as one likes. What was found that way
stands by name in the tests of the operation.
"""

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given

from npp_kernels._dispatch import runs_kernels
from npp_kernels.losses import gradient_kernels, row_kernels
from tests import fuzz_cases, fuzz_linear, fuzz_losses, fuzz_means
from tests.conftest import INTERPRETED


@pytest.fixture(scope="module", autouse=True)
def ran(request):
    """Count the cases of each test, and append the counts to the journal."""
    counts = Counter()
    yield counts
    journal = request.config.getoption("fuzz_journal")
    if journal:
        with Path(journal).open("a") as file:
            print(json.dumps(counts), file=file)


def narrow_blocks():
    """Send rows of a few hundred logits through the code for rows that are wider than one program's registers."""
    stack = ExitStack()
    sizes = {"MAX_BLOCK_BYTES": 1024, "MAX_OPTIONS_BYTES": 512, "MAX_SMOOTHED_BYTES": 512}
    for name, value in sizes.items():
        stack.enter_context(mock.patch.object(row_kernels, name, value))
    stack.enter_context(mock.patch.object(gradient_kernels, "GRADIENT_BLOCK", 128))
    return stack


def count(ran, name, device):
    where = "interpreter" if INTERPRETED else device.type
    ran[f"{name}, {where}"] += 1


@given(case=fuzz_cases.LOSS_CASES)
def test_patch_cross_entropy(device, ran, case):
    with narrow_blocks() if case.wide_rows else ExitStack():
        fuzz_losses.check_loss(case, device)
    count(ran, "patch_cross_entropy", device)


@given(case=fuzz_cases.LINEAR_CASES)
def test_linear_patch_cross_entropy(device, ran, case):
    with narrow_blocks() if case.loss.wide_rows else ExitStack():
        fuzz_linear.check_linear(case, device)
    count(ran, "linear_patch_cross_entropy", device)


@given(case=fuzz_cases.MEAN_CASES)
def test_group_mean(device, ran, case):
    fuzz_means.check_group_mean(case, device)
    count(ran, "group_mean", device)


@given(case=fuzz_cases.PATCH_CASES)
def test_patch_mean(device, ran, case):
    fuzz_means.check_patch_mean(case, device)
    count(ran, "patch_mean", device)


@given(case=fuzz_cases.SEGMENT_CASES)
def test_segments(device, ran, case):
    if not runs_kernels(torch.empty(0, device=device)):
        pytest.skip("the PyTorch path needs no segments")
    fuzz_means.check_segments(case, device)
    count(ran, "find_segments", device)


@given(case=fuzz_cases.LOSS_CASES)
def test_bad_ids(device, ran, case):
    fuzz_losses.check_bad_id(case, device)
    count(ran, "bad ids", device)
