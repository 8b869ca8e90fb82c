"""`patch_mean` on every device: values and gradients within the budget, strides, infinities, and errors."""

import einops
import pytest
import torch

import npp_kernels
import reference.ops as reference
from tests.budget import assert_within_budget
from tests.conftest import INTERPRETED

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # the interpreter truncates bfloat16


def run(function, embeddings, patch, upstream, **options):
    embeddings = embeddings.detach().clone().requires_grad_()
    out = function(embeddings, patch, **options)
    out.backward(upstream.to(out.dtype))
    return out, embeddings.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((2, 8, 8, 16), (2, 2)),  # aligned
        ((3, 6, 4, 37), (3, 2)),  # an oblong patch, odd width
        ((2, 3, 8, 8, 5), (8, 8)),  # one patch, two leading axes
        ((1, 4, 4, 600), (1, 4)),  # several blocks of columns
    ],
)
def test_within_budget(device, dtype, shape, patch):
    embeddings = torch.randn(shape, device=device).to(dtype)
    upstream = torch.randn_like(reference.patch_mean(embeddings, patch))
    wide = torch.promote_types(dtype, torch.float32)
    actual = run(npp_kernels.patch_mean, embeddings, patch, upstream)
    eager = [t.to(dtype) for t in run(reference.patch_mean, embeddings.to(wide), patch, upstream)]
    oracle = run(reference.patch_mean, embeddings.double(), patch, upstream.double())
    for what, *three in zip(("out", "grad_embeddings"), actual, eager, oracle, strict=True):
        assert_within_budget(*three, what=what)


def test_other_ranks(device):
    video = torch.randn(2, 4, 6, 4, 3, device=device)
    expected = einops.reduce(video, "b (t x) (h y) (w z) d -> b (t h w) d", "mean", x=2, y=3, z=2)
    torch.testing.assert_close(npp_kernels.patch_mean(video, (2, 3, 2)), expected)
    text = torch.randn(2, 12, 5, device=device)
    torch.testing.assert_close(npp_kernels.patch_mean(text, (4,)), text.view(2, 3, 4, 5).mean(2))


def test_flat_and_strided(device):
    embeddings = torch.randn(2, 5, 4, 6, device=device).permute(0, 2, 3, 1)
    flat = embeddings.reshape(2, 24, 5)
    expected = reference.patch_mean(embeddings, (2, 3))
    torch.testing.assert_close(npp_kernels.patch_mean(embeddings, (2, 3)), expected)
    torch.testing.assert_close(npp_kernels.patch_mean(flat, (2, 3), grid=(4, 6)), expected)


def test_equals_group_mean_of_the_same_embeddings(device):
    table = torch.randn(30, 8, device=device)
    tokens = torch.randint(30, (2, 4, 4), device=device)
    torch.testing.assert_close(
        npp_kernels.patch_mean(table[tokens], 2), npp_kernels.group_mean(table, npp_kernels.group_tokens(tokens, 2))
    )


def test_one_token(device):
    embeddings = torch.randn(2, 4, 4, 3, device=device)
    assert torch.equal(npp_kernels.patch_mean(embeddings, 1), embeddings.view(2, 16, 3))


@pytest.mark.parametrize(
    ("shape", "means"), [((0, 4, 4, 3), (0, 4, 3)), ((2, 4, 4, 0), (2, 4, 0)), ((2, 0, 4, 3), (2, 0, 3))]
)
def test_empty(device, shape, means):
    embeddings = torch.zeros(shape, device=device, requires_grad=True)
    result = npp_kernels.patch_mean(embeddings, 2)
    result.sum().backward()
    assert result.shape == means
    assert embeddings.grad.shape == shape


def test_gradcheck():
    embeddings = torch.randn(2, 4, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: npp_kernels.patch_mean(e, (2, 3)), embeddings)
    assert torch.autograd.gradcheck(lambda e: reference.patch_mean(e, (2, 3)), embeddings)


def test_errors():
    with pytest.raises(TypeError, match=r"embeddings: expected float32.*int64"):
        npp_kernels.patch_mean(torch.zeros(4, 4, 3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"embeddings: expected .*got shape \(4,\)"):
        npp_kernels.patch_mean(torch.zeros(4), 2)
    with pytest.raises(ValueError, match="does not divide 5"):
        npp_kernels.patch_mean(torch.zeros(1, 5, 4, 3), 2)
    with pytest.raises(ValueError, match=r"patch: expected a tuple, or grid=.*axes \(8, 64\) of embeddings"):
        npp_kernels.patch_mean(torch.zeros(8, 64, 3), 4)  # sequences, not an image
    with pytest.raises(ValueError, match="grid: expected embeddings to end in"):
        npp_kernels.patch_mean(torch.zeros(1, 15, 3), 2, grid=(4, 4))


@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (not INTERPRETED))
@pytest.mark.parametrize(("shape", "patch"), [((2, 6, 6, 24), (3, 2)), ((1, 4, 4, 6, 8), (2, 2, 3))])
def test_16_bit_sums_in_fp32(device, dtype, shape, patch):
    """Every mean is summed in fp32 and rounded once, also where the sum is out of float16's range."""
    embeddings = torch.randn(shape, device=device).to(dtype)
    embeddings[..., 0] = 60000.0
    means = npp_kernels.patch_mean(embeddings, patch)
    assert (means[..., 0] == embeddings[0, 0, 0, 0].flatten()[0]).all()
    exact = npp_kernels.patch_mean(embeddings.double(), patch)  # fp64 takes the PyTorch path
    assert_within_budget(means, exact.to(dtype), exact, scale=npp_kernels.patch_mean(embeddings.double().abs(), patch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_are_pytorchs(device, dtype):
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[inf, 1, 2, 3], [1, -inf, 2, 3], [inf, 1, -inf, 2], [1, nan, inf, 2]], device=device)
    means = npp_kernels.patch_mean(rows.to(dtype)[..., None].expand(4, 4, 8).contiguous(), (4,))
    expected = torch.tensor([inf, -inf, nan, nan], device=device).to(dtype)
    torch.testing.assert_close(means, expected[:, None, None].expand(4, 1, 8), equal_nan=True)
