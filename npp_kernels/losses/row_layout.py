"""Rows of logits in memory: how far apart ours are, and which part of one that starts anywhere is loaded wide.

A thread loads 16 bytes at a time where the compiler knows that an address is a multiple of 16. Most of a row
that starts or ends elsewhere is still made of whole groups of 16 bytes: its aligned part. What stands before and behind
that, fewer than 16 bytes each, are its edges. A kernel takes them as one more, small tile, element by element. Nothing
outside of the row is read or written: its neighbours belong to other programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import cdiv

# Triton knows a size for a multiple of 16 or for nothing; 16 elements are a multiple of the 16 bytes that a thread
# loads at a time, of what the tensor memory accelerator asks of a row, and of what cuBLAS asks for its fast kernels.
ALIGNMENT = 16
# Rows that need a pad get one up to a whole line of the L2, 128 bytes, in 16-bit dtypes.
PADDED_ALIGNMENT = 64


def empty_rows(num_rows: int, vocab_size: int, like: Tensor) -> Tensor:
    """Return room for logits ``[num_rows, vocab_size]``, in the dtype and on the device of ``like``.

    Where the vocabulary is no multiple of `ALIGNMENT`, there is a pad behind every row, which is never read: products
    take a distance between rows, and copy nothing. Nor is it written, but for what the tensor memory accelerator fills
    of the 16 bytes that a row ends in.
    """
    stride = vocab_size
    if vocab_size % ALIGNMENT:
        stride = cdiv(vocab_size, PADDED_ALIGNMENT) * PADDED_ALIGNMENT
    return like.new_empty((num_rows, stride))[:, :vocab_size]


def is_ragged(logits: Tensor, grad: Tensor | None) -> bool:
    """Return whether a kernel is to tell the aligned part of each row of ``logits [N, V]`` from its edges.

    The gradient's rows must start as many elements behind a group of 16 bytes as those of the logits do; where they do
    not, the kernel loads and stores element by element.
    """
    vocab_size, stride = logits.shape[1], logits.stride(0)
    grad_stride = stride if grad is None else grad.stride(0)
    is_aligned = vocab_size % ALIGNMENT == 0 and stride % ALIGNMENT == 0 and grad_stride % ALIGNMENT == 0
    return not is_aligned and (stride - grad_stride) % ALIGNMENT == 0


@triton.jit
def align(start, VECTOR: tl.constexpr):
    """Return the first multiple of VECTOR from ``start`` on, in a form from which the compiler sees that it is one."""
    return (start + (VECTOR - 1)) // VECTOR * VECTOR


@triton.jit
def find_aligned_part(start, vocab_size, VECTOR: tl.constexpr):
    """Return how many elements of a row, which starts at element ``start``, are before its aligned part; its length."""
    head = tl.minimum(align(start, VECTOR) - start, vocab_size).to(tl.int32)
    return head, (vocab_size - head) // VECTOR * VECTOR


@triton.jit
def find_edges(head, aligned_size, vocab_size, VECTOR: tl.constexpr):
    """Return the ids before and behind a row's aligned part, 2 · VECTOR places, and in which places there is one."""
    places = tl.arange(0, 2 * VECTOR)
    ids = tl.where(places < VECTOR, places, head + aligned_size + (places - VECTOR))
    return ids, (places < head) | ((places >= VECTOR) & (ids < vocab_size))
