"""The losses where others round the answer away: logits with an offset, and rows that are sure of their target.

The yardstick is PyTorch's own cross entropy on the same logits: never more than twice its error, and none to speak of
where PyTorch gives 0 for what is not.
"""

import pytest
import torch
import torch.nn.functional as F

import npp_kernels
import reference.ops as reference
from npp_kernels.losses import gradient_kernels, row_kernels
from tests.budget import assert_within_budget
from tests.conftest import INTERPRETED

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # the interpreter truncates bfloat16
EPS = torch.finfo(torch.float32).eps


def forms(logits, targets, **options):
    """Return loss, lse, entropy and gradient of each row: ours, PyTorch's and the exact ones."""
    ours, plain, exact = logits.clone(), logits.float(), logits.double()
    for leaf in (ours, plain, exact):
        leaf.requires_grad_()
    loss, stats = npp_kernels.patch_cross_entropy(
        ours, targets[:, None], reduction="none", return_stats=True, **options
    )
    loss.sum().backward()
    wide = F.cross_entropy(plain, targets, reduction="none", **options)
    wide.sum().backward()
    logs = F.log_softmax(plain.detach(), -1)
    entropy = -(logs.exp() * logs).masked_fill(logs.isinf(), 0).sum(-1)
    oracle, exact_stats = reference.patch_cross_entropy(exact, targets[:, None], reduction="none", **options)
    oracle.sum().backward()
    return (
        (loss[:, 0].detach(), stats.lse, stats.entropy, ours.grad),
        (wide.detach(), torch.logsumexp(plain.detach(), -1), entropy, plain.grad.to(logits.dtype)),
        (oracle[:, 0].detach(), exact_stats.lse, exact_stats.entropy, exact.grad),
    )


def check(logits, targets, **options):
    for what, actual, eager, oracle in zip(
        ("loss", "lse", "entropy", "gradient"), *forms(logits, targets, **options), strict=True
    ):
        # A loss is a logarithm of 1 and more; a row's gradient is a difference of numbers of its own size.
        scale = oracle.abs().sum(1, keepdim=True) if oracle.ndim > 1 else oracle.abs().clamp(min=1)
        assert_within_budget(actual, eager, oracle, what=what, scale=scale)


@pytest.fixture(params=["narrow", "wide"])
def width(request, monkeypatch):
    """Rows in a program's registers, and the same rows through the kernel for those that are wider."""
    if request.param == "wide":
        monkeypatch.setattr(row_kernels, "MAX_BLOCK_BYTES", 1024)
        monkeypatch.setattr(row_kernels, "MAX_OPTIONS_BYTES", 512)
        monkeypatch.setattr(gradient_kernels, "GRADIENT_BLOCK", 128)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [0, 15, 30])
@pytest.mark.parametrize("offset", [0, 100, -1000, 1e5, 1e8])
@pytest.mark.usefixtures("width")
def test_offsets_and_confidence(device, offset, gap, dtype):
    if offset > torch.finfo(dtype).max:
        pytest.skip(f"{offset:g} is more than {dtype} holds")
    num_rows, vocab_size = (24, 600) if INTERPRETED else (1024, 600)
    logits = 3 * torch.randn(num_rows, vocab_size, device=device)
    targets = torch.randint(vocab_size, (num_rows,), device=device)
    logits.scatter_add_(1, targets[:, None], torch.full((num_rows, 1), float(gap), device=device))
    check((logits + offset).to(dtype), targets)


@pytest.mark.parametrize("vocab_size", [2, 33, 5000])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_vocabularies(device, vocab_size, options):
    num_rows = 20 if INTERPRETED else 10_000 if vocab_size < 100 else 256
    targets = torch.randint(vocab_size, (num_rows,), device=device)
    for offset in (0.0, 1e4):
        check(offset + 3 * torch.randn(num_rows, vocab_size, device=device), targets, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [500, 512])  # a power of two fills its block, whose masks the compiler drops
