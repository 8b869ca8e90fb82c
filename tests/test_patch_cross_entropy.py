"""The loss on logits: options, shapes, gradients in place, masks and wide rows, against the reference in fp64."""

import pytest
import torch
import torch.nn.functional as F

import npp_kernels
import reference.ops as reference
from npp_kernels import VocabularyShard
from npp_kernels._dispatch import runs_kernels
from npp_kernels.losses import gradient_kernels, row_kernels, torch_path
from npp_kernels.losses.options import LossOptions
from npp_kernels.losses.scores import Scores
from npp_kernels.losses.targets import find_targets
from tests.budget import assert_within_budget
from tests.conftest import INTERPRETED
from tests.inputs import LOSS_OPTIONS, SLOT_WEIGHTS, make_groups, peaky_logits

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # the interpreter truncates bfloat16


def run(function, logits, groups, upstream, **options):
    logits = logits.detach().clone().requires_grad_()
    loss, stats = function(logits, groups, **options)
    loss.backward(upstream.to(loss.dtype))
    return loss, logits.grad, *stats


def check(logits, groups, upstream=None, *, ours=None, **options):
    """Check loss, gradient and statistics against the oracle, for an upstream of 1 and for another one."""
    if upstream is None:
        upstream = torch.tensor([1.0, 1.7]).unbind()
        if options.get("reduction") == "none":
            upstream = [torch.rand(groups.shape)]
    for grad in upstream:
        grad = grad.to(logits.device)
        actual = run(
            npp_kernels.patch_cross_entropy, logits, groups, grad, return_stats=True, **options, **(ours or {})
        )
        wide = torch.promote_types(logits.dtype, torch.float32)
        eager = run(reference.patch_cross_entropy, logits.to(wide), groups, grad, **options)
        oracle = run(reference.patch_cross_entropy, logits.double(), groups, grad.double(), **options)
        eager = (eager[0], eager[1].to(logits.dtype), *eager[2:])
        if ours and logits.dtype == torch.bfloat16 and grad.ndim == 0:
            # In place the gradient is rounded in the forward, and again when the upstream turns out not to be 1.
            unit = run(reference.patch_cross_entropy, logits.to(wide), groups, torch.ones_like(grad), **options)[1]
            eager = (eager[0], unit.to(logits.dtype) * grad, *eager[2:])
        for what, *three in zip(("loss", "grad", "lse", "accuracy", "entropy"), actual, eager, oracle, strict=False):
            # A row's gradient is a difference of numbers of its own size, even where it is small itself.
            scale = oracle[1].abs().sum(1, keepdim=True) if what == "grad" else None
            assert_within_budget(*three, what=what, scale=scale)
        assert torch.equal(actual[5], eager[5])  # predictions


DIFFERENTIABLE = [
    options for options in LOSS_OPTIONS if "token_scaling" not in options
]  # which is no derivative of its loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_options(device, dtype, options):
    check(peaky_logits(23, 75, dtype=dtype, device=device), make_groups(75, 23, 4, device), **options)


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "group_size"),
    [
        (1, 2, 1),  # the smallest
        (5, 33, 1),  # K=1, an odd vocabulary
        (9, 64, 5),  # aligned, K not a power of two
        (16, 40, 256),  # wide groups, targets repeated many times
    ],
)
@pytest.mark.parametrize("ignored", [0.0, 0.3, 2.0])  # none, some, all
def test_shapes(device, num_rows, vocab_size, group_size, ignored):
    groups = make_groups(vocab_size, num_rows, group_size, device, ignored=ignored)
    check(peaky_logits(num_rows, vocab_size, device=device), groups)
    check(peaky_logits(num_rows, vocab_size, device=device), groups.int(), reduction="none")


@pytest.mark.parametrize("options", [{}, {"normalize": "row"}, {"normalize": "slot"}, {"reduction": "none"}], ids=str)
def test_an_id_of_the_vocabulary_may_be_ignored(device, options):
    """A padding id, say, with ids below and above it."""
    groups = torch.randint(20, (9, 4), device=device)
    groups[0], groups[1, :2] = 7, 7
    check(peaky_logits(9, 20, device=device), groups, ignore_index=7, **options)


