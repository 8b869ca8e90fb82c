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

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reference.comparison.journal import Budget, Journal
from reference.comparison.outcomes import Outcome
from reference.network.model import Transformer
from reference.sample import Sampler
from reference.score import Gaussian, fit_gaussian, frechet_distance, halves, image_features
from reference.tokenizer import Tokenizer
from reference.tokens.codes import load_dataset, load_tokenizer
from reference.tokens.token_dataset import TokenDataset
from reference.train import Run
from reference.training.checkpoint import load_model
from reference.training.processes import Stopped

NEIGHBOUR = 3  # of precision and recall, as their paper has it (arXiv 1904.06991)
NEIGHBOURHOOD_IMAGES = 5_000  # distances of all pairs: 10,000 would take four times as long
SAMPLES_AT_A_TIME = {"cpu": 100, "cuda": 1024}
FEATURES_AT_A_TIME = {"cpu": 64, "cuda": 256}
KEPT_PER_CLASS = 8  # tokens of samples that are kept to be looked at
GUIDANCE_OVER_TIME = 1.5  # of samples while a run trains


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


def kept_name(way: str, seed: int, guidance: float) -> str:
    """Return the name of the file of samples that are kept.

    >>> kept_name("plain, same seconds", 0, 1.5)
    'plain-same-seconds-0-1.5.npy'
    """
    return f"{way.replace(',', '').replace(' ', '-')}-{seed}-{guidance:g}.npy"


class SampleScores:
    """Scores samples of one data set.

    Args:
        spec: the data set, as `reference.tokens.codes.load_dataset` takes it.
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

    def sample(self, model: Transformer, guidance: float, seed: int) -> NDArray[np.integer]:
        """Sample the classes of the real images: tokens ``[N, H, W]``; the same seed draws the same noise."""
        batch_size = min(self.number, SAMPLES_AT_A_TIME[self.device.type])
        sampler = Sampler(model, batch_size=batch_size, guidance=guidance)
        tokens = sampler(self.real.labels, torch.Generator(self.device).manual_seed(seed))
        return tokens.cpu().numpy()

    def kept(self, tokens: NDArray[np.integer]) -> NDArray[np.uint16]:
        """Return the samples that are kept to be looked at: the first of each class, class by class."""
        labels = self.real.labels.numpy()
        chosen = [np.flatnonzero(labels == label)[:KEPT_PER_CLASS] for label in np.unique(labels)]
        return tokens[np.concatenate(chosen)].astype(np.uint16)

    def score(self, features: Tensor) -> dict[str, float]:
        """Score features of images beside those of real ones."""
        return self._score(features, self.real)


class SampleObserver:
    """Scores samples of the runs of a comparison: of each at its end, of one seed while it trains too.

    ``samples.jsonl`` has a line for each run and guidance, and for the real images; ``over_time.jsonl`` for each point
    of a run's time; ``samples/`` a few tokens of each.

    Args:
        spec: the data set.
        network: from `reference.score.feature_network`.
        folder: of the comparison.
        number: samples of each run and guidance.
        guidance_scales: of classifier-free guidance.
        budget: seconds; no score starts where it is spent.
        watched_seed: whose runs are looked at closely: samples are kept, and scored while they train.
        over_time: samples while a run trains, at every second evaluation and `GUIDANCE_OVER_TIME`; 0 for none.
        precision: precision and recall too, with torch-fidelity.

    Raises:
        ValueError: the folder has scores of other numbers of samples.
    """

    def __init__(
        self,
        spec: str,
        network: nn.Module,
        folder: Path,
        number: int,
        guidance_scales: Sequence[float],
        budget: Budget,
        *,
        watched_seed: int | None = None,
        over_time: int = 0,
        precision: bool = True,
    ) -> None:
        self.folder = folder
        self.guidance_scales = guidance_scales
        self.budget = budget
        self.journal = Journal(folder / "samples.jsonl")
        for entry in self.journal.entries:
            if entry["samples"] != number:
                raise ValueError(
                    f"samples: expected {entry['samples']}, as in {self.journal.path}, got {number}: distances of "
                    "other numbers of images cannot be compared; choose another --output"
                )
        self.journal_over_time = Journal(folder / "over_time.jsonl")
        self.scores = SampleScores(spec, number, network, precision=precision)
        self.scores_over_time = SampleScores(spec, over_time, network, precision=False) if over_time else None
        self._evaluations = 0
        self._watched_seed = watched_seed
        for name, found in self.scores.real.scores.items():
            if self.journal.find(way=name, samples=number) is None:
                self.journal.add({"way": name, "samples": number, **found})

    def watch(self, run: Run) -> None:
        """Score samples of a run that trains."""
        self._evaluations += 1
        is_due = self._evaluations % 2 == 0 and run.step < run.schedule.total_steps
        if self.scores_over_time is None or run.config.seed != self._watched_seed or not is_due:
            return
        wanted = {"run": run.folder.name, "step": run.step}
        if self.journal_over_time.find(**wanted) is None:
            scores = self.scores_over_time
            tokens = scores.sample(run.model, GUIDANCE_OVER_TIME, run.config.seed)
            found = scores.score(scores.features(scores.tokenizer.decode(tokens)))
            entry = {**wanted, "seconds": run.clock.seconds, "samples": scores.number, **found}
            self.journal_over_time.add(entry)

    def finish(self, outcome: Outcome, checkpoint: Path) -> None:
        """Score samples of a run at each guidance that the journal does not have yet.

        Raises:
            Stopped: the budget is spent, and scores are missing.
        """
        run = {"way": outcome.way, "seed": outcome.seed, "samples": self.scores.number}
        missing = [g for g in self.guidance_scales if self.journal.find(**run, guidance=g) is None]
        if not missing:
            return
        dtype = torch.bfloat16 if self.scores.device.type == "cuda" else torch.float32
        model = load_model(checkpoint).to(self.scores.device, dtype)
        folder = self.folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        # Distances take the host's cores while the GPU samples on. Features are computed in this thread: another's work
        # on the GPU would break the capture of a graph.
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting = []
            for guidance in missing:
                if not self.budget.allows(0):
                    break
                tokens = self.scores.sample(model, guidance, outcome.seed)
                if outcome.seed == self._watched_seed:
                    np.save(folder / kept_name(outcome.way, outcome.seed, guidance), self.scores.kept(tokens))
                features = self.scores.features(self.scores.tokenizer.decode(tokens))
                waiting.append(({**run, "guidance": guidance}, pool.submit(self.scores.score, features)))
            for entry, future in waiting:
                found = future.result()
                self.journal.add({**entry, **found})
                figures = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                print(f"{outcome.way}, seed {outcome.seed}, guidance {entry['guidance']:g}: {figures}", flush=True)
        if len(waiting) < len(missing):
            raise Stopped
