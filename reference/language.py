"""Patches of text at equal seconds: plain training of a small Llama, PatchTrain, and Token-Superposition Training.

    python -m reference.language --seconds 40 --seeds 0,1,2 --output runs/language

trains, for every seed, a `LlamaForCausalLM` of transformers through `npp_kernels.integrations.transformers`, each way
for as many seconds of training, on sources of Python packages (`reference.tokens.corpus`):

    plain        next-token training
    PatchTrain   patches of 4 tokens for two thirds of the data, each example a quarter of the positions; then tokens
    TST          bags of 4 tokens for 0.3 of the seconds, examples four times as long, so that a step has as many
                 positions; nearer tokens of a bag count more; then tokens

The steps of each way follow from what a step takes, which is measured first. Scores are held-out nats per byte, of
single tokens. Each step is one CUDA graph (`npp_kernels.StepGraph`). ``language.jsonl`` has a line for each run; the
same command goes on where it was stopped; ``--report`` makes ``language.md`` and ``language.png`` of what is there.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npp_kernels import PatchSchedule, StepGraph
from npp_kernels.integrations.transformers import apply
from reference.claim import device_name, versions
from reference.comparison.journal import Budget, Journal
from reference.comparison.language_report import write_report
from reference.tokens.corpus import Corpus, load_corpus
from reference.training.clock import Clock
from reference.training.processes import Stopped, process_group
from reference.training.step import SETUP_STEPS

EVALUATIONS = 8  # of each run
TIMED_STEPS = 20  # of each kind, before the first run
MULTIPLE = 64  # of the hidden channels of SwiGLU
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0


@dataclass(frozen=True)
class LanguageConfig:
    """What all runs share."""

    vocab_size: int = 4096
    length: int = 512  # positions of an example
    batch_size: int = 64
    hidden_size: int = 512
    num_layers: int = 8
    num_heads: int = 8
    lr: float = 1e-3
    warmup_steps: int = 50
    decay_ratio: float = 0.2
    end_factor: float = 0.1
    seconds: float = 40.0
    held_out_examples: int = 512
    max_files: int | None = None


TINY = LanguageConfig(
    vocab_size=300, length=64, batch_size=4, hidden_size=64, num_layers=2, num_heads=2, warmup_steps=5, seconds=4.0,
    held_out_examples=16, max_files=40,
)  # fmt: skip


@dataclass(frozen=True)
class LanguageWay:
    """One way to train: how much of a run is on patches, and what a step of theirs reads.

    ``longer`` is the length of their examples over that of plain ones. ``share`` is of the data (PatchTrain) or of the
    seconds (Token-Superposition Training).
    """

    name: str
    patch: int = 1
    share: float = 0.0
    share_of: str = "data"
    longer: int = 1
    slot_weights: tuple[float, ...] | None = None

    def steps(self, seconds: float, fine: float, coarse: float) -> tuple[int, int]:
        """Return the numbers of coarse and fine steps of a run, from the seconds of the run and of one step of each.

        >>> LanguageWay("PatchTrain", 4, 2 / 3).steps(60, fine=1.0, coarse=0.25)
        (80, 40)
        >>> LanguageWay("TST", 4, 0.3, "seconds", longer=4).steps(60, fine=1.0, coarse=1.0)
        (18, 42)
        """
        if self.patch == 1:
            return 0, max(1, round(seconds / fine))
        if self.share_of == "seconds":
            return max(1, round(self.share * seconds / coarse)), max(1, round((1 - self.share) * seconds / fine))
        of_data = self.share / (1 - self.share) / self.longer  # coarse steps for each fine one
        number = seconds / (fine + of_data * coarse)
        return max(1, round(of_data * number)), max(1, round(number))

    def schedule(self, steps: tuple[int, int]) -> PatchSchedule:
        """Return the stages."""
        coarse, fine = steps
        return PatchSchedule([*([(self.patch, coarse)] if coarse else []), (1, coarse + fine)])


WAYS = (
    LanguageWay("plain"),
    LanguageWay("PatchTrain", 4, 2 / 3),
    LanguageWay("TST", 4, 0.3, "seconds", longer=4, slot_weights=(1.0, 1 / 2, 1 / 3, 1 / 4)),
)


class Text:
    """The corpus on a device: random examples of the training files, and the held-out ones.

    Args:
        corpus: the text.
        config: lengths.
        device: where the examples are cut.
    """

    def __init__(self, corpus: Corpus, config: LanguageConfig, device: torch.device) -> None:
        self.train = torch.from_numpy(corpus.train.astype("int64")).to(device)
        number = min(config.held_out_examples, len(corpus.test) // config.length)
        if number < 1:
            raise ValueError(f"max_files: expected enough text for an example held out, got {len(corpus.test)} tokens")
        held_out = torch.from_numpy(corpus.test[: number * config.length].astype("int64")).to(device)
        self.held_out = held_out.view(number, config.length)
        self.token_bytes = torch.from_numpy(corpus.token_bytes).to(device)

    def batch(self, size: int, length: int, generator: torch.Generator) -> Tensor:
        """Cut examples anywhere."""
        starts = torch.randint(len(self.train) - length, (size, 1), generator=generator, device=self.train.device)
        return self.train[starts + torch.arange(length, device=self.train.device)]


class Training:
    """A model and its step.

    Args:
        way: how to train.
        config: of model and optimizer.
        vocab_size: of the tokenizer.
        seed: of the weights.
        device: where to.
    """

    def __init__(self, way: LanguageWay, config: LanguageConfig, vocab_size: int, seed: int, device: torch.device):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        llama = LlamaConfig(
            vocab_size=vocab_size, hidden_size=config.hidden_size,
            intermediate_size=8 * config.hidden_size // 3 // MULTIPLE * MULTIPLE,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            max_position_embeddings=config.length, tie_word_embeddings=False,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(llama)
        self.model = model.to(device).train()
        self.patched = apply(self.model, 1, normalize="slot", slot_weights=way.slot_weights)
        on_gpu = device.type == "cuda"
        self.lr = torch.tensor(config.lr, device=device)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), self.lr, BETAS, weight_decay=WEIGHT_DECAY, fused=on_gpu, capturable=on_gpu
        )
        self.precision = torch.bfloat16 if on_gpu else torch.float32

        def step(ids: Tensor, *, patch: int) -> Tensor:
            self.patched.patch = patch
            with torch.autocast(device.type, self.precision, enabled=on_gpu):
                loss: Tensor = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        self.run = StepGraph(step, optimizers=optimizer, release_past=True, device=device)

    @torch.no_grad()
    def nats_per_byte(self, text: Text, batch_size: int) -> float:
        """Return the held-out loss of single tokens; the first of an example has nothing before it, and is left out."""
        self.model.eval()
        nats = torch.zeros((), dtype=torch.float64, device=text.held_out.device)
        with self.patched.paused():
            for ids in text.held_out.split(batch_size):
                with torch.autocast(ids.device.type, self.precision, enabled=ids.is_cuda):
                    logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
                nats += F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        self.model.train()
        return float(nats / text.token_bytes[text.held_out[:, 1:]].sum())


def time_steps(config: LanguageConfig, text: Text, vocab_size: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of a step on tokens and on patches, for each way that has both."""
    found: dict[str, list[float]] = {}
    for way in WAYS:
        training = Training(way, config, vocab_size, 0, device)
        generator = torch.Generator(device).manual_seed(0)
        seconds = []
        for patch, longer in ((1, 1), (way.patch, way.longer))[: 1 if way.patch == 1 else 2]:
            batches = [text.batch(config.batch_size, longer * config.length, generator) for _ in range(2)]
            for _ in range(SETUP_STEPS + 1):
                training.run(batches[0], patch=patch)
            _wait(device)
            begin = time.perf_counter()
            for number in range(TIMED_STEPS):
                training.run(batches[number % 2], patch=patch)
            _wait(device)
            seconds.append((time.perf_counter() - begin) / TIMED_STEPS)
        found[way.name] = seconds
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(
    way: LanguageWay, steps: tuple[int, int], config: LanguageConfig, text: Text, vocab_size: int, seed: int
) -> dict[str, Any]:
    """Train one way with one seed; return its curve."""
    device = text.train.device
    training = Training(way, config, vocab_size, seed, device)
    schedule = way.schedule(steps)
    generator = torch.Generator(device).manual_seed(seed)
    clock = Clock(device, 0.0, 0.0)
    every = max(1, schedule.total_steps // EVALUATIONS)
    curve: dict[str, list[float]] = {name: [] for name in ("step", "seconds", "tokens", "patch", "loss", "nats")}
    tokens, losses = 0, []
    clock.start()
    for number in range(schedule.total_steps):
        stage = schedule.at(number)
        factor = schedule.lr_factor(number, config.warmup_steps, config.decay_ratio, config.end_factor)
        training.lr.fill_(config.lr * factor)
        coarse = number < steps[0]
        length = config.length * (way.longer if coarse else 1)
        ids = text.batch(config.batch_size, length, generator)
        losses.append(training.run(ids, patch=stage.patch))
        clock.count(new_stage=number == stage.start)
        tokens += ids.numel()
        done = number + 1
        if done % every == 0 or done == stage.end:
            _wait(device)
            clock.stop()
            loss = torch.stack(losses).mean().item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"{way.name}, seed {seed}: expected a finite loss, got {loss} at step {done}")
            nats = training.nats_per_byte(text, config.batch_size)
            row = (done, clock.seconds, tokens, way.patch if coarse else 1, loss, nats)
            for name, value in zip(curve, row, strict=True):
                curve[name].append(value)
            losses = []
            clock.start()
    return {"curve": curve, "setup_seconds": clock.setup_seconds, "steps": list(steps)}


