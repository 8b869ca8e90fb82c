"""The images of three of the examples: 2,000 pictures of clothes as 16 by 16 tokens, which the repository carries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).parents[1] / "reference" / "data" / "fashion_mnist_tokens.npz"
VOCAB_SIZE, NUM_CLASSES, GRID = 512, 10, (16, 16)


def load() -> tuple[Tensor, Tensor]:
    """Return tokens ``[2000, 16, 16]`` and classes ``[2000]``, int64: stored ids are small, the operations' are not."""
    with np.load(FILE) as data:
        return torch.from_numpy(data["tokens"].astype(np.int64)), torch.from_numpy(data["labels"].astype(np.int64))
