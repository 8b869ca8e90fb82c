"""What each process of tests/test_vocabulary_parallel.py does: all its cases, one after the other, in one group.

    python -m tests.vocabulary_ranks RANK WORLD FOLDER SEED DEVICE

Every rank draws the same inputs, cuts out its slice of the vocabulary, and compares what it gets with the operation of
one process on the whole. What failed goes to ``FOLDER/RANK.json``, by case, for the tests to find.
"""

import json
import re
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import npp_kernels
import reference.ops as reference
from npp_kernels import VocabularyShard, group_mean, linear_patch_cross_entropy, patch_cross_entropy
from npp_kernels.losses import chunks
from tests.budget import assert_within_budget
from tests.conftest import INTERPRETED
from tests.inputs import peaky_logits, skewed_ids

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # the interpreter truncates bfloat16
SIZES = {1: [75], 2: [53, 22], 4: [30, 1, 24, 20]}  # uneven, one rank with a single id
ROWS = 6 if INTERPRETED else 23  # which takes seconds for what others do in milliseconds
SLOT_WEIGHTS = (1.0, 0.5, 0.25, 2.0)
OPTIONS = [
    {},
    {"normalize": "row"},
    {"normalize": "slot"},
    {"normalize": "row", "slot_weights": torch.tensor(SLOT_WEIGHTS)},
    {"normalize": "slot", "slot_weights": SLOT_WEIGHTS, "z_loss": 0.1},
    {"reduction": "sum", "slot_weights": SLOT_WEIGHTS, "z_loss": 0.01},
    {"reduction": "none"},
    {"reduction": "none", "label_smoothing": 0.1, "softcap": 5.0},
    {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0},
    {"num_targets": torch.tensor(70.0), "z_loss": 0.1},
    {"normalize": "row", "z_loss": 0.1, "label_smoothing": 1.0},
    {"class_weight": True},
    {"class_weight": True, "normalize": "row", "slot_weights": SLOT_WEIGHTS, "z_loss": 0.1},
    {"class_weight": True, "normalize": "slot", "label_smoothing": 0.2},
    {"class_weight": True, "label_smoothing": 0.3, "reduction": "none", "softcap": 8.0},
    {"token_scaling": True},
    {"token_scaling": True, "normalize": "row", "label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01},
    {"token_scaling": True, "reduction": "none"},
]


class Ranks:
    """The process group, and this rank's slice of a vocabulary."""

    def __init__(self, rank, world, device):
        self.rank, self.world, self.device = rank, world, device
        self.runs_kernels = INTERPRETED or device.type == "cuda"
        self.sizes = SIZES[world]
        self.vocab_size = sum(self.sizes)
        self.shard = VocabularyShard.of(self.sizes[rank])
        assert self.shard.sizes == tuple(self.sizes)
        assert self.shard == VocabularyShard.of_sizes(self.sizes)
        # With a group of its own a rank holds everything.
        groups = [dist.new_group([other]) for other in range(world)]
        self.alone = VocabularyShard.of_sizes([self.vocab_size], groups[rank])

    def mine(self, tensor, axis=0):
        return tensor.narrow(axis, self.shard.start, self.shard.size).detach().clone()

    def groups(self, num_rows, group_size, *, ignored=0.2):
        groups = skewed_ids(self.vocab_size, (num_rows, group_size), device=self.device)
        groups[torch.rand(groups.shape, device=self.device) < ignored] = -100
        if num_rows > 2 and ignored:
            groups[1] = -100
        return groups

    def options(self, options):
        """Return options whose tensors are made, and on the device."""
        made = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in options.items()
        }
        if "class_weight" in made:
            made["class_weight"] = torch.rand(self.vocab_size, device=self.device) + 0.1
        return made

    def check_same_everywhere(self, tensor):
        first = tensor.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first.isnan(), tensor.isnan())
        assert torch.equal(first.nan_to_num(), tensor.nan_to_num()), "ranks differ"


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