def test_a_vocabulary_of_one_has_no_loss(device):
    logits = torch.randn(3, 1, device=device, requires_grad=True)
    loss = npp_kernels.patch_cross_entropy(logits, torch.zeros(3, 3, dtype=torch.int64, device=device))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.zeros((), device=device))
    torch.testing.assert_close(logits.grad, torch.zeros(3, 1, device=device), atol=1e-7, rtol=0)


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Send small rows through the code for rows that are wider than one program's registers."""
    monkeypatch.setattr(row_kernels, "MAX_BLOCK_BYTES", 256)
    monkeypatch.setattr(row_kernels, "MAX_OPTIONS_BYTES", 256)
    monkeypatch.setattr(row_kernels, "MAX_SMOOTHED_BYTES", 256)
    monkeypatch.setattr(gradient_kernels, "GRADIENT_BLOCK", 32)


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_wide_rows(device, options):
    if device.type == "cuda":
        pytest.skip("the blocks are too small for a GPU's threads; test_full_size has wide rows")
    check(peaky_logits(7, 300), make_groups(300, 7, 4, device), **options)


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"reduction": "none"}], ids=str)
def test_three_rows_of_three_blocks(device, options):
    """The same in a fraction of the interpreter's time; the largest logit in the first, the last and the middle."""
    if device.type == "cuda":
        pytest.skip("the blocks are too small for a GPU's threads")
    logits = torch.randn(3, 150)
    logits[torch.arange(3), torch.tensor([5, 149, 70])] = 6.0
    groups = torch.tensor([[5, 80], [0, -100], [149, 149]])
    # For an upstream of 1 the gradient is the forward's, for another one the backward's.
    upstream = torch.rand(3, 2) if "reduction" in options else torch.tensor(1.7 if options else 1.0)
    check(logits, groups, [upstream], **options)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"softcap": 4.0, "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(device, dtype, options):
    """The gradient lands in the logits' own memory, and is the same."""
    logits = peaky_logits(11, 65, dtype=dtype, device=device)
    groups = make_groups(65, 11, 4, device)
    check(logits, groups, ours={"inplace_backward": True}, **options)
    leaf = logits.clone().requires_grad_()
    product = leaf * 1
    address = product.data_ptr()
    seen = []
    product.register_hook(lambda grad: seen.append(grad.data_ptr()))
    npp_kernels.patch_cross_entropy(product, groups, inplace_backward=True, **options).sum().backward()
    assert seen == [address]


def test_by_default_the_callers_tensors_are_left_alone(device):
    logits = peaky_logits(11, 65, device=device).requires_grad_()
    groups = make_groups(65, 11, 4, device)
    before = logits.detach().clone(), groups.clone()
    (3 * npp_kernels.patch_cross_entropy(logits, groups)).backward()
    assert torch.equal(logits, before[0])
    assert torch.equal(groups, before[1])