@pytest.mark.parametrize("gap", [0.0, 20.0])
@pytest.mark.usefixtures("width")
def test_softcapped_rows(device, gap, vocab_size, dtype):
    """A maximum that is a product: less itself it has to be 0, whatever the compiler fuses."""
    num_rows = 24 if INTERPRETED else 4096
    logits = 3 * torch.randn(num_rows, vocab_size, device=device)
    groups = torch.randint(vocab_size, (num_rows, 2), device=device)
    logits = logits.scatter_(1, groups[:, :1], gap, reduce="add").to(dtype)
    results = []
    for cast in (None, torch.float32, torch.float64):
        leaf = (logits if cast is None else logits.to(cast)).clone().requires_grad_()
        function = npp_kernels.patch_cross_entropy if cast is None else reference.patch_cross_entropy
        options = {"return_stats": True} if cast is None else {}
        loss, stats = function(leaf, groups, reduction="none", softcap=30.0, **options)
        loss.sum().backward()
        results.append(
            (loss.detach(), stats.lse, stats.entropy, leaf.grad.to(dtype if cast == torch.float32 else cast))
        )
    for what, *three in zip(("loss", "lse", "entropy", "gradient"), *results, strict=True):
        # A tanh is off by a last place of its own, 30 times as large after the cap.
        assert_within_budget(*three, what=what, scale=30.0 if what != "gradient" else 1.0)


def test_known_values(device):
    def loss_and_gradient(row, target):
        logits = torch.tensor([row], device=device, requires_grad=True)
        loss = npp_kernels.patch_cross_entropy(logits, torch.tensor([[target]], device=device))
        loss.backward()
        return loss.item(), logits.grad[0].tolist()

    loss, gradient = loss_and_gradient([1e8, 1e8], 0)  # PyTorch has this right
    assert loss == pytest.approx(0.693147180559945, rel=2 * EPS)
    assert gradient == [-0.5, 0.5]
    loss, gradient = loss_and_gradient([20.0, 6.0], 0)  # and gives 0 for this loss, and for its gradient at the target
    assert loss == pytest.approx(8.3152837e-7, rel=4 * EPS)
    assert gradient == pytest.approx([-8.3152802e-7, 8.3152802e-7], rel=4 * EPS)
    loss, _ = loss_and_gradient([30.0, 0.0], 0)
    assert loss == pytest.approx(9.3576230e-14, rel=4 * EPS)


OPTIONS = [
    {},
    {"reduction": "none"},
    {"normalize": "row"},
    {"slot_weights": [1.0, 0.5, 0.25, 2.0]},
    {"label_smoothing": 1e-6},
    {"z_loss": 1e-9},
    {"token_scaling": True},
    {"softcap": 200.0},
]


@pytest.mark.parametrize("gap", [16, 20, 24, 30])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("width")
def test_sure_rows(device, options, gap):
    """A positive loss, a negative gradient at the target, and a sum over the row of 0, each to a few roundings."""
    num_rows, vocab_size = (6, 600) if INTERPRETED else (64, 600)
    logits = torch.randn(num_rows, vocab_size, device=device)
    groups = torch.randint(vocab_size, (num_rows, 1), device=device).expand(-1, 4).clone()
    groups[1::3, 1] = -100
    logits.scatter_(1, groups[:, :1], float(gap))
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = npp_kernels.patch_cross_entropy(leaf, groups, **options)
    oracle, _ = reference.patch_cross_entropy(exact, groups, **options)
    loss.sum().backward()
    oracle.sum().backward()
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-5, atol=0)
    # Elements at which smoothing takes away just what the softmax gives are differences themselves.
    allowed = 2e-5 * exact.grad.abs() + 1e-6 * exact.grad.abs().amax(1, keepdim=True)
    assert ((leaf.grad.double() - exact.grad).abs() <= allowed).all()
    if options.keys() <= {"reduction", "normalize", "slot_weights", "token_scaling"}:
        assert (loss > 0).all() or loss.ndim == 2
        assert (leaf.grad.gather(1, groups[:, :1]) < 0).all()
    if "softcap" not in options and "z_loss" not in options:
        assert (leaf.grad.double().sum(1).abs() <= 4 * EPS * leaf.grad.double().abs().sum(1)).all()


