"""The kernels that decode one position of every image; `reference.sampling.decoding` puts them together.

Decoding moves bytes: each weight once, and of the cache of keys and values what is filled. Around that, every launch
costs a few microseconds, so that what lies between two products belongs to one of them:

    embed      x = the condition at position 0, else the last id
    multiply   q, k, v = norm(x) · Wqkv           attend   o = softmax(turn(q) · turn(K)) · V, and k, v into the cache
    multiply   x = x + o · Wo
    multiply   h = silu(norm(x) · W1) ∘ (norm(x) · W3)
    multiply   x = x + h · W2                     multiply   logits = norm(x) · W, after the last layer

Where a number depends on the position, a kernel reads the position from memory: one CUDA graph serves all of them. A
kernel may be launched while the one ahead of it runs (OVERLAP), and waits for it before it touches memory.

Source: FlashDecoding (Dao et al., 2023, crfm.stanford.edu/2023/10/12/flashdecoding.html) for the splits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import cdiv, launch, next_power_of_2, num_multiprocessors
from reference.network.attention import Rotary

EMBED_BLOCK = 1024
KEY_BLOCK = 32  # positions that are attended to at a time
PROGRAMS_OF_A_MULTIPROCESSOR = 8  # of attention: where there are fewer, the positions are split
MAX_SPLITS = 16
ROW_BLOCK = 64  # rows and channels of a program's product: many small tiles, for there are few rows
LARGE_ROW_BLOCK = 128  # where there are more rows than that: each of its tiles reads the weight once more
CHANNEL_BLOCK = 32
INNER_BLOCK = 64
# A warp by itself: of 4, whose sums cross from warp to warp, the loop had 17 barriers (in the compiled code for sm_90).
ATTEND_OPTIONS = {"BLOCK": KEY_BLOCK, "num_warps": 1}


@triton.jit
def _wait(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait until all of the one before is done."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _embed_kernel(
    ids_ptr,  # [num_images] int64
    labels_ptr,  # [num_rows] int64
    position_ptr,  # [] int64
    tokens_ptr,  # [vocab_size, DIM]
    classes_ptr,  # [num_classes + 1, DIM]
    out_ptr,  # [num_rows, DIM]
    num_images,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write one row: the condition at position 0, later the last id, which both halves of the guidance share."""
    _wait(OVERLAP)
    row = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < DIM
    position = tl.load(position_ptr)
    label = tl.load(labels_ptr + row)
    token = tl.load(ids_ptr + row % num_images)
    # One of the two is read, the other 0.
    condition = tl.load(classes_ptr + label * DIM + channels, mask=tl.where(mask, position, -1) == 0, other=0.0)
    last = tl.load(tokens_ptr + token * DIM + channels, mask=tl.where(mask, position, 0) > 0, other=0.0)
    tl.store(out_ptr + tl.cast(row, tl.int64) * DIM + channels, condition + last, mask=mask)


