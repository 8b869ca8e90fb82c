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
MAX_VOCAB = 32_768  # of the kernel: what the registers of a program hold
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
def _ordered(logits):
    """Return unsigned numbers in the order of the logits, of which none is NaN."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.uint32, bitcast=True)  # -0 equals 0
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _top_k(order, mask, top_k):
    """Return the order of the top_k-th largest: the largest number that so many reach, from its highest bit on."""
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        higher = threshold | bit
        bit = bit >> 1
        reached = tl.sum((mask & (order >= higher)).to(tl.int32), axis=0)
        threshold = tl.where(reached >= top_k, higher, threshold)
    return threshold


@triton.jit
def _top_p(order, mask, probabilities, SHARE: tl.constexpr):
    """Return which are needed to make up a share, the likeliest first and equal ones by their place.

    The largest number above which there still is the share: what comes next is the last that is needed.
    """
    share = tl.full((), SHARE, tl.float64)
    below = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        higher = below | bit
        bit = bit >> 1
        above = tl.sum(tl.where(mask & (order > higher), probabilities, 0.0), axis=0)
        below = tl.where(above >= share, higher, below)
    last = mask & (order == below + 1)
    above = tl.sum(tl.where(mask & (order > below + 1), probabilities, 0.0), axis=0)
    each = tl.max(tl.where(last, probabilities, 0.0), axis=0)
    place = tl.cumsum(last.to(tl.int32), axis=0) - 1
    return (mask & (order > below + 1)) | (last & (above + place.to(tl.float64) * each < share))


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
    not_finite = tl.sum((tl.abs(logits) < float("inf")).to(tl.int32), axis=0) < BLOCK
    tl.store(finite_ptr, tl.full((), 0, tl.uint8), mask=not_finite)

    if HAS_TOP_K:
        mask = mask & (_ordered(logits) >= _top_k(_ordered(logits), mask, top_k))
    largest = tl.max(tl.where(mask, logits, -float("inf")), axis=0)
    if SHARE is not None:
        wide = tl.where(mask, tl.exp(logits.to(tl.float64) - largest.to(tl.float64)), 0.0)
        mask = _top_p(_ordered(logits), mask, wide / tl.sum(wide, axis=0), SHARE)
    noise = tl.load(noise_ptr + image * vocab_size + ids, mask=mask, other=1.0)
    exponentials = tl.where(mask, tl.exp(logits - largest), 0.0)
    ratios = exponentials / tl.sum(exponentials, axis=0) / tl.maximum(noise, TINY)
    chosen = tl.minimum(tl.argmax(ratios, axis=0), vocab_size - 1).to(tl.int64)
    tl.store(ids_ptr + image, chosen)
    tl.store(tokens_ptr + image * num_positions + tl.load(position_ptr), chosen)


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
    block = next_power_of_2(vocab_size)
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
        BLOCK=block,
        num_warps=min(max(block // ELEMENTS_OF_A_WARP, 1), 32),
    )