def test_several_backwards(device):
    logits = peaky_logits(6, 20, device=device).requires_grad_()
    groups = make_groups(20, 6, 4, device)
    loss = npp_kernels.patch_cross_entropy(logits, groups)
    grads = [
        torch.autograd.grad(loss, logits, torch.tensor(g, device=device), retain_graph=True)[0] for g in (2.0, 1.0, 3.0)
    ]
    torch.testing.assert_close(grads[0], 2 * grads[1])
    torch.testing.assert_close(grads[2], 3 * grads[1])
    loss = npp_kernels.patch_cross_entropy(logits * 1, groups, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=True: expected one backward, got a second"):
        loss.backward()


class NoGradient(torch.autograd.Function):
    """Twice its argument, whose backward says that there is no gradient."""

    @staticmethod
    def forward(ctx, value):
        return 2 * value

    @staticmethod
    def backward(ctx, upstream):
        return None


def test_a_loss_that_no_gradient_comes_to_has_none(device):
    logits = peaky_logits(6, 20, device=device).requires_grad_()
    NoGradient.apply(npp_kernels.patch_cross_entropy(logits, make_groups(20, 6, 4, device))).backward()
    assert logits.grad is None


def test_a_gradient_that_was_handed_out_is_the_callers(device):
    """`loss.backward(retain_graph=True); x.grad.zero_(); loss.backward()`, as with `F.cross_entropy`."""
    logits = peaky_logits(6, 20, device=device).requires_grad_()
    loss = npp_kernels.patch_cross_entropy(logits, make_groups(20, 6, 4, device))
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    logits.grad.zero_()
    loss.backward()
    torch.testing.assert_close(logits.grad, first)


@pytest.mark.parametrize(
    "logits", [torch.zeros(1, 8).expand(3, 8), torch.zeros(10).unfold(0, 8, 1), torch.zeros(1, 3, 8).expand(2, 3, 8)]
)
def test_in_place_on_rows_that_share_memory_is_refused(logits):
    groups = torch.zeros(*logits.shape[:-1], 2, dtype=torch.int64)
    npp_kernels.patch_cross_entropy(logits, groups)
    with pytest.raises(ValueError, match="inplace_backward: expected logits whose elements each have memory of their"):
        npp_kernels.patch_cross_entropy(logits, groups, inplace_backward=True)


def test_in_place_on_no_rows_that_share_memory():
    logits = torch.zeros(1, 0, 8).expand(3, 0, 8).requires_grad_()
    groups = torch.zeros(3, 0, 2, dtype=torch.int64)
    (grad,) = torch.autograd.grad(npp_kernels.patch_cross_entropy(logits, groups, inplace_backward=True), logits)
    assert grad.shape == logits.shape


def test_in_place_is_noticed_by_others_who_saved_the_logits(device):
    leaf = peaky_logits(6, 20, device=device).requires_grad_()
    logits = leaf.exp()  # saves its result
    loss = npp_kernels.patch_cross_entropy(logits, make_groups(20, 6, 4, device), inplace_backward=True)
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("the PyTorch path writes in the backward only")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


CLASS_OPTIONS = [
    {},
    {"normalize": "row", "slot_weights": SLOT_WEIGHTS},
    {"normalize": "slot"},
    {"reduction": "sum", "z_loss": 0.01},
    {"reduction": "none", "label_smoothing": 0.1},
    {"label_smoothing": 0.2, "softcap": 5.0},
    {"num_targets": 7, "token_scaling": True},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CLASS_OPTIONS, ids=str)
def test_class_weights(device, dtype, options):
    class_weight = torch.rand(75, device=device)
    class_weight[::5] = 0
    groups = make_groups(75, 23, 4, device)
    check(peaky_logits(23, 75, dtype=dtype, device=device), groups, class_weight=class_weight, **options)


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize("options", CLASS_OPTIONS, ids=str)
def test_class_weights_of_wide_rows(device, options):
    if device.type == "cuda":
        pytest.skip("the blocks are too small for a GPU's threads")
    groups = make_groups(300, 7, 4, device)
    check(peaky_logits(7, 300), groups, class_weight=torch.rand(300, device=device), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_f_cross_entropy(device, reduction, label_smoothing):
    ours, plain = (peaky_logits(40, 50, device=device).requires_grad_() for _ in range(2))
    plain.data.copy_(ours.data)
    groups = make_groups(50, 40, 1, device)
    weight = torch.rand(50, device=device)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    loss = npp_kernels.patch_cross_entropy(ours, groups, class_weight=weight, **options)
    expected = F.cross_entropy(plain, groups[:, 0], weight=weight, **options)
    torch.testing.assert_close(loss.flatten(), expected.flatten())
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_token_scaling_takes_the_probability_as_a_constant(device):
    logits = peaky_logits(12, 50, device=device).requires_grad_()
    groups = make_groups(50, 12, 1, device)
    loss = npp_kernels.patch_cross_entropy(logits, groups, token_scaling=True)
    plain = F.cross_entropy(logits, groups[:, 0], reduction="none")
    scaled = plain * torch.exp(-plain.detach())
    expected = scaled.sum() / (groups >= 0).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


def test_one_target_is_f_cross_entropy(device):
    logits = peaky_logits(12, 50, device=device)
    groups = make_groups(50, 12, 1, device)
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "sum"}):
        ours = npp_kernels.patch_cross_entropy(logits, groups, **options)
        torch.testing.assert_close(ours, F.cross_entropy(logits, groups[:, 0], **options))


def test_all_ignored_is_zero_even_for_broken_logits(device):
    logits = torch.full((3, 10), float("nan"), device=device, requires_grad=True)
    groups = torch.full((3, 4), -100, device=device)
    for options in LOSS_OPTIONS:
        loss = npp_kernels.patch_cross_entropy(logits, groups, **options)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.equal(loss, torch.zeros_like(loss)), options
        assert torch.equal(grad, torch.zeros_like(grad)), options


