"""A tiny Llama trained by Hugging Face's `Trainer`, first on patches of four bytes, then on single bytes.

    pip install '.[integrations]'
    python -m examples.transformers_trainer        # half a minute on one core of a CPU

The text is the source of some modules that come with Python. It prints the loss of each stage, the milliseconds of a
step, and the held-out loss on single bytes, on which the last stage trains.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import textwrap
import time

import torch
import transformers

from npp_kernels import PatchSchedule
from npp_kernels.integrations.transformers_trainer import PatchCollator, PatchTrainerMixin

MODULES = (argparse, inspect, textwrap, json, tempfile)
LENGTH, PADDING = 256, 0  # bytes of an example; no source has a byte of zero


class PatchTrainer(PatchTrainerMixin, transformers.Trainer):
    """The trainer as it is, on a schedule; for TRL, put the mix-in in front of `SFTTrainer`."""


class Clock(transformers.TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Start."""
        self.begin = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.begin)


def main() -> None:
    """Train, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of the whole run; the first half trains on patches")
    steps = parser.parse_args().steps
    transformers.set_seed(0)
    text = "".join(inspect.getsource(module) for module in MODULES).encode()
    examples = [{"input_ids": list(text[begin : begin + LENGTH])} for begin in range(0, len(text) - LENGTH, LENGTH)]
    train, held_out = examples[:-32], examples[-32:]

    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=LENGTH, pad_token_id=PADDING, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    schedule = PatchSchedule([(4, steps // 2), (1, steps)])
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=schedule.total_steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=2e-3, logging_steps=max(steps // 8, 1), eval_strategy="steps", eval_steps=steps // 2,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        clock = Clock()
        trainer = PatchTrainer(
            model, arguments, train_dataset=train, eval_dataset=held_out,
            data_collator=PatchCollator(4, pad_token_id=PADDING), callbacks=[clock],
            patch_schedule=schedule, lr_options={"warmup_steps": steps // 10, "decay_ratio": 0.3, "end_factor": 0.1},
        )  # fmt: skip
        how = "applies the output layer itself" if trainer.patched.formulation.fused else "takes the model's logits"
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train)} examples; the loss {how}")
        trainer.train()

    history = trainer.state.log_history
    for patch, until in schedule.boundaries:
        seconds = sorted(clock.seconds[until - steps // 2 : until])[steps // 4]
        loss = [entry["loss"] for entry in history if entry.get("patch") == patch][-1]
        print(f"patch {patch}: loss {loss:.3f}, {1000 * seconds:.0f} ms a step")
    print(f"by the patches of its steps, the run costs {schedule.relative_cost((LENGTH,)):.2f} of one on single bytes")
    loss = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
    print(f"held out, on single bytes: {loss:.3f} nats; {torch.tensor(256.0).log():.3f} for random guesses")
    prompt = b"def add_argument(self, "
    ids = torch.tensor([list(prompt)])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
