"""Small made-up image files in the formats that the loaders read.

For test_codes.py and test_tokenizer.py.
"""

import gzip
from pathlib import Path

import numpy as np


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = np.array(array.shape, dtype=">i4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def write_fashion_mnist(directory: Path, num_train: int = 30, num_test: int = 10) -> None:
    """Write smooth random 28×28 images with their labels under Fashion-MNIST's file names."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 28)
    for name, number in (("train", num_train), ("t10k", num_test)):
        corners = generator.integers(0, 256, (number, 2, 1, 1))
        images = corners[:, 0] * ramp[:, None] * 0.5 + corners[:, 1] * ramp * 0.5
        write_idx(directory / f"{name}-images-idx3-ubyte.gz", images.astype(np.uint8))
        write_idx(directory / f"{name}-labels-idx1-ubyte.gz", generator.integers(0, 10, number).astype(np.uint8))
