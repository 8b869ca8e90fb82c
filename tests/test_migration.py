"""What the page of migration says, run."""

import re

import pytest
import torch
import torch.nn.functional as F

from npp_kernels import linear_patch_cross_entropy
from tests.processes import ROOT

PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 2
    assert all("assert_close" in snippet for snippet in SNIPPETS)


@pytest.mark.parametrize("number", range(2))
def test_snippets_run(number):
    exec(compile(SNIPPETS[number], "docs/migration.md", "exec"), {"__name__": "migration"})


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "none"}])
def test_at_one_target_it_is_the_ordinary_loss(options):
    hidden, weight, bias = torch.randn(2, 7, 8), torch.randn(30, 8), torch.randn(30)
    targets = torch.randint(30, (2, 7)).masked_fill(torch.rand(2, 7) < 0.2, -100)
    expected = F.cross_entropy((hidden @ weight.T + bias).flatten(0, 1), targets.flatten(), **options)
    loss = linear_patch_cross_entropy(hidden, weight, targets[..., None], bias=bias, **options)
    torch.testing.assert_close(loss.flatten() if loss.ndim else loss, expected)


def test_shift_is_a_slice():
    hidden, weight, targets = torch.randn(2, 7, 8), torch.randn(30, 8), torch.randint(30, (2, 7))
    expected = F.cross_entropy((hidden[:, :-1] @ weight.T).flatten(0, 1), targets[:, 1:].flatten())
    loss = linear_patch_cross_entropy(hidden[:, :-1], weight, targets[:, 1:, None])
    torch.testing.assert_close(loss, expected)
