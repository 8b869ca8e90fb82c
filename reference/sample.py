"""Sample images from a trained `Transformer`, token by token: the inference that patch training leaves unchanged.

    python -m reference.sample --checkpoint runs/first/coarse-to-fine --out grid.png --classes 0 1 2 3 --guidance 2.0

writes a grid of samples, one row per class; ``--codes FILE.npy`` also keeps the tokens. For ImageNet,

    python -m reference.sample --checkpoint c2i_B_256.pt --per-class 50 --decoder vq16:decode --adm samples.npz

writes what the standard evaluator of FID (openai/guided-diffusion, ``evaluations/evaluator.py``) reads: ``arr_0``,
uint8 ``[N, height, width, 3]``. ``vq16:decode`` names a function ``decode`` in your own module ``vq16``, which runs
the tokenizer's decoder: int64 tokens ``[B, H, W]`` on the model's device in, floats ``[B, 3, height, width]`` in -1 to
1 out. Classes take turns, since the evaluator computes the Inception Score on stretches of 5,000 images.

One step reads a key-value cache of fixed size, draws all ids on the device and moves the position on by itself. On a
GPU its kernels (`reference.sampling.decoding`) are captured once as a CUDA graph, which is replayed for every token.
"""

from __future__ import annotations

import argparse
import math
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from reference.network.model import KeyValueCache, Transformer
from reference.sampling.choosing import Drawing, draw, filter_logits
from reference.sampling.decoding import Decoding, serves
from reference.tokens.codes import load_tokenizer
from reference.training.checkpoint import load_latest, load_model, read

TILE_SIZE = 64  # pixels of a sample in the grid, at least
TILE_GAP = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIN_TEMPERATURE = 1e-6  # the likeliest id in all but name, and logits divided by it are still finite; see top_k=1
WARM_UP_STEPS = 3  # before a capture: kernels are compiled, libraries set themselves up


class Sampler:
    """Samples batches of one size from one model, with one set of options.

    >>> from reference.network.model import ModelConfig
    >>> model = Transformer(ModelConfig.named("tiny", vocab_size=512, grid=(4, 4), num_classes=10))
    >>> sampler = Sampler(model, batch_size=2, guidance=2.0, top_k=100)
    >>> sampler(torch.tensor([3, 7, 7]), torch.Generator().manual_seed(0)).shape
    torch.Size([3, 4, 4])

    Args:
        model: its parameters' device and dtype are those of the decoding; dropout is off while it samples.
        batch_size: images at a time.
        guidance: scale of classifier-free guidance, ``uncond + guidance · (cond − uncond)``; at 1 the unconditional
            half is not computed.
        temperature: divides the logits; at least 1e-6.
        top_k, top_p: as for `reference.sampling.choosing.filter_logits`.
        fast: whether the kernels of `reference.sampling.decoding` may serve it; they do on a GPU, for a model that
            is ``fast``.

    Raises:
        ValueError: an option out of range.
        FloatingPointError: the logits are not finite, in a call.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        batch_size: int,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        fast: bool = True,
    ):
        for name, value, is_good, expected in (
            ("batch_size", batch_size, batch_size >= 1, "at least 1"),
            ("guidance", guidance, 0 <= guidance < math.inf, "at least 0 and finite"),
            ("temperature", temperature, MIN_TEMPERATURE <= temperature < math.inf, f"{MIN_TEMPERATURE} or more"),
            ("top_k", top_k, top_k is None or top_k >= 1, "None or at least 1"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ):
            if not is_good:
                raise ValueError(f"{name}: expected {expected}, got {value}")
        self.model = model
        self.batch_size = batch_size
        self.drawing = Drawing(guidance, temperature, top_k, top_p)
        self.decode = model.decode

        # Everything a step reads or writes stays where it is: the graph keeps addresses, not values.
        weight = model.output.weight
        rows = batch_size if guidance == 1 else 2 * batch_size
        config = model.config
        self.cache: KeyValueCache = model.make_cache(rows, weight.dtype, weight.device)
        self.ids = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        self.labels = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.position = torch.zeros((), dtype=torch.int64, device=weight.device)
        self.noise = torch.ones(batch_size, config.vocab_size, device=weight.device)
        self.tokens = torch.zeros(batch_size, math.prod(config.grid), dtype=torch.int64, device=weight.device)
        self.is_finite = torch.ones((), dtype=torch.bool, device=weight.device)  # have all logits been, in this batch
        self.kernels: Decoding | None = None
        if fast and serves(model):
            self.kernels = Decoding(model, self.cache, self.labels, self.position)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, labels: Tensor, generator: torch.Generator, *, progress: bool = False) -> Tensor:
        """Sample one image per label: ``labels [N] -> tokens [N, H, W]``, int64.

        The same labels, generator state, options and machine give the same images.
        """
        if labels.numel() and not 0 <= labels.min() <= labels.max() < self.model.config.num_classes:
            raise ValueError(
                f"labels: expected 0 to {self.model.config.num_classes - 1}, got {labels.min()} to {labels.max()}"
            )
        batches = labels.to(self.ids.device).split(self.batch_size)
        was_training = self.model.training
        self.model.eval()
        try:
            with tqdm(total=len(batches) * self.tokens.shape[1], unit="token", disable=not progress) as bar:
                samples = [self._sample_batch(batch, generator, bar) for batch in batches]
        finally:
            self.model.train(was_training)
        return torch.cat(samples).unflatten(1, self.model.config.grid)

    def _sample_batch(self, labels: Tensor, generator: torch.Generator, bar: tqdm) -> Tensor:
        if self.ids.is_cuda and self.graph is None:
            self.graph = self._capture()
        number = len(labels)
        full = F.pad(labels, (0, self.batch_size - number))  # the last batch may be short
        unconditional = torch.full_like(full, self.model.config.num_classes)
        self.labels.copy_(full if self.drawing.guidance == 1 else torch.cat((full, unconditional)))
        self.position.zero_()
        self.is_finite.fill_(True)
        for index in range(self.tokens.shape[1]):
            self.noise.exponential_(generator=generator)
            if index == 0 and self.kernels is None:
                self._choose(self.model.decode(None, self.labels, self.position, self.cache))
            elif self.graph is not None:
                self.graph.replay()
            else:
                self._step()
            bar.update()
        if not self.is_finite:
            for kept in (*self.cache.keys, *self.cache.values):
                kept.zero_()  # NaN would come through the mask, into the next batch
            raise FloatingPointError(
                "logits: expected finite numbers, got infinities or NaN: the model's weights are not finite, or the "
                f"guidance of {self.drawing.guidance} or the temperature of {self.drawing.temperature} leads out of "
                f"{self.noise.dtype}"
            )
        return self.tokens[:number].clone()

    def _step(self) -> None:
        """Feed the last ids, choose the next ones."""
        if self.kernels is not None:
            self.kernels.step(self.drawing, self.noise, self.ids, self.tokens, self.is_finite)
            return
        ids = self.ids if self.drawing.guidance == 1 else self.ids.repeat(2)
        self._choose(self.decode(ids, None, self.position, self.cache))

    def _choose(self, logits: Tensor) -> None:
        """Choose the next ids from the logits, keep them, and move on."""
        guidance, temperature, top_k, top_p = self.drawing
        if guidance != 1:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance * (conditional - unconditional)
        logits = logits / temperature
        self.is_finite.logical_and_(logits.isfinite().all())
        logits = filter_logits(logits, top_k=top_k, top_p=top_p)
        self.ids.copy_(draw(logits, self.noise))
        self.tokens.index_copy_(1, self.position.view(1), self.ids.unsqueeze(1))
        self.position.add_(1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Capture one step; what the trial steps left behind is overwritten by the first batch."""
        self.position.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(min(WARM_UP_STEPS, self.tokens.shape[1])):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.position.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph


@torch.no_grad()
def decode_with(decoder: Callable[[Tensor], Tensor], tokens: Tensor, batch_size: int) -> NDArray[np.uint8]:
    """Turn tokens ``[N, H, W]`` into uint8 images ``[N, height, width, 3]`` with a decoder network.

    Args:
        decoder: int64 ``[B, H, W]`` to floats ``[B, 3, height, width]`` in -1 to 1.
        tokens: on the decoder's device.
        batch_size: images at a time.
    """
    images = np.empty(0, dtype=np.uint8)
    for start in tqdm(range(0, len(tokens), batch_size), desc="decoding", unit="batch"):
        pixels = decoder(tokens[start : start + batch_size]).float()
        batch = (pixels * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        if start == 0:  # 50,000 images of 256×256 take 10 GB: no room for a list and its concatenation
            images = np.empty((len(tokens), *batch.shape[1:]), dtype=np.uint8)
        images[start : start + len(batch)] = batch
    return images


def save_adm(path: str | Path, images: NDArray[np.uint8]) -> None:
    """Save images as the evaluator of FID reads them: ``arr_0``, uint8 ``[N, height, width, 3]``."""
    colour = images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=-1)
    with Path(path).open("wb") as file:  # given a name, NumPy would append its own suffix
        np.savez(file, colour)


