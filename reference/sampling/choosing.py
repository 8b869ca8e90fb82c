"""Choosing ids from logits: top-k, top-p and a draw, in PyTorch and in one kernel.

A filter keeps what is above a threshold. PyTorch finds it by sorting; the kernel, with a whole row of logits in its
registers, bit by bit: 32 sums over the row for each of the two filters, and nothing is moved. Bytes of an image: 2·V
logits of each half of the guidance, 4·V of the noise. Both keep the same ids.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import launch, next_power_of_2

TOP_P_TOLERANCE = 1e-13  # eight times 0.1 is less than 0.8 in fp64 as well
MAX_VOCAB = 16_384  # of the kernel: what the registers of a program hold
ELEMENTS_OF_A_WARP = 1024
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


class Drawing(NamedTuple):
    """How logits become ids: the options of `reference.sample.Sampler`."""

    guidance: float
    temperature: float
    top_k: int | None
    top_p: float


def filter_logits(logits: Tensor, *, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Set the logits of unlikely ids to -inf: ``[..., V] -> [..., V]``.

    >>> import torch
    >>> logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    >>> filter_logits(logits, top_p=0.6).exp()  # the fewest ids that make up 0.6
    tensor([0.5000, 0.2000, 0.0000, 0.0000])

    Args:
        logits: ``[..., V]``.
        top_k: keep the k largest (and what equals the last of them).
        top_p: then keep the fewest ids, the likeliest first, whose probabilities sum to at least this, give or take
            1e-13. The sums are in fp64: in fp32, where the last of 16,384 ids have less than a sum's rounding, hundreds
            are kept or lost by chance.
    """
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
        sums = ordered.double().softmax(-1).cumsum(-1)
        before = F.pad(sums[..., :-1], (1, 0))
        is_more = before >= top_p - TOP_P_TOLERANCE
        logits = torch.empty_like(logits).scatter_(-1, ids, ordered.masked_fill(is_more, -math.inf))
    return logits


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw one id per row, with its softmax probability: ``[..., V] -> [...]``.

    Args:
        logits: fp32 ``[..., V]``.
        noise: of the same shape, from the exponential distribution of rate 1.

    The arg max of p/noise has distribution p; unlike `torch.multinomial` it needs no look at the values by the host.
    """
    return (logits.softmax(-1) / noise.clamp(min=torch.finfo(noise.dtype).tiny)).argmax(-1)


@triton.jit
def _order_of(logits):
    """Return positive numbers in the order of finite logits."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.uint32, bitcast=True)  # -0 equals 0
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _logits_of(order):
    """Return the logits of such numbers."""
    return tl.where(order >> 31 == 1, order & 0x7FFFFFFF, ~order).to(tl.float32, bitcast=True)


@triton.jit
def _keep_top_k(order, top_k):
    """Set what is less than the top_k-th largest to 0: than the largest number that so many reach."""
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        higher = threshold | bit
        reached = tl.sum((order >= higher).to(tl.int32), axis=0)
        threshold = tl.where(reached >= top_k, higher, threshold)
        bit = bit >> 1
    return tl.where(order >= threshold, order, 0)


@triton.jit
def _keep_top_p(order, largest, SHARE: tl.constexpr):
    """Set what is not needed to make up a share to 0, the likeliest first and equal ones by their place.

    Above the number ``below`` there still is the share, above the next one no more: that is the last that is needed.
    Of each element a thread holds its order and its fp64 weight: of a row of 16,384, 96 of its 128 registers.
    """
    largest = largest.to(tl.float64)
    weights = tl.where(order > 0, tl.exp(_logits_of(order).to(tl.float64) - largest), 0.0)
    share = tl.full((), SHARE, tl.float64) * tl.sum(weights, axis=0)
    below = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        higher = below | bit
        above = tl.sum(tl.where(order > higher, weights, 0.0), axis=0)
        below = tl.where(above >= share, higher, below)
        bit = bit >> 1
    last = below + 1
    missing = share - tl.sum(tl.where(order > last, weights, 0.0), axis=0)
    each = tl.exp(_logits_of(last).to(tl.float64) - largest)
    return _keep_first(order, last, tl.minimum(tl.ceil(missing / each), 1.0 * order.shape[0]).to(tl.int32))