def test_minus_infinity_masks_a_logit(device):
    logits = peaky_logits(64, 40, device=device)  # in a few rows one gradient would decide the mean error
    logits[:, 7:30] = float("-inf")
    groups = torch.randint(7, (64, 3), device=device)
    check(logits, groups)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_a_row_that_is_minus_infinity_throughout_is_nan(device, options, wide, request):
    """Its losses and its gradient, as PyTorch's; and no other row's."""
    vocab_size = 40
    if wide and device.type == "cuda":
        vocab_size = 100_000
    elif wide:
        request.getfixturevalue("narrow_blocks")
        vocab_size = 150
    logits = torch.randn(3, vocab_size, device=device)
    logits[1] = float("-inf")
    logits.requires_grad_()
    groups = torch.tensor([[5, 8], [0, -100], [4, 4]], device=device)
    losses = npp_kernels.patch_cross_entropy(logits, groups, reduction="none", **options)
    (grad,) = torch.autograd.grad(losses, logits, torch.full_like(losses, 1.7))
    assert losses.isnan().tolist() == [[False, False], [True, False], [False, False]]
    assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_target_that_is_masked_costs_infinitely_much(device, reduction):
    logits = torch.zeros(3, 40, device=device)
    logits[1, 5] = float("-inf")
    groups = torch.tensor([[0, 1], [5, 6], [2, 2]], device=device)
    losses = npp_kernels.patch_cross_entropy(logits, groups, reduction=reduction)
    assert losses.isinf().sum() == 1
    assert losses.max() == float("inf")


def test_slices_and_leading_axes(device):
    padded = peaky_logits(12, 64, device=device)
    groups = make_groups(50, 12, 4, device)
    for options in ({}, {"reduction": "none"}):
        check(padded[:, :50], groups, **options)
        check(padded.t().contiguous().t()[:, :50], groups, **options)
    loss, stats = npp_kernels.patch_cross_entropy(
        padded.view(3, 4, 64), groups.view(3, 4, 4), return_stats=True, reduction="none"
    )
    assert loss.shape == (3, 4, 4)
    assert all(value.shape == (3, 4) for value in stats)
    assert [value.dtype for value in stats] == [torch.float32] * 3 + [torch.int64]
    loss, stats = npp_kernels.patch_cross_entropy(padded[0], groups[0], return_stats=True)
    assert loss.shape == stats.lse.shape == ()


def test_in_place_on_a_slice(device):
    storage = peaky_logits(12, 64, device=device)
    groups = make_groups(50, 12, 4, device)
    leaf = storage[:, :50].clone().requires_grad_()
    (2 * npp_kernels.patch_cross_entropy(leaf, groups)).backward()
    kept = storage[:, 50:].clone()
    view = storage[:, :50].requires_grad_()
    (2 * npp_kernels.patch_cross_entropy(view, groups, inplace_backward=True)).backward()
    torch.testing.assert_close(view.grad, leaf.grad)
    assert torch.equal(storage[:, 50:], kept)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_gradient_of_a_slice_follows_from_the_scores_of_the_whole(device, label_smoothing):
    """As each rank of a vocabulary that is shared out computes its own; beside the slice nothing is written."""
    sizes = (7, 3, 8)
    logits, groups = peaky_logits(5, sum(sizes), device=device), make_groups(sum(sizes), 5, 4, device)
    upstream, options = torch.tensor(1.7, device=device), LossOptions(label_smoothing=label_smoothing)
    leaf = logits.clone().requires_grad_()
    npp_kernels.patch_cross_entropy(leaf, groups, label_smoothing=label_smoothing).backward(upstream)
    targets, _ = find_targets(groups, options, logits)
    scores = Scores.empty(targets, logits.dtype, per_target=False, stats=False)
    on_kernels = runs_kernels(logits)
    if on_kernels:
        row_kernels.launch_loss(logits, None, targets, scores)
    else:
        torch_path.torch_loss(logits, targets, scores)
    for rank, size in enumerate(sizes):
        shard = VocabularyShard(sizes, rank, "none")
        mine = targets._replace(shard=shard)
        # Rows of 50 start as many elements behind 16 bytes as those of the logits, and are ragged; rows of 51 are not.
        for row_size in (50, 51):
            around = torch.full((7, row_size), 9.0, device=device)
            grad = around[1:-1, 16 : 16 + size]
            fill = gradient_kernels.launch_gradient if on_kernels else torch_path.torch_gradient
            fill(logits[:, shard.start : shard.stop], grad, mine, scores, upstream)
            torch.testing.assert_close(grad, leaf.grad[:, shard.start : shard.stop])
            grad.fill_(9)
            assert (around == 9).all()


def test_empty(device):
    logits = torch.zeros(0, 10, device=device, requires_grad=True)
    groups = torch.zeros(0, 4, dtype=torch.int64, device=device)
    loss = npp_kernels.patch_cross_entropy(logits, groups)
    loss.backward()
    assert loss == 0
    assert npp_kernels.patch_cross_entropy(logits, groups, reduction="none").shape == (0, 4)


