"""Rows of logits in memory: how far apart ours are."""

from __future__ import annotations

from torch import Tensor

from npp_kernels._dispatch import cdiv

# Triton knows a size for a multiple of 16 or for nothing; 16 elements are a multiple of the 16 bytes that a thread
# loads at a time, of what the tensor memory accelerator asks of a row, and of what cuBLAS asks for its fast kernels.
ALIGNMENT = 16
# Rows that need a pad get one up to a whole line of the L2, 128 bytes, in 16-bit dtypes.
PADDED_ALIGNMENT = 64


def empty_rows(num_rows: int, vocab_size: int, like: Tensor) -> Tensor:
    """Return room for logits ``[num_rows, vocab_size]``, in the dtype and on the device of ``like``.

    Where the vocabulary is no multiple of `ALIGNMENT`, there is a pad behind every row, which is never written nor
    read: products take a distance between rows, and copy nothing.
    """
    stride = vocab_size
    if vocab_size % ALIGNMENT:
        stride = cdiv(vocab_size, PADDED_ALIGNMENT) * PADDED_ALIGNMENT
    return like.new_empty((num_rows, stride))[:, :vocab_size]
