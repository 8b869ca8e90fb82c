import pytest
import torch
import torch.nn.functional as F

import npp_kernels
import reference.ops as reference
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
