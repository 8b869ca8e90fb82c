"""Images <-> tokens: k-means over 2×2 pixel blocks, and the small file of real tokens that the repository carries.

A learned tokenizer would need downloads; 512 centroids of 2×2 blocks need none, and give what matters here: a grid of
16×16 ids from real images, with the skewed distribution that real tokens have.

    python -m reference.tokenizer --images /usr/share/datasets/fashion-mnist --out tokens.npz

made the embedded file from Debian's package ``dataset-fashion-mnist``; it fits the centroids on training images,
encodes test images, and prints the figures that stand in ``reference/data/README.md``.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 2  # pixels on each side of a token
IMAGE_SIZE = 32  # of a padded Fashion-MNIST image; 28×28 pixels are its content
NUM_CENTROIDS = 512
NUM_FITTED_IMAGES = 10_000  # of the 60,000: 0.9 million distinct blocks; k-means takes about half a minute
NUM_EMBEDDED_IMAGES = 2_000  # what fits a few hundred kilobytes
NUM_CLASSES = 10

EMBEDDED_TOKENS = Path(__file__).parent / "data" / "fashion_mnist_tokens.npz"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FILES = {"train": "train", "test": "t10k"}


class EmbeddedTokens(NamedTuple):
    """Tokenized images, their tokenizer and their classes."""

    tokens: NDArray[np.uint16]  # [num_images, 16, 16]
    centroids: NDArray[np.float32]  # [512, 4]
    labels: NDArray[np.uint8]  # [num_images]


@dataclass(frozen=True)
class Tokenizer:
    """Nearest-centroid tokens of 2×2 pixel blocks.

    >>> import numpy as np
    >>> tokenizer = Tokenizer(np.array([[0, 0, 0, 0], [9, 9, 9, 9]], dtype=np.float32))
    >>> image = np.array([[[0, 1, 9, 8], [1, 0, 8, 9]]], dtype=np.uint8)
    >>> tokenizer.encode(image).tolist()
    [[[0, 1]]]
    >>> tokenizer.decode(tokenizer.encode(image)).tolist()
    [[[0, 0, 9, 9], [0, 0, 9, 9]]]

    Args:
        centroids: float32 ``[V, 4·C]`` in 0-255, pixels of a block in raster order, channels last.
    """

    centroids: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.centroids.ndim != 2 or self.centroids.shape[1] not in (BLOCK**2, 3 * BLOCK**2):
            raise ValueError(f"centroids: expected shape [V, 4] or [V, 12], got {self.centroids.shape}")

    @classmethod
    def fit(cls, images: NDArray[np.uint8], *, num_centroids: int, seed: int = 0) -> Tokenizer:
        """Fit centroids to the blocks of grey images ``[N, H, W]``; darkest centroid first.

        Raises:
            ImportError: scikit-learn is missing.
        """
        # Equal blocks count by weight: half of all blocks are plain background.
        blocks, counts = np.unique(_blocks(images, 1), axis=0, return_counts=True)
        fit = _optional("sklearn.cluster").KMeans(num_centroids, random_state=seed, n_init=1, max_iter=30)
        with _optional("threadpoolctl").threadpool_limits(
            1
        ):  # the order of sums, and so the last bits, would depend on the number of threads
            fit.fit(blocks.astype(np.float32), sample_weight=counts)
        centroids = fit.cluster_centers_.astype(np.float32)
        return cls(centroids[np.argsort(centroids.mean(1), kind="stable")])

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return self.centroids.shape[1] // BLOCK**2

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """Turn images ``[N, 2H, 2W]`` (RGB: ``[N, 2H, 2W, 3]``) into tokens ``[N, H, W]``.

        Raises:
            ValueError: the images are not uint8, of another rank, or of an odd size.
            ImportError: SciPy is missing.
        """
        expected_rank = 3 if self.channels == 1 else 4
        if (
            images.dtype != np.uint8
            or images.ndim != expected_rank
            or images.shape[1] % BLOCK
            or images.shape[2] % BLOCK
        ):
            raise ValueError(
                f"images: expected uint8 with {expected_rank} axes and even height and width, "
                f"got {images.dtype} of shape {images.shape}"
            )
        _, nearest = _optional("scipy.spatial").KDTree(self.centroids).query(_blocks(images, self.channels), workers=-1)
        return nearest.astype(np.uint16).reshape(len(images), images.shape[1] // BLOCK, images.shape[2] // BLOCK)

    def decode(self, tokens: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Turn tokens ``[N, H, W]`` into images ``[N, 2H, 2W]`` (RGB: ``[N, 2H, 2W, 3]``).

        Raises:
            IndexError: a token is outside the vocabulary.
        """
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(self.centroids):
            raise IndexError(
                f"tokens: expected ids in [0, {len(self.centroids)}), got {tokens.min()} to {tokens.max()}"
            )
        num_images, height, width = tokens.shape
        blocks = np.rint(self.centroids).clip(0, 255).astype(np.uint8)[tokens]
        pixels = blocks.reshape(num_images, height, width, BLOCK, BLOCK, self.channels).transpose(0, 1, 3, 2, 4, 5)
        images = pixels.reshape(num_images, BLOCK * height, BLOCK * width, self.channels)
        return images[..., 0] if self.channels == 1 else images