def test_gradcheck():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    groups = make_groups(7, 5, 4, "cpu")
    for options in DIFFERENTIABLE:
        assert torch.autograd.gradcheck(lambda z: npp_kernels.patch_cross_entropy(z, groups, **options), logits)  # noqa: B023
        assert torch.autograd.gradcheck(lambda z: reference.patch_cross_entropy(z, groups, **options)[0], logits)  # noqa: B023


def test_float16_survives_a_loss_scale(device):
    """Gradients of 1e-6 vanish in float16; a loss scale must reach them before they are rounded."""
    logits = peaky_logits(64, 300, dtype=torch.float16, device=device).requires_grad_()
    groups = make_groups(300, 64, 4, device)
    scale = 2.0**15
    (scale * npp_kernels.patch_cross_entropy(logits, groups)).backward()
    exact = logits.detach().double().requires_grad_()
    (scale * reference.patch_cross_entropy(exact, groups)[0]).backward()
    assert (logits.grad == 0).float().mean() <= (exact.grad.half() == 0).float().mean() + 1e-3


def test_accuracy_takes_the_first_of_equal_logits(device):
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]], device=device)
    for target, expected in ((1, 1.0), (2, 0.0)):
        _, stats = npp_kernels.patch_cross_entropy(logits, torch.tensor([[target]], device=device), return_stats=True)
        assert stats.accuracy.item() == expected


def test_budget_rejects_low_precision_softmax():
    """The assertion must see what a plain atol=rtol=1e-2 lets pass: a softmax computed in bfloat16."""
    logits = peaky_logits(32, 512, dtype=torch.bfloat16)
    groups = make_groups(512, 32, 4, "cpu")
    one = torch.tensor(1.0)
    wrong = run(reference.patch_cross_entropy, logits, groups, one)[1]
    eager = run(reference.patch_cross_entropy, logits.float(), groups, one)[1].bfloat16()
    oracle = run(reference.patch_cross_entropy, logits.double(), groups, one.double())[1]
    torch.testing.assert_close(wrong.double(), oracle, atol=1e-2, rtol=1e-2)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(wrong, eager, oracle)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalize": "rows"}, "normalize: expected one of .* got 'rows'"),
        ({"reduction": "avg"}, "reduction: expected one of .* got 'avg'"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected a number in .* got 1.5"),
        ({"z_loss": -1.0}, "z_loss: expected a finite number of at least 0, got -1.0"),
        ({"softcap": 0.0}, "softcap: expected a finite number above 0 or None, got 0.0"),
        ({"slot_weights": [1.0]}, "slot_weights: expected 4 weights, one per slot, got 1"),
        ({"slot_weights": SLOT_WEIGHTS, "reduction": "none"}, "slot_weights: expected None"),
        ({"z_loss": 0.1, "reduction": "none"}, "z_loss: expected 0"),
        ({"num_targets": 3, "normalize": "row"}, "num_targets: expected None unless"),
        ({"num_targets": 3, "reduction": "sum"}, "num_targets: expected None unless"),
        ({"num_targets": torch.ones(2)}, "num_targets: expected a number or a 0-d tensor"),
        ({"num_targets": float("nan")}, "num_targets: expected a finite number of at least 0, got nan"),
        ({"num_targets": float("inf")}, "num_targets: expected a finite number of at least 0, got inf"),
        ({"num_targets": -1}, "num_targets: expected a finite number of at least 0, got -1"),
        ({"num_targets": torch.tensor(2.0, requires_grad=True)}, "num_targets: expected a tensor without a gradient"),
        ({"slot_weights": [1.0, -0.5, 1, 1]}, r"slot_weights: expected finite weights of at least 0, got \[1.0, -0.5"),
        ({"slot_weights": torch.tensor([1.0, float("nan"), 1, 1])}, "slot_weights: expected finite weights"),
        ({"slot_weights": torch.ones(4, requires_grad=True)}, "slot_weights: expected a tensor without a gradient"),
        ({"slot_weights": torch.ones(2, 2)}, r"slot_weights: expected \[K\], one weight per slot, got"),
        ({"class_weight": torch.ones(7)}, r"class_weight: expected \[8\], one weight per id, got \(7,\)"),
        ({"class_weight": torch.ones(8, requires_grad=True)}, "class_weight: expected a tensor without a gradient"),
        ({"class_weight": torch.ones(8, device="meta")}, "class_weight: expected the device of"),
    ],
)
def test_option_errors(options, words):
    with pytest.raises(ValueError, match=words):
        npp_kernels.patch_cross_entropy(torch.zeros(3, 8), torch.zeros(3, 4, dtype=torch.int64), **options)


