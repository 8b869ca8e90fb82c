"""Losses and means over a shared-out vocabulary, number by number: cases of tests/vocabulary_ranks.py.

Each is given a rank's `Ranks`, and runs on all of them at once.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import reference.ops as reference
from npp_kernels import group_mean, linear_patch_cross_entropy, patch_cross_entropy
from npp_kernels.losses import chunks
from tests.budget import assert_within_budget
from tests.conftest import INTERPRETED
from tests.inputs import LOSS_OPTIONS, SLOT_WEIGHTS, peaky_logits, skewed_ids

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # the interpreter truncates bfloat16
ROWS = 6 if INTERPRETED else 23  # which takes seconds for what others do in milliseconds
OPTIONS = [
    *LOSS_OPTIONS,
    {"class_weight": True},
    {"class_weight": True, "normalize": "row", "slot_weights": SLOT_WEIGHTS, "z_loss": 0.1},
    {"class_weight": True, "normalize": "slot", "label_smoothing": 0.2},
    {"class_weight": True, "label_smoothing": 0.3, "reduction": "none", "softcap": 8.0},
]


def run(function, inputs, groups, upstream, **options):
    """Return loss, the gradients of the inputs, and the statistics, where the function has them."""
    inputs = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in inputs]
    loss, stats = function(*inputs, groups, **options)
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), [tensor.grad for tensor in inputs if tensor is not None], stats


def upstreams(ranks, groups, options):
    if options.get("reduction") == "none":
        return [torch.rand(groups.shape, device=ranks.device)]
    return [torch.tensor(value, device=ranks.device) for value in ([1.7] if INTERPRETED else [1.0, 1.7])]


def logits_case(options, dtype):
    """Loss, gradient and statistics are within the budget of one process, and its predictions the same."""

    def case(ranks):
        made = ranks.options(options)
        groups = ranks.groups(ROWS, 4)
        logits = peaky_logits(ROWS, ranks.vocab_size, dtype=dtype, device=ranks.device)
        for upstream in upstreams(ranks, groups, options):
            check_logits(ranks, logits, groups, upstream, made)

    return case


def check_logits(ranks, logits, groups, upstream, options, scale=None):
    loss, (grad,), stats = run(
        patch_cross_entropy, [ranks.mine(logits, 1)], groups, upstream, return_stats=True, shard=ranks.shard, **options
    )
    one = run(patch_cross_entropy, [logits], groups, upstream, return_stats=True, **options)
    wide = torch.promote_types(logits.dtype, torch.float32)
    eager = run(reference.patch_cross_entropy, [logits.to(wide)], groups, upstream, **options)
    oracle = run(reference.patch_cross_entropy, [logits.double()], groups, upstream.double(), **options)
    ranks.check_same_everywhere(loss)
    assert_within_budget(loss, eager[0], oracle[0], what="loss", scale=scale)
    row_scale = oracle[1][0].abs().sum(1, keepdim=True)
    eager_grad = ranks.mine(eager[1][0].to(logits.dtype), 1)
    assert_within_budget(grad, eager_grad, ranks.mine(oracle[1][0], 1), what="gradient", scale=row_scale)
    for name in ("lse", "entropy"):
        three = (getattr(which, name) for which in (stats, eager[2], oracle[2]))
        assert_within_budget(*three, what=name)
    assert torch.equal(stats.prediction, one[2].prediction)
    assert torch.equal(stats.accuracy, one[2].accuracy)


def linear_case(options, dtype, with_bias, chunk_rows):
    """So are the gradients of the hidden states, which are whole on every rank, and of each rank's weights."""

    def case(ranks):
        made = ranks.options(options)
        groups = ranks.groups(ROWS, 4)
        hidden = torch.randn(ROWS, 16, dtype=dtype, device=ranks.device)
        weight = torch.randn(ranks.vocab_size, 16, device=ranks.device).to(dtype)
        bias = torch.randn(ranks.vocab_size, device=ranks.device).to(dtype) if with_bias else None

        def ours(hidden, weight, bias, groups, **more):
            return linear_patch_cross_entropy(hidden, weight, groups, bias=bias, return_stats=True, **more)

        def plain(hidden, weight, bias, groups, **more):
            # Logits are rounded to the dtype, as F.linear does.
            rounded = F.linear(hidden, weight, bias).to(dtype).to(hidden.dtype)
            return reference.patch_cross_entropy(rounded, groups, **more)

        for upstream in upstreams(ranks, groups, options):
            whole = [hidden, weight, bias]
            sliced = [hidden, ranks.mine(weight), None if bias is None else ranks.mine(bias)]
            more = made | {"chunk_rows": chunk_rows}
            loss, grads, stats = run(ours, sliced, groups, upstream, shard=ranks.shard, **more)
            one = run(ours, whole, groups, upstream, **more)
            wide = torch.promote_types(dtype, torch.float32)
            oracle = run(plain, [part if part is None else part.double() for part in whole], groups, upstream, **made)
            eager = run(plain, [part if part is None else part.to(wide) for part in whole], groups, upstream, **made)
            ranks.check_same_everywhere(loss)
            ranks.check_same_everywhere(grads[0])
            assert_within_budget(loss, one[0], oracle[0], what="loss", scale=oracle[2].lse.abs().max())
            cut = [torch.Tensor.clone, *[ranks.mine] * 2]
            for name, grad, one_grad, eager_grad, exact, take in zip(
                ("hidden", "weight", "bias"), grads, one[1], eager[1], oracle[1], cut, strict=False
            ):
                # One process is what eager is in the other comparisons: the gradient of the logits is rounded too.
                worse = torch.where(
                    (one_grad.double() - exact).abs() > (eager_grad.to(dtype).double() - exact).abs(),
                    one_grad,
                    eager_grad.to(dtype),
                )
                assert_within_budget(grad, take(worse), take(exact), what=name, scale=exact.abs().max())
            torch.testing.assert_close(stats.lse, one[2].lse)
            assert torch.equal(stats.prediction, one[2].prediction)

    return case