def compare(
    config: LanguageConfig, seeds: Sequence[int], folder: Path, device: torch.device, budget: Budget | None = None
) -> None:
    """Train every way with every seed, but for what the journal has.

    Raises:
        ValueError: the journal is that of another comparison.
        Stopped: the budget is spent.
    """
    budget = budget or Budget(None)
    journal = Journal(folder / "language.jsonl")
    corpus = load_corpus(config.vocab_size, config.max_files)
    text = Text(corpus, config, device)
    vocab_size = len(corpus.token_bytes)
    settings = {
        "config": asdict(config), "source": corpus.source, "device": device_name(device),
        "ways": [{**asdict(way), "slot_weights": list(way.slot_weights or [])} for way in WAYS],
    }  # fmt: skip
    header = journal.find(kind="settings")
    if header is None:
        timed = time_steps(config, text, vocab_size, device)
        header = {"kind": "settings", **settings, "versions": versions(), "step_seconds": timed}
        journal.add(header)
    for name, value in settings.items():
        if header[name] != value:
            raise ValueError(
                f"{name}: expected {header[name]}, as in {journal.path}, got {value}; choose another --output"
            )
    for seed, way in itertools.product(seeds, WAYS):
        if journal.find(kind="run", way=way.name, seed=seed) is not None:
            continue
        before = [entry["wall_seconds"] for entry in journal.entries if entry.get("way") == way.name]
        expected = max(before, default=config.seconds)
        if not budget.allows(expected):
            print(f"{way.name}, seed {seed}: left for later, some {expected:.0f} s of {budget.left:.0f}", flush=True)
            raise Stopped
        started = time.monotonic()
        fine = header["step_seconds"]["plain"][0]  # one figure for all ways, so that their lengths fit each other
        steps = way.steps(config.seconds, fine, header["step_seconds"][way.name][-1])
        found = train(way, steps, config, text, vocab_size, seed)
        entry = {"kind": "run", "way": way.name, "seed": seed, **found, "wall_seconds": time.monotonic() - started}
        journal.add(entry)
        last = {name: values[-1] for name, values in entry["curve"].items()}
        print(
            f"{way.name}, seed {seed}: {last['nats']:.4f} nats per byte after {last['seconds']:.1f} s, "
            f"{steps[0]} + {steps[1]} steps, {last['tokens'] / 1e6:.1f}M tokens",
            flush=True,
        )


