"""Is coarse-to-fine training better at the same cost? Several ways to train one model, over several seeds.

    python -m reference.claim --model S --data npz_mirrored:FILE --seeds 0,1,2 --output runs/claim

trains, for every seed, from the same weights and on the same data order:

    plain                    next-token training in full
    two levels               coarse to fine, for as many steps; its operations are the budget of the ways below
    three levels             for as many steps as cost the same
    plain, same operations   stopped at that budget: what a fair reader compares coarse to fine with
    plain, same seconds      stopped at the seconds that the slower of the two took, with the same seed

Every way has learning rates that belong to its own length. Seconds are those of training: without evaluations and
checkpoints, the steps that compile and capture counted as long as later ones (`reference.training.clock`).

``--samples 10000`` also scores samples of every run, at each of ``--guidance-scales``
(`reference.comparison.sample_scores`).

The folder holds ``results.json``, which is whole at any moment, ``samples.jsonl``, ``report.md`` and plots. The same
command goes on where it was stopped, or killed, and trains nothing twice; ``--budget`` stops it after so many seconds;
``--report`` makes report and plots of what is there.
"""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from npp_kernels import PatchSchedule
from reference.comparison import sample_report
from reference.comparison.journal import Budget, Journal
from reference.comparison.outcomes import Outcome, Results, plot, read_results, report
from reference.comparison.sample_scores import SampleObserver
from reference.network.model import ModelConfig
from reference.score import feature_network
from reference.tokens.codes import load_dataset, load_tokenizer
from reference.train import Run
from reference.training.config import TrainConfig, options_parser, read_options, require_data
from reference.training.log import read_log
from reference.training.processes import Stopped, only_run_in, process_group

EVALUATIONS = 12  # points of the curve of full plain training
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)  # of samples


@dataclass(frozen=True)
class Way:
    """One way to train.

    ``length`` says what sets the number of steps: ``"steps"``, as many as asked for; ``"operations"``, as many as cost
    what two levels of ``"steps"`` cost; ``"seconds"``, as many as take the time of the slowest coarse-to-fine way.
    ``rate`` and ``lr`` stand in for those of the comparison.
    """

    name: str
    levels: int
    length: str
    rate: float | None = None
    lr: float | None = None

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return self.name.replace(",", "").replace(" ", "-")

    def schedule(self, steps: int, config: TrainConfig) -> PatchSchedule:
        """Return the stages of a run of so many steps."""
        return PatchSchedule.coarse_to_fine(self.levels, steps, self.rate or config.rate)

    def changed(self, config: TrainConfig) -> TrainConfig:
        """Return the run of this way, in place of full plain training."""
        factor = 1.0 if self.lr is None else self.lr / config.lr
        rate = self.rate or config.rate
        return replace(config, levels=self.levels, rate=rate, lr=factor * config.lr, end_lr=factor * config.end_lr)


TWO_LEVELS = Way("two levels", 2, "steps")
WAYS = (
    Way("plain", 1, "steps"),
    TWO_LEVELS,
    Way("three levels", 3, "operations"),
    Way("plain, same operations", 1, "operations"),
    Way("plain, same seconds", 1, "seconds"),
)


def operations(schedule: PatchSchedule, model: ModelConfig) -> int:
    """Return the operations of a run for each image of a batch, forward and backward.

    >>> from reference.network.model import ModelConfig
    >>> schedule = PatchSchedule.coarse_to_fine(levels=2, total_steps=1000)
    >>> round(operations(schedule, ModelConfig.named("B")) / (1000 * ModelConfig.named("B").training_flops(1)), 3)
    0.623
    """
    return sum((stage.end - stage.start) * model.training_flops(stage.patch) for stage in schedule.stages)


def steps_of(
    way: Way, ways: Sequence[Way], config: TrainConfig, model: ModelConfig, total_steps: int, done: dict[str, Outcome]
) -> int:
    """Return how many steps a way trains.

    Args:
        way: one of ``ways``.
        ways: those that are compared, coarse-to-fine ones before those that depend on them.
        config: of full plain training.
        model: its dimensions, which say what a step costs.
        total_steps: of full plain training.
        done: what came of earlier ways with the same seed, by name.
    """
    coarse = [other for other in ways if other.levels > 1]
    budget = next((other for other in coarse if other.length == "steps"), TWO_LEVELS)
    if way.length == "steps":
        return total_steps
    if way.length == "seconds":
        plain = next(done[other.name] for other in ways if other.levels == 1 and other.length == "steps")
        return round(plain.steps * max(done[other.name].seconds for other in coarse) / plain.seconds)

    def cost(other: Way) -> int:
        return operations(other.schedule(total_steps, config), model)

    return round(total_steps * cost(budget) / cost(way))


