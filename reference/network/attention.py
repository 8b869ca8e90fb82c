"""Causal self-attention with a 2-D rotary embedding, from the output of one linear layer to the input of the next.

A coarse sequence is short: 64 positions at patch 2 and 16 at patch 4, where general attention kernels spend their time
on being launched, and the rotation around them moves more bytes than they do. `_forward_kernel` and `_backward_kernel`
rotate, attend and rotate the gradients back in one pass each: ``qkv`` is read as the layer wrote it, the gradient is
written as that layer's backward reads it, and nothing lies in memory in between.

Bytes of one layer, for ``R = B·P`` rows of D channels in bf16: forward 6·R·D read and 2·R·D written; backward 10·R·D
read (qkv, output and its gradient) and 6·R·D written.

`attend` chooses: those kernels, flash_attn where it is installed, or PyTorch's own attention.

Source: FlashAttention-2 (arXiv 2307.08691), section 3, for the backward from the logarithms of the sums; RoFormer
(arXiv 2104.09864) for the rotation; LlamaGen (arXiv 2406.06525) for its two dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import INTERPRETED, cdiv, is_hopper, launch

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

ROTARY_BASE = 10_000.0
MAX_POSITIONS = 256  # of the kernels: longer sequences do enough work for general ones
HEAD_DIMS = (32, 64)

Rotary = tuple[Tensor, Tensor]


def rotary_embedding(positions: Tensor, width: int, head_dim: int) -> Rotary:
    """Return cosines and sines, fp32 ``[P, head_dim / 2]``: half of the pairs turn with the row, half with the column.

    Position 0, the condition, has neither: LlamaGen zeroes its query and key, so that every token attends to it with a
    score of 0 and it attends to itself alone.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
    frequencies = 1.0 / ROTARY_BASE**exponents
    cell = positions - 1
    row, column = torch.div(cell, width, rounding_mode="floor"), cell % width
    angles = torch.cat((torch.outer(row.float(), frequencies), torch.outer(column.float(), frequencies)), dim=-1)
    is_token = (positions > 0).unsqueeze(-1)
    return angles.cos() * is_token, angles.sin() * is_token


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn adjacent pairs of channels, in fp32: ``x [B, P, ..., head_dim]``."""
    real, imaginary = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    shape = (x.shape[1], *(1,) * (x.ndim - 3), x.shape[-1] // 2)
    cosine, sine = rotary[0].view(shape), rotary[1].view(shape)
    turned = torch.stack((real * cosine - imaginary * sine, imaginary * cosine + real * sine), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def attend(qkv: Tensor, rotary: Rotary, *, fast: bool = True) -> Tensor:
    """Rotate queries and keys, and attend to this and earlier positions.

    >>> import torch
    >>> qkv = torch.randn(2, 16, 3, 4, 64)
    >>> attend(qkv, rotary_embedding(torch.arange(16), width=4, head_dim=64)).shape
    torch.Size([2, 16, 4, 64])

    Args:
        qkv: ``[B, P, 3, num_heads, head_dim]``.
        rotary: as `rotary_embedding` returns it, for these positions.
        fast: whether the kernels of this file may serve it.

    Returns:
        ``[B, P, num_heads, head_dim]``, in the dtype of ``qkv``.
    """
    if fast and serves(qkv):
        return rotary_attention(qkv.contiguous(), *rotary)[0]
    query, key = rotate(qkv[:, :, :2], rotary).unbind(2)
    value = qkv[:, :, 2]
    if flash_attn_func is not None and qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16):
        return flash_attn_func(query, key, value, causal=True)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def serves(qkv: Tensor) -> bool:
    """Return whether `rotary_attention` is to be used: on Hopper, for short sequences of 16-bit numbers.

    Elsewhere the backward has more values than a thread has registers (8.0, 10.0), and nothing has been measured. The
    interpreter has no products of bf16.
    """
    fits = qkv.shape[1] <= MAX_POSITIONS and qkv.shape[-1] in HEAD_DIMS
    dtypes = (torch.float16,) if INTERPRETED else (torch.bfloat16, torch.float16)
    return (is_hopper(qkv) or INTERPRETED) and qkv.dtype in dtypes and fits


@triton.jit
def _load_rotary(cosine_ptr, sine_ptr, positions, num_positions, HALF: tl.constexpr):
    """Load the cosines and sines of some positions."""
    offsets = positions[:, None] * HALF + tl.arange(0, HALF)[None, :]
    mask = positions[:, None] < num_positions
    return tl.load(cosine_ptr + offsets, mask=mask, other=0.0), tl.load(sine_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _load(ptr, positions, num_positions, stride, WIDTH: tl.constexpr):
    """Load one head's channels at some positions; what is past the end is 0."""
    offsets = positions[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(ptr + offsets, mask=positions[:, None] < num_positions, other=0)


@triton.jit
def _store(ptr, positions, num_positions, stride, values):
    """Store one head's channels at some positions, but for what is past the end."""
    offsets = positions[:, None] * stride + tl.arange(0, values.shape[1])[None, :]
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=positions[:, None] < num_positions)


