"""The batches of a run, each from its step and the seed alone.

`reference.train` takes each step's batch from here, so that a run that is resumed sees what it would have seen.
"""

from __future__ import annotations

import functools

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from reference.tokens.token_dataset import TokenDataset


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Maps a step of the run to its batch, from the seed and the step alone: tokens ``[B, H, W]``, labels ``[B]``.

    Args:
        dataset: images in variants.
        batch_size: images of a step over all processes.
        seed: of the order, which is another one in each epoch; a last incomplete batch is left out.
        rank: this process, of ``processes``; each reads its own part of every batch.
    """

    def __init__(self, dataset: TokenDataset, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        if not 1 <= batch_size <= len(dataset):
            raise ValueError(f"batch_size: expected 1 to the {len(dataset)} images of the data, got {batch_size}")
        if batch_size % processes:
            raise ValueError(f"batch_size: expected a multiple of {processes} processes, got {batch_size}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.part = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)
        self.steps_per_epoch = len(dataset) // batch_size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order_of_epoch(self.seed, epoch, len(self.dataset))
        indices = order[place * self.batch_size : (place + 1) * self.batch_size]
        return self.dataset.batch(indices[self.part], epoch=epoch)


@functools.lru_cache(maxsize=2)
def _order_of_epoch(seed: int, epoch: int, num_images: int) -> np.ndarray:
    # The third number keeps the order apart from other draws of the same seed and epoch, such as the augmentation's.
    return np.random.default_rng((seed, epoch, 1)).permutation(num_images)
