"""A long run of the fused path beside plain PyTorch, and a run that is killed again and again.

    python -m tests.long_run curves --minutes 12 --model S --batch-size 64     # on the GPU, if there is one
    python -m tests.long_run kills --kills 10 --epochs 4 --model tiny

``curves`` trains three models on the embedded tokens, coarse to fine: the fused one and a plain one from the same
weights on the same batches, and a plain one from other weights on other batches. Every hundred steps the gradients of
all parameters of the fused model are compared with those of the plain formulation at the same weights. At the end the
fused curve must lie as near to its plain one as the two plain ones lie to each other.

``kills`` runs `reference.train` twice, once to the end, and once with SIGKILL at moments drawn from ``--seed``; the two
last checkpoints must be equal bit for bit. Each exits with status 1 where that does not hold.
"""

import argparse
import copy
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

from npp_kernels import PatchSchedule, group_tokens
from reference.network.model import ModelConfig, Transformer
from reference.tokens.codes import load_dataset
from reference.training.checkpoint import load_latest
from tests.processes import ROOT

SMOOTHED = 20  # steps of a curve that are averaged before curves are compared


class Run:
    """One model in training: its own weights, batches and curve."""

    def __init__(self, config, options, *, fast, seed):
        torch.manual_seed(seed)
        self.model = Transformer(config, fast=fast).to(options.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.05)
        self.batches = random.Random(seed)
        self.options, self.curve = options, []

    def batch(self, data):
        indices = self.batches.sample(range(len(data)), self.options.batch_size)
        tokens, labels = data.batch(indices, epoch=0)
        return tokens.to(self.options.device), labels.to(self.options.device)

    def gradients(self, tokens, labels, patch):
        """Fill the gradients; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        dtype = torch.bfloat16
        with torch.autocast(self.options.device, dtype=dtype, enabled=self.options.precision == "bf16"):
            loss = self.model.loss(group_tokens(tokens, patch), labels, patch)
        loss.backward()
        return loss.detach()

    def step(self, data, patch):
        self.curve.append(self.gradients(*self.batch(data), patch))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def compare_gradients(fused, probe, batch, patch):
    """Return the largest distance of a parameter's gradients over their norm, and the parameter's name."""
    probe.model.load_state_dict(fused.model.state_dict())
    for run in (fused, probe):
        run.gradients(*batch, patch)
    distances = {}
    for (name, one), other in zip(fused.model.named_parameters(), probe.model.parameters(), strict=True):
        distances[name] = ((one.grad - other.grad).norm() / other.grad.norm().clamp(min=1e-12)).item()
    name = max(distances, key=distances.get)
    return distances[name], name


def smooth(curve):
    losses = torch.stack(curve).double().cpu()
    return losses.unfold(0, min(SMOOTHED, len(losses)), 1).mean(1)


def curves(options):
    """Train, compare, and return the exit status."""
    data = load_dataset("embedded", "train")
    config = ModelConfig.named(
        options.model, vocab_size=data.vocab_size, grid=data.grid, num_classes=data.num_classes,
        token_dropout=0.0, dropout=0.0, class_dropout=0.0,
    )  # fmt: skip
    fused = Run(config, options, fast=True, seed=0)
    plain = Run(config, options, fast=False, seed=0)
    other = Run(config, options, fast=False, seed=1)
    probe = copy.copy(plain)
    probe.model = copy.deepcopy(plain.model)
    probe.optimizer = torch.optim.SGD(probe.model.parameters(), lr=0.0)
    start, step, stage, worst = time.monotonic(), 0, -1, (0.0, "none")
    schedule = PatchSchedule.coarse_to_fine(3, 1000)  # of a thousandth of the time each
    while (done := (time.monotonic() - start) / (60 * options.minutes)) < 1:
        current = schedule.at(int(1000 * done))
        if current.index != stage:
            stage = current.index
            print(f"step {step}: patch {current.patch}", flush=True)
        for run in (fused, plain, other):
            run.step(data, current.patch)
        if step % options.every == 0:
            found = compare_gradients(fused, probe, fused.batch(data), current.patch)
            plain.batch(data)  # so that both go on with the same images
            worst = max(worst, found)
            print(f"step {step}: loss {fused.curve[-1]:.4f}, gradients within {found[0]:.2e}, {found[1]}", flush=True)
        step += 1
    one, same, another = (smooth(run.curve) for run in (fused, plain, other))
    distance, spread = (one - same).abs(), (same - another).abs()
    print(
        f"{step} steps in {options.minutes:g} minutes on {options.device}, {options.precision}, model {options.model}"
    )
    print(f"largest difference of a parameter's gradients: {worst[0]:.2e} of their norm, {worst[1]}")
    for what, values in (("fused and plain, same seed", distance), ("plain and plain, other seeds", spread)):
        print(f"{what}: mean {values.mean():.4f}, largest {values.max():.4f}, at the end {values[-1]:.4f}")
    allowed = 1e-3 if options.precision == "fp32" else 0.05
    good = distance.mean() <= spread.mean() and distance.max() <= spread.max() and worst[0] <= allowed
    print("within the spread" if good else f"NOT within the spread, or gradients further apart than {allowed}")
    return 0 if good else 1


def kills(options):
    """Run twice, kill one, compare, and return the exit status."""
    common = ["--model", options.model, "--epochs", str(options.epochs), "--batch-size", str(options.batch_size)]
    common += ["--workers", "0", "--checkpoint-every", str(options.checkpoint_every), "--ema", "0.99"]
    command = [sys.executable, "-m", "reference.train", *common, "--output"]
    whole, broken = options.output / "whole", options.output / "broken"
    start, quiet = time.monotonic(), subprocess.DEVNULL
    subprocess.run([*command, whole], cwd=ROOT, check=True, stdout=quiet, stderr=quiet)
    seconds = time.monotonic() - start
    moments = random.Random(options.seed)
    killed = 0
    while killed < options.kills:
        process = subprocess.Popen([*command, broken], cwd=ROOT, stdout=quiet, stderr=quiet)
        try:
            process.wait(timeout=moments.uniform(0.2, 0.6) * seconds)
            break  # it reached the end before its moment
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            state = load_latest(broken)
            print(
                f"killed, {killed} of {options.kills}; it goes on from step {state['step'] if state else 0}", flush=True
            )
    subprocess.run([*command, broken], cwd=ROOT, check=True, stdout=quiet, stderr=quiet)
    one, other = load_latest(broken), load_latest(whole)
    different = [] if one["step"] == other["step"] else ["step"]
    for part in ("model", "ema", "exp_avg", "exp_avg_sq"):
        for name, tensor in other[part].items():
            if not torch.equal(tensor, one[part][name]):
                different.append(f"{part} {name}")
    print(f"{killed} kills in a run of {seconds:.0f} s; step {one['step']}; {len(different)} tensors differ")
    return 1 if different or killed < options.kills else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("curves", "kills"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of curves")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--every", type=int, default=100, help="steps between comparisons of gradients")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--checkpoint-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=Path("runs/long_run"), help="a folder, without an earlier run")
    options = parser.parse_args()
    return curves(options) if options.what == "curves" else kills(options)


if __name__ == "__main__":
    sys.exit(main())
