"""Train a class-conditional image model coarse to fine.

    python -m reference.train --model tiny                                   # on a CPU, on what the repository carries
    python -m reference.train --model B --data codes:DIR --output runs/b     # the paper's run, on one GPU
    torchrun --nproc-per-node 8 -m reference.train --model XL --data codes:DIR --output runs/xl

The same command again continues a run that was stopped, or killed, from its last checkpoint. ``--levels 1`` is plain
next-token training, ``--official`` the official code's formulation and optimizer; ``--help`` lists all options.

Exit status: 0 when the run is complete; 1 when it cannot go on (the loss is not finite, the disk is full, another run
uses its folder); 75 when it was asked to stop by SIGTERM, as schedulers do before they take a machine back: it finishes
its step (under torchrun, the steps up to the next report), saves a checkpoint, and the same command goes on from there.

Under torchrun every process trains on its part of each batch, and updates its part of the weights; the step is one CUDA
graph, the exchange of gradients included. ``--parallel fsdp`` is for a model that one GPU cannot hold. A run may go on
in another number of processes. Where one is lost, the others say so within a minute, and end with status 1.
"""

from __future__ import annotations

import errno
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from npp_kernels import PatchSchedule, Stage
from reference.network.model import Transformer
from reference.tokens.batches import Batches
from reference.tokens.codes import load_dataset
from reference.tokens.token_dataset import ArrayDataset
from reference.training import checkpoint
from reference.training.clock import Clock
from reference.training.config import FREE_TO_CHANGE, TrainConfig, parse
from reference.training.heartbeat import Heartbeat
from reference.training.log import COLUMNS, Log
from reference.training.processes import (
    STOPPED,
    Stopped,
    Termination,
    leave_stopping_to_the_run,
    only_run_in,
    process_group,
)
from reference.training.step import Progress, TrainStep

EXPECTED = {errno.ENOSPC, errno.EDQUOT, errno.EAGAIN}  # the disk is full, or another run is in the folder
# How many logits a batch of an evaluation has: few enough for a CPU's caches, enough for a GPU (512 MB in fp32).
EVALUATED_LOGITS = {"cpu": 2**23, "cuda": 2**27}


