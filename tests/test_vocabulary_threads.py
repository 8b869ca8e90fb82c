"""A vocabulary that threads of one process share out: every path of the PyTorch side, in float64 and in milliseconds.

`test_vocabulary_parallel` starts real process groups; here a barrier and a list stand for one, so that debuggers,
coverage and mutation testing see what each rank does.
"""

import threading

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import npp_kernels
from npp_kernels import VocabularyShard
from npp_kernels.losses import sharded
from npp_kernels.losses.options import LossOptions
from npp_kernels.losses.targets import find_targets
from npp_kernels.vocabulary_shard import local_slice
from tests.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter serves one thread")
SIZES = (7, 3, 8)
VOCAB_SIZE = sum(SIZES)
REDUCTIONS = {"max": torch.amax, "min": torch.amin, "sum": torch.sum}


class Done:
    """What has to be waited for no longer."""

    def wait(self):
        return True


@pytest.fixture
def over_ranks(monkeypatch):
    """Return a function that runs another with the shard of each rank, and returns what each of them returned."""
    barrier, parts = threading.Barrier(len(SIZES), timeout=20), {}

    def start_all_reduce(shard, tensor, operation):
        parts[shard.rank] = tensor.clone()
        barrier.wait()
        result = REDUCTIONS[operation](torch.stack([parts[rank] for rank in range(len(SIZES))]), 0)
        barrier.wait()
        tensor.copy_(result)
        return Done()

    monkeypatch.setattr(VocabularyShard, "start_all_reduce", start_all_reduce)

    def run(function):
        results, errors = {}, []

        def work(rank):
            try:
                results[rank] = function(VocabularyShard(SIZES, rank, "threads"))
            except Exception as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(SIZES))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        barrier.reset()
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [results[rank] for rank in range(len(SIZES))]

    return run


def make_groups(ignored=-100):
    groups = torch.randint(VOCAB_SIZE, (11, 4))
    groups[torch.rand(groups.shape) < 0.2] = ignored
    groups[1] = ignored
    groups[2] = groups[2, :1]  # one target several times
    return groups


OPTIONS = [
    {},
    {"reduction": "none", "label_smoothing": 0.1},
    {"reduction": "sum", "z_loss": 0.1, "softcap": 3.0, "slot_weights": [1.0, 0.5, 2.0, 0.25]},
    {"normalize": "row", "label_smoothing": 0.2, "class_weight": torch.arange(1.0, 1.0 + VOCAB_SIZE).double()},
    {"token_scaling": True, "ignore_index": 5},
]


def run_loss(function, leaves, groups, upstream, **options):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss, stats = function(*leaves, groups, return_stats=True, **options)
    loss.backward(upstream)
    return loss.detach(), [leaf.grad for leaf in leaves], stats


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_slices_of_logits_score_as_the_whole(over_ranks, options):
    logits, groups = 3 * torch.randn(11, VOCAB_SIZE).double(), make_groups(options.get("ignore_index", -100))
    logits[3, groups[3, 0].clamp(min=0)] += 20  # a sure row
    logits[4] = 1.0  # equal maxima on every rank
    logits[5].clamp_(max=0.25)
    upstream = torch.rand(groups.shape if options.get("reduction") == "none" else ()).double()
    function = npp_kernels.patch_cross_entropy
    loss, (grad,), stats = run_loss(function, [logits], groups, upstream, **options)
    found = over_ranks(
        lambda shard: run_loss(
            function, [logits[:, shard.start : shard.stop]], groups, upstream, shard=shard, **options
        )
    )
    for found_loss, _, found_stats in found:
        torch.testing.assert_close(found_loss, loss)
        for name in ("lse", "entropy", "accuracy"):
            torch.testing.assert_close(getattr(found_stats, name), getattr(stats, name), msg=name)
        assert torch.equal(found_stats.prediction, stats.prediction)
    torch.testing.assert_close(torch.cat([grads[0] for _, grads, _ in found], 1), grad)


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_slices_of_an_output_layer_score_as_the_whole(over_ranks, chunk_rows):
    hidden, weight = torch.randn(11, 5).double(), torch.randn(VOCAB_SIZE, 5).double()
    groups, upstream = make_groups()[:, :3], torch.tensor(1.7).double()
    function = npp_kernels.linear_patch_cross_entropy
    loss, (grad_hidden, grad_weight), stats = run_loss(function, [hidden, weight], groups, upstream)

    def run(shard):
        leaves = [hidden, weight[shard.start : shard.stop]]
        return run_loss(function, leaves, groups, upstream, shard=shard, chunk_rows=chunk_rows)

    found = over_ranks(run)
    for found_loss, grads, found_stats in found:
        torch.testing.assert_close(found_loss, loss)
        torch.testing.assert_close(grads[0], grad_hidden)
        torch.testing.assert_close(found_stats.lse, stats.lse)
    torch.testing.assert_close(torch.cat([grads[1] for _, grads, _ in found]), grad_weight)


