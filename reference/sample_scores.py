"""Samples of every run of a comparison beside real images: Fréchet distance, precision and recall, over guidance.

`reference.claim --samples N` scores each run as soon as it is trained. The real images are

- those of the test split that the samples are compared with, ``reference``;
- other images, as many: **real to real**, what a perfect model with a perfect tokenizer would get;
- the same, encoded and decoded: **the tokenizer's floor**, what a perfect model of these tokens would get. It needs the
  images; where a data set has tokens alone, decoded tokens stand for real images, and there is no floor.

The other images are the second half of the test split where it is large enough, else training images. Features are
those of `reference.score.feature_network`. Precision and recall are `torch-fidelity`'s (the share of samples among real
images, and of real images among samples, by distances to the third nearest neighbour), of the first 5,000 images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reference.checkpoint import load_model
from reference.codes import TokenDataset, load_dataset, load_tokenizer
from reference.journal import Budget, Journal
from reference.processes import Stopped
from reference.sample import Sampler, save_grid
from reference.score import Gaussian, fit_gaussian, frechet_distance, halves, image_features
from reference.tokenizer import Tokenizer

NEIGHBOUR = 3  # of precision and recall, as their paper has it (arXiv 1904.06991)
NEIGHBOURHOOD_IMAGES = 5_000  # distances of all pairs: 10,000 would take four times as long
SAMPLES_AT_A_TIME = {"cpu": 100, "cuda": 1024}
FEATURES_AT_A_TIME = {"cpu": 64, "cuda": 256}
KEPT_PER_CLASS = 8  # tokens of samples that are kept to be looked at


@dataclass(frozen=True)
class RealImages:
    """What samples are compared with, and real images as good as they could be.

    ``labels`` are the classes that are sampled; ``reference`` are features; ``scores`` those of the other images, and
    of the same through the tokenizer where there are images.
    """

    labels: Tensor
    reference: Tensor
    fit: Gaussian
    scores: dict[str, dict[str, float]]


def choose(test: TokenDataset, train: TokenDataset, number: int) -> tuple[Any, TokenDataset, Any]:
    """Choose images to compare with, and other ones: indices of the first, and data set and indices of the others.

    >>> test, train = load_dataset("embedded", "test"), load_dataset("embedded", "train")
    >>> [len(indices) for indices in choose(test, train, 200)[::2]], choose(test, train, 200)[1] is test
    ([200, 200], True)
    >>> choose(test, train, 400)[1] is train
    True
    """
    if 2 * number <= len(test):
        others, first = halves(len(test), number)
        return first, test, others
    available = len(train) if train.images is None else min(len(train), len(train.images))
    if number > min(len(test), available):
        raise ValueError(
            f"samples: expected at most {min(len(test), available)}, as many as there are held-out images and training "
            f"images to set beside them, got {number}"
        )
    order = np.random.default_rng(0)
    return order.permutation(len(test))[:number], train, order.permutation(available)[:number]


def pixels(data: TokenDataset, indices: NDArray[np.int64], tokenizer: Tokenizer) -> NDArray[np.uint8]:
    """Return real images, or decoded tokens where there are tokens alone."""
    if data.images is not None:
        return data.images[indices]
    return tokenizer.decode(data.batch(indices)[0].numpy())


def neighbourhoods(features: Tensor, reference: Tensor) -> dict[str, float]:
    """Return precision and recall of features among reference features.

    Raises:
        ImportError: torch-fidelity is missing.
    """
    try:
        from torch_fidelity.metric_prc import prc_features_to_metric
    except ImportError as error:
        raise ImportError("precision and recall need torch-fidelity: pip install torch-fidelity") from error
    several = (features[:NEIGHBOURHOOD_IMAGES], reference[:NEIGHBOURHOOD_IMAGES])
    found = prc_features_to_metric(*several, prc_neighborhood=NEIGHBOUR, verbose=False)
    return {name: found[name] for name in ("precision", "recall")}


class SampleScores:
    """Scores samples of one data set.

    Args:
        spec: the data set, as `reference.codes.load_dataset` takes it.
        number: samples of each run and guidance.
        network: from `reference.score.feature_network`; its device is where models sample.
        precision: precision and recall too, with torch-fidelity.

    Raises:
        ValueError: there are not as many real images, or the data set has no tokenizer.
    """

    def __init__(self, spec: str, number: int, network: nn.Module, *, precision: bool = True) -> None:
        tokenizer = load_tokenizer(spec)
        if tokenizer is None:
            raise ValueError(f"data: expected one with a tokenizer, to make images of samples, got {spec!r}")
        self.tokenizer = tokenizer
        self.number = number
        self.network = network
        self.device = next(network.parameters()).device
        self.precision = precision
        self.real = self._real_images(spec)

    def _real_images(self, spec: str) -> RealImages:
        test, train = load_dataset(spec, "test"), load_dataset(spec, "train")
        first, others_data, others = choose(test, train, self.number)
        reference = self.features(pixels(test, first, self.tokenizer))
        fit = fit_gaussian(reference)
        tokens, labels = others_data.batch(others)
        sets = {"real to real": pixels(others_data, others, self.tokenizer)}
        if test.images is not None:
            sets["tokenizer's floor"] = self.tokenizer.decode(tokens.numpy())
        real = RealImages(labels, reference, fit, {})
        scores = {name: self._score(self.features(images), real) for name, images in sets.items()}
        return RealImages(labels, reference, fit, scores)

    def features(self, images: NDArray[np.uint8]) -> Tensor:
        """Compute features, on the CPU."""
        return image_features(self.network, images, batch_size=FEATURES_AT_A_TIME[self.device.type], progress=False)

    def _score(self, features: Tensor, real: RealImages) -> dict[str, float]:
        scores = {"frechet": frechet_distance(fit_gaussian(features), real.fit)}
        return {**scores, **(neighbourhoods(features, real.reference) if self.precision else {})}

    def sample(self, checkpoint: Path, guidance: float, seed: int) -> NDArray[np.integer]:
        """Sample the classes of the real images: tokens ``[N, H, W]``; the same seed draws the same noise."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = load_model(checkpoint).to(self.device, dtype)
        batch_size = min(self.number, SAMPLES_AT_A_TIME[self.device.type])
        sampler = Sampler(model, batch_size=batch_size, guidance=guidance)
        tokens = sampler(self.real.labels, torch.Generator(self.device).manual_seed(seed))
        return tokens.cpu().numpy()

    def kept(self) -> NDArray[np.int64]:
        """Return which samples are kept to be looked at: the first of each class, class by class."""
        labels = self.real.labels.numpy()
        return np.concatenate([np.flatnonzero(labels == label)[:KEPT_PER_CLASS] for label in np.unique(labels)])

    def grid(self, path: Path, tokens: NDArray[np.integer]) -> None:
        """Write samples that were kept as a PNG, a row for each class."""
        save_grid(path, self.tokenizer.decode(tokens), columns=KEPT_PER_CLASS)

    @contextmanager
    def scoring(self) -> Iterator[_Scoring]:
        """Score beside the sampling: distances take the host's cores while the GPU samples on."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            yield _Scoring(self, pool)


class _Scoring:
    def __init__(self, scores: SampleScores, pool: ThreadPoolExecutor) -> None:
        self._scores, self._pool = scores, pool
        self._waiting: list[tuple[dict[str, Any], Future[dict[str, float]]]] = []

    def add(self, entry: dict[str, Any], tokens: NDArray[np.integer]) -> None:
        # Features are computed here: another thread's work on the GPU would break a capture of a graph.
        features = self._scores.features(self._scores.tokenizer.decode(tokens))
        self._waiting.append((entry, self._pool.submit(self._scores._score, features, self._scores.real)))

    def results(self) -> Iterator[dict[str, Any]]:
        for entry, future in self._waiting:
            yield {**entry, **future.result()}


def score_run(
    scores: SampleScores,
    journal: Journal,
    run: dict[str, Any],
    checkpoint: Path,
    guidance_scales: Sequence[float],
    budget: Budget,
) -> None:
    """Score samples of a run at each guidance that the journal does not have yet.

    Args:
        scores: of the data set.
        journal: where a line for each guidance goes.
        run: what tells it from others, as ``{"way": "plain", "seed": 0}``; samples are kept under these names.
        checkpoint: the folder of the run.
        guidance_scales: of classifier-free guidance.
        budget: seconds; none of the scores starts where it is spent.

    Raises:
        Stopped: the budget is spent, and scores are missing.
    """
    for name, found in scores.real.scores.items():
        if journal.find(way=name, samples=scores.number) is None:
            journal.add({"way": name, "samples": scores.number, **found})
    with scores.scoring() as scoring:
        for guidance in guidance_scales:
            wanted = {**run, "guidance": guidance, "samples": scores.number}
            if journal.find(**wanted) is not None or not budget.allows(0):
                continue
            tokens = scores.sample(checkpoint, guidance, seed=run["seed"])
            name = f"{run['way'].replace(',', '').replace(' ', '-')}-{run['seed']}-{guidance:g}"
            folder = journal.path.parent / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{name}.npy", tokens[scores.kept()].astype(np.uint16))
            scoring.add(wanted, tokens)
        for entry in scoring.results():
            journal.add(entry)
            print(
                ", ".join(f"{key} {value:.4g}" for key, value in entry.items() if isinstance(value, float)), flush=True
            )
    missing = [g for g in guidance_scales if journal.find(**run, guidance=g, samples=scores.number) is None]
    if missing:
        raise Stopped