def test_option_type_errors():
    logits, groups = torch.zeros(3, 8), torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match="ignore_index: expected an int, got None"):
        npp_kernels.patch_cross_entropy(logits, groups, ignore_index=None)
    with pytest.raises(TypeError, match="class_weight: expected float32"):
        npp_kernels.patch_cross_entropy(logits, groups, class_weight=torch.ones(8, dtype=torch.int64))


def test_input_errors():
    logits, groups = torch.zeros(3, 8), torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"groups: expected the leading shape of logits, \(3,\), and K, got \(2, 4\)"):
        npp_kernels.patch_cross_entropy(logits, groups[:2])
    with pytest.raises(TypeError, match="groups: expected int32 or int64"):
        npp_kernels.patch_cross_entropy(logits, groups.float())
    with pytest.raises(TypeError, match="logits: expected float32"):
        npp_kernels.patch_cross_entropy(groups, groups)
    with pytest.raises(ValueError, match="logits: expected a vocabulary of at least 1"):
        npp_kernels.patch_cross_entropy(logits[:, :0], groups)
    with pytest.raises(ValueError, match="groups: expected the device of logits"):
        npp_kernels.patch_cross_entropy(logits, groups.to("meta"))
    with pytest.raises(IndexError, match=r"groups: expected ids in \[0, 8\), got 8 at position \(2, 3\)"):
        npp_kernels.patch_cross_entropy(logits, torch.tensor([[0] * 4, [-100] * 4, [7, 0, 0, 8]]))


def test_double_backward_is_refused(device):
    logits = peaky_logits(3, 8, device=device).requires_grad_()
    for reduction in ("mean", "none"):
        loss = npp_kernels.patch_cross_entropy(logits, make_groups(8, 3, 4, device), reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="patch_cross_entropy: expected one backward, got a double backward"):
            grad.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "group_size"),
    [
        (1024, 16384, 16),  # LlamaGen's vocabulary, at patch 4
        (512, 16384, 1),
        (64, 32768, 4),  # the widest row that stays in registers
        (64, 32769, 4),  # the narrowest one that does not
        (40, 128256, 1),  # Llama 3
        (16, 262144, 256),  # Gemma, and the widest group
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_size(num_rows, vocab_size, group_size, dtype):
    logits = peaky_logits(num_rows, vocab_size, dtype=dtype, device="cuda")
    groups = make_groups(vocab_size, num_rows, group_size, "cuda")
    check(logits, groups)
    check(logits, groups, ours={"inplace_backward": True}, label_smoothing=0.1, softcap=20.0, z_loss=1e-4)
    check(logits, groups, reduction="none")


@pytest.mark.gpu
def test_bad_ids_on_a_gpu():
    logits = peaky_logits(4, 8, device="cuda").requires_grad_()
    groups = torch.tensor([[0, 1], [2, 8], [-1, 3], [-100, 2**40]], device="cuda")
    losses = npp_kernels.patch_cross_entropy(logits, groups, reduction="none")
    assert losses.isnan().tolist() == [[False, False], [False, True], [True, False], [False, True]]
    loss = npp_kernels.patch_cross_entropy(logits, groups)
    loss.backward()
    assert loss.isnan()
    assert logits.grad[0].isfinite().all()
    assert logits.grad[1:].isnan().all()
    npp_kernels.check_ids(True)
    try:
        with pytest.raises(ValueError, match=r"got 8 at position \(1, 1\)"):
            npp_kernels.patch_cross_entropy(logits, groups)
    finally:
        npp_kernels.check_ids(False)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    num_rows, vocab_size = 16400, 131072
    logits = torch.randn(num_rows, vocab_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert logits.numel() > 2**31
    groups = make_groups(vocab_size, num_rows, 2, "cuda")
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}):
        (grad,) = torch.autograd.grad(npp_kernels.patch_cross_entropy(logits, groups, **options).sum(), logits)
        rows = torch.tensor([0, num_rows - 1], device="cuda")
        exact = logits.detach()[rows].double().requires_grad_()
        count = (groups != -100).sum().item() if not options else 1
        (reference.patch_cross_entropy(exact, groups[rows], reduction="sum")[0] / count).backward()
        torch.testing.assert_close(grad[rows].double(), exact.grad, rtol=1e-2, atol=1e-9)
        del grad