def mean_case(dtype, group_size, ignore_index, out_dtype):
    """The means are those of one process, and each rank gets the gradient of its rows."""

    def case(ranks):
        table = torch.randn(ranks.vocab_size, 24, device=ranks.device).to(dtype)
        groups = ranks.groups(2 * ROWS, group_size, ignored=0.0 if ignore_index is None else 0.3)
        upstream = torch.randn(2 * ROWS, 24, device=ranks.device)
        options = {"ignore_index": ignore_index}
        results = []
        for part, more in (
            (ranks.mine(table), {"shard": ranks.shard, "out_dtype": out_dtype}),
            (table, {"out_dtype": out_dtype}),
        ):
            leaf = part.requires_grad_()
            means = group_mean(leaf, groups, **options, **more)
            means.backward(upstream.to(means.dtype))
            results.append((means.detach(), leaf.grad))
        plain = []
        for wide in (torch.promote_types(dtype, torch.float32), torch.float64):
            leaf = table.detach().to(wide).requires_grad_()
            means = reference.group_mean(leaf, groups, **options)
            means.backward(upstream.to(results[0][0].dtype).to(wide))
            plain.append((means.detach(), leaf.grad))
        (means, grad), (one_means, one_grad) = results
        ranks.check_same_everywhere(means)
        assert_within_budget(means, plain[0][0].to(means.dtype), plain[1][0], what="means")
        exact = ranks.mine(plain[1][1])
        eager_grad, scale = ranks.mine(plain[0][1].to(dtype)), plain[1][1].abs().max()
        assert_within_budget(grad, eager_grad, exact, what="gradient", scale=scale)
        if group_size == 1:  # a row and zeros: no sum rounds
            assert torch.equal(means, one_means)
        if group_size in (1, 4) and not ranks.runs_kernels:
            assert torch.equal(grad, ranks.mine(one_grad))  # every id sums the same positions in the same order

    return case


