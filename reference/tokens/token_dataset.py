"""Tokenized images in variants, whose draw depends on seed, epoch and image alone; and those that one array holds.

`reference.tokens.codes` makes them of every source, and `reference.tokens.batches` draws from them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

FINGERPRINT_IMAGES = 256  # read to tell data sets of the same sizes apart: few enough for files over a network


class TokenDataset(Dataset[tuple[Tensor, int]]):
    """Tokenized images with their classes, each image in one or more variants.

    >>> from reference.tokens.codes import load_dataset
    >>> data = load_dataset("embedded", "train")
    >>> tokens, label = data[0]
    >>> tokens.shape, tokens.dtype, label
    (torch.Size([16, 16]), torch.int64, 9)
    >>> tokens, labels = data.batch([0, 7, 8], epoch=3)
    >>> tokens.shape, labels.shape
    (torch.Size([3, 16, 16]), torch.Size([3]))

    ``data[index]`` is the plain image, for scoring; ``data[epoch, index]`` is the variant drawn for that epoch, so that
    a sampler that yields ``(epoch, index)`` is all that training needs; ``batch`` reads many at once.

    Args:
        grid: tokens on each axis, ``(H, W)``.
        vocab_size: ids are below it.
        num_classes: labels are below it.
        num_variants: variants of each image.
        plain_variant: the variant without augmentation.
        seed: of the draw of variants.
    """

    # The images before they were tokenized, where they are at hand: uint8 [num_images, height, width] (, 3). Of a
    # training split they may be the first ones only.
    images: NDArray[np.uint8] | None = None

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        vocab_size: int,
        num_classes: int,
        num_variants: int,
        plain_variant: int,
        seed: int,
    ):
        self.grid = grid
        self.vocab_size = vocab_size
        self.num_classes = num_classes
        self.num_variants = num_variants
        self.plain_variant = plain_variant
        self.seed = seed

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, indices: NDArray[np.int64], variants: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Read tokens ``[B, H, W]`` and labels ``[B]`` of given images in given variants."""
        raise NotImplementedError

    def variants(self, indices: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Draw the variant of each image for an epoch, from the seed, the epoch and the index alone."""
        return _variants_of_epoch(self.seed, epoch, len(self), self.num_variants)[indices]

    def batch(self, indices: Sequence[int] | NDArray[np.int64], *, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        """Read images: tokens int64 ``[B, H, W]`` and labels int64 ``[B]``; without an epoch, the plain images."""
        where = np.asarray(indices, dtype=np.int64)
        if epoch is None:
            variants = np.full(len(where), self.plain_variant)
        else:
            variants = self.variants(where, epoch)
        tokens, labels = self.read(where, variants)
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these images from others: their number and sizes, and a hash of some of them.

        It reads 256 images, spread evenly, and is the same for the same data in every process and on every machine.
        """
        chosen = np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_IMAGES).astype(np.int64))
        tokens, labels = self.read(chosen, chosen % self.num_variants)
        content = hashlib.sha256(np.ascontiguousarray(tokens, dtype="<i8").tobytes())
        content.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
        return {
            "images": len(self),
            "variants": self.num_variants,
            "grid": tuple(self.grid),
            "vocab_size": self.vocab_size,
            "num_classes": self.num_classes,
            "content": content.hexdigest(),
        }

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        tokens, labels = self.batch([index], epoch=epoch)
        return tokens[0], int(labels[0])


@functools.lru_cache(maxsize=4)
def _variants_of_epoch(seed: int, epoch: int, num_images: int, num_variants: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).integers(num_variants, size=num_images)


class ArrayDataset(TokenDataset):
    """Images in one array, in memory or mapped from a file.

    Args:
        tokens: unsigned ``[num_images, num_variants, H, W]``, the plain image first.
        labels: unsigned ``[num_images]``.
        vocab_size, num_classes, seed: as for `TokenDataset`.
        images: the images before they were tokenized, where they are at hand.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        labels: NDArray[Any],
        *,
        vocab_size: int,
        num_classes: int,
        seed: int = 0,
        images: NDArray[np.uint8] | None = None,
    ):
        if tokens.ndim != 4 or labels.shape != tokens.shape[:1]:
            raise ValueError(
                "tokens, labels: expected shapes [num_images, num_variants, H, W] and [num_images], "
                f"got {tokens.shape} and {labels.shape}"
            )
        super().__init__(
            grid=(tokens.shape[2], tokens.shape[3]),
            vocab_size=vocab_size,
            num_classes=num_classes,
            num_variants=tokens.shape[1],
            plain_variant=0,
            seed=seed,
        )
        self.tokens = tokens
        self.labels = labels
        self.images = images

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: NDArray[np.int64], variants: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Read tokens ``[B, H, W]`` and labels ``[B]`` of given images in given variants."""
        return self.tokens[indices, variants], self.labels[indices]
