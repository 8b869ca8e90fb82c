"""The attention with its rotation: both paths against fp64, which one runs, and what torch.compile sees of it."""

import doctest

import pytest
import torch

import reference.network.attention
from npp_kernels._dispatch import INTERPRETED, is_hopper
from reference.network.attention import attend, rotary_attention, rotary_embedding

# Images, positions, heads, channels of a head, width of the grid: whole in one tile or not, with and without a rest.
SHAPES = [
    (2, 16, 2, 64, 4),
    (2, 4, 1, 64, 2),
    (3, 32, 2, 32, 4),
    (1, 64, 2, 64, 8),
    (1, 150, 2, 64, 10),
    (1, 256, 1, 64, 16),
]
RELATIVE = 1.2  # of the other path's error


def attend_in_fp64(qkv, rotary):
    """Write the attention down once more: complex rotation, softmax over what came before."""
    turn = torch.complex(rotary[0].double(), rotary[1].double())[:, None]
    query, key = (
        torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
        for x in qkv.double().unbind(2)[:2]
    )
    scores = torch.einsum("bphd,bqhd->bhpq", query, key) / qkv.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=qkv.device).triu(1)
    return torch.einsum("bhpq,bqhd->bphd", scores.masked_fill(later, -torch.inf).softmax(-1), qkv[:, :, 2].double())


def inputs_of(shape, dtype, device):
    images, positions, heads, channels, width = shape
    qkv = (1.5 * torch.randn(images, positions, 3, heads, channels)).to(device, dtype)
    rotary = rotary_embedding(torch.arange(positions, device=device), width, channels)
    return qkv, rotary, torch.randn(images, positions, heads, channels).to(device, dtype)


def value_and_gradient(function, qkv, grad):
    qkv = qkv.clone().requires_grad_()
    out = function(qkv)
    out.backward(grad.to(out.dtype))
    return out.detach(), qkv.grad


def test_docstrings_run():
    assert doctest.testmod(reference.network.attention).failed == 0


# The interpreter has no products of bf16. PyTorch warns where the first product of a process is in a backward.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_near_to_fp64_as_separate_operations(shape, dtype, device):
    qkv, rotary, grad = inputs_of(shape, dtype, device)
    exact = value_and_gradient(lambda x: attend_in_fp64(x, rotary), qkv.double(), grad)
    fused = value_and_gradient(lambda x: attend(x, rotary), qkv, grad)
    separate = value_and_gradient(lambda x: attend(x, rotary, fast=False), qkv, grad)
    for ours, other, oracle in zip(fused, separate, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - oracle).norm() <= RELATIVE * (other - oracle).norm()
        assert (other - oracle).norm() <= 0.02 * oracle.norm()


def test_the_kernels_serve_short_sequences_of_16_bit_numbers(device, monkeypatch):
    called = []
    real = rotary_attention

    def counted(*arguments):
        called.append(arguments[0].shape)
        return real(*arguments)

    monkeypatch.setattr(reference.network.attention, "rotary_attention", counted)
    runs = INTERPRETED or is_hopper(torch.empty(0, device=device))
    for shape, dtype, served in [
        ((1, 16, 1, 64, 4), torch.float16, True),
        ((1, 16, 1, 64, 4), torch.bfloat16, not INTERPRETED),
        ((1, 16, 1, 64, 4), torch.float32, False),
        ((1, 16, 1, 64, 4), torch.float64, False),
        ((1, 16, 1, 24, 4), torch.float16, False),
        ((1, 289, 1, 32, 17), torch.float16, False),
    ]:
        called.clear()
        qkv, rotary, _ = inputs_of(shape, dtype, device)
        assert attend(qkv, rotary).shape == (1, shape[1], 1, shape[3])
        assert len(called) == (served and runs)
    called.clear()
    attend(*inputs_of((1, 16, 1, 64, 4), torch.float16, device)[:2], fast=False)
    assert not called


@pytest.mark.gpu
def test_operator_is_what_it_says():
    for shape in SHAPES[:1] + SHAPES[4:5]:
        qkv, rotary, _ = inputs_of(shape, torch.bfloat16, "cuda")
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(rotary_attention, (qkv.requires_grad_(), *rotary), test_utils=tests)


@pytest.mark.gpu
def test_compiles_without_a_break():
    qkv, rotary, grad = inputs_of((2, 64, 2, 64, 8), torch.bfloat16, "cuda")
    compiled = torch.compile(lambda x: attend(x * 1.5, rotary) + 1, fullgraph=True, dynamic=False)
    expected = value_and_gradient(lambda x: attend(x * 1.5, rotary) + 1, qkv, grad)
    for ours, other in zip(value_and_gradient(compiled, qkv, grad), expected, strict=True):
        torch.testing.assert_close(ours, other)