def sure_case(gap, offset):
    """A row that is sure of its target keeps a positive loss, and its gradient the right sign, at any offset."""

    def case(ranks):
        logits = 0.5 * torch.randn(ROWS, ranks.vocab_size, device=ranks.device) + offset
        groups = skewed_ids(ranks.vocab_size, (ROWS, 1), device=ranks.device)
        logits.scatter_add_(1, groups, torch.full_like(groups, gap, dtype=logits.dtype))
        upstream = torch.tensor(1.0, device=ranks.device)
        check_logits(ranks, logits, groups, upstream, {}, scale=1.0 if gap else None)
        losses, (grad,), _ = run(
            patch_cross_entropy, [ranks.mine(logits, 1)], groups, torch.ones(ROWS, 1, device=ranks.device),
            return_stats=True, shard=ranks.shard, reduction="none",
        )  # fmt: skip
        expected = patch_cross_entropy(logits, groups, reduction="none")
        torch.testing.assert_close(losses, expected, rtol=2e-6, atol=0)
        assert (losses > 0).all()
        local = groups - ranks.shard.start
        here = (local >= 0) & (local < ranks.shard.size)
        at_target = grad.gather(1, local.clamp(0, ranks.shard.size - 1))[here]
        assert (at_target < 0).all()
        total = grad.double().sum(1)
        dist.all_reduce(total)
        magnitude = grad.double().abs().sum(1)
        dist.all_reduce(magnitude)
        assert (total.abs() <= 1e-6 * magnitude).all()

    return case


def sure_beside_targets_elsewhere(ranks):
    """A rank that holds the sure one, its first id, also weighs the targets of the others, which it does not hold."""
    logits = torch.randn(ROWS, ranks.vocab_size, device=ranks.device)
    logits[:, 0] += 15
    groups = torch.tensor([0, ranks.vocab_size - 1, 0, ranks.vocab_size // 2], device=ranks.device).expand(ROWS, 4)
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}):
        check_logits(ranks, logits, groups, torch.tensor(1.0, device=ranks.device), options)


def bitwise_where_sums_are_exact(ranks):
    """Exponentials of 1 and 0 add up exactly in any order: then nothing differs in a single bit."""
    logits = torch.where(torch.rand(ROWS, ranks.vocab_size, device=ranks.device) < 0.3, 0.0, -200.0)
    logits[:, 3], logits[5] = 0.0, -200.0
    groups = ranks.groups(ROWS, 4)
    for dtype in DTYPES:
        for options in ({}, {"normalize": "row", "z_loss": 0.1}, {"reduction": "none"}):
            given = logits.to(dtype)
            for upstream in upstreams(ranks, groups, options):
                more = {"return_stats": True, **options}
                ours = run(patch_cross_entropy, [ranks.mine(given, 1)], groups, upstream, shard=ranks.shard, **more)
                one = run(patch_cross_entropy, [given], groups, upstream, **more)
                if ours[0].ndim or not ranks.runs_kernels:
                    assert torch.equal(ours[0], one[0])
                else:  # the kernel of one process adds up the rows itself, in an order of its own
                    torch.testing.assert_close(ours[0], one[0], rtol=1e-6, atol=0)
                assert torch.equal(ours[1][0], ranks.mine(one[1][0], 1))
                for mine, theirs in zip(ours[2], one[2], strict=True):
                    assert torch.equal(mine, theirs)


def a_group_of_one_is_one_process(ranks):
    """Nothing is added to its sums; on the PyTorch path it is the same to the last bit."""
    groups = ranks.groups(ROWS, 4)
    for options in OPTIONS[:: 4 if INTERPRETED else 1]:
        made = ranks.options(options)
        logits = peaky_logits(ROWS, ranks.vocab_size, device=ranks.device)
        upstream = upstreams(ranks, groups, options)[-1]
        ours = run(patch_cross_entropy, [logits], groups, upstream, return_stats=True, shard=ranks.alone, **made)
        one = run(patch_cross_entropy, [logits], groups, upstream, return_stats=True, **made)
        for mine, theirs in zip((ours[0], *ours[1], *ours[2]), (one[0], *one[1], *one[2]), strict=True):
            if not ranks.runs_kernels:
                assert torch.equal(mine, theirs), options
            else:
                torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)