@triton.jit
def _load_turned(ptr, cosine_ptr, sine_ptr, positions, num_positions, stride, HEAD_DIM: tl.constexpr):
    """Load one head's channels at some positions, pairs of them as whole words, and turn the pairs."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    cosine, sine = _load_rotary(cosine_ptr, sine_ptr, positions, num_positions, HEAD_DIM // 2)
    words = _load(ptr.to(tl.pointer_type(tl.uint32)), positions, num_positions, stride // 2, HEAD_DIM // 2)
    real = words.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    imaginary = (words >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    turned = tl.join((real * cosine - imaginary * sine).to(dtype), (imaginary * cosine + real * sine).to(dtype))
    return tl.reshape(turned, (positions.shape[0], HEAD_DIM))


@triton.jit
def _store_turned_back(ptr, cosine_ptr, sine_ptr, positions, num_positions, stride, grad, HEAD_DIM: tl.constexpr):
    """Turn the gradients of pairs back, and store them as whole words."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    cosine, sine = _load_rotary(cosine_ptr, sine_ptr, positions, num_positions, HEAD_DIM // 2)
    real, imaginary = tl.split(tl.reshape(grad, (positions.shape[0], HEAD_DIM // 2, 2)))
    low = (real * cosine + imaginary * sine).to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = (imaginary * cosine - real * sine).to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
    _store(ptr.to(tl.pointer_type(tl.uint32)), positions, num_positions, stride // 2, (high << 16) | low)


@triton.jit
def _forward_kernel(
    qkv_ptr, cosine_ptr, sine_ptr, out_ptr, lse_ptr, scale, num_positions, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend from one block of positions, in one head of one image: ``out``, and log2 of the sums of exponentials."""
    block, head = tl.program_id(0), tl.program_id(1)
    width = num_heads * HEAD_DIM
    stride = 3 * width  # of qkv's positions
    image_rows = (head // num_heads).to(tl.int64) * num_positions
    query_ptr = qkv_ptr + image_rows * stride + head % num_heads * HEAD_DIM
    key_ptr, value_ptr = query_ptr + width, query_ptr + 2 * width

    rows = block * BLOCK + tl.arange(0, BLOCK)
    query = _load_turned(query_ptr, cosine_ptr, sine_ptr, rows, num_positions, stride, HEAD_DIM)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        key = _load_turned(key_ptr, cosine_ptr, sine_ptr, columns, num_positions, stride, HEAD_DIM)
        value = _load(value_ptr, columns, num_positions, stride, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key)) * scale
        # A row past the end sees real columns, and its own: no sum is empty.
        scores = tl.where(columns[None, :] <= rows[:, None], scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - new_largest)
        p = tl.exp2(scores - new_largest[:, None])
        total = total * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(value.dtype), value, mixed * shrink[:, None])
        largest = new_largest

    out_ptr += image_rows * width + head % num_heads * HEAD_DIM
    _store(out_ptr, rows, num_positions, width, mixed / total[:, None])
    tl.store(lse_ptr + head.to(tl.int64) * num_positions + rows, largest + tl.log2(total), mask=rows < num_positions)


@triton.jit
def _load_outcome(out_ptr, grad_out_ptr, lse_ptr, rows, num_positions, width, HEAD_DIM: tl.constexpr):
    """Load the gradient of some rows of ``out``, its product with them, and the logarithms of their sums."""
    grad_out = _load(grad_out_ptr, rows, num_positions, width, HEAD_DIM)
    out = _load(out_ptr, rows, num_positions, width, HEAD_DIM)
    mean = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + rows, mask=rows < num_positions, other=float("inf"))  # past the end: p = 0
    return grad_out, mean, lse


@triton.jit
def _backward_kernel(
    qkv_ptr, cosine_ptr, sine_ptr, out_ptr, lse_ptr, grad_out_ptr, grad_qkv_ptr, scale, softmax_scale, num_positions,
    num_heads, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys, values and queries of one block of positions.

    The keys of block t are seen by the blocks from t on, and its queries see the blocks up to t: together one more than
    there are blocks, so that all programs have the same work. A sequence that is WHOLE in one block needs one pass.

    The other side comes half a block at a time: with 166 registers a thread in place of 236, three programs fit on a
    multiprocessor in place of two.
    """
    INNER: tl.constexpr = BLOCK if WHOLE else BLOCK // 2
    block, head = tl.program_id(0), tl.program_id(1)
    width = num_heads * HEAD_DIM
    stride = 3 * width  # of qkv's positions
    image_rows = (head // num_heads).to(tl.int64) * num_positions
    first_channel = head % num_heads * HEAD_DIM
    query_ptr = qkv_ptr + image_rows * stride + first_channel
    key_ptr, value_ptr = query_ptr + width, query_ptr + 2 * width
    grad_query_ptr = grad_qkv_ptr + image_rows * stride + first_channel
    out_ptr += image_rows * width + first_channel
    grad_out_ptr += image_rows * width + first_channel
    lse_ptr += head.to(tl.int64) * num_positions

    here = block * BLOCK + tl.arange(0, BLOCK)
    key = _load_turned(key_ptr, cosine_ptr, sine_ptr, here, num_positions, stride, HEAD_DIM)
    value = _load(value_ptr, here, num_positions, stride, HEAD_DIM)
    grad_value = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    grad_key = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    grad_scores = tl.zeros((BLOCK, INNER), value.dtype)
    first, end = block * BLOCK, num_positions
    if WHOLE:
        first, end = 0, BLOCK  # known to the compiler: no loop is left
    for start in range(first, end, INNER):
        rows = start + tl.arange(0, INNER)
        query = _load_turned(query_ptr, cosine_ptr, sine_ptr, rows, num_positions, stride, HEAD_DIM)
        grad_out, mean, lse = _load_outcome(out_ptr, grad_out_ptr, lse_ptr, rows, num_positions, width, HEAD_DIM)
        scores = tl.dot(key, tl.trans(query)) * scale  # transposed: keys by queries
        p = tl.where(here[:, None] <= rows[None, :], tl.exp2(scores - lse[None, :]), 0.0)
        grad_value = tl.dot(p.to(value.dtype), grad_out, grad_value)
        grad_scores = (p * (tl.dot(value, tl.trans(grad_out)) - mean[None, :])).to(value.dtype)
        grad_key = tl.dot(grad_scores, query, grad_key)
    _store(grad_query_ptr + 2 * width, here, num_positions, stride, grad_value)
    grad_key *= softmax_scale
    grad_key_ptr = grad_query_ptr + width
    _store_turned_back(grad_key_ptr, cosine_ptr, sine_ptr, here, num_positions, stride, grad_key, HEAD_DIM)

    if WHOLE:
        grad_query = tl.dot(tl.trans(grad_scores), key)
    else:
        query = _load_turned(query_ptr, cosine_ptr, sine_ptr, here, num_positions, stride, HEAD_DIM)
        grad_out, mean, lse = _load_outcome(out_ptr, grad_out_ptr, lse_ptr, here, num_positions, width, HEAD_DIM)
        grad_query = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
        for start in range(0, (block + 1) * BLOCK, INNER):
            columns = start + tl.arange(0, INNER)
            seen_key = _load_turned(key_ptr, cosine_ptr, sine_ptr, columns, num_positions, stride, HEAD_DIM)
            seen_value = _load(value_ptr, columns, num_positions, stride, HEAD_DIM)
            scores = tl.dot(query, tl.trans(seen_key)) * scale
            p = tl.where(columns[None, :] <= here[:, None], tl.exp2(scores - lse[:, None]), 0.0)
            grad_scores = (p * (tl.dot(grad_out, tl.trans(seen_value)) - mean[:, None])).to(value.dtype)
            grad_query = tl.dot(grad_scores, seen_key, grad_query)
    grad_query *= softmax_scale
    _store_turned_back(grad_query_ptr, cosine_ptr, sine_ptr, here, num_positions, stride, grad_query, HEAD_DIM)


def tiles(qkv: Tensor, backward: bool) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid of programs of a kernel, and its fixed parameters."""
    num_images, num_positions, _, num_heads, head_dim = qkv.shape
    block = 16 if num_positions <= 16 else 64  # the smallest tile of the tensor cores, and what registers can hold
    options = {"HEAD_DIM": head_dim, "BLOCK": block, "num_warps": 4 if block == 64 else 2}
    # The backward's registers are full: to load ahead of use leaves room for two programs in place of three.
    options |= {"num_stages": 1, "WHOLE": num_positions <= block} if backward else {"num_stages": 2}
    return (cdiv(num_positions, block), num_images * num_heads), options


def empty_outcome(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for what `rotary_attention` returns."""
    num_images, num_positions, _, num_heads, head_dim = qkv.shape
    out = qkv.new_empty((num_images, num_positions, num_heads, head_dim))
    return out, qkv.new_empty((num_images, num_heads, num_positions), dtype=torch.float32)


@torch.library.custom_op("npp_reference::rotary_attention", mutates_args=())
def rotary_attention(qkv: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention of ``qkv [B, P, 3, num_heads, head_dim]``, and log2 of its sums ``[B, num_heads, P]``.

    One operator in the eyes of `torch.compile`, which need not look into it.
    """
    num_positions, num_heads, head_dim = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    out, lse = empty_outcome(qkv)
    grid, options = tiles(qkv, backward=False)
    scale = math.log2(math.e) / math.sqrt(head_dim)
    launch(_forward_kernel, grid, qkv, cosine, sine, out, lse, scale, num_positions, num_heads, **options)
    return out, lse


@rotary_attention.register_fake
def _(qkv: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    return empty_outcome(qkv)


@torch.library.custom_op("npp_reference::rotary_attention_backward", mutates_args=())
def _rotary_attention_backward(
    qkv: Tensor, cosine: Tensor, sine: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor
) -> Tensor:
    num_positions, num_heads, head_dim = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    grad_qkv = torch.empty_like(qkv)
    grid, options = tiles(qkv, backward=True)
    softmax_scale = 1 / math.sqrt(head_dim)
    arguments = (qkv, cosine, sine, out, lse, grad_out.contiguous(), grad_qkv, softmax_scale * math.log2(math.e))
    launch(_backward_kernel, grid, *arguments, softmax_scale, num_positions, num_heads, **options)
    return grad_qkv


@_rotary_attention_backward.register_fake
def _(qkv: Tensor, cosine: Tensor, sine: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor) -> Tensor:
    return torch.empty_like(qkv)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    return _rotary_attention_backward(*ctx.saved_tensors, grad_out), None, None


rotary_attention.register_autograd(_backward, setup_context=_keep_for_backward)
