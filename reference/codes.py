"""Tokenized images for the trainer: Fashion-MNIST, the embedded sample, LlamaGen's code directories, and .npz files.

    load_dataset("embedded", "train")              2,000 images that the repository carries; 1 in 5 is for testing
    load_dataset("fashion_mnist", "train")         60,000 images in ten variants, made once and kept
    load_dataset("fashion_mnist:DIR", "train")     the same from a folder of the four gzipped IDX files
    load_dataset("codes:DIR", "train")             what LlamaGen's extract_codes_c2i.py wrote; 1 in 100 is for testing
    load_dataset("codes:DIR+DIR,TEST", "train")    two sets of crops of the same images, and a test split of its own
    load_dataset("npz:FILE", "train")              arrays train, test, train_labels, test_labels, perhaps centroids
    load_dataset("npz_mirrored:FILE", "train")     the same, every training image mirrored too; it needs the centroids

A dataset keeps no state: which variant (crop, flip) of an image is read depends on the seed, the epoch and the image
alone, so a run that resumes inside an epoch reads what it would have read.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from reference.tokenizer import (
    BLOCK,
    FASHION_MNIST,
    IMAGE_SIZE,
    NUM_CLASSES,
    Tokenizer,
    load_fashion_mnist,
    load_tokens,
    place,
)

SPLITS = ("train", "test")
CACHE = Path("runs/tokens")

# Fashion-MNIST's ten variants: in the middle and moved by one pixel each way, all of them mirrored too.
MOVES = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
VARIANTS = [(down, right, flip) for flip in (False, True) for down, right in MOVES]
_IMAGES_PER_STEP = 2_000  # tokenized at a time, for the progress bar

FINGERPRINT_IMAGES = 256  # read to tell data sets of the same sizes apart: few enough for files over a network
EMBEDDED_TEST_EVERY = 5
CODES_TEST_EVERY = 100
CODES_VOCAB_SIZE = 16_384  # of LlamaGen's VQ-16 tokenizer
CODES_NUM_CLASSES = 1_000  # of ImageNet
TEN_CROP_CENTRE = 4  # torchvision's order: four corners, the centre, then the five mirrored


class TokenDataset(Dataset[tuple[Tensor, int]]):
    """Tokenized images with their classes, each image in one or more variants.

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

    # The images before they were tokenized, where they are at hand: uint8 [num_images, height, width] (, 3).
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

    def read(self, indices: NDArray[np.int64], variants: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
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
        tokens: NDArray,
        labels: NDArray,
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

    def read(self, indices: NDArray[np.int64], variants: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        """Read tokens ``[B, H, W]`` and labels ``[B]`` of given images in given variants."""
        return self.tokens[indices, variants], self.labels[indices]


class CodeDirectory(TokenDataset):
    """Images in LlamaGen's format: one file of codes and one of the label for each image.

    ``imagenet256_codes/<i>.npy`` is ``[1, variants, H·W]``, ``imagenet256_labels/<i>.npy`` is ``[1]``. Variants are the
    ten crops, or the image and its mirror image. Several directories with the same images (crops of another range,
    say) add their variants together.

    Args:
        directories: each with one ``*_codes`` folder and its ``*_labels`` folder.
        numbers: the images to take, by the number in their file names.
        seed: of the draw of variants.
    """

    def __init__(self, directories: list[Path], numbers: NDArray[np.int64], *, seed: int = 0):
        self.folders = [_code_folders(directory) for directory in directories]
        self.numbers = numbers
        shapes = [np.load(codes / f"{numbers[0]}.npy").shape for codes, _ in self.folders]
        side = math.isqrt(shapes[0][-1])
        for (codes, _), shape in zip(self.folders, shapes, strict=True):
            if len(shape) != 3 or shape[0] != 1 or shape[2] != side**2:
                raise ValueError(f"{codes}: expected arrays [1, variants, H·W] of a square grid, got shape {shape}")
        # Variant v of the dataset is row `v - self.starts[d]` of directory d.
        self.starts = np.cumsum([0, *(shape[1] for shape in shapes)])
        super().__init__(
            grid=(side, side),
            vocab_size=CODES_VOCAB_SIZE,
            num_classes=CODES_NUM_CLASSES,
            num_variants=int(self.starts[-1]),
            plain_variant=TEN_CROP_CENTRE if shapes[0][1] == len(VARIANTS) else 0,
            seed=seed,
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, indices: NDArray[np.int64], variants: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        """Read tokens ``[B, H, W]`` and labels ``[B]`` of given images in given variants."""
        directories = np.searchsorted(self.starts, variants, side="right") - 1
        tokens = np.empty((len(indices), *self.grid), dtype=np.int64)
        labels = np.empty(len(indices), dtype=np.int64)
        for row, (index, variant, directory) in enumerate(zip(indices, variants, directories, strict=True)):
            codes, classes = self.folders[directory]
            name = f"{self.numbers[index]}.npy"
            tokens[row] = np.load(codes / name)[0, variant - self.starts[directory]].reshape(self.grid)
            labels[row] = np.load(classes / name)[0]
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"{self.folders[0][0]}: expected ids in [0, {self.vocab_size}), got {tokens.max()}")
        return tokens, labels


def _code_folders(directory: Path) -> tuple[Path, Path]:
    """Return the folders of codes and of labels in a directory."""
    found = sorted(directory.glob("*_codes"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{directory}: expected one folder such as imagenet256_codes, as LlamaGen's extract_codes_c2i.py writes "
            f"it, found {[path.name for path in found]}"
        )
    labels = found[0].with_name(found[0].name.removesuffix("_codes") + "_labels")
    if not labels.is_dir():
        raise FileNotFoundError(f"{labels} is missing; it belongs beside {found[0].name}")
    return found[0], labels


def _numbers(directory: Path) -> NDArray[np.int64]:
    """Return the numbers of all images in a code directory, in order."""
    codes, _ = _code_folders(directory)
    numbers = [int(entry.name.removesuffix(".npy")) for entry in os.scandir(codes) if entry.name.endswith(".npy")]
    if not numbers:
        raise FileNotFoundError(f"{codes}: expected files 0.npy, 1.npy, …, found none")
    return np.sort(np.array(numbers, dtype=np.int64))


def load_dataset(spec: str, split: str, *, seed: int = 0, cache: str | Path = CACHE) -> TokenDataset:
    """Load tokenized images by name.

    >>> data = load_dataset("embedded", "test")
    >>> len(data), data.grid, data.vocab_size, data.num_classes
    (400, (16, 16), 512, 10)

    Args:
        spec: what to load; the head of this module lists the forms.
        split: ``"train"`` or ``"test"``. The two never share an image.
        seed: of the draw of variants in training.
        cache: folder that keeps the tokens of Fashion-MNIST's training images (300 MB).

    Raises:
        ValueError: ``spec`` or ``split`` is none of those.
        FileNotFoundError: the files are not there; the message says what was looked for.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    kind, _, where = spec.partition(":")
    if spec == "embedded":
        return _embedded(split, seed)
    if kind == "fashion_mnist":
        return _fashion_mnist(Path(where or FASHION_MNIST), split, seed, Path(cache))
    if kind == "codes" and where:
        return _codes(where, split, seed)
    if kind in ("npz", "npz_mirrored") and where:
        return _npz(Path(where), split, seed, mirrored=kind == "npz_mirrored")
    raise ValueError(
        f"spec: expected embedded, fashion_mnist[:DIR], codes:DIR, npz:FILE or npz_mirrored:FILE, got {spec!r}"
    )


def load_tokenizer(spec: str) -> Tokenizer | None:
    """Load what turns the tokens of a data set into pixels; None where that is a network of the user's own.

    It needs neither the images nor their tokens, so that samples can be decoded where there is no data.

    Args:
        spec: as for `load_dataset`.
    """
    kind, _, where = spec.partition(":")
    if kind in ("embedded", "fashion_mnist"):
        return Tokenizer(load_tokens().centroids)
    if kind in ("npz", "npz_mirrored"):
        with np.load(where) as data:
            return Tokenizer(data["centroids"]) if "centroids" in data.files else None
    return None


def _held_out(number: int, every: int, split: str) -> NDArray[np.int64]:
    """Return the indices of a split in which one image of `every` is held out."""
    indices = np.arange(number)
    is_test = indices % every == every - 1
    return indices[is_test if split == "test" else ~is_test]


def _embedded(split: str, seed: int) -> ArrayDataset:
    data = load_tokens()
    chosen = _held_out(len(data.tokens), EMBEDDED_TEST_EVERY, split)
    return ArrayDataset(
        data.tokens[chosen, None],
        data.labels[chosen],
        vocab_size=len(data.centroids),
        num_classes=NUM_CLASSES,
        seed=seed,
    )


def _fashion_mnist(directory: Path, split: str, seed: int, cache: Path) -> ArrayDataset:
    images, labels = load_fashion_mnist(split, directory)
    tokenizer = Tokenizer(load_tokens().centroids)
    if split == "train":
        tokens, plain = _cached_variants(images, tokenizer, cache), None
    else:
        plain = place(images)
        tokens = tokenizer.encode(plain)[:, None]
    return ArrayDataset(
        tokens, labels, vocab_size=len(tokenizer.centroids), num_classes=NUM_CLASSES, seed=seed, images=plain
    )


def _cached_variants(images: NDArray[np.uint8], tokenizer: Tokenizer, cache: Path) -> NDArray[np.uint16]:
    """Tokenize all variants of the images, or map the file that an earlier call left: ``[N, 10, 16, 16]``."""
    content = 0
    for part in (repr(VARIANTS).encode(), tokenizer.centroids.tobytes(), images.tobytes()):
        content = zlib.crc32(part, content)
    path = cache / f"fashion_mnist-{content:08x}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed: another process, or one that was stopped, never leaves half a file under the name.
        partial = path.with_suffix(f".{os.getpid()}.partial")
        shape = (len(images), len(VARIANTS), IMAGE_SIZE // BLOCK, IMAGE_SIZE // BLOCK)
        tokens = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint16, shape=shape)
        for start in tqdm(range(0, len(images), _IMAGES_PER_STEP), desc=f"tokenizing into {path}", unit="chunk"):
            chunk = slice(start, start + _IMAGES_PER_STEP)
            for variant, (down, right, flip) in enumerate(VARIANTS):
                tokens[chunk, variant] = tokenizer.encode(place(images[chunk], down=down, right=right, flip=flip))
        tokens.flush()
        del tokens
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def _codes(places: str, split: str, seed: int) -> CodeDirectory:
    train, _, test = places.partition(",")
    if test and split == "test":
        return CodeDirectory([Path(test)], _numbers(Path(test)), seed=seed)
    directories = [Path(name) for name in train.split("+")]
    numbers = _numbers(directories[0])
    if not test:
        numbers = numbers[_held_out(len(numbers), CODES_TEST_EVERY, split)]
    return CodeDirectory(directories, numbers, seed=seed)


def _npz(path: Path, split: str, seed: int, *, mirrored: bool) -> ArrayDataset:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    with np.load(path) as data:
        needed = {"train", "test", "train_labels", "test_labels"} | ({"centroids"} if mirrored else set())
        if missing := needed - set(data.files):
            raise ValueError(f"{path}: expected the arrays {sorted(needed)}, {sorted(missing)} missing")
        tokens = {name: data[name] for name in SPLITS}
        labels = {name: data[f"{name}_labels"] for name in SPLITS}
        vocab_size = (
            len(data["centroids"]) if "centroids" in data.files else max(int(a.max()) for a in tokens.values()) + 1
        )
        variants = [tokens[split]]
        if mirrored and split == "train":
            variants.append(_mirror(tokens[split], Tokenizer(data["centroids"])))
    return ArrayDataset(
        np.stack(variants, axis=1),
        labels[split],
        vocab_size=vocab_size,
        num_classes=max(int(array.max()) for array in labels.values()) + 1,
        seed=seed,
    )


def _mirror(tokens: NDArray, tokenizer: Tokenizer) -> NDArray[np.uint16]:
    """Return the tokens of the mirrored images: each block becomes the one nearest to its mirror image."""
    blocks = tokenizer.decode(np.arange(len(tokenizer.centroids))[:, None, None])
    mirror_of = tokenizer.encode(blocks[:, :, ::-1]).reshape(-1)
    return mirror_of[tokens[:, :, ::-1]]