def compare(
    config: TrainConfig,
    ways: Sequence[Way],
    seeds: Sequence[int],
    device: torch.device,
    *,
    observer: SampleObserver | None = None,
    budget: Budget | None = None,
) -> tuple[list[Outcome], dict[tuple[str, int], Path]]:
    """Train every way with every seed, but for what the results say already.

    Args:
        config: full plain training; its seed and levels do not count.
        ways: as `WAYS`: full plain training first, then coarse to fine, then what depends on their seconds.
        seeds: of weights, data order, augmentation and dropout.
        device: where to.
        observer: scores samples of a run while it trains, and after it, before the results have it.
        budget: seconds; a run that took longer with another seed than is left is not started.

    Returns:
        All outcomes in the folder ``config.output``, and the folder of each run.

    Raises:
        ValueError: the folder holds another comparison, or one on another device.
        Stopped: the budget is spent.
    """
    budget = budget or Budget(None)
    data = load_dataset(config.data, "train")
    model = config.model_config(data.vocab_size, data.grid, data.num_classes)
    steps_per_epoch = len(data) // config.batch_size
    total_steps = config.schedule(steps_per_epoch).total_steps
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, evaluate_every=config.evaluate_every or max(1, total_steps // EVALUATIONS))
    results = Results(folder / "results.json", config, ways)
    folders = {(way.name, seed): folder / f"{way.folder}-{seed}" for way in ways for seed in seeds}
    for number, (seed, way) in enumerate(itertools.product(seeds, ways), start=1):
        if way.name in results.of_seed(seed):
            continue
        if others := {outcome.device for outcome in results.outcomes} - {device_name(device)}:
            raise ValueError(
                f"device: expected {min(others)}, as in {results.path}, got {device_name(device)}: "
                "seconds of several devices cannot be compared; choose another --output"
            )
        steps = steps_of(way, ways, config, model, total_steps, results.of_seed(seed))
        part = operations(way.schedule(steps, config), model)
        cost = part / (total_steps * model.training_flops(1))
        name = f"[{number}/{len(folders)}] {way.name}, seed {seed}"
        expected = max((each.wall_seconds for each in results.outcomes if each.way == way.name), default=0.0)
        if not budget.allows(expected):
            print(f"{name}: left for later, it would take some {expected:.0f} s of {budget.left:.0f}", flush=True)
            raise Stopped
        print(f"{name}: {steps} steps, {cost:.3f} of the operations", flush=True)
        started = time.monotonic()
        changes: dict[str, Any] = {"seed": seed, "output": str(folders[way.name, seed])}
        # Half a step more: epochs times steps of an epoch is rounded down.
        changes["epochs"] = (steps + 0.5) / steps_per_epoch
        watch = None if observer is None else observer.watch
        outcome = train(way, replace(way.changed(config), **changes), device, cost, budget, watch)
        if observer is not None:
            observer.finish(outcome, folders[way.name, seed])
        outcome = replace(outcome, wall_seconds=time.monotonic() - started)
        results.add(outcome)
        error = outcome.curve["error"][-1]
        print(
            f"{outcome.nll:.4f} ± {error:.4f} nats per token after {outcome.seconds:.1f} s of training "
            f"and {outcome.setup_seconds:.1f} s of set-up",
            flush=True,
        )
    return results.outcomes, folders


def train(
    way: Way,
    config: TrainConfig,
    device: torch.device,
    cost: float,
    budget: Budget,
    watch: Callable[[Run], None] | None = None,
) -> Outcome:
    """Train one way with one seed, or what is left of it."""
    with only_run_in(Path(config.output)):
        run = Run(config, device)
        run.deadline, run.watch = budget.deadline, watch
        assert run.test_data is not None
        run.train()
        log = read_log(run.folder / "log.csv")
    ends = [0.0] + [
        next(float(row["train_seconds"]) for row in log if int(row["step"]) == stage.end)
        for stage in run.schedule.stages
    ]
    evaluations = [row for row in log if row["test_nll"]]
    columns = {
        "step": "step", "seconds": "train_seconds", "nll": "test_nll", "error": "test_nll_error", "patch": "patch",
        "loss": "loss",
    }  # fmt: skip
    outcome = Outcome(
        way=way.name,
        seed=config.seed,
        levels=way.levels,
        steps=run.step,
        epochs=run.step / run.batches.steps_per_epoch,
        operations=cost,
        stages=[
            {"patch": stage.patch, "steps": stage.end - stage.start, "seconds": end - start}
            for stage, (start, end) in zip(run.schedule.stages, itertools.pairwise(ends), strict=True)
        ],
        setup_seconds=run.clock.setup_seconds,
        curve={name: [float(row[column]) for row in evaluations] for name, column in columns.items()},
        num_images=len(run.test_data),
        device=device_name(device),
        versions=versions(),
    )
    del run
    gc.collect()  # the next run wants the memory of this one's graph
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return outcome


def device_name(device: torch.device) -> str:
    """Return the name of a device as its maker has it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or ""}
    for package in ("triton", "numpy"):
        found[package] = importlib.metadata.version(package)
    return found


def run_comparison(
    config: TrainConfig,
    ways: Sequence[Way],
    seeds: Sequence[int],
    device: torch.device,
    *,
    samples: int = 0,
    guidance_scales: Sequence[float] = GUIDANCE_SCALES,
    over_time: int = 0,
    budget: Budget | None = None,
) -> None:
    """Train every way with every seed, and score ``samples`` of each, and ``over_time`` of the first while it trains.

    Raises:
        Stopped: the budget, in seconds, is spent.
    """
    budget = budget or Budget(None)
    observer = None
    if samples:
        folder = Path(config.output)
        observer = SampleObserver(
            config.data,
            feature_network(device),
            folder,
            samples,
            guidance_scales,
            budget,
            watched_seed=seeds[0],
            over_time=over_time,
        )
    compare(config, ways, seeds, device, observer=observer, budget=budget)


def write_report(folder: Path) -> str:
    """Write report and plots of what is in a folder; return the report."""
    settings, outcomes = read_results(folder / "results.json")
    plot(outcomes, folder / "nll.png")
    text = report(settings, outcomes)
    entries = Journal(folder / "samples.jsonl").entries
    if sample_report.of_runs(entries):
        text += "\n" + samples_section(folder, settings["data"], entries, outcomes)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def samples_section(folder: Path, data: str, entries: list[dict[str, Any]], outcomes: Sequence[Outcome]) -> str:
    """Draw what samples scored, and return it as Markdown."""
    sample_report.plot(entries, folder / "samples.png")
    if (folder / "samples").exists():  # figures that were kept for a page have their picture, and not the samples
        tokenizer = load_tokenizer(data)
        assert tokenizer is not None, "samples were scored as images"
        sample_report.picture(entries, folder / "samples", tokenizer, folder / "grid.png")
    levels = {outcome.way: outcome.levels for outcome in outcomes}
    coarse, plain = ([way for way in levels if (levels[way] > 1) == is_coarse] for is_coarse in (True, False))
    return "\n".join(
        [
            "## Samples",
            "",
            f"Of {max(entry['samples'] for entry in entries)} images each; features of EfficientNet-Lite0 (no FID). "
            "± is the sample standard deviation over seeds; precision and recall are at the guidance with the smallest "
            "mean distance.",
            "",
            sample_report.table(entries),
            "",
            "Differences with the same seed, ± standard error of the mean; below 0 coarse to fine is better:",
            "",
            sample_report.differences(entries, coarse, plain),
            "",
            "![Fréchet distance over guidance, recall over precision](samples.png)",
            "",
            "![Samples: a row for each way, as in the table](grid.png)",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write and print what came out."""
    parser = options_parser(
        "python -m reference.claim",
        "Compare plain and coarse-to-fine training at equal cost, over seeds.",
        leave_out=("seed", "levels"),
    )
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--samples", type=int, default=0, help="of each run and guidance, to be scored; 0 for none")
    usual = ",".join(f"{scale:g}" for scale in GUIDANCE_SCALES)
    parser.add_argument("--guidance-scales", default=usual, help="of the samples, with commas")
    parser.add_argument("--budget", type=float, help="seconds after which to stop; the same command goes on")
    parser.add_argument("--report", action="store_true", help="make report and plots of what is there; train nothing")
    config, options = read_options(parser, arguments, output="runs/claim")
    folder = Path(config.output)
    stopped = False
    if not options.report:
        require_data(parser, config)
        seeds = [int(seed) for seed in options.seeds.split(",")]
        scales = [float(scale) for scale in options.guidance_scales.split(",")]
        budget = Budget(options.budget)
        with process_group() as device:
            try:
                run_comparison(
                    config, WAYS, seeds, device, samples=options.samples, guidance_scales=scales, budget=budget
                )
            except Stopped:
                stopped = True
    if (folder / "results.json").exists() or not stopped:
        text = write_report(folder)
        print(f"\n{text}\nwritten: report.md, plots and results.json in {folder}")
    if stopped:
        raise Stopped


if __name__ == "__main__":
    main()
