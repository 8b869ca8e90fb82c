"""SwiGLU with both products in one: values, gradients, weights that are neighbours, and what torch.compile sees."""

import doctest

import pytest
import torch

import reference.network.swiglu
from npp_kernels._dispatch import runs_kernels
from reference.network.model import SIZES, FeedForward, ModelConfig
from reference.network.swiglu import gated, join, swiglu
from reference.training.optimizer import AdamWConfig, FlatAdamW


def gradients(function, *tensors):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    grads = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)).sum(), tensors)
    return out.detach(), *grads


def test_docstrings_run():
    assert doctest.testmod(reference.network.swiglu).failed == 0


# Channels that fill a program's block, that do not, and more than one block.
@pytest.mark.parametrize("channels", [8, 1024, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_as_two_products(channels, dtype, device):
    x = torch.randn(2, 5, 16, device=device).to(dtype)
    w1, w3 = ((torch.randn(channels, 16, device=device) / 4).to(dtype) for _ in range(2))
    exact = gradients(lambda *a: gated(*a, fast=False), x.double(), w1.double(), w3.double())
    plain = gradients(lambda *a: gated(*a, fast=False), x, w1, w3)
    fused = gradients(gated, x, w1, w3)
    for ours, other, oracle in zip(fused, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - oracle).norm() <= max(1.5 * (other - oracle).norm(), 1e-6 * oracle.norm())


def test_neighbours_are_read_as_one(device):
    both = torch.randn(12, 3, device=device)
    w1, w3 = both[:6], both[6:]
    assert torch.equal(join(w1, w3), both)
    assert join(w1, w3).data_ptr() == both.data_ptr()
    for first, second in ((w3, w1), (w1, w3.clone()), (w1[::2], w3[::2]), (both[:5], w3)):
        joined = join(first, second)
        assert torch.equal(joined, torch.cat((first, second)))
        assert joined.data_ptr() != both.data_ptr()


@pytest.mark.parametrize("size", SIZES)
def test_the_optimizer_lays_them_side_by_side(size):
    config = ModelConfig.named(size)
    if config.dim > 1024:
        config = ModelConfig(dim=config.dim // 4, num_heads=1)  # as many blocks, or fewer
    feed_forward = FeedForward(config, fast=True)
    FlatAdamW(feed_forward, AdamWConfig(), dtype=torch.bfloat16)
    w1, w3 = feed_forward.w1.weight, feed_forward.w3.weight
    assert join(w1, w3).data_ptr() == w1.data_ptr()


def test_the_kernels_serve_one_dtype_outside_of_autocast(device, monkeypatch):
    called = []
    real = swiglu

    def counted(*arguments):
        called.append(True)
        return real(*arguments)

    monkeypatch.setattr(reference.network.swiglu, "swiglu", counted)
    x, w = torch.randn(2, 3, 8, device=device), torch.randn(16, 8, device=device)
    assert gated(x, w, w).shape == (2, 3, 16)
    assert len(called) == runs_kernels(x)
    called.clear()
    gated(x.double(), w.double(), w.double())
    gated(x, w, w, fast=False)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert gated(x, w, w).dtype == torch.bfloat16
    assert not called


@pytest.mark.gpu
def test_operator_is_what_it_says():
    x, w1, w3 = (torch.randn(size, 32, device="cuda", requires_grad=True) for size in (10, 64, 64))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(swiglu, (x, w1, w3), test_utils=tests)


@pytest.mark.gpu
def test_compiles_without_a_break():
    x, w1, w3 = (torch.randn(size, 64, device="cuda").bfloat16() for size in (48, 128, 128))
    compiled = torch.compile(lambda *a: gated(*a) + 1, fullgraph=True, dynamic=False)
    expected = gradients(lambda *a: gated(*a) + 1, x, w1, w3)
    for ours, other in zip(gradients(compiled, x, w1, w3), expected, strict=True):
        torch.testing.assert_close(ours, other)