def test_a_row_that_is_sure_of_one_of_several_targets(device):
    """One target has nearly all of the softmax, the others next to nothing: their gradients do not disturb its own."""
    logits = torch.randn(32, 100, device=device)
    groups = torch.randint(100, (32, 4), device=device)
    logits.scatter_(1, groups[:, :1], 25.0)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    npp_kernels.patch_cross_entropy(leaf, groups).backward()
    reference.patch_cross_entropy(exact, groups)[0].backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-6, atol=1e-20)


@pytest.mark.usefixtures("width")
def test_infinite_masked_and_nan_rows_are_as_pytorch_has_them(device):
    vocab_size = 600
    logits = torch.randn(7, vocab_size, device=device)
    logits[0] = float("-inf")
    logits[1, 3] = float("inf")
    logits[2, 5] = float("nan")
    logits[3] = torch.finfo(torch.float32).min  # a mask that is not infinite
    logits[4, 1:] = float("-inf")
    logits[5, :-1] = torch.finfo(torch.float32).min
    targets = torch.tensor([1, 3, 2, 7, 0, 4, 6], device=device)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, stats = npp_kernels.patch_cross_entropy(ours, targets[:, None], reduction="none", return_stats=True)
    expected = F.cross_entropy(plain, targets, reduction="none")
    torch.testing.assert_close(loss[:, 0], expected, equal_nan=True)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, equal_nan=True, rtol=1e-6, atol=1e-7)
    assert ((stats.prediction >= 0) & (stats.prediction < vocab_size)).all()
    expected = logits.argmax(1)
    assert torch.equal(stats.prediction[3:], expected[3:])


def test_a_target_that_weighs_nothing_may_cost_infinitely_much(device):
    logits = torch.zeros(2, 8, device=device)
    logits[0, 3] = float("-inf")
    groups = torch.tensor([[3, 1], [2, 2]], device=device)
    loss = npp_kernels.patch_cross_entropy(logits, groups, slot_weights=[0.0, 1.0])
    assert loss.item() == pytest.approx((torch.tensor(7.0).log() + torch.tensor(8.0).log()).item() / 2, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("gap", [0, 10, 15, 20, 24, 30, 40])
def test_many_bf16_rows_that_are_sure_of_their_target(gap, offset):
    """The exponentials in place of logits: at every confidence no worse than PyTorch with bf16 logits."""
    num_rows, vocab_size, hidden_size = 4096, 16384, 768
    weight = torch.randn(vocab_size, hidden_size, device="cuda")
    weight /= weight.norm(dim=1, keepdim=True)
    targets = torch.randint(vocab_size, (num_rows,), device="cuda")
    hidden = gap * weight[targets] + 0.5 * torch.randn(num_rows, hidden_size, device="cuda")
    if offset:
        hidden[:, 0], weight[:, 0] = offset, 1.0

    def results(function, dtype):
        leaves = [tensor.bfloat16().to(dtype).detach().clone().requires_grad_() for tensor in (hidden, weight)]
        loss = function(*leaves)
        return loss.detach().double(), *(grad.double() for grad in torch.autograd.grad(loss, leaves))

    groups = targets[:, None]
    ours = results(lambda h, w: npp_kernels.linear_patch_cross_entropy(h, w, groups), torch.bfloat16)
    plain = results(lambda h, w: F.cross_entropy((h @ w.t()).float(), targets), torch.bfloat16)
    exact = results(lambda h, w: reference.linear_patch_cross_entropy(h, w, groups)[0], torch.float64)
    assert ours[0] > 0
    for what, one, other, oracle in zip(("loss", "hidden", "weight"), ours, plain, exact, strict=True):
        errors = [((value - oracle).norm() / oracle.norm()).item() for value in (one, other)]
        print(f"{what}: {errors[0]:.1e}, PyTorch {errors[1]:.1e}")
        assert errors[0] <= max(errors[1], 1e-6 if what == "loss" else 2**-8)
        if what != "loss":
            assert errors[0] <= 2**-8  # bfloat16 itself