@pytest.mark.parametrize("ignore_index", [None, -100, 5])
def test_slices_of_a_table_have_the_means_of_the_whole(over_ranks, ignore_index):
    table, groups, upstream = torch.randn(VOCAB_SIZE, 5).double(), make_groups(), torch.randn(11, 5).double()
    groups = groups if ignore_index == -100 else groups.clamp(min=0)

    def run(part, **options):
        part = part.detach().clone().requires_grad_()
        means = npp_kernels.group_mean(part, groups, ignore_index=ignore_index, **options)
        means.backward(upstream)
        return means.detach(), part.grad

    means, grad = run(table)
    found = over_ranks(lambda shard: run(table[shard.start : shard.stop], shard=shard))
    for found_means, _ in found:
        torch.testing.assert_close(found_means, means)
    torch.testing.assert_close(torch.cat([part for _, part in found]), grad)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none", "token_scaling": True, "label_smoothing": 0.1}, {"z_loss": 0.1, "softcap": 3.0}],
    ids=str,
)
def test_the_operators_of_compiled_code_score_the_same(over_ranks, options, stats):
    logits, groups = torch.randn(11, VOCAB_SIZE).double(), make_groups()
    wishes = {"per_target": options.get("reduction") == "none", "stats": stats}

    def run(shard):
        assert sharded.restored_shard(*sharded.flattened_shard(shard)) == shard
        mine = logits[:, shard.start : shard.stop]
        targets, _ = find_targets(groups, LossOptions(**options), mine, shard)
        expected = [part for part in sharded.find_scores(mine, targets, **wishes) if part is not None]
        arguments = *targets.tensors(), *targets.settings, *sharded.flattened_shard(shard), *wishes.values()
        found = torch.ops.npp_kernels.sharded_scores(mine, *arguments)
        torch.testing.assert_close(found, expected)
        return len(found), (mine, *arguments)

    for count, arguments in over_ranks(run):
        assert count == 1 + 2 * ("token_scaling" in options) + stats
        with FakeTensorMode() as mode:  # as compiled code sees it
            fakes = [mode.from_tensor(part) if isinstance(part, torch.Tensor) else part for part in arguments]
            assert len(torch.ops.npp_kernels.sharded_scores(*fakes)) == count
    assert sharded.restored_shard(*sharded.flattened_shard(None)) is None