def _optional(module: str) -> ModuleType:
    """Import what only fitting and encoding need; tokens load and decode with NumPy alone."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the tokenizer needs {module} here: pip install scikit-learn (scipy comes with it)"
        ) from error


def _blocks(images: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Return all blocks, ``[N·H·W, 4·C]``."""
    num_images, height, width = images.shape[:3]
    blocks = images.reshape(num_images, height // BLOCK, BLOCK, width // BLOCK, BLOCK, channels)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, BLOCK**2 * channels)


def psnr(images: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio in dB, over all pixels together."""
    error = np.square(images.astype(np.float32) - decoded).mean(dtype=np.float64)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def unigram_entropy(tokens: NDArray[np.integer]) -> float:
    """Return the entropy of the ids' distribution in bits: what a model without context has to pay per token."""
    counts = np.bincount(tokens.reshape(-1).astype(np.int64))
    shares = counts[counts > 0] / tokens.size
    return float(-(shares * np.log2(shares)).sum())


def load_tokens(path: str | Path = EMBEDDED_TOKENS) -> EmbeddedTokens:
    """Load real tokens, by default those that the repository carries.

    >>> data = load_tokens()
    >>> data.tokens.shape, data.tokens.dtype.name, data.centroids.shape, data.labels.shape
    ((2000, 16, 16), 'uint16', (512, 4), (2000,))
    """
    with np.load(path) as data:
        return EmbeddedTokens(data["tokens"], data["centroids"], data["labels"])


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of bytes: magic ``0, 0, 8, rank``, the sizes as big-endian int32, then the data."""
    with gzip.open(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes, got one that starts with {content[:4]!r}")
    rank = content[3]
    shape = tuple(int(size) for size in np.frombuffer(content, ">i4", rank, offset=4))
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if data.size != math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} bytes of data for shape {shape}, got {data.size}")
    return data.reshape(shape)


def load_fashion_mnist(
    split: str, directory: str | Path = FASHION_MNIST
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Load Fashion-MNIST's images, uint8 ``[N, 28, 28]``, and labels, uint8 ``[N]``.

    Args:
        split: ``"train"`` (60,000 images) or ``"test"`` (10,000).
        directory: where the four gzipped IDX files lie; by default where Debian's package puts them.

    Raises:
        FileNotFoundError: a file is missing; the message says where to get it.
    """
    if split not in _FILES:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        path = Path(directory) / f"{_FILES[split]}-{kind}-ubyte.gz"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing. Fashion-MNIST is in Debian's package: apt-get install dataset-fashion-mnist "
                f"(it fills {FASHION_MNIST}); or download its four .gz files from "
                "https://github.com/zalandoresearch/fashion-mnist (data/fashion) into a folder, and name that folder."
            )
        arrays.append(read_idx(path))
    return arrays[0], arrays[1]


def place(images: NDArray[np.uint8], *, down: int = 0, right: int = 0, flip: bool = False) -> NDArray[np.uint8]:
    """Centre images ``[N, 28, 28]`` on black 32×32 ones, moved by up to two pixels, mirrored first where asked."""
    margin = (IMAGE_SIZE - images.shape[1]) // 2
    if not (-margin <= down <= margin and -margin <= right <= margin):
        raise ValueError(f"down, right: expected shifts of at most {margin} pixels, got {down} and {right}")
    mirrored = images[:, :, ::-1] if flip else images
    return np.pad(mirrored, ((0, 0), (margin + down, margin - down), (margin + right, margin - right)))


def main() -> None:
    """Make the embedded file."""
    parser = argparse.ArgumentParser(description="Make the embedded file of Fashion-MNIST tokens.")
    parser.add_argument("--images", type=Path, default=FASHION_MNIST, help="folder of the gzipped IDX files")
    parser.add_argument("--out", type=Path, default=EMBEDDED_TOKENS, help="the .npz file to write")
    options = parser.parse_args()
    tokenizer = Tokenizer.fit(
        place(load_fashion_mnist("train", options.images)[0][:NUM_FITTED_IMAGES]), num_centroids=NUM_CENTROIDS
    )
    images, labels = load_fashion_mnist("test", options.images)
    padded = place(images)
    tokens = tokenizer.encode(padded)
    decoded = tokenizer.decode(tokens)
    inside = (slice(None), slice(2, 30), slice(2, 30))
    print(
        f"PSNR on the {len(images)} test images: {psnr(images, decoded[inside]):.2f} dB, "
        f"{psnr(padded, decoded):.2f} dB with the padding counted"
    )
    embedded = tokens[:NUM_EMBEDDED_IMAGES]
    share = np.bincount(embedded.reshape(-1)).max() / embedded.size
    print(
        f"the first {len(embedded)} of them: unigram entropy {unigram_entropy(embedded):.2f} bits per token, "
        f"share of the most frequent id {share:.3f}"
    )
    partial = options.out.with_name(options.out.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, tokens=embedded, centroids=tokenizer.centroids, labels=labels[:NUM_EMBEDDED_IMAGES])
    os.replace(partial, options.out)


if __name__ == "__main__":
    main()
