"""LlamaGen's code directories: a file of codes and one of the label for each image. Each error names its file.

`reference.tokens.codes` reads ``--data codes:DIR`` through it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.tokens.token_dataset import TokenDataset

CODES_VOCAB_SIZE = 16_384  # of LlamaGen's VQ-16 tokenizer
CODES_NUM_CLASSES = 1_000  # of ImageNet
TEN_CROP_CENTRE = 4  # torchvision's order: four corners, the centre, then the five mirrored
TEN_CROPS = 10
# What a packed array may unpack to: labels in order pack well, tokens hardly at all, and a file that is made to fill
# the memory a thousandfold.
UNPACKED_BYTES = 1 << 26
UNPACKED_RATIO = 100
_IMAGE = re.compile(r"(0|[1-9][0-9]*)\.npy")


def code_folders(directory: Path) -> tuple[Path, Path]:
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


def image_numbers(directory: Path) -> NDArray[np.int64]:
    """Return the numbers of all images in a code directory, in order.

    Hidden files are passed over: they are what a copy that was stopped leaves behind.
    """
    codes, _ = code_folders(directory)
    names = [entry.name for entry in os.scandir(codes) if entry.name.endswith(".npy") and entry.name[0] != "."]
    if not names:
        raise FileNotFoundError(f"{codes}: expected files 0.npy, 1.npy, …, found none")
    if strange := [name for name in names if not _IMAGE.fullmatch(name)]:
        raise ValueError(f"{codes}: expected files 0.npy, 1.npy, …, found {min(strange)}")
    return np.sort(np.array([int(name.removesuffix(".npy")) for name in names], dtype=np.int64))


def read_array(path: Path) -> NDArray[Any]:
    """Read one ``.npy`` file.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is empty, cut short, or another file under this name.
    """
    try:
        # Mapped first, which fails where the header promises more than the file has, before there is room made for it.
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
        raise ValueError(f"{path}: expected a whole .npy file, it cannot be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: expected an array in NumPy's .npy format, got a {type(array).__name__}")
    return np.array(array)


def read_arrays(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Read those arrays of an ``.npz`` file that it has; the errors are those of `read_array`."""
    try:
        with path.open("rb") as file, np.load(file) as archive:
            for part in archive.zip.infolist():
                if part.file_size > UNPACKED_BYTES + UNPACKED_RATIO * part.compress_size:
                    raise ValueError(f"{part.filename} unpacks to {part.file_size} bytes from {part.compress_size}")
            return {name: archive[name] for name in names if name in archive.files}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except Exception as error:  # as above
        raise ValueError(f"{path}: expected a whole .npz file, it cannot be read: {error}") from error


def read_codes(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    """Read the codes of one image, of a known shape."""
    codes = read_array(path)
    if codes.shape != shape:
        raise ValueError(f"{path}: expected an array of shape {shape}, as in the first image, got {codes.shape}")
    return codes


def read_label(path: Path, num_classes: int) -> int:
    """Read the label of one image."""
    label = read_array(path)
    if label.size != 1:
        raise ValueError(f"{path}: expected one label, got an array of shape {label.shape}")
    return int(whole_numbers(str(path), label, num_classes)[(0,) * label.ndim])


def whole_numbers(name: str, array: NDArray[Any], end: int) -> NDArray[Any]:
    """Return an array of ids or labels as it is; refuse it where one is not a whole number in ``[0, end)``.

    Floats that hold whole numbers will do: extraction scripts differ in the type that they save.
    """
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: expected whole numbers in [0, {end}), got the type {array.dtype}")
    is_good = (array >= 0) & (array < end)
    if array.dtype.kind == "f":
        is_good &= array == np.floor(array)
    if not is_good.all():
        raise ValueError(f"{name}: expected whole numbers in [0, {end}), got {array[~is_good][0]}")
    return array


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
        self.folders = [code_folders(directory) for directory in directories]
        self.numbers = numbers
        shapes = [read_array(codes / f"{numbers[0]}.npy").shape for codes, _ in self.folders]
        side = math.isqrt(shapes[0][-1]) if shapes[0] else 0
        for (codes, _), shape in zip(self.folders, shapes, strict=True):
            if len(shape) != 3 or shape[0] != 1 or shape[2] != side**2:
                raise ValueError(
                    f"{codes / f'{numbers[0]}.npy'}: expected an array [1, variants, H·W] of a square grid, "
                    f"got shape {shape}"
                )
        self._shapes = shapes
        self._labels = np.full(len(numbers), -1, dtype=np.int64)  # what was read already; the files do not change
        # Variant v of the dataset is row `v - self.starts[d]` of directory d.
        self.starts = np.cumsum([0, *(shape[1] for shape in shapes)])
        super().__init__(
            grid=(side, side),
            vocab_size=CODES_VOCAB_SIZE,
            num_classes=CODES_NUM_CLASSES,
            num_variants=int(self.starts[-1]),
            plain_variant=TEN_CROP_CENTRE if shapes[0][1] == TEN_CROPS else 0,
            seed=seed,
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, indices: NDArray[np.int64], variants: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Read tokens ``[B, H, W]`` and labels ``[B]`` of given images in given variants."""
        directories = np.searchsorted(self.starts, variants, side="right") - 1
        tokens = np.empty((len(indices), *self.grid), dtype=np.int64)
        labels = np.empty(len(indices), dtype=np.int64)
        for row, (index, variant, directory) in enumerate(zip(indices, variants, directories, strict=True)):
            codes, _ = self.folders[directory]
            path = codes / f"{self.numbers[index]}.npy"
            image = read_codes(path, self._shapes[directory])[0, variant - self.starts[directory]]
            tokens[row] = whole_numbers(str(path), image, self.vocab_size).reshape(self.grid)
            labels[row] = self._label(index)
        return tokens, labels

    def _label(self, index: int) -> int:
        """Return the label of an image, on which all directories have to agree."""
        if self._labels[index] < 0:
            paths = [classes / f"{self.numbers[index]}.npy" for _, classes in self.folders]
            first, *others = (read_label(path, self.num_classes) for path in paths)
            for path, label in zip(paths[1:], others, strict=True):
                if label != first:
                    raise ValueError(f"{path}: expected the label {first}, as in {paths[0]}, got {label}")
            self._labels[index] = first
        return int(self._labels[index])