@pytest.fixture
def second_of_three():
    """A process group of three ranks of which this process is the second, and that sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("second_of_three")
def test_a_dtensor_says_which_ids_a_rank_holds():
    mesh = init_device_mesh("cpu", (3,))

    def distributed(local, placement, rows, mesh=mesh):
        return DTensor.from_local(local, mesh, placement, run_check=False, shape=(rows, 4), stride=(4, 1))

    for rows, sizes in ((9, (3, 3, 3)), (8, (3, 3, 2)), (7, (3, 3, 1))):
        table = distributed(torch.randn(3, 4), [Shard(0)], rows)
        local, shard = local_slice("table", table, 0, None)
        assert (shard.sizes, shard.rank) == (sizes, 1)
        assert torch.equal(local, table.to_local())
        assert local_slice("table", table, -2, VocabularyShard.of_sizes(sizes))[1] == shard
    with pytest.raises(ValueError, match="shard: expected that of table"):
        local_slice("table", table, 0, VocabularyShard.of_sizes((2, 3, 2)))
    with pytest.raises(ValueError, match=r"sizes: expected every rank to hold at least one id, got \[2, 2, 0\]"):
        local_slice("table", distributed(torch.randn(2, 4), [Shard(0)], 4), 0, None)
    with pytest.raises(TypeError, match=r"table: expected .* placement Shard\(0\)"):
        local_slice("table", distributed(torch.randn(9, 4), [Replicate()], 9), 0, None)
    with pytest.raises(TypeError, match=r"table: expected .* placement Shard\(1\)"):
        local_slice("table", table, 1, None)
    two_axes = init_device_mesh("cpu", (3, 1))
    with pytest.raises(TypeError, match="on a mesh of one axis"):
        local_slice("table", distributed(torch.randn(3, 4), [Shard(0), Replicate()], 9, two_axes), 0, None)
    for sizes in ((4, 5), (3, 3, 3, 3)):
        with pytest.raises(ValueError, match="sizes: expected 3, one for each rank"):
            VocabularyShard.of_sizes(sizes)


def test_a_group_of_one_exchanges_its_size():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard = VocabularyShard.of(8)
    finally:
        dist.destroy_process_group()
    assert (shard.sizes, shard.rank) == ((8,), 0)


@pytest.mark.usefixtures("second_of_three")
def test_dtensors_are_what_their_slices_and_a_shard_are():
    """The ranks send nothing here, so that the numbers mean nothing; but they are the same."""
    mesh, groups, shard = init_device_mesh("cpu", (3,)), torch.randint(9, (5, 2)), VocabularyShard.of_sizes((3, 3, 3))
    logits, hidden, weight, bias = torch.randn(5, 3), torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)

    def distributed(local, axis):
        return DTensor.from_local(local, mesh, [Shard(axis)], run_check=False)

    loss = npp_kernels.patch_cross_entropy
    assert torch.equal(loss(distributed(logits, 1), groups), loss(logits, groups, shard=shard))
    loss = npp_kernels.linear_patch_cross_entropy
    assert torch.equal(
        loss(hidden, distributed(weight, 0), groups, bias=distributed(bias, 0)),
        loss(hidden, weight, groups, bias=bias, shard=shard),
    )
    means = npp_kernels.group_mean
    assert torch.equal(means(distributed(weight, 0), groups), means(weight, groups, shard=shard))


@pytest.mark.parametrize("other", [0, 1])
def test_other_rows_on_one_rank_are_an_error_on_all(over_ranks, other):
    logits, table, groups = torch.randn(11, VOCAB_SIZE), torch.randn(VOCAB_SIZE, 5), torch.full((11, 4), 2)

    def run(shard):
        mine = groups.clone()
        mine[7, 1] = 2 + (shard.rank == other)
        messages = []
        for call in (
            lambda: npp_kernels.patch_cross_entropy(logits[:, shard.start : shard.stop], mine, shard=shard),
            lambda: npp_kernels.group_mean(table[shard.start : shard.stop], mine, shard=shard),
        ):
            with pytest.raises(ValueError, match="groups: expected the same rows on every rank") as caught:
                call()
            messages.append(str(caught.value))
        return messages

    assert len(over_ranks(run)) == len(SIZES)


def test_a_shard_knows_its_ids():
    shards = [VocabularyShard(SIZES, rank, "threads") for rank in range(len(SIZES))]
    assert [(shard.start, shard.stop, shard.size, shard.vocab_size) for shard in shards] == [
        (0, 7, 7, 18),
        (7, 10, 3, 18),
        (10, 18, 8, 18),
    ]
    with pytest.raises(ValueError, match=r"logits: expected 3 ids on axis -1, those of rank 1 in a shard of"):
        npp_kernels.patch_cross_entropy(torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64), shard=shards[1])
