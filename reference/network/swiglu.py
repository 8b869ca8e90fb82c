"""SwiGLU's first half, ``silu(x · w1ᵀ) * (x · w3ᵀ)``, with both products in one.

The weights are two parameters, as in the official checkpoints. The optimizer lays them one behind the other, and one
product reads them as one matrix: on a coarse stage one kernel that fills the GPU in place of two that do not, and
backward one gradient of x in place of two to be added up. Each pass has one elementwise kernel between its products:
3 numbers a channel and position forward, 5 backward.

Source: GLU Variants Improve Transformer (arXiv 2002.05202), section 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import cdiv, launch, runs_kernels

BLOCK = 1024  # channels of a program


def gated(x: Tensor, w1: Tensor, w3: Tensor, *, fast: bool = True) -> Tensor:
    """Return ``silu(x · w1ᵀ) * (x · w3ᵀ)``.

    >>> import torch
    >>> gated(torch.randn(2, 16, 24), torch.randn(64, 24), torch.randn(64, 24)).shape
    torch.Size([2, 16, 64])

    Args:
        x: ``[..., D]``.
        w1: ``[F, D]``.
        w3: ``[F, D]``.
        fast: whether the kernels of this file may serve it.
    """
    if fast and serves(x, w1):
        return swiglu(x.flatten(0, -2), w1, w3)[0].unflatten(0, x.shape[:-1])
    return F.silu(F.linear(x, w1)) * F.linear(x, w3)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Return whether `swiglu` is to be used: by kernels, and outside of autocast, which casts one weight at a time."""
    return runs_kernels(x) and x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)


@triton.jit
def _swiglu_kernel(joined_ptr, out_ptr, num_channels, BLOCK: tl.constexpr):
    """``silu`` of the first half of a row, times the second half."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < num_channels
    joined_ptr += row * 2 * num_channels
    gate = tl.load(joined_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(joined_ptr + num_channels + channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * num_channels + channels, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _swiglu_backward_kernel(joined_ptr, grad_out_ptr, grad_joined_ptr, num_channels, BLOCK: tl.constexpr):
    """Gradients of both halves of a row."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < num_channels
    joined_ptr += row * 2 * num_channels
    grad_joined_ptr += row * 2 * num_channels
    gate = tl.load(joined_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(joined_ptr + num_channels + channels, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_out_ptr + row * num_channels + channels, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(grad_joined_ptr + channels, grad * up * share * (1.0 + gate * (1.0 - share)), mask=mask)
    tl.store(grad_joined_ptr + num_channels + channels, grad * gate * share, mask=mask)


def join(w1: Tensor, w3: Tensor) -> Tensor:
    """Return two weights as one, without a copy where the second lies behind the first."""
    behind = w1.is_contiguous() and w3.is_contiguous() and w3.data_ptr() == w1.data_ptr() + w1.nbytes
    if behind and w1.untyped_storage().data_ptr() == w3.untyped_storage().data_ptr():
        return w1.as_strided((2 * w1.shape[0], w1.shape[1]), w1.stride())
    return torch.cat((w1, w3))


@torch.library.custom_op("npp_reference::swiglu", mutates_args=())
def swiglu(x: Tensor, w1: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    """Return `gated` of ``x [N, D]``, and both products, ``[N, 2·F]``, which the backward needs.

    One operator in the eyes of `torch.compile`, which need not look into it.
    """
    joined = F.linear(x, join(w1, w3))
    num_rows, num_channels = x.shape[0], w1.shape[0]
    out = x.new_empty((num_rows, num_channels))
    launch(_swiglu_kernel, (num_rows, cdiv(num_channels, BLOCK)), joined, out, num_channels, BLOCK=BLOCK)
    return out, joined


@swiglu.register_fake
def _(x: Tensor, w1: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], w1.shape[0])), x.new_empty((x.shape[0], 2 * w1.shape[0]))


@torch.library.custom_op("npp_reference::swiglu_backward", mutates_args=())
def _swiglu_backward(grad_out: Tensor, joined: Tensor, x: Tensor, w1: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, num_channels = x.shape[0], w1.shape[0]
    grad_joined = torch.empty_like(joined)
    arguments = (joined, grad_out.contiguous(), grad_joined, num_channels)
    launch(_swiglu_backward_kernel, (num_rows, cdiv(num_channels, BLOCK)), *arguments, BLOCK=BLOCK)
    return grad_joined @ join(w1, w3), grad_joined.t() @ x


@_swiglu_backward.register_fake
def _(grad_out: Tensor, joined: Tensor, x: Tensor, w1: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2 * w1.shape[0], x.shape[1]))


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    grad_x, grad_weights = _swiglu_backward(grad_out, *ctx.saved_tensors)
    return grad_x, *grad_weights.chunk(2)


swiglu.register_autograd(_backward, setup_context=_keep_for_backward)
