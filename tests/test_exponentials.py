"""The fused first product of `linear_patch_cross_entropy`, by itself: in fp32 by the interpreter, in bf16 on a GPU."""

import math

import pytest
import torch

import reference.ops as reference
from npp_kernels.losses import exponential_rows, exponentials
from npp_kernels.losses.options import LossOptions
from npp_kernels.losses.row_layout import empty_rows
from npp_kernels.losses.scores import LOSS, MAXIMUM, REST, Scores
from npp_kernels.losses.targets import find_targets
from tests.conftest import INTERPRETED
from tests.test_linear_patch_cross_entropy import make_inputs as linear_inputs
from tests.test_patch_cross_entropy import make_groups

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or the interpreter", allow_module_level=True)

# The descriptors take multiples of 16 bytes; tiles are 128×256×64, so that no size here fills them.
NUM_ROWS, HIDDEN_SIZE, VOCAB_SIZE = 37, 24, 600
OPTIONS = [
    {},
    {"normalize": "row"},
    {"normalize": "slot"},
    {"reduction": "sum"},
    {"z_loss": 0.01},
    {"slot_weights": [1.0, 0.5, 0.0, 0.25]},
    {"num_targets": 50.0},
]


def make_inputs(device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return linear_inputs(NUM_ROWS, HIDDEN_SIZE, VOCAB_SIZE, device, dtype, bias=False)[:2]


def run(hidden, weight, groups, **options):
    """Return the loss, the lse and the gradient of the logits, put together from its factors."""
    targets, _ = find_targets(groups, LossOptions(**options), like=hidden)
    scores = Scores.empty(targets, hidden.dtype, per_target=False, stats=False)
    offsets = exponentials.find_offsets(hidden, weight)
    gradient = exponentials.launch_exponentials(hidden, weight, offsets, targets, scores)
    expected = (hidden.float() * gradient.row_scale[:, None]).to(hidden.dtype)
    torch.testing.assert_close(gradient.hidden, expected, equal_nan=True)
    lse = scores.rows[MAXIMUM] + torch.log1p(scores.rows[REST])
    return scores.rows[LOSS].sum(), lse, gradient.matrix.double() * gradient.row_scale[:, None]


def check(hidden, weight, groups, *, allowed=1e-9, **options):
    loss, lse, dlogits = run(hidden, weight, groups, **options)
    logits = (hidden.double() @ weight.double().t()).requires_grad_()
    expected, stats = reference.patch_cross_entropy(logits, groups, **options)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), stats.lse.detach(), rtol=1e-5, atol=3e-5)
    # Each element is rounded once to the matrix's dtype; fp32 logits have an error that their exponentials inherit.
    tolerance = torch.finfo(hidden.dtype).eps + 1e-6 * logits.abs().max().item()
    largest = logits.grad.abs().max().item()
    error = (dlogits - logits.grad).abs() - tolerance * logits.grad.abs()
    assert error.max() <= 2 * tolerance * largest  # at a target, where two large numbers may cancel
    rows = torch.arange(len(groups), device=groups.device)[:, None].expand_as(groups)
    error[rows[groups >= 0], groups[groups >= 0]] = 0
    assert error.max() <= allowed * largest


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(device, options):
    check(*make_inputs(device), make_groups(VOCAB_SIZE, NUM_ROWS, 4, device), **options)


@pytest.mark.parametrize("group_size", [1, 3, 64])
def test_group_sizes(device, group_size):
    check(*make_inputs(device), make_groups(VOCAB_SIZE, NUM_ROWS, group_size, device))