@triton.jit
def _keep_first(order, last, number):
    """Set what is less than ``last`` to 0, and of what equals it all but so many, the first ones."""
    places = tl.arange(0, order.shape[0])
    end = tl.full((), 0, tl.int32)
    bit = tl.full((), order.shape[0], tl.int32)
    while bit > 0:
        higher = end | bit
        before = tl.sum(((order == last) & (places < higher)).to(tl.int32), axis=0)
        end = tl.where(before <= number, higher, end)
        bit = bit >> 1
    return tl.where((order > last) | ((order == last) & (places < end)), order, 0)


@triton.jit
def _choose_kernel(
    logits_ptr,  # [num_images or 2 · num_images, vocab_size]
    noise_ptr,  # fp32 [num_images, vocab_size], from the exponential distribution of rate 1
    position_ptr,  # [] int64
    ids_ptr,  # int64 [num_images] out
    tokens_ptr,  # int64 [num_images, num_positions] out, at the position
    finite_ptr,  # uint8 [] out: 0 if a logit is not finite
    num_images,
    vocab_size,
    num_positions,
    guidance,
    temperature,
    top_k,
    GUIDED: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    SHARE: tl.constexpr,  # of top-p, or None
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program chooses the id of one image."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    image = tl.cast(tl.program_id(0), tl.int64)
    ids = tl.arange(0, BLOCK)
    mask = ids < vocab_size
    logits = tl.load(logits_ptr + image * vocab_size + ids, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        other_ptr = logits_ptr + (image + num_images) * vocab_size
        unconditional = tl.load(other_ptr + ids, mask=mask, other=0.0).to(tl.float32)
        logits = unconditional + guidance * (logits - unconditional)
    logits = tl.div_rn(logits, tl.full([BLOCK], 1.0, tl.float32) * temperature)
    is_finite = tl.abs(logits) < float("inf")
    tl.store(finite_ptr, tl.full((), 0, tl.uint8), mask=tl.sum(is_finite.to(tl.int32), axis=0) < BLOCK)
    logits = tl.where(is_finite, logits, 0.0)  # of an image that is lost an id is drawn nevertheless

    order = tl.where(mask, _order_of(logits), 0)  # 0 is what is not kept
    if HAS_TOP_K:
        order = _keep_top_k(order, top_k)
    largest = _logits_of(tl.max(order, axis=0))
    if SHARE is not None:
        order = _keep_top_p(order, largest, SHARE)
    noise = tl.load(noise_ptr + image * vocab_size + ids, mask=order > 0, other=1.0)
    exponentials = tl.where(order > 0, tl.exp(_logits_of(order) - largest), 0.0)
    ratios = exponentials / tl.sum(exponentials, axis=0) / tl.maximum(noise, TINY)
    chosen = tl.argmax(ratios, axis=0).to(tl.int64)
    tl.store(ids_ptr + image, chosen)
    tl.store(tokens_ptr + image * num_positions + tl.load(position_ptr), chosen)


def row_options(vocab_size: int) -> dict[str, int]:
    """Return the fixed parameters of the kernel that holds a row of logits."""
    block = next_power_of_2(vocab_size)
    return {"BLOCK": block, "num_warps": min(max(block // ELEMENTS_OF_A_WARP, 1), 32)}


def choose(
    logits: Tensor, noise: Tensor, position: Tensor, drawing: Drawing, ids: Tensor, tokens: Tensor, is_finite: Tensor
) -> None:
    """Fill ``ids [B]`` and the position's column of ``tokens [B, P]``; ``is_finite`` turns false if a logit is not.

    Args:
        logits: ``[2·B, V]``, the conditional half first; ``[B, V]`` with a guidance of 1.
        noise: fp32 ``[B, V]``, as for `draw`.
        position: 0-d, int64.
        drawing: the options.
        ids: int64 ``[B]``, to be filled.
        tokens: int64 ``[B, P]``, to be filled at the position.
        is_finite: 0-d, bool.
    """
    num_images, vocab_size = noise.shape
    launch(
        _choose_kernel,
        (num_images,),
        logits,
        noise,
        position,
        ids,
        tokens,
        is_finite.view(torch.uint8),
        num_images,
        vocab_size,
        tokens.shape[1],
        drawing.guidance,
        drawing.temperature,
        min(drawing.top_k or vocab_size, vocab_size),
        early=True,
        GUIDED=drawing.guidance != 1,
        HAS_TOP_K=drawing.top_k is not None,
        SHARE=drawing.top_p - TOP_P_TOLERANCE if drawing.top_p < 1 else None,
        **row_options(vocab_size),
    )