def save_grid(path: str | Path, images: NDArray[np.uint8], columns: int) -> None:
    """Save images ``[N, height, width]`` or ``[N, height, width, 3]`` as one PNG, row by row."""
    zoom = max(1, TILE_SIZE // images.shape[1])
    tiles = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = tiles.shape[1] + TILE_GAP, tiles.shape[2] + TILE_GAP
    rows = math.ceil(len(tiles) / columns)
    canvas = np.full((rows * height + TILE_GAP, columns * width + TILE_GAP, *tiles.shape[3:]), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = TILE_GAP + index // columns * height, TILE_GAP + index % columns * width
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    Image.fromarray(canvas).save(path)


def run_settings(checkpoint: str | Path) -> dict[str, Any]:
    """Return what a checkpoint of ours, or the newest in a folder, was trained with; little for an official one.

    Beside the options of the run, ``averaged`` tells whether there is a moving average of the weights, and ``step``
    after how many steps.
    """
    path = Path(checkpoint)
    if path.is_dir():
        state = load_latest(path) or {}
    else:
        state = read(path, mmap=True)
    return {**state.get("train_config", {}), "averaged": bool(state.get("ema")), "step": state.get("step")}


def describe_weights(settings: dict[str, Any], choice: str) -> str:
    """Say which weights a figure is of.

    >>> describe_weights({"averaged": True, "ema": 0.9999, "step": 1000}, "average")
    'moving average of the weights, 90% of which is still the weights before training (--weights raw for the others)'

    Args:
        settings: from `run_settings`.
        choice: ``"average"`` or ``"raw"``, as ``--weights`` was given.
    """
    if choice == "raw" or not settings.get("averaged"):
        return "raw weights"
    decay, step = settings.get("ema"), settings.get("step")
    beginning = decay**step if decay and step is not None else 0.0
    if beginning < 0.01:
        return "moving average of the weights"
    return (
        f"moving average of the weights, {beginning:.0%} of which is still the weights before training "
        "(--weights raw for the others)"
    )


def positive(text: str) -> int:
    """Read a number of the command line that has to be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what sampling and scoring are both told of the model and of the drawing of tokens."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a folder for its newest")
    parser.add_argument(
        "--weights", choices=("average", "raw"), default="average", help="the moving average, where the run kept one"
    )
    parser.add_argument(
        "--data", help="data set of the tokens, as reference.tokens.codes names it; that of the run by default"
    )
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance; that of the run by default")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens that make up this share"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--batch-size", type=positive, default=64, help="images at a time")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="where to compute")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32", help="of the model")


def load_sampler(model: Transformer, options: argparse.Namespace, settings: dict[str, Any]) -> Sampler:
    """Return the sampler that the command line describes; what it leaves open is as the run's settings say."""
    return Sampler(
        model,
        batch_size=options.batch_size,
        guidance=settings.get("guidance", 1.0) if options.guidance is None else options.guidance,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m reference.sample", description="Sample images from a checkpoint.")
    add_model_arguments(parser)
    parser.add_argument("--classes", type=int, nargs="+", help="which to sample; all by default")
    parser.add_argument("--per-class", type=positive, default=8, help="samples of each class")
    parser.add_argument("--out", type=Path, help="PNG file for a grid, one row per class")
    parser.add_argument("--codes", type=Path, help=".npy file for the tokens, uint16 [N, H, W], classes taking turns")
    parser.add_argument("--decoder", help="MODULE:FUNCTION that turns tokens into images, where k-means does not")
    parser.add_argument("--adm", type=Path, help=".npz file for the evaluator of FID")
    options = parser.parse_args(arguments)
    if not (options.out or options.codes or options.adm):
        parser.error("nothing to write: give --out, --codes or --adm")
    for name in ("out", "codes", "adm"):
        path = getattr(options, name)
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{name}: expected a folder that is there, got {path.parent}")
    if options.out is not None and options.out.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--out: expected a picture, such as grid.png, got {options.out}")
    return options


def main() -> None:
    """Sample, decode, write."""
    options = parse()
    settings = run_settings(options.checkpoint)
    model = load_model(options.checkpoint, ema=options.weights == "average")
    model.to(options.device, DTYPES[options.dtype])
    print(f"sampling from the {describe_weights(settings, options.weights)}")
    # What decodes is looked for before minutes of sampling.
    decoder: Any = pkgutil.resolve_name(options.decoder) if options.decoder else None
    tokenizer = None
    if decoder is None and (options.out or options.adm):
        tokenizer = load_tokenizer(options.data or settings.get("data", ""))
        if tokenizer is None:
            raise SystemExit("these tokens need a decoder: give --decoder, or --data with a k-means tokenizer")
    classes = options.classes or list(range(model.config.num_classes))
    labels = torch.tensor(classes * options.per_class)
    sampler = load_sampler(model, options, settings)
    tokens = sampler(labels, torch.Generator(options.device).manual_seed(options.seed), progress=True)
    if options.codes:
        with options.codes.open("wb") as file:
            np.save(file, tokens.cpu().numpy().astype(np.uint16))
    if options.out or options.adm:
        if tokenizer is None:
            images = decode_with(decoder, tokens, options.batch_size)
        else:
            images = tokenizer.decode(tokens.cpu().numpy())
        if options.adm:
            save_adm(options.adm, images)
        if options.out:
            by_class = images.reshape(options.per_class, len(classes), *images.shape[1:]).swapaxes(0, 1)
            save_grid(options.out, by_class.reshape(images.shape), columns=options.per_class)
    print(f"wrote {', '.join(str(path) for path in (options.codes, options.out, options.adm) if path)}")


if __name__ == "__main__":
    main()
