"""The output layer's products around a softmax that is never normalised in memory, for bfloat16 on Hopper.

    E_pv = 2^(z_pv · log2 e − o_p)       z = hidden · weightᵀ, from the epilogue of the first product
    S_p  = Σ_v E_pv                      lse_p = ln 2 · (o_p + log2 S_p)
    F_pv = E_pv − Σ_{j: t_pj = v} c_pj / q_p         q_p = (Σ_j c_pj + 2 λ lse_p) / S_p
    dz   = q F      grad_hidden = q ⊙ (F · weight)      grad_weight = Fᵀ · (q ⊙ hidden)

bfloat16 has the range of fp32, so that the exponentials themselves can be stored for any offset o_p that is near the
row's maximum, and everything that is known only once the whole row is (S, the lse, the coefficients) goes to vectors of
one number a row. The logits are never stored, F differs from E at the targets alone, and no kernel passes over either:
what `row_kernels` reads and writes again, 4 bytes for every logit, is saved. See `OFFSET_MARGIN` for the offsets.

This file has the products; `exponential_rows` what comes between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from npp_kernels._dispatch import cdiv, is_hopper, launch, num_multiprocessors
from npp_kernels._triton_math import LOG2_E
from npp_kernels.losses.exponential_rows import ScaledGradient, score_exponentials
from npp_kernels.losses.row_layout import empty_rows
from npp_kernels.losses.scores import Scores
from npp_kernels.losses.targets import Targets

# The offset of a row is the maximum over so many of its logits, and a margin, in powers of two. The sample may hold the
# row's maximum, beside which all others count in a row that is sure of its target: E is 2^-16 there, and only what is
# 2^-110 (76 nats) below it falls under 2^-126. The true maximum may be 106 powers of two, 73 nats, larger than the
# sample's; a row in which it is larger still is computed again.
SAMPLE_SIZE = 64
OFFSET_MARGIN = tl.constexpr(16.0)
SAMPLE_ROWS = 64
# H100, 2026-11-24: 4,096 rows, V = 16,384, D = 768 in 176 µs, D = 1536 in 294 (cuBLAS without exponentials 153, 284).
# Tiles of 128×128 take 229 and 407; three stages, and tiles stored at once, 187 and 305.
BLOCK_ROWS = 128
BLOCK_VOCAB = 256
BLOCK_HIDDEN = 64
STAGES = 4
GROUP_ROWS = 8  # blocks of rows that share a block of the weight while it is in the L2
# With fewer rows the launches cost what is saved: 1,024 rows, K = 16, D = 768, take 181 µs, and 175 with logits.
MIN_ROWS = 4096
MIN_VOCAB = 4096
MAX_VOCAB = 1 << 19  # one warp holds a row's sums


@triton.jit(do_not_specialize=["num_rows"])
def _offsets_kernel(
    hidden_ptr,  # [num_rows, hidden_size]
    weight_ptr,  # [vocab_size, hidden_size]
    offsets_ptr,  # [num_rows] out
    num_rows,
    vocab_size,
    hidden_size,
    SAMPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """One program finds the offsets of BLOCK_ROWS rows from SAMPLE logits, evenly spaced over the vocabulary."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ids = tl.arange(0, SAMPLE).to(tl.int64) * vocab_size // SAMPLE
    logits = tl.zeros([BLOCK_ROWS, SAMPLE], tl.float32)
    for first in range(0, hidden_size, BLOCK_HIDDEN):
        columns = first + tl.arange(0, BLOCK_HIDDEN)
        in_row = (columns < hidden_size)[None, :]
        hidden_mask = (rows < num_rows)[:, None] & in_row
        hidden = tl.load(hidden_ptr + rows[:, None] * hidden_size + columns[None, :], mask=hidden_mask, other=0.0)
        weight = tl.load(weight_ptr + ids[:, None] * hidden_size + columns[None, :], mask=in_row, other=0.0)
        logits = tl.dot(hidden, tl.trans(weight), logits)
    offsets = tl.ceil(tl.max(logits, axis=1) * LOG2_E) + OFFSET_MARGIN
    tl.store(offsets_ptr + rows, offsets, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _exponentials_kernel(
    sums_ptr,  # [num_rows, tiles of the vocabulary] out
    offsets_ptr,  # [num_rows]
    hidden_desc,  # [num_rows, hidden_size]
    weight_desc,  # [vocab_size, hidden_size]
    exponentials_desc,  # [num_rows, vocab_size] out
    num_rows,
    vocab_size,
    hidden_size,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One program computes every num_programs-th tile of the first product, and its exponentials' sums by row."""
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    vocab_blocks = tl.cdiv(vocab_size, BLOCK_VOCAB)
    group_tiles = GROUP_ROWS * vocab_blocks
    for tile in tl.range(tl.program_id(0), row_blocks * vocab_blocks, tl.num_programs(0), flatten=True):
        first_block = tile // group_tiles * GROUP_ROWS
        group_rows = min(row_blocks - first_block, GROUP_ROWS)
        first_row = (first_block + tile % group_tiles % group_rows) * BLOCK_ROWS
        vocab_block = tile % group_tiles // group_rows
        first_id = vocab_block * BLOCK_VOCAB
        logits = tl.zeros([BLOCK_ROWS, BLOCK_VOCAB], tl.float32)
        for first in range(0, hidden_size, BLOCK_HIDDEN):
            hidden = hidden_desc.load([first_row, first])
            weight = weight_desc.load([first_id, first])
            logits = tl.dot(hidden, weight.T, logits)
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        offsets = tl.load(offsets_ptr + rows, mask=rows < num_rows, other=0.0)
        exponentials = tl.exp2(logits * LOG2_E - offsets[:, None])
        if not EVEN:
            ids = first_id + tl.arange(0, BLOCK_VOCAB)
            exponentials = tl.where((ids < vocab_size)[None, :], exponentials, 0.0)
        sums = sums_ptr + rows.to(tl.int64) * vocab_blocks + vocab_block
        tl.store(sums, tl.sum(exponentials, axis=1), mask=rows < num_rows)
        # In two halves, so that the fourth stage of the product has room in the shared memory.
        halves = tl.permute(tl.reshape(exponentials, (BLOCK_ROWS, 2, BLOCK_VOCAB // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        exponentials_desc.store([first_row, first_id], left.to(exponentials_desc.dtype))
        exponentials_desc.store([first_row, first_id + BLOCK_VOCAB // 2], right.to(exponentials_desc.dtype))


def serves_exponentials(hidden: Tensor, weight: Tensor, targets: Targets, scores: Scores) -> bool:
    """Return whether these products, ``hidden [N, D]`` and ``weight [V, D]``, can be computed this way."""
    return (
        # The tiles fill its 227 KB of shared memory. An A100 has no instructions for them, and would spill; Blackwell
        # would need 240 KB for the same tiles, and with a stage less, which would fit, nobody has measured them.
        is_hopper(hidden)
        and hidden.dtype == torch.bfloat16
        and hidden.shape[0] >= MIN_ROWS
        and MIN_VOCAB <= weight.shape[0] <= MAX_VOCAB
        and targets.settings.label_smoothing is None
        and targets.settings.softcap is None
        and scores.predictions is None  # statistics need logits
        # The tensor memory accelerator takes rows of multiples of 16 bytes; those of the exponentials are ours to pad.
        and weight.shape[1] % 8 == 0
        and all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in (hidden, weight))
    )


def find_offsets(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the offsets ``[N]`` of the rows of ``hidden [N, D]``."""
    num_rows, hidden_size = hidden.shape
    offsets = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    launch(
        _offsets_kernel,
        (cdiv(num_rows, SAMPLE_ROWS),),
        hidden,
        weight,
        offsets,
        num_rows,
        weight.shape[0],
        hidden_size,
        SAMPLE=SAMPLE_SIZE,
        BLOCK_ROWS=SAMPLE_ROWS,
        BLOCK_HIDDEN=BLOCK_HIDDEN,
    )
    return offsets


def launch_exponentials(
    hidden: Tensor, weight: Tensor, offsets: Tensor, targets: Targets, scores: Scores
) -> ScaledGradient:
    """Score ``hidden [N, D]``: fill ``scores``, and return the gradient of the logits."""
    num_rows, hidden_size = hidden.shape
    vocab_size = weight.shape[0]
    exponentials = empty_rows(num_rows, vocab_size, hidden)
    num_sums = cdiv(vocab_size, BLOCK_VOCAB)
    sums = torch.empty((num_rows, num_sums), dtype=torch.float32, device=hidden.device)
    tiles = cdiv(num_rows, BLOCK_ROWS) * num_sums
    launch(
        _exponentials_kernel,
        (min(tiles, num_multiprocessors(hidden)),),
        sums,
        offsets,
        TensorDescriptor.from_tensor(hidden, [BLOCK_ROWS, BLOCK_HIDDEN]),
        TensorDescriptor.from_tensor(weight, [BLOCK_VOCAB, BLOCK_HIDDEN]),
        TensorDescriptor.from_tensor(exponentials, [BLOCK_ROWS, BLOCK_VOCAB // 2]),
        num_rows,
        vocab_size,
        hidden_size,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_VOCAB=BLOCK_VOCAB,
        BLOCK_HIDDEN=BLOCK_HIDDEN,
        GROUP_ROWS=GROUP_ROWS,
        EVEN=vocab_size % BLOCK_VOCAB == 0,
        num_warps=8,
        num_stages=STAGES,
    )
    return score_exponentials(hidden, weight, offsets, (exponentials, sums, BLOCK_VOCAB), targets, scores)
