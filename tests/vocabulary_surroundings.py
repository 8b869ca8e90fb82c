"""A shared-out vocabulary among other things: cases of tests/vocabulary_ranks.py.

What else shares out tensors (DTensors, sequence parallelism, data parallelism), the page of the documentation, modules,
errors, and compiled code. Each is given a rank's `Ranks`, and runs on all of them at once.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import npp_kernels
from npp_kernels import VocabularyShard, group_mean, linear_patch_cross_entropy, patch_cross_entropy
from tests.conftest import INTERPRETED


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


CASES = [
    distributed_tensors,
    sequence_parallel,
    rows_and_vocabulary,
    the_page_of_the_documentation,
    other_rows_on_some_ranks,
    modules,
    errors,
    compiled,
]
