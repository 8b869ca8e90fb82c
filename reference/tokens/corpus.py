"""Text that is there wherever this runs, as tokens: the Python sources of PyTorch and of two packages that it needs.

All three are under three-clause BSD licences (`LICENCES` is compared with what the installed packages say). One file in
fifty is held out. Tokens are a byte-level BPE, fitted on the training files; with a vocabulary of 256 they are bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LICENCES = {"torch": "BSD", "sympy": "BSD", "networkx": "BSD"}  # all three clauses, read in their files
HELD_OUT_EVERY = 50  # files, by a hash of their names
FILES_AT_A_TIME = 256  # an encoded file takes a hundred times its ids
FITTED_BYTES = 8_000_000  # of the training files: enough for a few thousand merges


@dataclass(frozen=True)
class Corpus:
    """Tokens of a text.

    ``train`` and ``test`` are ids ``[number]``, files one after the other; ``token_bytes`` says how many bytes each id
    of the vocabulary stands for; ``source`` what the text is.
    """

    train: NDArray[np.uint16]
    test: NDArray[np.uint16]
    token_bytes: NDArray[np.int64]
    source: dict[str, Any]


def licence(package: str) -> str:
    """Return what an installed package says of its licence: the field, or else the classifiers."""
    metadata = importlib.metadata.metadata(package)
    fields = [metadata[name] for name in ("License-Expression", "License") if name in metadata]
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License")]
    return next(filter(None, fields), "; ".join(classifiers))


def source_files(package: str) -> dict[str, str]:
    """Return the Python sources of an installed package by name, those that are UTF-8.

    Raises:
        ValueError: the package's licence is not the one that was checked.
    """
    expected = LICENCES[package]
    if expected not in licence(package):
        raise ValueError(f"{package}: expected a licence of {expected}, got {licence(package)!r}")
    module = importlib.import_module(package)
    assert module.__file__ is not None
    root = Path(module.__file__).parent
    texts = {}
    for path in sorted(root.rglob("*.py")):
        try:
            texts[f"{package}/{path.relative_to(root).as_posix()}"] = path.read_bytes().decode()
        except UnicodeDecodeError:  # noqa: PERF203 - a test file or two, in another encoding on purpose
            continue
    return {name: text for name, text in texts.items() if text}


def is_held_out(name: str) -> bool:
    """Return whether a file is for testing."""
    return zlib.crc32(name.encode()) % HELD_OUT_EVERY == 0


def load_corpus(vocab_size: int, max_files: int | None = None) -> Corpus:
    """Read and tokenize the text.

    Args:
        vocab_size: of the BPE, 256 (bytes) to 65,536.
        max_files: of each package, evenly spread; None for all.

    Raises:
        ImportError: the package ``tokenizers`` is missing, which transformers brings.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError("tokens of text need tokenizers: pip install tokenizers (transformers brings it)") from error
    if not 256 <= vocab_size <= 2**16:
        raise ValueError(f"vocab_size: expected 256 to {2**16}, got {vocab_size}")
    texts: dict[str, str] = {}
    for package in LICENCES:
        files = list(source_files(package).items())
        texts.update(files[:: max(1, len(files) // max_files)] if max_files else files)
    train = {name: text for name, text in texts.items() if not is_held_out(name)}
    test = {name: text for name, text in texts.items() if is_held_out(name)}

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    every = max(1, sum(map(len, train.values())) // FITTED_BYTES)
    tokenizer.train_from_iterator(list(train.values())[::every], trainer)

    def encode(files: dict[str, str]) -> NDArray[np.uint16]:
        contents = list(files.values())
        ids = []
        for start in range(0, len(contents), FILES_AT_A_TIME):
            found = tokenizer.encode_batch_fast(contents[start : start + FILES_AT_A_TIME])
            ids += [np.array(each.ids, dtype=np.uint16) for each in found]
        return np.concatenate(ids)

    vocabulary = tokenizer.get_vocab()  # a ByteLevel token has one character for each byte
    token_bytes = np.zeros(len(vocabulary), dtype=np.int64)
    for token, index in vocabulary.items():
        token_bytes[index] = len(token)
    content = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in texts.items()).encode())
    source = {
        "packages": {package: importlib.metadata.version(package) for package in LICENCES},
        "files": len(texts),
        "bytes": sum(len(text.encode()) for text in texts.values()),
        "held_out_bytes": sum(len(text.encode()) for text in test.values()),
        "sha256": content.hexdigest(),
        "vocab_size": len(vocabulary),
    }
    return Corpus(encode(train), encode(test), token_bytes, source)
