"""Tokenized images for the trainer: Fashion-MNIST, the embedded sample, LlamaGen's code directories, and .npz files.

    load_dataset("embedded", "train")              2,000 images that the repository carries; 1 in 5 is for testing
    load_dataset("fashion_mnist", "train")         60,000 images in ten variants, made once and kept
    load_dataset("fashion_mnist:DIR", "train")     the same from a folder of the four gzipped IDX files
    load_dataset("codes:DIR", "train")             what LlamaGen's extract_codes_c2i.py wrote; 1 in 100 is for testing
    load_dataset("codes:DIR+DIR,TEST", "train")    two sets of crops of the same images, and a test split of its own
    load_dataset("npz:FILE", "train")              arrays train, test, train_labels, test_labels, perhaps centroids,
                                                   and test_images, train_images for scores of samples
    load_dataset("npz_mirrored:FILE", "train")     the same, every training image mirrored too; it needs the centroids

A dataset keeps no state: which variant (crop, flip) of an image is read depends on the seed, the epoch and the image
alone, so a run that resumes inside an epoch reads what it would have read.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
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
from reference.tokens.code_files import CodeDirectory, image_numbers, read_arrays, whole_numbers
from reference.tokens.token_dataset import ArrayDataset, TokenDataset

SPLITS = ("train", "test")
CACHE = Path("runs/tokens")

# Fashion-MNIST's ten variants: in the middle and moved by one pixel each way, all of them mirrored too.
MOVES = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
VARIANTS = [(down, right, flip) for flip in (False, True) for down, right in MOVES]
_IMAGES_PER_STEP = 2_000  # tokenized at a time, for the progress bar

EMBEDDED_TEST_EVERY = 5
CODES_TEST_EVERY = 100


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
        data = read_arrays(Path(where), ["centroids"])
        return Tokenizer(data["centroids"]) if "centroids" in data else None
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
        return CodeDirectory([Path(test)], image_numbers(Path(test)), seed=seed)
    directories = [Path(name) for name in train.split("+")]
    numbers = image_numbers(directories[0])
    if not test:
        if len(numbers) < CODES_TEST_EVERY:
            raise ValueError(
                f"{directories[0]}: expected at least {CODES_TEST_EVERY} images, one in {CODES_TEST_EVERY} of which is "
                f"for testing, found {len(numbers)}; name a test split of its own, codes:DIR,TEST"
            )
        numbers = numbers[_held_out(len(numbers), CODES_TEST_EVERY, split)]
    return CodeDirectory(directories, numbers, seed=seed)


def _npz(path: Path, split: str, seed: int, *, mirrored: bool) -> ArrayDataset:
    needed = {"train", "test", "train_labels", "test_labels"} | ({"centroids"} if mirrored else set())
    data = read_arrays(path, needed | {"centroids", f"{split}_images"})
    if missing := needed - set(data):
        raise ValueError(f"{path}: expected the arrays {sorted(needed)}, {sorted(missing)} missing")
    tokens = {name: data[name] for name in SPLITS}
    labels = {name: data[f"{name}_labels"] for name in SPLITS}
    vocab_size = _end_of(tokens.values()) if "centroids" not in data else len(data["centroids"])
    num_classes = _end_of(labels.values())
    for name in SPLITS:
        whole_numbers(f"{path}, {name}", tokens[name], vocab_size)
        whole_numbers(f"{path}, {name}_labels", labels[name], num_classes)
    variants = [tokens[split]]
    if mirrored and split == "train":
        variants.append(_mirror(tokens[split], Tokenizer(data["centroids"])))
    return ArrayDataset(
        np.stack(variants, axis=1),
        labels[split],
        vocab_size=vocab_size,
        num_classes=num_classes,
        seed=seed,
        images=_images(path, data, split),
    )


def _images(path: Path, data: dict[str, NDArray[Any]], split: str) -> NDArray[np.uint8] | None:
    """Return the images of a file: of its test split all, of its training split perhaps only the first ones."""
    images = data.get(f"{split}_images")
    if images is None:
        return None
    number = len(data[split])
    is_enough = 0 < len(images) <= number if split == "train" else len(images) == number
    if images.dtype != np.uint8 or not is_enough:
        raise ValueError(
            f"{path}, {split}_images: expected uint8, {'at most ' if split == 'train' else ''}{number} images, got "
            f"{images.dtype} of shape {images.shape}"
        )
    return images


def _end_of(arrays: Iterable[NDArray[Any]]) -> int:
    """Return the number after the largest of all ids or labels, where a file does not say how many there are."""
    return max(int(np.nan_to_num(array.max(initial=0))) for array in arrays) + 1


def _mirror(tokens: NDArray[Any], tokenizer: Tokenizer) -> NDArray[np.uint16]:
    """Return the tokens of the mirrored images: each block becomes the one nearest to its mirror image."""
    blocks = tokenizer.decode(np.arange(len(tokenizer.centroids))[:, None, None])
    mirror_of = tokenizer.encode(blocks[:, :, ::-1]).reshape(-1)
    return mirror_of[tokens[:, :, ::-1]]