def distributed_tensors(ranks):
    """A `DTensor` that is sharded over its vocabulary finds its group, and gets a `DTensor` as its gradient."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    vocab_size = 2 * ranks.world + 1 if ranks.world == 2 else 10  # slices of 3 and 2, or 3, 3, 3 and 1
    hidden, weight = torch.randn(7, 8, device=ranks.device), torch.randn(vocab_size, 8, device=ranks.device)
    bias, groups = torch.randn(vocab_size, device=ranks.device), torch.randint(vocab_size, (7, 4), device=ranks.device)

    def step(hidden, weight, bias):
        inputs = [part.requires_grad_() for part in (hidden, weight, bias)]
        loss = linear_patch_cross_entropy(hidden, weight, groups, bias=bias)
        loss = loss + group_mean(weight, groups).square().sum()
        loss.backward()
        return loss.detach(), [part.grad for part in inputs]

    def sharded(tensor, axis=0):
        return distribute_tensor(tensor.detach().clone(), mesh, [Shard(axis)])

    expected_loss, expected = step(hidden.clone(), weight.clone(), bias.clone())
    for whole in (hidden.clone(), distribute_tensor(hidden, mesh, [Replicate()])):
        loss, grads = step(whole, sharded(weight), sharded(bias))
        torch.testing.assert_close(loss, expected_loss)
        assert [type(grad) for grad in grads[1:]] == [DTensor, DTensor]
        assert [grad.placements for grad in grads[1:]] == [(Shard(0),), (Shard(0),)]
        for grad, exact in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad.full_tensor() if isinstance(grad, DTensor) else grad, exact)
    logits = sharded(hidden @ weight.t(), 1).requires_grad_()
    patch_cross_entropy(logits, groups).backward()
    leaf = (hidden @ weight.t()).requires_grad_()
    patch_cross_entropy(leaf, groups).backward()
    torch.testing.assert_close(logits.grad.full_tensor(), leaf.grad)
    embedding = npp_kernels.PatchEmbedding(vocab_size, 8, device=ranks.device)
    embedding.weight = torch.nn.Parameter(sharded(weight))
    torch.testing.assert_close(embedding(groups), group_mean(weight, groups))

    with pytest.raises(TypeError, match=r"weight: expected a plain tensor, or a DTensor with the placement Shard\(0\)"):
        linear_patch_cross_entropy(hidden, sharded(weight, 1), groups)
    with pytest.raises(TypeError, match=r"logits: expected a plain tensor, or a DTensor with the placement Shard\(1\)"):
        patch_cross_entropy(sharded(hidden), groups)
    with pytest.raises(TypeError, match=r"hidden: .* Replicate\(\) beside a vocabulary that is sharded"):
        linear_patch_cross_entropy(sharded(hidden), sharded(weight), groups)
    with pytest.raises(TypeError, match="hidden: expected a plain tensor, got a DTensor"):
        linear_patch_cross_entropy(sharded(hidden), weight, groups)
    with pytest.raises(ValueError, match="shard: expected that of weight"):
        linear_patch_cross_entropy(hidden, sharded(weight), groups, shard=ranks.shard)
    with pytest.raises(ValueError, match="expected every rank to hold at least one id"):
        group_mean(sharded(weight[: ranks.world - 1]), groups)


def sequence_parallel(ranks):
    """Rows shared out, ``num_targets`` that of all: losses and the weight's gradients add up to the whole."""
    rows = 8 * ranks.world
    hidden, weight = torch.randn(rows, 8, device=ranks.device), torch.randn(ranks.vocab_size, 8, device=ranks.device)
    groups = ranks.groups(rows, 4, ignored=0.0)
    groups[::3, 1:] = -100
    mine = slice(8 * ranks.rank, 8 * ranks.rank + 8)
    num_targets = (groups[mine] != -100).sum()
    dist.all_reduce(num_targets)
    # The z-loss counts this call's rows, and here all ranks have as many that have a target.
    for ours, theirs in (({}, {}), ({"z_loss": 0.1 / ranks.world}, {"z_loss": 0.1})):
        leaves = [hidden[mine].clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = linear_patch_cross_entropy(*leaves, groups[mine], num_targets=num_targets, **ours)
        loss.backward()
        loss = loss.detach()
        dist.all_reduce(loss)
        dist.all_reduce(leaves[1].grad)
        whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        expected = linear_patch_cross_entropy(*whole, groups, **theirs)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(leaves[0].grad, whole[0].grad[mine])
        torch.testing.assert_close(leaves[1].grad, whole[1].grad)


def rows_and_vocabulary(ranks):
    """Both at once, on a mesh of two axes: pairs of ranks share out the rows, their partners the vocabulary."""
    if ranks.world != 4:
        return
    mesh = init_device_mesh(ranks.device.type, (2, 2), mesh_dim_names=("rows", "vocabulary"))
    hidden, weight = torch.randn(16, 8, device=ranks.device), torch.randn(ranks.vocab_size, 8, device=ranks.device)
    groups = ranks.groups(16, 4)
    sizes = [30, ranks.vocab_size - 30]
    shard = VocabularyShard.of_sizes(sizes, mesh.get_group("vocabulary"))
    row = mesh.get_local_rank("rows")
    mine = slice(8 * row, 8 * row + 8)
    num_targets = (groups[mine] != -100).sum()
    dist.all_reduce(num_targets, group=mesh.get_group("rows"))
    leaves = [hidden[mine].clone().requires_grad_(), weight[shard.start : shard.stop].clone().requires_grad_()]
    loss = linear_patch_cross_entropy(*leaves, groups[mine], num_targets=num_targets, shard=shard)
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss, group=mesh.get_group("rows"))
    dist.all_reduce(leaves[1].grad, group=mesh.get_group("rows"))
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = linear_patch_cross_entropy(*whole, groups)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(leaves[0].grad, whole[0].grad[mine])
    torch.testing.assert_close(leaves[1].grad, whole[1].grad[shard.start : shard.stop])