def parse(arguments: Sequence[str] | None = None) -> tuple[LanguageConfig, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m reference.language", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Compare plain training of a language model with training on patches, at equal seconds.",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/language"), help="folder of the results")
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--seconds", type=float, help="of training, of each run; 40, or 4 with --tiny")
    parser.add_argument("--lr", type=float, help="peak learning rate; 0.001")
    parser.add_argument("--vocab-size", type=int, help="of the BPE; 256 for bytes; 4096, or 300 with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on little text, for a look on a CPU")
    parser.add_argument("--budget", type=float, help="seconds after which to stop; the same command goes on")
    parser.add_argument("--report", action="store_true", help="make report and plot of what is there; train nothing")
    options = parser.parse_args(arguments)
    given = {"lr": options.lr, "seconds": options.seconds, "vocab_size": options.vocab_size}
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(TINY if options.tiny else LanguageConfig(), **changes), options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write and print what came out."""
    config, options = parse(arguments)
    stopped = False
    if not options.report:
        with process_group() as device:
            try:
                compare(
                    config,
                    [int(seed) for seed in options.seeds.split(",")],
                    options.output,
                    device,
                    Budget(options.budget),
                )
            except Stopped:
                stopped = True
    print(f"\n{write_report(options.output)}\nwritten: language.md, language.png, language.jsonl in {options.output}")
    if stopped:
        raise Stopped


if __name__ == "__main__":
    main()