def a_slice_without_targets(ranks):
    """All targets on the first rank; and padding at the end of the vocabulary, at -inf, on the last."""
    groups = ranks.groups(ROWS, 4) % ranks.sizes[0]
    upstream = torch.tensor(1.0, device=ranks.device)
    logits = peaky_logits(ROWS, ranks.vocab_size, device=ranks.device)
    check_logits(ranks, logits, groups, upstream, {"z_loss": 0.1})
    logits[:, -ranks.sizes[-1] :] = float("-inf")
    loss, (grad,), stats = run(
        patch_cross_entropy, [ranks.mine(logits, 1)], groups, upstream, return_stats=True, shard=ranks.shard
    )
    one = run(patch_cross_entropy, [logits], groups, upstream, return_stats=True)
    torch.testing.assert_close(loss, one[0])
    torch.testing.assert_close(grad, ranks.mine(one[1][0], 1))
    for mine, theirs in zip(stats, one[2], strict=True):
        torch.testing.assert_close(mine, theirs)


def equal_maxima_on_several_ranks(ranks):
    """The first of equal ids is the prediction, and all but one of them count in the sum."""
    logits = torch.randn(ROWS, ranks.vocab_size, device=ranks.device).clamp(max=0.5)
    check_logits(ranks, logits, ranks.groups(ROWS, 4), torch.tensor(1.0, device=ranks.device), {})
    constant = torch.full_like(logits, 7.0)
    check_logits(ranks, constant, ranks.groups(ROWS, 4), torch.tensor(1.0, device=ranks.device), {})


def nothing_to_score(ranks):
    """All targets ignored: 0 and never NaN; no rows: 0, and no rank waits for another."""
    weight = torch.randn(ranks.shard.size, 8, device=ranks.device, requires_grad=True)
    for num_rows in (0, 5):
        hidden = torch.randn(num_rows, 8, device=ranks.device, requires_grad=True)
        groups = torch.full((num_rows, 3), -100, device=ranks.device)
        loss = linear_patch_cross_entropy(hidden, weight, groups, shard=ranks.shard, z_loss=0.1)
        loss = loss + patch_cross_entropy(hidden @ weight.t(), groups, shard=ranks.shard)
        loss.backward()
        assert loss == 0
        assert not hidden.grad.any()
        assert not weight.grad.any()
        assert group_mean(weight, groups, ignore_index=-100, shard=ranks.shard).shape == (num_rows, 8)


def not_a_number(ranks):
    """A NaN or an infinity in one slice spoils the row on every rank, and no other row."""
    clean = peaky_logits(5, ranks.vocab_size, device=ranks.device)
    groups = ranks.groups(5, 2, ignored=0.0)
    for value, ids in ((float("nan"), 1), (float("inf"), 1), (float("-inf"), slice(None))):
        logits = clean.clone()
        logits[2, ids] = value
        ours = run(
            patch_cross_entropy, [ranks.mine(logits, 1)], groups, torch.ones(5, 2, device=ranks.device),
            shard=ranks.shard, reduction="none", return_stats=True,
        )  # fmt: skip
        expected = torch.zeros(5, dtype=torch.bool, device=ranks.device)
        expected[2] = True
        assert torch.equal(ours[0].isnan().all(1), expected)
        assert torch.equal(ours[0].isnan().any(1), expected)
        assert torch.equal(ours[1][0].isnan().any(1), expected)