class Run:
    """One training run on one process: what is trained, where it stands, and its logs.

    Args:
        config: what to run.
        device: where to.
    """

    # What may be set before it trains: a time of `time.monotonic` at which a run on one process stops as when it is
    # asked to, and what is called after each evaluation, in a time that does not count as training.
    deadline = math.inf
    watch: Callable[[Run], None] | None = None

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.folder = Path(config.output)
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        dataset = load_dataset(config.data, "train", seed=config.seed)
        self.test_data = load_dataset(config.data, "test") if config.evaluate_every else None
        self.fingerprint = dataset.fingerprint()
        self.batches = Batches(dataset, config.batch_size, config.seed, self.rank, self.processes)
        self.schedule: PatchSchedule = config.schedule(self.batches.steps_per_epoch)

        torch.manual_seed(config.seed)  # the same weights in every process
        model_config = config.model_config(dataset.vocab_size, dataset.grid, dataset.num_classes)
        self.model = Transformer(model_config, fast=not config.official)
        if config.parallel != "fsdp":  # which takes it to the device in parts
            self.model.to(device)
        self.trainer = TrainStep(
            self.model,
            config.step_config(device.type),
            config.adamw_config(),
            batch_size=config.batch_size // self.processes,
        )
        torch.manual_seed(config.seed * self.processes + self.rank)  # dropout of its own in every process

        self.step = 0
        self.clock = Clock(device, 0.0, 0.0)
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = checkpoint.load_latest(self.folder, sharded=self.trainer.is_sharded)
        if saved is not None:
            self._restore(saved)

    def train(self) -> None:
        """Train to the end of the run.

        Raises:
            FloatingPointError: the loss or the gradient is no longer finite.
            Stopped: the process was asked to stop, and has saved.
        """
        log = closing(Log(self.folder, self.step, self.config.tensorboard)) if self.rank == 0 else nullcontext()
        bar = tqdm(
            total=self.schedule.total_steps,
            initial=self.step,
            unit="step",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            disable=self.rank != 0,
        )
        self.model.train()
        with log as open_log, bar, Termination() as termination:
            self._train(open_log, bar, termination)

    def close(self) -> None:
        """Give back what holds on to the process group."""
        self.trainer.close()

    def _train(self, log: Log | None, bar: tqdm, termination: Termination) -> None:
        loader = DataLoader(
            self.batches,
            batch_size=None,  # an item is a batch already
            sampler=range(self.step, self.schedule.total_steps),
            # Rows of an array are there sooner than another process could send them.
            num_workers=0 if isinstance(self.batches.dataset, ArrayDataset) else self.config.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_stopping_to_the_run,
            generator=torch.Generator(),  # or the loader would draw from the random state that a checkpoint restored
        )
        self.clock.start()
        for tokens, labels in loader:
            stage = self.schedule.at(self.step)
            lr = self.config.lr_at(self.step, self.schedule, self.batches.steps_per_epoch)
            self.trainer.run(tokens, labels, stage.patch, lr)
            self.clock.count(new_stage=self.step == stage.start)
            self.step += 1
            bar.update()
            reports = self._reports_now(stage)
            if reports:
                self._report(stage, lr, log, bar)
            if self.step < self.schedule.total_steps and self._has_to_stop(termination, reports):
                self._stop(log)

    def _report(self, stage: Stage, lr: float, log: Log | None, bar: tqdm) -> None:
        """Look at the steps since the last report, write them down, and save where that is due."""
        progress = self.trainer.report()
        speed = self.clock.stop() * self.config.batch_size
        self._check(progress, stage, lr)
        score = self._evaluate() if self._evaluates_now() else (None, None, None)
        if log is not None:
            log.write(self._row(stage, lr, progress, speed, score))
        if self.watch is not None and self._evaluates_now():
            self.watch(self)
        bar.set_description(f"patch {stage.patch} ({stage.index + 1}/{len(self.schedule.stages)})")
        bar.set_postfix_str(f"loss {progress.loss:.3f}, {speed:.0f} images/s, {self._time_left(stage, speed)} left")
        if self._saves_now(stage):
            self._save(log)
        self.clock.start()

    def _has_to_stop(self, termination: Termination, reports: bool) -> bool:
        if self.processes == 1:
            return termination.is_asked or time.monotonic() > self.deadline
        return reports and termination.is_asked_anywhere(self.device)  # all have to save after the same step

    def _stop(self, log: Log | None) -> None:
        """Save, and end the process."""
        if bool(self.trainer.sums.isfinite().all()):  # or the checkpoint before is worth more
            self.clock.stop()
            self._save(log)
        print(f"{self.folder}: asked to stop, at step {self.step}; the same command goes on", file=sys.stderr)
        raise Stopped

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluates_now(self) -> bool:
        # One process evaluates; the others wait for it in the next step's sum of gradients. A sharded model takes all.
        evaluates = self.test_data is not None and (self.rank == 0 or self.trainer.is_sharded)
        return evaluates and (self.step == self.schedule.total_steps or self._is_due(self.config.evaluate_every))

    def _reports_now(self, stage: Stage) -> bool:
        config = self.config
        every = (config.log_every, config.evaluate_every, config.checkpoint_every)
        return self.step == stage.end or any(self._is_due(number) for number in every)

    def _saves_now(self, stage: Stage) -> bool:
        return self._is_due(self.config.checkpoint_every) or self.step == stage.end

    def _check(self, progress: Progress, stage: Stage, lr: float) -> None:
        if not progress.is_finite:
            saved = checkpoint.checkpoints(self.folder)
            raise FloatingPointError(
                f"loss: expected finite numbers, got loss {progress.loss} and gradient norm {progress.gradient_norm} "
                f"in the {progress.steps} steps before step {self.step} (patch {stage.patch}, learning rate {lr:.3g}); "
                f"the last checkpoint before that is {saved[-1] if saved else 'none'}"
            )

    def _evaluate(self) -> tuple[float, float, str]:
        """Return the held-out negative log-likelihood at patch 1, its standard error, and the weights it is of.

        In nats per token. It is that of the weights as they are trained, also where a moving average is kept.
        """
        from reference.score import held_out_likelihood  # it needs Pillow, which training alone does not

        assert self.test_data is not None
        dtype = torch.bfloat16 if self.trainer.config.precision == "autocast" else torch.float32
        num_tokens = math.prod(self.test_data.grid)
        batch_size = max(1, EVALUATED_LOGITS[self.device.type] // (num_tokens * self.test_data.vocab_size))
        # The model is compiled for training. To compile it for evaluation too would take longer than it saves.
        with torch.compiler.set_stance("force_eager"):
            score = held_out_likelihood(self.model, self.test_data, batch_size=batch_size, dtype=dtype)
        return score.nats_per_token, score.standard_error * math.log(2) / num_tokens, "raw"

    def _row(
        self, stage: Stage, lr: float, progress: Progress, speed: float, score: tuple[Any, Any, Any]
    ) -> dict[str, Any]:
        values = (
            self.step, self.step / self.batches.steps_per_epoch, stage.index, stage.patch, lr, progress.loss,
            progress.gradient_norm, speed, self.clock.seconds, self.clock.setup_seconds, *score,
        )  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))

    def _time_left(self, stage: Stage, speed: float) -> str:
        """Return the time to the end of the run, later stages taken to be slower by their operations."""
        flops = self.model.config.training_flops
        work = sum(
            (later.end - max(later.start, self.step)) * flops(later.patch)
            for later in self.schedule.stages[stage.index :]
        )
        seconds = work / flops(stage.patch) * self.config.batch_size / max(speed, 1e-9)
        return tqdm.format_interval(seconds) if seconds < 1e9 else "?"

    def _save(self, log: Log | None) -> None:
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        all_random: list[Any] = [random]
        if self.processes > 1:
            all_random = [None] * self.processes
            dist.all_gather_object(all_random, random)
        trained = self.trainer.state()
        rest = {
            "step": self.step,
            "seconds": self.clock.seconds,
            "setup_seconds": self.clock.setup_seconds,
            "random": all_random,
            "data": self.fingerprint,
            "model_config": asdict(self.model.config),
            "train_config": asdict(self.config),
        }
        if log is not None:
            log.sync()
        if self.trainer.is_sharded:
            checkpoint.save_sharded(self.folder, trained, rest)
        elif self.rank == 0:
            checkpoint.save(self.folder, trained | rest)

    def _restore(self, saved: dict[str, Any]) -> None:
        for name, value in asdict(self.config).items():
            before = saved["train_config"].get(name, value)  # older checkpoints know fewer options
            if name not in FREE_TO_CHANGE and before != value:
                raise ValueError(
                    f"{name}: expected {before!r}, as in the run in {self.folder}, got {value!r}; "
                    "choose another --output for another run"
                )
        self._check_data(saved)
        self.trainer.load(saved)
        if len(saved["random"]) == self.processes:
            random = saved["random"][self.rank]
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"])
        else:  # the batches are the same in any number of processes, dropout is not
            if self.rank == 0:
                print(f"{self.folder}: {len(saved['random'])} processes before, {self.processes} now", file=sys.stderr)
            seed = np.random.SeedSequence((self.config.seed, saved["step"], self.processes, self.rank))
            torch.manual_seed(int(seed.generate_state(1)[0]))
        self.step = saved["step"]
        self.clock = Clock(self.device, saved["seconds"], saved["setup_seconds"])

    def _check_data(self, saved: dict[str, Any]) -> None:
        """Refuse to go on with other images than those that the run has seen."""
        expected = saved.get("data")
        if expected is None and self.rank == 0:
            print(f"{self.folder}: its checkpoint does not say what its data was; this is not checked", file=sys.stderr)
        for name, value in (expected or {}).items():
            if self.fingerprint[name] != value:
                raise ValueError(
                    f"data: expected {name} {value}, as in the run in {self.folder}, got {self.fingerprint[name]} "
                    f"from {self.config.data}; choose another --output for other data"
                )
        if saved["step"] > self.schedule.total_steps:
            raise ValueError(
                f"data: expected enough images for more than the {saved['step']} steps that the run in {self.folder} "
                f"has made, got {self.fingerprint['images']}, which make {self.schedule.total_steps}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    config = parse(arguments)
    with process_group() as device:
        return train(config, device)  # whose run is gone when the group goes, or gloo would wait for it forever


def train(config: TrainConfig, device: torch.device) -> int:
    """Train what is left of a run; return the exit status."""
    try:
        with Heartbeat(config.lost_after), only_run_in(Path(config.output)), closing(Run(config, device)) as run:
            if run.rank == 0:
                where = f"from step {run.step} of" if run.step else "for"
                cost = run.schedule.relative_cost(run.model.config.grid)
                print(
                    f"{config.output}: training {where} {run.schedule.total_steps} steps on {device}, {cost:.3f} of the"
                )
                print(f"tokens of plain training, in stages {run.schedule.boundaries}", flush=True)
            run.train()
    except Stopped:
        return STOPPED  # in place of an exception that holds the run
    except (FloatingPointError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in EXPECTED:
            raise
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