@pytest.mark.parametrize("vocab_size", [599, 584, 513])
def test_pads_behind_the_rows_of_odd_vocabularies_are_not_read(device, vocab_size, monkeypatch):
    made = []

    def poisoned(*arguments):
        rows = empty_rows(*arguments)
        made.append(rows.as_strided((rows.shape[0], rows.stride(0)), (rows.stride(0), 1)).fill_(float("nan")))
        return rows

    monkeypatch.setattr(exponentials, "empty_rows", poisoned)
    hidden, weight = make_inputs(device)
    weight = weight[:vocab_size].contiguous()
    weight[-1] += hidden[7]  # a target in the last tile that has more than half of its row
    groups = make_groups(vocab_size, NUM_ROWS, 4, device)
    groups[7] = vocab_size - 1
    check(hidden, weight, groups)
    (rows,) = made
    assert rows[:, :vocab_size].isfinite().all()
    # The tensor memory accelerator stores 16 bytes or nothing, so that up to seven of the pad may be exponentials of 0.
    last = -(-vocab_size // 8) * 8
    assert (rows[:, vocab_size:last].isnan() | (rows[:, vocab_size:last] == 0)).all()
    assert rows[:, last:].isnan().all()


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, VOCAB_SIZE - 1])
def test_a_row_that_its_sample_misjudges(device, vocab_size):
    """Logits of which no sample knows are far above all others: 300 nats, where 73 fit."""
    hidden, weight = make_inputs(device)
    weight = weight[:vocab_size].contiguous()
    sampled = set((torch.arange(exponentials.SAMPLE_SIZE) * vocab_size // exponentials.SAMPLE_SIZE).tolist())
    outlier = next(index for index in range(vocab_size) if index not in sampled)
    weight[outlier] = hidden[5] * (300 / hidden[5].float().square().sum()).to(hidden.dtype)
    groups = make_groups(vocab_size, NUM_ROWS, 4, device)
    assert (hidden.float() @ weight.float().t()).max() > 250
    check(hidden, weight, groups)


def test_large_and_negative_logits(device):
    hidden, weight = make_inputs(device)
    weight *= 10
    hidden[:, 0], weight[:, 0] = 8, -40  # all logits are near -320
    check(hidden, weight, make_groups(VOCAB_SIZE, NUM_ROWS, 4, device))


def test_ignored_rows_and_bad_ids(device):
    hidden, weight = make_inputs(device)
    groups = make_groups(VOCAB_SIZE, NUM_ROWS, 4, device)
    groups[3] = -100
    _, _, dlogits = run(hidden, weight, groups)
    assert dlogits[3].abs().max() == 0
    groups[4, 1] = VOCAB_SIZE
    loss, _, dlogits = run(hidden, weight, groups)
    assert loss.isnan()
    assert dlogits[4].isnan().all()
    assert dlogits[3].abs().max() == 0
    assert dlogits[5].isfinite().all()


def test_weights_of_both_signs_may_cancel(device):
    hidden, weight = make_inputs(device)
    groups = make_groups(VOCAB_SIZE, NUM_ROWS, 2, device, ignored=0)
    check(hidden, weight, groups, slot_weights=[1.0, -1.0], reduction="sum", allowed=2**-19)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("gap", [0.0, 5.0, 20.0])
def test_the_rounding_of_targets_goes_into_their_rows_scale(device, group_size, gap):
    """Of one target nothing is left of it; of several no more than each by itself would have."""
    hidden, weight = (tensor.bfloat16() for tensor in make_inputs(device))
    groups = torch.stack([torch.randperm(VOCAB_SIZE, device=device)[:group_size] for _ in range(NUM_ROWS)])
    weight = weight / weight.float().norm(dim=1, keepdim=True)
    hidden = (hidden + gap * weight[groups[:, 0]]).bfloat16()
    weight = weight.bfloat16()
    logits = (hidden.double() @ weight.double().t()).requires_grad_()
    reference.patch_cross_entropy(logits, groups)[0].backward()
    base2 = logits.detach() / math.log(2)
    offsets = (base2[:, :64].amax(1).ceil() + 16).float()
    values = torch.exp2(base2 - offsets[:, None]).float()
    tile = 256
    sums = torch.nn.functional.pad(values, (0, -VOCAB_SIZE % tile)).unflatten(1, (-1, tile)).sum(2)
    targets, _ = find_targets(groups, LossOptions(), like=hidden)
    scores = Scores.empty(targets, hidden.dtype, per_target=False, stats=False)
    tiles = (values.bfloat16(), sums.contiguous(), tile)
    factors = exponential_rows.score_exponentials(hidden, weight, offsets, tiles, targets, scores)
    found = factors.matrix.gather(1, groups).double() * factors.row_scale[:, None]
    exact = logits.grad.gather(1, groups)
    error = ((found - exact).norm(dim=1) / exact.norm(dim=1)).max()
    allowed = 2**-7 if INTERPRETED else 2**-8  # the interpreter cuts bf16 off
    if group_size == 1:  # what a sure row subtracts is a sum of others, of which one tile is rounded
        allowed = 2e-5 if gap < 20 else 2**-9
    assert error <= allowed