def in_place_and_twice(ranks):
    """The gradient in the logits' memory; one backward only; and otherwise a second one that adds the same."""
    logits, groups = peaky_logits(9, ranks.vocab_size, device=ranks.device), ranks.groups(9, 4)
    leaf = ranks.mine(logits, 1).requires_grad_()
    expected = torch.autograd.grad(patch_cross_entropy(leaf, groups, shard=ranks.shard), leaf)[0]
    product = leaf * 1
    address, seen = product.data_ptr(), []
    product.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss = patch_cross_entropy(product, groups, shard=ranks.shard, inplace_backward=True)
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected)
    assert seen == [address]
    with pytest.raises(RuntimeError, match="inplace_backward=True"):
        loss.backward()
    hidden = torch.randn(9, 8, device=ranks.device, requires_grad=True)
    weight = ranks.mine(torch.randn(ranks.vocab_size, 8, device=ranks.device)).requires_grad_()
    loss = linear_patch_cross_entropy(hidden, weight, groups, shard=ranks.shard, chunk_rows=4)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    loss.backward()
    torch.testing.assert_close((hidden.grad, weight.grad), tuple(2 * grad for grad in once))


def only_some_gradients(ranks):
    """Frozen hidden states, a frozen weight, neither: the same loss."""
    hidden = torch.randn(9, 8, device=ranks.device)
    weight = ranks.mine(torch.randn(ranks.vocab_size, 8, device=ranks.device))
    groups, losses = ranks.groups(9, 4), []
    for wants in ((True, True), (True, False), (False, True), (False, False)):
        leaves = [part.clone().requires_grad_(want) for part, want in zip((hidden, weight), wants, strict=True)]
        loss = linear_patch_cross_entropy(*leaves, groups, shard=ranks.shard, chunk_rows=4)
        if any(wants):
            loss.backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wants)
        losses.append(loss.detach())
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def chunks_are_the_same_on_every_rank(ranks):
    """However many rows of its own slice a rank could hold: after each chunk the ranks talk to each other."""
    hidden = torch.randn(20, 8, device=ranks.device)
    weight, groups = torch.randn(ranks.vocab_size, 8, device=ranks.device), ranks.groups(20, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_ELEMENTS", 4 * max(ranks.sizes))
        patch.setattr(chunks, "CHUNK_MULTIPLE", 1)
        part = ranks.mine(weight).requires_grad_()
        loss = linear_patch_cross_entropy(hidden, part, groups, shard=ranks.shard)
        loss.backward()
    weight.requires_grad_()
    expected = linear_patch_cross_entropy(hidden, weight, groups)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(part.grad, ranks.mine(weight.grad))


def autocast_and_float64(ranks):
    """Products in autocast's dtype; float64 throughout, checked by finite differences of the whole."""
    hidden, weight = torch.randn(9, 8, device=ranks.device), torch.randn(ranks.vocab_size, 8, device=ranks.device)
    groups = ranks.groups(9, 4)
    part = ranks.mine(weight)
    with torch.autocast(ranks.device.type, torch.bfloat16):
        loss = linear_patch_cross_entropy(hidden, part, groups, shard=ranks.shard)
        one = linear_patch_cross_entropy(hidden, weight, groups)
    torch.testing.assert_close(loss, one, rtol=1e-4, atol=1e-4)
    upstream = torch.tensor(1.0, device=ranks.device)

    def ours(hidden, weight, groups, **more):
        return linear_patch_cross_entropy(hidden, weight, groups, return_stats=True, **more)

    exact = run(ours, [hidden.double(), part.double()], groups, upstream, shard=ranks.shard)
    one = run(ours, [hidden.double(), weight.double()], groups, upstream)
    assert exact[0].dtype == torch.float64
    torch.testing.assert_close(exact[0], one[0])
    torch.testing.assert_close(exact[1], [one[1][0], ranks.mine(one[1][1])])


CASES = [
    sure_beside_targets_elsewhere,
    bitwise_where_sums_are_exact,
    a_group_of_one_is_one_process,
    a_slice_without_targets,
    equal_maxima_on_several_ranks,
    nothing_to_score,
    not_a_number,
    in_place_and_twice,
    only_some_gradients,
    chunks_are_the_same_on_every_rank,
    autocast_and_float64,
]