def the_page_of_the_documentation(ranks):
    """Its snippets run as they stand, one after the other, and say what one process says."""
    page = (Path(__file__).parents[1] / "docs" / "vocabulary_parallel.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    whole_table, whole_weight = torch.randn(2, ranks.vocab_size, 8, device=ranks.device).unbind()
    groups = ranks.groups(6, 4, ignored=0.0)
    names = {"group": dist.group.WORLD, "groups": groups, "head": whole_weight.clone().requires_grad_()}
    names |= {"table": ranks.mine(whole_table).requires_grad_(), "weight": ranks.mine(whole_weight).requires_grad_()}
    assert len(snippets) == 4
    exec(compile(snippets[0], "docs/vocabulary_parallel.md", "exec"), names)
    leaves = [whole_table.clone().requires_grad_(), whole_weight.clone().requires_grad_()]
    hidden = group_mean(leaves[0], groups).tanh()
    expected = linear_patch_cross_entropy(hidden, leaves[1], groups)
    expected.backward()
    torch.testing.assert_close(names["loss"], expected)
    torch.testing.assert_close(names["table"].grad, ranks.mine(leaves[0].grad))
    torch.testing.assert_close(names["weight"].grad, ranks.mine(leaves[1].grad))

    exec(compile(snippets[1], "docs/vocabulary_parallel.md", "exec"), names)
    vocab_size = 4 * ranks.world + 3
    step = -(-vocab_size // ranks.world)
    slice_ = slice(step * ranks.rank, step * ranks.rank + step)
    logits, labels = torch.randn(2, 5, vocab_size, device=ranks.device), torch.randint(vocab_size, (2, 5, 3))
    labels = labels.to(ranks.device)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for targets in (labels, labels[..., 0]):
        rows = logits.unsqueeze(-2).expand(*logits.shape[:2], targets[0, 0].numel(), vocab_size)
        expected = F.cross_entropy(rows.flatten(0, 2), targets.flatten(), reduction="sum")
        plain = names["cross_entropy_loss"](
            logits[..., slice_], targets, global_vocab_size=vocab_size, tp_group=dist.group.WORLD
        )
        torch.testing.assert_close(plain, expected)
        torch.testing.assert_close(
            names["cross_entropy_loss"](distribute_tensor(logits, mesh, [Shard(2)]), targets), expected
        )

    exec(compile(snippets[2], "docs/vocabulary_parallel.md", "exec"), names)
    logits, target = torch.randn(5, 2, 4 * ranks.world, device=ranks.device), labels[0, :, :2] % 4
    losses = names["vocab_parallel_cross_entropy"](
        logits[..., 4 * ranks.rank : 4 * ranks.rank + 4], target, 0.1, dist.group.WORLD
    )
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(losses, expected.view(5, 2))

    names["hidden"] = names["hidden"].detach()
    exec(compile(snippets[3], "docs/vocabulary_parallel.md", "exec"), names)
    total = names["part"].detach()
    dist.all_reduce(total)
    torch.testing.assert_close(total, linear_patch_cross_entropy(names["hidden"], whole_weight, groups))


def other_rows_on_some_ranks(ranks):
    """Ranks that have rows of their own, as in data parallelism, are told: by an error, on a GPU by NaN."""
    groups = ranks.groups(6, 4)  # before what is of other sizes on other ranks
    logits, hidden = torch.randn(6, ranks.shard.size, device=ranks.device), torch.randn(6, 4, device=ranks.device)
    table = torch.randn(ranks.shard.size, 4, device=ranks.device)
    groups[3, 2] = ranks.rank
    npp_kernels.check_ids(True)
    for call in (
        lambda: patch_cross_entropy(logits, groups, shard=ranks.shard),
        lambda: linear_patch_cross_entropy(hidden, table, groups, shard=ranks.shard),
        lambda: group_mean(table, groups, ignore_index=-100, shard=ranks.shard),
    ):
        with pytest.raises(ValueError, match="groups: expected the same rows on every rank that shares out"):
            call()
    npp_kernels.check_ids(False)
    if ranks.device.type == "cuda":
        losses = patch_cross_entropy(logits, groups, shard=ranks.shard, reduction="none")
        assert losses[3].isnan().any()
        assert not losses[[0, 1, 2, 4, 5]].isnan().any()


def modules(ranks):
    """The modules take the shard where they take the tensors."""
    hidden, weight = torch.randn(9, 8, device=ranks.device), torch.randn(ranks.vocab_size, 8, device=ranks.device)
    groups = ranks.groups(9, 4)
    part = ranks.mine(weight)
    expected = linear_patch_cross_entropy(hidden, weight, groups, label_smoothing=0.1)
    linear = npp_kernels.LinearPatchCrossEntropyLoss(label_smoothing=0.1)
    plain = npp_kernels.PatchCrossEntropyLoss(label_smoothing=0.1)
    torch.testing.assert_close(linear(hidden, part, groups, shard=ranks.shard), expected)
    torch.testing.assert_close(plain(hidden @ part.t(), groups, shard=ranks.shard), expected)


def errors(ranks):
    """Each names the argument, what was expected and what came, on every rank, before any rank waits."""
    groups = ranks.groups(3, 2, ignored=0.0)  # before what is of other sizes on other ranks
    logits = torch.randn(3, ranks.shard.size, device=ranks.device)
    size = ranks.shard.size
    with pytest.raises(ValueError, match=f"logits: expected {size} ids on axis -1, those of rank {ranks.rank}"):
        patch_cross_entropy(torch.cat([logits, logits], 1), groups, shard=ranks.shard)
    with pytest.raises(ValueError, match=f"weight: expected {size} ids on axis 0"):
        linear_patch_cross_entropy(logits, torch.randn(size + 1, size, device=ranks.device), groups, shard=ranks.shard)
    with pytest.raises(ValueError, match=f"table: expected {size} ids on axis 0"):
        group_mean(torch.randn(size + 1, 4, device=ranks.device), groups, shard=ranks.shard)
    with pytest.raises(TypeError, match="shard: expected a VocabularyShard or None, got ProcessGroup"):
        patch_cross_entropy(logits, groups, shard=dist.group.WORLD)
    with pytest.raises(ValueError, match=rf"class_weight: expected \[{ranks.vocab_size}\]"):
        patch_cross_entropy(logits, groups, shard=ranks.shard, class_weight=torch.ones(size, device=ranks.device))
    with pytest.raises(ValueError, match=f"sizes: expected {ranks.world}, one for each rank"):
        VocabularyShard.of_sizes([3] * (ranks.world + 1))
    with pytest.raises(ValueError, match="sizes: expected every rank to hold at least one id"):
        VocabularyShard.of(3 if ranks.rank else 0)
    with pytest.raises(TypeError, match="sizes: expected ints"):
        VocabularyShard.of(3.5)
    others = dist.new_group([0])
    if ranks.rank:
        with pytest.raises(ValueError, match="group: expected a process group that this process is in"):
            VocabularyShard.of(3, others)
    if ranks.device.type == "cpu":
        bad = groups.clone()
        bad[1, 1] = ranks.vocab_size
        with pytest.raises(IndexError, match=rf"groups: expected ids in \[0, {ranks.vocab_size}\)"):
            patch_cross_entropy(logits, bad, shard=ranks.shard)
    loss = patch_cross_entropy(logits.requires_grad_(), groups, shard=ranks.shard)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, logits, create_graph=True)[0].sum().backward()


def compiled(ranks):
    """One graph, in which the exchange is an operator; the same loss and gradients."""
    if INTERPRETED or ranks.world > 2:  # compiling takes seconds on each rank
        return
    backend = "inductor" if ranks.device.type == "cuda" else "aot_eager"
    hidden, weight = torch.randn(9, 8, device=ranks.device), torch.randn(ranks.vocab_size, 8, device=ranks.device)
    groups, part = ranks.groups(9, 4), ranks.mine(weight)
    shard = ranks.shard

    def step(hidden, weight):
        inputs = group_mean(weight, groups, ignore_index=-100, shard=shard) + hidden
        loss, stats = linear_patch_cross_entropy(inputs, weight, groups, shard=shard, chunk_rows=5, return_stats=True)
        losses = patch_cross_entropy(inputs @ weight.t(), groups, shard=shard, label_smoothing=0.1, reduction="none")
        return loss + losses.mean(), stats.prediction

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        leaves = [hidden.clone().requires_grad_(), part.clone().requires_grad_()]
        loss, predictions = function(*leaves)
        (2 * loss).backward()
        results.append([loss.detach(), predictions, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    settings = (-100, "none", 0.1, None, 5.0, True, list(shard.sizes), shard.rank, shard.group_name)
    call = (hidden @ part.t(), groups, None, None, None, *settings, True, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.npp_kernels.sharded_scores, call, test_utils=checks)
    assert len(torch.ops.npp_kernels.sharded_scores(*call)) == 4
    torch.library.opcheck(torch.ops.npp_kernels.sum_over_ranks, (hidden, shard.group_name), test_utils=checks)


def named(dtype):
    return str(dtype).removeprefix("torch.")


CASES = {
    **{
        f"logits {named(dtype)} {options}": logits_case(options, dtype)
        for options in OPTIONS
        for dtype in DTYPES[: 1 if INTERPRETED and options else None]
    },
    **{
        f"linear {named(dtype)} bias={with_bias} chunk_rows={chunk_rows} {options}": linear_case(
            options, dtype, with_bias, chunk_rows
        )
        for dtype, with_bias, chunk_rows, options in [
            (torch.float32, False, None, {}),
            (torch.float32, True, 5, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}),
            (torch.float32, True, 7, {"reduction": "none", "class_weight": True}),
            (torch.float32, False, 6, {"normalize": "slot", "slot_weights": SLOT_WEIGHTS, "token_scaling": True}),
            (torch.float16, False, 5, {"normalize": "row"}),
            *((dtype, True, rows, {}) for dtype in DTYPES[2:] for rows in (None, 5)),
        ]
    },
    **{
        f"group_mean {named(dtype)} K={group_size} ignore_index={ignored} {out}": mean_case(
            dtype, group_size, ignored, out
        )
        for dtype in DTYPES
        for group_size, ignored, out in [(1, None, None), (4, None, None), (3, -100, torch.float32), (4, -100, None)]
    },
    **{f"sure by {gap} at {offset}": sure_case(gap, offset) for gap in (0, 10, 20, 30) for offset in (0.0, 1000.0)},
    **{
        case.__name__: case
        for case in (
            sure_beside_targets_elsewhere, bitwise_where_sums_are_exact, a_group_of_one_is_one_process,
            a_slice_without_targets, equal_maxima_on_several_ranks, nothing_to_score, not_a_number, in_place_and_twice,
            only_some_gradients, chunks_are_the_same_on_every_rank, autocast_and_float64, distributed_tensors,
            sequence_parallel, rows_and_vocabulary, the_page_of_the_documentation, other_rows_on_some_ranks, modules,
            errors, compiled,
        )
    },
}  # fmt: skip


@contextmanager
def process_group(rank, world, folder, device):
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        dist.destroy_process_group()


def main():
    rank, world, folder, seed = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    device = torch.device(sys.argv[5], *[rank] * (sys.argv[5] == "cuda"))
    outcomes = {}
    with process_group(rank, world, folder, device):
        ranks = Ranks(rank, world, device)
        for name, case in CASES.items():
            torch.manual_seed(seed)
            try:
                case(ranks)
            except Exception:
                outcomes[name] = traceback.format_exc()
            else:
                outcomes[name] = None
            (folder / f"{rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
