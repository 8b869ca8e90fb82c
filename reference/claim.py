"""Is coarse-to-fine training better at the same cost? Several ways to train one model, over several seeds.

    python -m reference.claim --model S --data npz_mirrored:FILE --seeds 0,1,2 --output runs/claim

trains, for every seed, from the same weights and on the same data order:

    plain                    next-token training in full
    two levels               coarse to fine, for as many steps; its operations are the budget of the ways below
    three levels             for as many steps as cost the same
    plain, same operations   stopped at that budget: what a fair reader compares coarse to fine with
    plain, same seconds      stopped at the seconds that the slower of the two took, with the same seed

Every way has learning rates that belong to its own length. Seconds are those of training: without evaluations and
checkpoints, the steps that compile and capture counted as long as later ones (`reference.train.Clock`).

The folder holds ``results.json``, which is whole at any moment, ``report.md`` and ``nll.png``. The same command goes on
where it was stopped, or killed, and trains nothing twice; ``--report`` makes report and plot of what is there.
"""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from npp_kernels import PatchSchedule
from reference.codes import load_dataset
from reference.config import TrainConfig, options_parser, read_options, require_data
from reference.log import read_log
from reference.model import ModelConfig
from reference.outcomes import Outcome, Results, plot, read_results, report
from reference.processes import only_run_in, process_group
from reference.train import Run

EVALUATIONS = 12  # points of the curve of full plain training


@dataclass(frozen=True)
class Way:
    """One way to train.

    ``length`` says what sets the number of steps: ``"steps"``, as many as asked for; ``"operations"``, as many as cost
    what the first coarse-to-fine way costs; ``"seconds"``, as many as take the time of the slowest coarse-to-fine way.
    """

    name: str
    levels: int
    length: str

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return self.name.replace(",", "").replace(" ", "-")


WAYS = (
    Way("plain", 1, "steps"),
    Way("two levels", 2, "steps"),
    Way("three levels", 3, "operations"),
    Way("plain, same operations", 1, "operations"),
    Way("plain, same seconds", 1, "seconds"),
)


def operations(schedule: PatchSchedule, model: ModelConfig) -> int:
    """Return the operations of a run for each image of a batch, forward and backward.

    >>> from reference.model import ModelConfig
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
    if way.length == "steps":
        return total_steps
    if way.length == "seconds":
        plain = next(done[other.name] for other in ways if other.levels == 1 and other.length == "steps")
        return round(plain.steps * max(done[other.name].seconds for other in coarse) / plain.seconds)

    def cost(levels: int) -> int:
        return operations(PatchSchedule.coarse_to_fine(levels, total_steps, config.rate), model)

    return round(total_steps * cost(coarse[0].levels) / cost(way.levels))


def compare(
    config: TrainConfig, ways: Sequence[Way], seeds: Sequence[int], device: torch.device
) -> tuple[list[Outcome], dict[tuple[str, int], Path]]:
    """Train every way with every seed, but for what the results say already.

    Args:
        config: full plain training; its seed and levels do not count.
        ways: as `WAYS`: full plain training first, then coarse to fine, then what depends on their seconds.
        seeds: of weights, data order, augmentation and dropout.
        device: where to.

    Returns:
        All outcomes in the folder ``config.output``, and the folder of each run.

    Raises:
        ValueError: the folder holds another comparison, or one on another device.
    """
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
        part = operations(PatchSchedule.coarse_to_fine(way.levels, steps, config.rate), model)
        cost = part / (total_steps * model.training_flops(1))
        name = f"[{number}/{len(folders)}] {way.name}, seed {seed}"
        print(f"{name}: {steps} steps, {cost:.3f} of the operations", flush=True)
        changes: dict[str, Any] = {"seed": seed, "levels": way.levels, "output": str(folders[way.name, seed])}
        # Half a step more: epochs times steps of an epoch is rounded down.
        changes["epochs"] = (steps + 0.5) / steps_per_epoch
        outcome = train(way, replace(config, **changes), device, cost)
        results.add(outcome)
        error = outcome.curve["error"][-1]
        print(
            f"{outcome.nll:.4f} ± {error:.4f} nats per token after {outcome.seconds:.1f} s of training "
            f"and {outcome.setup_seconds:.1f} s of set-up",
            flush=True,
        )
    return results.outcomes, folders


def train(way: Way, config: TrainConfig, device: torch.device, cost: float) -> Outcome:
    """Train one way with one seed, or what is left of it."""
    with only_run_in(Path(config.output)):
        run = Run(config, device)
        assert run.test_data is not None
        run.train()
        log = read_log(run.folder / "log.csv")
    ends = [0.0] + [
        next(float(row["train_seconds"]) for row in log if int(row["step"]) == stage.end)
        for stage in run.schedule.stages
    ]
    evaluations = [row for row in log if row["test_nll"]]
    columns = {"step": "step", "seconds": "train_seconds", "nll": "test_nll", "error": "test_nll_error"}
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write and print what came out."""
    parser = options_parser(
        "python -m reference.claim",
        "Compare plain and coarse-to-fine training at equal cost, over seeds.",
        leave_out=("seed", "levels"),
    )
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--report", action="store_true", help="make report and plot of what is there; train nothing")
    config, options = read_options(parser, arguments, output="runs/claim")
    folder = Path(config.output)
    if not options.report:
        require_data(parser, config)
        with process_group() as device:
            compare(config, WAYS, [int(seed) for seed in options.seeds.split(",")], device)
    settings, outcomes = read_results(folder / "results.json")
    text = report(settings, outcomes)
    (folder / "report.md").write_text(text, encoding="utf-8")
    plot(outcomes, folder / "nll.png")
    print(f"\n{text}\nwritten: report.md, nll.png and results.json in {folder}")


if __name__ == "__main__":
    main()