@triton.jit
def _multiply_kernel(
    x_ptr,  # [num_rows, DIM]
    norm_ptr,  # [DIM] or None: the weight of the norm of x
    weight_ptr,  # [num_channels, DIM]
    gated_ptr,  # [num_channels, DIM] or None: the second weight of SwiGLU
    residual_ptr,  # [num_rows, num_channels] or None: what is added; may be out
    out_ptr,  # [num_rows, num_channels]
    num_rows,
    num_channels,
    eps,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program computes a tile of ``norm(x) · weightᵀ``, its SwiGLU, or its sum with the residual stream.

    What a row is divided by is the same for all of its products: it is known when they are, and divides their sum.
    """
    _wait(OVERLAP)
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask, channel_mask = rows < num_rows, channels < num_channels
    row_offsets = rows.to(tl.int64)
    weight_offsets = channels.to(tl.int64)[None, :] * DIM
    squares = tl.zeros([BLOCK_ROWS], tl.float32)
    products = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    gated = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for start in range(0, DIM, BLOCK_INNER):
        inner = start + tl.arange(0, BLOCK_INNER)
        x = tl.load(x_ptr + row_offsets[:, None] * DIM + inner[None, :], mask=row_mask[:, None], other=0.0)
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            x = (wide * tl.load(norm_ptr + inner)[None, :].to(tl.float32)).to(x.dtype)
        weight = tl.load(weight_ptr + weight_offsets + inner[:, None], mask=channel_mask[None, :], other=0.0)
        products = tl.dot(x, weight, products, input_precision="ieee")  # of fp32 alone, and known to every GPU
        if gated_ptr is not None:
            weight = tl.load(gated_ptr + weight_offsets + inner[:, None], mask=channel_mask[None, :], other=0.0)
            gated = tl.dot(x, weight, gated, input_precision="ieee")
    if norm_ptr is not None:
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        products *= scale
        gated *= scale
    if gated_ptr is not None:
        products = products * tl.sigmoid(products) * gated
    offsets = row_offsets[:, None] * num_channels + channels[None, :]
    mask = row_mask[:, None] & channel_mask[None, :]
    if residual_ptr is not None:
        products += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, products.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _turned(ptr, cosine, sine, HEAD_DIM: tl.constexpr):
    """Load one head's channels, turn their pairs, and round them as they are kept."""
    pairs = 2 * tl.arange(0, HEAD_DIM // 2)
    real = tl.load(ptr + pairs).to(tl.float32)
    imaginary = tl.load(ptr + pairs + 1).to(tl.float32)
    turned = tl.interleave(real * cosine - imaginary * sine, imaginary * cosine + real * sine)
    return turned.to(ptr.dtype.element_ty)


@triton.jit
def _attend_kernel(
    qkv_ptr,  # [num_rows, 3, num_heads, HEAD_DIM]
    cosine_ptr,  # [num_positions, HEAD_DIM / 2]
    sine_ptr,
    position_ptr,  # [] int64
    keys_ptr,  # [num_rows, num_heads, num_positions, HEAD_DIM]
    values_ptr,
    out_ptr,  # [num_rows, num_heads, HEAD_DIM], or fp32 [num_rows, num_heads, splits, HEAD_DIM]
    sums_ptr,  # None, or fp32 [num_rows, num_heads, splits, 2]: the largest score, and the sum of exponentials
    scale,
    num_heads,
    num_positions,
    SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program attends from one head of one row to SPLIT positions, as far as they are filled.

    The first one also to the new position, whose key and value it puts into the cache.
    """
    _wait(OVERLAP)
    head = tl.program_id(0)
    split = tl.program_id(1)
    position = tl.load(position_ptr).to(tl.int32)
    channels = tl.arange(0, HEAD_DIM)
    pairs = position * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)
    cosine, sine = tl.load(cosine_ptr + pairs), tl.load(sine_ptr + pairs)
    width = num_heads * HEAD_DIM
    qkv_ptr += tl.cast(head // num_heads, tl.int64) * 3 * width + head % num_heads * HEAD_DIM
    first = tl.cast(head, tl.int64) * num_positions * HEAD_DIM
    keys_ptr += first
    values_ptr += first

    query = _turned(qkv_ptr, cosine, sine, HEAD_DIM).to(tl.float32)
    key = _turned(qkv_ptr + width, cosine, sine, HEAD_DIM)
    value = tl.load(qkv_ptr + 2 * width + channels)
    is_first = split == 0
    here = position * HEAD_DIM + channels
    if is_first:
        tl.store(keys_ptr + here, key)
        tl.store(values_ptr + here, value)
    largest = tl.where(is_first, tl.sum(query * key.to(tl.float32), axis=0) * scale, -float("inf"))
    total = tl.where(is_first, 1.0, 0.0)
    mixed = tl.where(is_first, value.to(tl.float32), 0.0)
    for start in range(split * SPLIT, tl.minimum(position, (split + 1) * SPLIT), BLOCK):
        seen = start + tl.arange(0, BLOCK)
        mask = seen < tl.minimum(position, (split + 1) * SPLIT)
        offsets = seen[:, None] * HEAD_DIM + channels[None, :]
        keys = tl.load(keys_ptr + offsets, mask=mask[:, None], other=0.0).to(tl.float32)
        values = tl.load(values_ptr + offsets, mask=mask[:, None], other=0.0).to(tl.float32)
        scores = tl.where(mask, tl.sum(keys * query[None, :], axis=1) * scale, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        shrink = tl.exp2(largest - new_largest)
        p = tl.exp2(scores - new_largest)
        total = total * shrink + tl.sum(p, axis=0)
        mixed = mixed * shrink + tl.sum(p[:, None] * values, axis=0)
        largest = new_largest
    if sums_ptr is None:
        tl.store(out_ptr + tl.cast(head, tl.int64) * HEAD_DIM + channels, (mixed / total).to(out_ptr.dtype.element_ty))
    else:
        part = tl.cast(head, tl.int64) * tl.num_programs(1) + split
        tl.store(out_ptr + part * HEAD_DIM + channels, mixed)
        tl.store(sums_ptr + 2 * part, largest)
        tl.store(sums_ptr + 2 * part + 1, total)


@triton.jit
def _combine_kernel(
    parts_ptr,  # fp32 [num_rows, num_heads, NUM_SPLITS, HEAD_DIM]
    sums_ptr,  # fp32 [num_rows, num_heads, NUM_SPLITS, 2]
    out_ptr,  # [num_rows, num_heads, HEAD_DIM]
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program adds up the splits of one head of one row. Of one that saw no position nothing is added."""
    _wait(OVERLAP)
    head = tl.cast(tl.program_id(0), tl.int64)
    channels = tl.arange(0, HEAD_DIM)
    parts = head * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    largest = tl.load(sums_ptr + 2 * parts)
    shrink = tl.exp2(largest - tl.max(largest, axis=0))
    total = tl.sum(tl.load(sums_ptr + 2 * parts + 1) * shrink, axis=0)
    mixed = tl.load(parts_ptr + parts[:, None] * HEAD_DIM + channels[None, :])
    mixed = tl.sum(mixed * shrink[:, None], axis=0) / total
    tl.store(out_ptr + head * HEAD_DIM + channels, mixed.to(out_ptr.dtype.element_ty))


def embed(ids: Tensor, labels: Tensor, position: Tensor, tables: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Fill ``out [N, D]`` from the tables of tokens and of classes."""
    tokens, classes = tables
    num_rows, dim = out.shape
    block = min(next_power_of_2(dim), EMBED_BLOCK)
    grid = (num_rows, cdiv(dim, block))
    # Not early: the kernel ahead of it, another graph's last one or PyTorch's, does not signal when this may start.
    launch(
        _embed_kernel, grid, ids, labels, position, tokens, classes, out, len(ids), DIM=dim, BLOCK=block, early=False
    )


def product_options(dim: int, num_rows: int, is_fp32: bool) -> dict[str, Any]:
    """Return the fixed parameters of a product over ``dim`` channels."""
    block_rows = ROW_BLOCK if num_rows <= LARGE_ROW_BLOCK else LARGE_ROW_BLOCK
    if is_fp32:
        block_rows = 16  # without tensor cores the tiles are in registers
    return {
        "BLOCK_ROWS": min(max(next_power_of_2(num_rows), 16), block_rows),
        "BLOCK_CHANNELS": CHANNEL_BLOCK,
        "BLOCK_INNER": INNER_BLOCK // 2 if is_fp32 or dim % INNER_BLOCK else INNER_BLOCK,
        "num_warps": 4,
        "num_stages": 2 if is_fp32 else 4,
    }


def multiply(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm: torch.nn.RMSNorm | None = None,
    gated: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Fill ``out [N, C]`` with ``norm(x) · weightᵀ`` of ``x [N, D], weight [C, D]``; gated, or on the residual."""
    (num_rows, dim), num_channels = x.shape, weight.shape[0]
    options = product_options(dim, num_rows, x.dtype == torch.float32)
    launch(
        _multiply_kernel,
        (cdiv(num_channels, options["BLOCK_CHANNELS"]), cdiv(num_rows, options["BLOCK_ROWS"])),
        x,
        None if norm is None else norm.weight,
        weight,
        gated,
        residual,
        out,
        num_rows,
        num_channels,
        0.0 if norm is None else norm.eps,
        early=True,
        DIM=dim,
        **options,
    )


def choose_splits(num_heads: int, num_positions: int, like: Tensor) -> int:
    """Return into how many parts the positions are split, for the heads of all rows: a power of two."""
    programs = PROGRAMS_OF_A_MULTIPROCESSOR * num_multiprocessors(like)
    wanted = next_power_of_2(cdiv(programs, num_heads))
    return min(wanted, next_power_of_2(cdiv(num_positions, KEY_BLOCK)), MAX_SPLITS)


def attend_to_cache(
    qkv: Tensor, rotary: Rotary, position: Tensor, cached: tuple[Tensor, Tensor], out: Tensor, splits: int
) -> None:
    """Attend from ``qkv [N, 3·D]`` at a position, whose key and value go into the cache of a layer: ``out [N, D]``."""
    keys, values = cached
    num_rows, num_heads, num_positions, head_dim = keys.shape
    parts, sums = out, None
    if splits > 1:
        parts = torch.empty((num_rows, num_heads, splits, head_dim), dtype=torch.float32, device=qkv.device)
        sums = torch.empty((num_rows, num_heads, splits, 2), dtype=torch.float32, device=qkv.device)
    launch(
        _attend_kernel,
        (num_rows * num_heads, splits),
        qkv,
        *rotary,
        position,
        keys,
        values,
        parts,
        sums,
        math.log2(math.e) / math.sqrt(head_dim),
        num_heads,
        num_positions,
        early=True,
        SPLIT=cdiv(num_positions, splits),
        HEAD_DIM=head_dim,
        **ATTEND_OPTIONS,
    )
    if sums is not None:
        options = {"NUM_SPLITS": splits, "HEAD_DIM": head_dim, "num_warps": 1}
        launch(_combine_kernel, (num_rows * num_heads,), parts, sums, out, early=True, **options)
