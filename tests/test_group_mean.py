"""`group_mean` on every device: values and gradients within the budget, reproducible, and the order made ahead."""

import pytest
import torch
import torch.nn.functional as F

import npp_kernels
import reference.ops as reference
from npp_kernels.embeddings import segments, table_gradient, torch_path
from tests.budget import assert_within_budget
from tests.conftest import INTERPRETED
from tests.inputs import skewed_ids

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # the interpreter truncates bfloat16


def run(function, table, groups, upstream, **options):
    table = table.detach().clone().requires_grad_()
    out = function(table, groups, **options)
    out.backward(upstream.to(out.dtype))
    return out, table.grad


def run_eager(table, groups, upstream, **options):
    """Run the reference as PyTorch's kernels on a GPU compute it: sums in fp32, one rounding at the end."""
    wide = torch.promote_types(table.dtype, torch.float32)
    return tuple(t.to(table.dtype) for t in run(reference.group_mean, table.to(wide), groups, upstream, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocab_size", "hidden_size", "shape", "ignore_index"),
    [
        (50, 32, (3, 5, 4), None),  # aligned
        (50, 33, (7, 3), None),  # odd width, K not a power of two
        (50, 33, (7, 3), 25),  # the most frequent id is ignored: whole groups have nothing left
        (9, 128, (1, 16), None),  # one group, ids repeated inside it
        (20, 700, (6, 4), 3),  # several blocks of columns
        (30, 8, (600, 1), None),  # segments longer than a chunk
        (30, 8, (9, 64), 15),  # wide groups, most of them ignored
    ],
)
def test_within_budget(device, dtype, vocab_size, hidden_size, shape, ignore_index):
    table = torch.randn(vocab_size, hidden_size, device=device).to(dtype)
    groups = skewed_ids(vocab_size, shape, device=device)
    upstream = torch.randn(*shape[:-1], hidden_size, device=device).to(dtype)
    options = {"ignore_index": ignore_index}
    actual = run(npp_kernels.group_mean, table, groups, upstream, **options)
    eager = run_eager(table, groups, upstream, **options)
    oracle = run(reference.group_mean, table.double(), groups, upstream.double(), **options)
    for what, *three in zip(("out", "grad_table"), actual, eager, oracle, strict=True):
        assert_within_budget(*three, what=what)


def test_budget_rejects_low_precision_sums():
    """The assertion must see what a plain atol=rtol=1e-2 lets pass: a gradient accumulated in bfloat16."""
    table = torch.randn(8, 64).bfloat16()
    groups = skewed_ids(8, (4096, 1))
    upstream = torch.randn(4096, 64).bfloat16()
    wrong = torch.zeros_like(table)
    for row, ids in zip(upstream, groups[:, 0].tolist(), strict=True):
        wrong[ids] += row
    _, eager = run_eager(table, groups, upstream)
    _, oracle = run(reference.group_mean, table.double(), groups, upstream.double())
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(wrong, eager, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_id_is_the_embedding_bit_for_bit(device, dtype):
    table = torch.randn(40, 24, device=device).to(dtype)
    table[3, :4] = -0.0
    table[4, 0] = float("inf")
    groups = torch.arange(40, device=device).view(8, 5, 1)
    bits = {2: torch.int16, 4: torch.int32}[table.element_size()]
    out = npp_kernels.group_mean(table, groups)
    assert torch.equal(out.view(bits), F.embedding(groups[..., 0], table).view(bits))


@pytest.mark.parametrize("ignore_index", [None, 2])
def test_frequent_ids_in_many_small_chunks(device, monkeypatch, ignore_index):
    """Segments with none, one and many whole chunks, and more chunks than one program looks at."""
    monkeypatch.setattr(table_gradient, "FEW_IDS", 0)
    monkeypatch.setattr(table_gradient, "CHUNK_SIZE", 4)
    groups = torch.tensor([0] * 29 + [1] * 3 + [2] * 9 + [3] * 8 + [4] + [6] * 14, device=device)
    groups = groups[torch.randperm(64, device=device)].view(32, 2)
    table, upstream = torch.zeros(8, 5, device=device), torch.randn(32, 5, device=device)
    _, grad = run(npp_kernels.group_mean, table, groups, upstream, ignore_index=ignore_index)
    _, exact = run(reference.group_mean, table.double(), groups, upstream.double(), ignore_index=ignore_index)
    torch.testing.assert_close(grad.double(), exact, atol=1e-5, rtol=1e-5)


def test_tables_with_strides(device):
    groups = torch.randint(6, (5, 3), device=device)
    for table in (torch.randn(4, 6, device=device).t(), torch.randn(6, 1, device=device).expand(6, 4)):
        torch.testing.assert_close(npp_kernels.group_mean(table, groups), table[groups].mean(1))


def test_gradcheck():
    table = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    groups = torch.randint(6, (2, 4, 3))
    assert torch.autograd.gradcheck(lambda t: npp_kernels.group_mean(t, groups), table)
    assert torch.autograd.gradcheck(lambda t: npp_kernels.group_mean(t, groups, ignore_index=2), table)
    assert torch.autograd.gradcheck(lambda t: reference.group_mean(t, groups, ignore_index=2), table)


def test_gradient_is_bitwise_reproducible(device):
    groups = skewed_ids(20, (150, 4), device=device)
    table = torch.randn(20, 40, device=device)
    upstream = torch.randn(150, 40, device=device)
    first, *others = (run(npp_kernels.group_mean, table, groups, upstream)[1] for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_reproducible_at_full_size(group_size):
    groups = skewed_ids(16384, (65536 // group_size, group_size), device="cuda")
    table = torch.randn(16384, 768, device="cuda").bfloat16()
    upstream = torch.randn(65536 // group_size, 768, device="cuda").bfloat16()
    first, *others = (run(npp_kernels.group_mean, table, groups, upstream)[1] for _ in range(10))
    assert all(torch.equal(first, other) for other in others)
    _, oracle = run(reference.group_mean, table.double(), groups, upstream.double())
    _, eager = run_eager(table, groups, upstream)
    assert_within_budget(first, eager, oracle)


def test_out_dtype(device):
    table = torch.randn(10, 8, device=device, requires_grad=True)
    groups = torch.randint(10, (5, 4), device=device)
    out = npp_kernels.group_mean(table, groups, out_dtype=torch.float16)
    assert out.dtype == torch.float16
    assert torch.equal(out, npp_kernels.group_mean(table, groups).half())
    out.sum().backward()
    assert table.grad.dtype == torch.float32


def test_strided_and_small_inputs(device):
    table = torch.randn(8, 20, device=device)
    groups = torch.randint(20, (4, 6), device=device)
    expected = reference.group_mean(table.t(), groups)
    torch.testing.assert_close(npp_kernels.group_mean(table.t(), groups), expected)
    wide = torch.randn(20, 16, device=device)
    torch.testing.assert_close(
        npp_kernels.group_mean(wide[:, :8], groups.t().int()), reference.group_mean(wide[:, :8], groups.t())
    )


@pytest.mark.parametrize("ignore_index", [None, 3])
def test_float64_is_exact_where_one_side_of_it_is_not(device, ignore_index):
    """A table in float64 with a result in float32, and the other way round."""
    groups = skewed_ids(20, (30, 4), device=device)
    upstream = torch.randn(30, 8, device=device)
    table = torch.randn(20, 8, device=device, dtype=torch.float64)
    _, expected = run(reference.group_mean, table, groups, upstream, ignore_index=ignore_index)
    options = {"ignore_index": ignore_index}
    _, grad = run(npp_kernels.group_mean, table, groups, upstream, out_dtype=torch.float32, **options)
    torch.testing.assert_close(grad, expected, rtol=1e-14, atol=1e-14)
    _, grad = run(npp_kernels.group_mean, table.float(), groups, upstream, out_dtype=torch.float64, **options)
    torch.testing.assert_close(grad, expected.float())


def test_empty(device):
    table = torch.randn(5, 4, device=device, requires_grad=True)
    out = npp_kernels.group_mean(table, torch.zeros(0, 3, dtype=torch.int64, device=device))
    assert out.shape == (0, 4)
    out.sum().backward()
    assert torch.equal(table.grad, torch.zeros_like(table))
    assert npp_kernels.group_mean(
        torch.randn(5, 0, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    ).shape == (2, 0)


def test_errors():
    table, groups = torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="table: expected 2 axes"):
        npp_kernels.group_mean(table[0], groups)
    with pytest.raises(TypeError, match=r"table: expected float32.*got .*int64"):
        npp_kernels.group_mean(groups, groups)
    with pytest.raises(TypeError, match=r"groups: expected int32 or int64, got .*float32"):
        npp_kernels.group_mean(table, table)
    with pytest.raises(ValueError, match=r"groups: expected .*K of at least 1"):
        npp_kernels.group_mean(table, groups[:, :0])
    with pytest.raises(ValueError, match="groups: expected the device of table, cpu, got meta"):
        npp_kernels.group_mean(table, groups.to("meta"))
    with pytest.raises(TypeError, match="out_dtype: expected"):
        npp_kernels.group_mean(table, groups, out_dtype=torch.int32)
    with pytest.raises(IndexError, match=r"groups: expected ids in \[0, 5\), got 7 at position \(1, 2\)"):
        npp_kernels.group_mean(table, torch.tensor([[0, 1, 2], [3, 4, 7]]))
    with pytest.raises(IndexError, match="got -100"):
        npp_kernels.group_mean(table, torch.tensor([[0, -100]]))
    assert npp_kernels.group_mean(table, torch.tensor([[0, -100]]), ignore_index=-100).isfinite().all()


def test_double_backward_is_refused(device):
    table = torch.randn(5, 4, device=device, requires_grad=True)
    out = npp_kernels.group_mean(table, torch.zeros(2, 3, dtype=torch.int64, device=device))
    (grad,) = torch.autograd.grad(out.square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="group_mean: expected one backward, got a double backward"):
        grad.sum().backward()


@pytest.mark.gpu
def test_bad_ids_on_a_gpu():
    table = torch.randn(5, 4, device="cuda", requires_grad=True)
    groups = torch.tensor([[0, 1], [2, 5], [-1, 3], [2**40, 0]], device="cuda")
    out = npp_kernels.group_mean(table, groups)
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()
    out.sum().backward()
    assert table.grad.isfinite().all()
    npp_kernels.check_ids(True)
    try:
        with pytest.raises(ValueError, match=r"got 5 at position \(1, 1\)"):
            npp_kernels.group_mean(table, groups)
    finally:
        npp_kernels.check_ids(False)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    groups = torch.randint(512, (2**20 + 1, 2), device="cuda")
    table = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = npp_kernels.group_mean(table, groups)
    assert out.numel() > 2**31
    rows = torch.tensor([0, 2**19, 2**20], device="cuda")
    torch.testing.assert_close(out[rows].float(), table[groups[rows]].float().mean(1), rtol=1e-2, atol=1e-2)
    out.backward(torch.ones_like(out))
    counts = torch.bincount(groups.flatten(), minlength=512) / 2
    torch.testing.assert_close(table.grad[:, 7].float(), counts, rtol=1e-2, atol=0)


@pytest.mark.parametrize("ignore_index", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (not INTERPRETED))
def test_16_bit_sums_in_fp32(device, dtype, ignore_index):
    """Every element is the mean, and the gradient the sum, in fp32, rounded once."""
    num_groups = 40 if INTERPRETED else 400
    table = torch.randn(20, 48, device=device).to(dtype)
    table[0] = 60000.0
    for group_size in (2, 3, 16):
        groups = torch.randint(20, (num_groups, group_size), device=device)
        groups[0] = 0
        upstream = torch.randn(num_groups, 48, device=device).to(dtype)
        out, grad = run(npp_kernels.group_mean, table, groups, upstream, ignore_index=ignore_index)
        assert (out[0] == table[0]).all()  # the sum is out of float16's range
        exact, terms = (
            run(reference.group_mean, t.double(), groups, u.double(), ignore_index=ignore_index)
            for t, u in ((table, upstream), (table.abs(), upstream.abs()))
        )
        for actual, oracle, scale in zip((out, grad), exact, terms, strict=True):
            assert_within_budget(actual, oracle.to(dtype), oracle, scale=scale)


@pytest.mark.parametrize("ignore_index", [None, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_are_pytorchs(device, dtype, ignore_index):
    """An infinite sum is infinite, of one sign; inf - inf and NaN are NaN. In the backward too, with many of one id."""
    inf, nan = float("inf"), float("nan")
    table = torch.tensor([[1.0], [2.0], [inf], [-inf], [nan]], device=device).to(dtype)
    table = torch.cat((table, table.new_zeros(5, 1))).expand(10, 8).contiguous()
    groups = torch.tensor(
        [[2, 0, 1, 1], [0, 3, 1, 0], [0, 1, 1, 2], [2, 2, 2, 0], [2, 0, 3, 1], [0, 4, 1, 2], [4, 2, 2, 2]],
        device=device,
    )
    expected = torch.tensor([inf, -inf, inf, inf, nan, nan, nan], device=device)
    out = npp_kernels.group_mean(table, groups, ignore_index=ignore_index)
    torch.testing.assert_close(out, expected.to(dtype)[:, None].expand(7, 8), equal_nan=True)
    for repeats in (1, 40):  # few ids, and chunks of one id
        ids = torch.arange(7, device=device).repeat_interleave(4).repeat(repeats).view(-1, 1)
        upstream = table[groups].flatten(0, 1).repeat(repeats, 1)
        _, grad = run(npp_kernels.group_mean, table, ids, upstream, ignore_index=ignore_index)
        torch.testing.assert_close(grad[:7], expected.to(dtype)[:, None].expand(7, 8), equal_nan=True)
        assert not grad[7:].any()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's numpy
def test_overflow_is_infinite(device):
    """A sum that leaves fp32's range stays infinite, as PyTorch's does, and does not come back as NaN."""
    table = torch.full((3, 8), 3e38, device=device)
    table[2] = 1.0
    out = npp_kernels.group_mean(table, torch.tensor([[0, 1, 2, 2], [2, 0, 1, 2]], device=device))
    assert (out == float("inf")).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "ignore_index"), [((5, 8), None), ((90, 2), 7), ((512, 1), None)])
def test_few_ids_are_summed_as_many_are(device, monkeypatch, dtype, shape, ignore_index):
    """One launch for a few ids gives the same bits as the sort, where no id is so frequent that it fills a chunk."""
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("the CPU has no kernels")
    table = torch.randn(40, 30, device=device).to(dtype)
    groups = torch.randint(40, shape, device=device)
    groups[0, 0] = 39
    upstream = torch.randn(*shape[:-1], 30, device=device).to(dtype)
    sorts = []
    found = segments.find_segments
    monkeypatch.setattr(table_gradient, "find_segments", lambda *arguments: sorts.append(1) or found(*arguments))
    _, few = run(npp_kernels.group_mean, table, groups, upstream, ignore_index=ignore_index)
    assert not sorts
    monkeypatch.setattr(table_gradient, "FEW_IDS", groups.numel() - 1)
    _, many = run(npp_kernels.group_mean, table, groups, upstream, ignore_index=ignore_index)
    assert sorts
    assert few.any()
    assert torch.equal(few, many)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize(
    ("vocab_size", "shape", "ignore_index", "rank_sort_limit"),
    [
        (50, (3, 5, 4), None, 8192),
        (50, (7, 3), 25, 8192),  # the most frequent id is ignored
        (30, (600, 1), None, 0),  # segments longer than a chunk, by the sort of long lists
        (300, (40, 16), 150, 0),  # the same, in two passes
    ],
)
def test_an_order_changes_no_bit(device, monkeypatch, dtype, vocab_size, shape, ignore_index, rank_sort_limit):
    monkeypatch.setattr(segments, "RANK_SORT_LIMIT", rank_sort_limit)
    monkeypatch.setattr(table_gradient, "FEW_IDS", 0)
    table = torch.randn(vocab_size, 24, device=device).to(dtype)
    groups = skewed_ids(vocab_size, shape, device=device)
    upstream = torch.randn(*shape[:-1], 24, device=device).to(dtype)
    out, grad = run(npp_kernels.group_mean, table, groups, upstream, ignore_index=ignore_index)
    order = npp_kernels.order_groups(groups, vocab_size, ignore_index=ignore_index)

    def refuse(*_):
        raise AssertionError("the backward sorts")

    for module, name in ((table_gradient, "find_segments"), (torch_path, "torch_segments")):
        monkeypatch.setattr(module, name, refuse)
    for given in (groups, groups.int()):
        means, gradient = run(npp_kernels.group_mean, table, given, upstream, ignore_index=ignore_index, order=order)
        assert torch.equal(means, out)
        assert torch.equal(gradient, grad)
    with pytest.raises(AssertionError, match="the backward sorts"):
        run(npp_kernels.group_mean, table, groups, upstream, ignore_index=ignore_index)


@pytest.mark.parametrize("rank_sort_limit", [0, 8192])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [None, 3, -100])
def test_an_order_is_the_same_on_every_device(device, monkeypatch, ignore_index, dtype, rank_sort_limit):
    """And of groups that are not contiguous, whose ids lie at a stride."""
    monkeypatch.setattr(segments, "RANK_SORT_LIMIT", rank_sort_limit)
    groups = skewed_ids(700, (40, 5, 8), dtype=dtype, device=device)
    if ignore_index is not None:
        groups[::3, 1] = ignore_index
    for view in (groups, groups[:, :-1], groups[..., ::2], groups.transpose(0, 2)):
        order = npp_kernels.order_groups(view, 700, ignore_index=ignore_index)
        expected = torch_path.torch_segments(view.cpu(), 700, ignore_index)
        assert {part.dtype for part in order[:3]} == {torch.int32}
        assert order.positions.shape == view.shape
        assert torch.equal(order.keys.cpu().long(), expected.keys.long())
        assert torch.equal(order.positions.cpu().long().flatten(), expected.order)
        assert torch.equal(order.starts.cpu().long(), expected.starts)
        assert torch.equal(order.starts.cpu(), torch.searchsorted(order.keys.cpu(), torch.arange(701)).int())


def test_an_order_of_no_groups(device):
    table = torch.randn(5, 4, device=device, requires_grad=True)
    groups = torch.zeros(2, 0, 3, dtype=torch.int64, device=device)
    order = npp_kernels.order_groups(groups, 5)
    assert [tuple(part.shape) for part in order[:3]] == [(0,), (2, 0, 3), (6,)]
    assert not order.starts.any()
    npp_kernels.group_mean(table, groups, order=order).sum().backward()
    assert torch.equal(table.grad, torch.zeros_like(table))


def test_an_order_in_compiled_code(device):
    """Given to it, and made in it; under autocast, too."""

    def given(table, groups, order):
        return npp_kernels.group_mean(table, groups, ignore_index=3, order=order)

    def made(table, groups, _):
        return given(table, groups, npp_kernels.order_groups(groups, 20, ignore_index=3))

    def moved(table, groups, order):
        return given(table, groups, order.to(table.device, non_blocking=True))

    table = torch.randn(20, 16, device=device)
    for function in (given, made, moved):
        torch._dynamo.reset()
        compiled = torch.compile(
            function, fullgraph=True, backend="inductor" if table.is_cuda else "aot_eager", dynamic=None
        )
        if INTERPRETED:
            compiled = function  # the compiler has no interpreter
        for num_groups in (6, 30, 50):
            groups = skewed_ids(20, (2, num_groups, 4), device=device)
            upstream = torch.randn(2, num_groups, 16, device=device)
            order = npp_kernels.order_groups(groups, 20, ignore_index=3)
            with torch.autocast(device.type, torch.bfloat16):
                expected = run(npp_kernels.group_mean, table, groups, upstream, ignore_index=3)
                actual = run(lambda t, g, c=compiled, o=order: c(t, g, o), table, groups, upstream)
            assert all(map(torch.equal, actual, expected))


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.randint(50, (8, 8), generator=torch.Generator().manual_seed(index))


def collate(images):
    groups = npp_kernels.group_tokens(torch.stack(images), 2)
    return groups, npp_kernels.order_groups(groups[:, :-1], 50)


def test_an_order_from_a_data_loaders_worker(device):
    table = torch.randn(50, 8, device=device, requires_grad=True)
    loader = torch.utils.data.DataLoader(
        Images(), 3, collate_fn=collate, num_workers=1, pin_memory=device.type == "cuda"
    )
    for groups, order in loader:
        assert isinstance(order, npp_kernels.GroupOrder)
        assert order.positions.is_pinned() == (device.type == "cuda")
        order, inputs = order.to(device, non_blocking=True), groups.to(device, non_blocking=True)[:, :-1]
        upstream = torch.randn(*inputs.shape[:-1], 8, device=device)
        expected = run(npp_kernels.group_mean, table, inputs, upstream)
        assert all(map(torch.equal, run(npp_kernels.group_mean, table, inputs, upstream, order=order), expected))


def test_an_order_collated_by_mistake_is_refused():
    """Orders of single samples do not stack to the order of their batch."""
    samples = [(ids, npp_kernels.order_groups(ids, 50)) for ids in torch.randint(50, (2, 4, 3))]
    groups = torch.stack([ids for ids, _ in samples])
    tensors = [torch.stack(parts) for parts in zip(*(order[:3] for _, order in samples), strict=True)]
    with pytest.raises(ValueError, match=r"order: expected keys \(24,\) for groups \(2, 4, 3\)"):
        npp_kernels.group_mean(torch.randn(50, 8), groups, order=npp_kernels.GroupOrder(*tensors, None))


def test_errors_of_an_order():
    table, groups = torch.randn(5, 4), torch.tensor([[0, 1, 2], [3, 4, 0]])
    order = npp_kernels.order_groups(groups, 5)

    def refused(kind, match, order, table=table, groups=groups, **options):
        with pytest.raises(kind, match=match):
            npp_kernels.group_mean(table, groups, order=order, **options)

    refused(TypeError, "order: expected a GroupOrder, .*got Tensor", order.positions)
    refused(TypeError, "order: expected a GroupOrder, .*got tuple", tuple(order))
    refused(ValueError, r"order: expected keys \(3,\) for groups \(1, 3\)", order, groups=groups[:1])
    refused(ValueError, r"order: expected positions \(3, 2\) for groups \(3, 2\)", order, groups=groups.view(3, 2))
    refused(ValueError, r"order: expected starts \(7,\) .*table of 6 rows", order, table=torch.randn(6, 4))
    refused(TypeError, "order: expected starts of int32, got .*int64", order._replace(starts=order.starts.long()))
    refused(ValueError, "order: expected the device of groups, cpu, got meta", order.to("meta"))
    refused(ValueError, "order: expected ignore_index=2, as in this call, got None", order, ignore_index=2)
    with pytest.raises(TypeError, match=r"vocab_size: expected an int, got 5\.0"):
        npp_kernels.order_groups(groups, 5.0)
    with pytest.raises(ValueError, match="vocab_size: expected at least 1, got 0"):
        npp_kernels.order_groups(groups, 0)
    with pytest.raises(TypeError, match="groups: expected int32 or int64"):
        npp_kernels.order_groups(groups.float(), 5)
    with pytest.raises(IndexError, match=r"groups: expected ids in \[0, 4\), got 4 at position \(1, 1\)"):
        npp_kernels.order_groups(groups, 4)


def test_an_order_of_other_groups_is_seen_where_ids_are_checked(device):
    table = torch.randn(5, 4, device=device)
    groups = torch.tensor([[0, 1, 2], [3, 4, 0]], device=device)
    orders = [npp_kernels.order_groups(ids, 5) for ids in (groups, groups.flip(0), groups.clamp(max=3))]
    npp_kernels.check_ids(True)
    try:
        npp_kernels.group_mean(table, groups, order=orders[0])
        for order in orders[1:]:
            with pytest.raises(ValueError, match=r"order: expected what order_groups makes of these groups"):
                npp_kernels.group_mean(table, groups, order=order)
    finally:
        npp_kernels.check_ids(False)
    for order in orders:  # every order of so many ids is safe to read by, if not right
        npp_kernels.group_mean(table.requires_grad_(), groups, order=order).sum().backward()


@pytest.mark.gpu
def test_an_order_at_full_size():
    """Made on the CPU and on the GPU, in eager mode and in a graph; two passes, K = 4, half a million embeddings."""
    groups = skewed_ids(16384, (16384, 4), device="cuda")
    table = torch.randn(16384, 768, device="cuda").bfloat16()
    upstream = torch.randn(16384, 768, device="cuda").bfloat16()
    _, expected = run(npp_kernels.group_mean, table, groups, upstream)
    orders = npp_kernels.order_groups(groups, 16384), npp_kernels.order_groups(groups.cpu(), 16384).to("cuda")
    for first, second in zip(orders[0][:3], orders[1][:3], strict=True):
        assert torch.equal(first, second)
    for order in orders:
        assert torch.equal(run(npp_kernels.group_mean, table, groups, upstream, order=order)[1], expected)
    leaf = table.clone().requires_grad_()

    def step():
        order = npp_kernels.order_groups(groups, 16384)
        return torch.autograd.grad(npp_kernels.group_mean(leaf, groups, order=order), leaf, upstream)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_bad_ids_in_an_order_on_a_gpu():
    table = torch.randn(5, 4, device="cuda")
    groups = torch.tensor([[0, 1], [2, 5], [-1, 3], [2**40, 0]], device="cuda")
    upstream = torch.randn(4, 4, device="cuda")
    order = npp_kernels.order_groups(groups, 5)
    _, expected = run(npp_kernels.group_mean, table, groups, upstream)
    assert torch.equal(run(npp_kernels.group_mean, table, groups, upstream, order=order)[1], expected)
