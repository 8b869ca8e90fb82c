"""The trainer: optimizer, step, data order, and whole runs that are killed, resumed, divided and broken."""

import csv
import doctest
import errno
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import reference.training.clock
import reference.training.config
import reference.training.optimizer
import reference.training.step
from npp_kernels import group_tokens
from reference import train
from reference.network.model import ModelConfig, Transformer
from reference.tokens.batches import Batches
from reference.tokens.codes import load_dataset
from reference.training.checkpoint import checkpoints, load_latest
from reference.training.clock import Clock
from reference.training.config import TrainConfig, parse
from reference.training.optimizer import AdamWConfig, FlatAdamW
from reference.training.processes import STOPPED, only_run_in
from reference.training.step import SETUP_STEPS, StepConfig, TrainStep
from reference.training.torch_adamw import TorchAdamW
from tests.processes import environment, kill_when, run_in, started, torchrun, wait_until

CONFIG = ModelConfig(
    vocab_size=37, grid=(4, 4), num_classes=5, dim=24, num_layers=2, num_heads=2, token_dropout=0.0, dropout=0.0,
    class_dropout=0.0,
)  # fmt: skip
WITHOUT_DROPOUT = ["--dropout", "0", "--class-dropout", "0"]


def model_of(config=CONFIG, *, fast=True, device="cpu"):
    torch.manual_seed(0)
    model = Transformer(config, fast=fast)
    torch.nn.init.normal_(model.output.weight, std=0.1)  # at zero, the first step would train nothing but itself
    return model.to(device).train()


def batch_of(step, batch_size=6):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(CONFIG.vocab_size, (batch_size, *CONFIG.grid), generator=generator)
    return tokens, torch.randint(CONFIG.num_classes, (batch_size,), generator=generator)


def train_steps(config, adamw=None, *, patches=(2, 2, 1, 1), device="cpu", model=None):
    """Train a few steps; return the step, and the mean loss of each."""
    model = model or model_of(fast=not config.official, device=device)
    step = TrainStep(model, config, adamw or AdamWConfig(), batch_size=6)
    losses = []
    for number, patch in enumerate(patches):
        step.run(*batch_of(number), patch=patch, lr=1e-2 / (number + 1))
        losses.append(step.report().loss)
    return step, losses


def assert_same_weights(step, other, **tolerance):
    expected = other.optimizer.state()["model"]
    for name, weight in step.optimizer.state()["model"].items():
        torch.testing.assert_close(weight, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


FP32 = StepConfig(precision="fp32", compile=False)


@pytest.mark.parametrize("module", [reference.training.config, reference.training.optimizer, reference.training.step])
def test_docstrings_run(module):
    assert doctest.testmod(module).failed == 0


# Clipping that acts (the gradient's norm is about 1), that does not, and none at all.
@pytest.mark.parametrize("clip", [0.1, 100.0, 0.0])
def test_flat_adamw_is_adamw_with_clipping(clip):
    adamw = AdamWConfig(clip=clip, weight_decay=0.3, ema=0.9)
    step, losses = train_steps(FP32, adamw)
    model = model_of()
    official = train_steps(StepConfig(precision="fp32", compile=False, official=True), adamw, model=model)
    assert losses == pytest.approx(official[1], rel=1e-5)
    for part, tensors in step.optimizer.state().items():
        for name, tensor in tensors.items():
            expected = official[0].optimizer.state()[part][name]
            torch.testing.assert_close(tensor, expected, rtol=2e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_parameters_of_many_shapes_and_sizes(dtype, device):
    """More than one launch takes, smaller and larger than a program's block; 16-bit weights are rounded fp32 ones."""
    sizes = [1, 3, 1024, 1025, 5000, *range(2, 40, 3), 777]
    models = [
        torch.nn.ParameterList([torch.nn.Parameter(torch.randn(size, 1 + size % 2)) for size in sizes]) for _ in "ab"
    ]
    models[1].load_state_dict(models[0].state_dict())
    adamw = AdamWConfig(weight_decay=0.3, clip=5.0, ema=0.9)
    optimizer = FlatAdamW(models[0].to(device), adamw, dtype=dtype)
    official = TorchAdamW(models[1].to(device), adamw)
    for _ in range(3):
        for parameter, other in zip(*(model.parameters() for model in models), strict=True):
            parameter.grad = torch.randn(parameter.shape, device=device).to(dtype)
            other.grad = parameter.grad.float()
        norms = []
        for one in (optimizer, official):
            one.set_lr(1e-2)
            one.collect(first=True)
            norms.append(one.update().item())
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert norms[0] > 5
    for part, tensors in official.state().items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                optimizer.state()[part][name], tensor, rtol=1e-5, atol=1e-6, msg=f"{part} {name}"
            )
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, optimizer.state()["model"][name].to(dtype)), name


def test_every_parameter_needs_a_gradient():
    model = torch.nn.Linear(2, 2)
    optimizer = FlatAdamW(model, AdamWConfig())
    model.weight.grad = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="model: expected a gradient of every parameter, got none of bias"):
        optimizer.collect(first=True)


def test_norms_do_not_decay():
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2, bias=False), "norm": torch.nn.RMSNorm(2)})
    torch.nn.init.ones_(model["linear"].weight)
    optimizer = FlatAdamW(model, AdamWConfig(weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.set_lr(0.1)
    optimizer.collect(first=True)
    optimizer.update()
    assert model["linear"].weight.flatten().tolist() == pytest.approx([0.95] * 4)
    assert model["norm"].weight.tolist() == [1.0, 1.0]


def test_master_weights_keep_what_bf16_would_round_away():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = FlatAdamW(model, AdamWConfig(weight_decay=0.0), dtype=torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    optimizer.set_lr(1e-4)  # bf16 has nothing between 1 and 1 - 2^-8, some 40 steps away
    for _ in range(60):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).backward()
        optimizer.collect(first=True)
        optimizer.update()
    assert optimizer.state()["model"]["weight"].item() == pytest.approx(1 - 60e-4, abs=1e-5)
    assert model.weight.item() == torch.tensor(1 - 60e-4).bfloat16().item()


def test_moving_average():
    step, _ = train_steps(FP32, AdamWConfig(ema=0.75), patches=(2,))
    before, after = model_of().state_dict(), step.optimizer.state()
    for name, average in after["ema"].items():
        torch.testing.assert_close(average, 0.75 * before[name] + 0.25 * after["model"][name])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_accumulated_parts_are_the_whole_batch(precision):
    whole, losses = train_steps(StepConfig(precision=precision, compile=False))
    parts, part_losses = train_steps(StepConfig(precision=precision, compile=False, accumulate=3))
    tolerance = 1e-5 if precision == "fp32" else 2e-3
    assert part_losses == pytest.approx(losses, rel=tolerance)
    if precision == "fp32":
        assert_same_weights(parts, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_low_precision_follows_fp32(precision):
    _, expected = train_steps(FP32)
    step, losses = train_steps(StepConfig(precision=precision, compile=False))
    assert losses == pytest.approx(expected, rel=1e-2)
    assert all(weight.dtype == torch.float32 for weight in step.optimizer.state()["model"].values())


def test_both_formulations_train_alike():
    fast, losses = train_steps(FP32, patches=(2, 4, 2, 1))
    official = StepConfig(precision="fp32", compile=False, official=True)
    other, official_losses = train_steps(official, patches=(2, 4, 2, 1))
    assert losses == pytest.approx(official_losses, rel=1e-5)
    assert_same_weights(fast, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("official", [False, True])
def test_state_goes_on_where_it_was(official):
    config = StepConfig(precision="fp32", compile=False, official=official)
    adamw = AdamWConfig(ema=0.9)
    whole, losses = train_steps(config, adamw, patches=(2, 2, 1, 1))
    half, _ = train_steps(config, adamw, patches=(2, 2))
    state = {part: dict(value) if isinstance(value, dict) else value for part, value in half.state().items()}
    resumed = TrainStep(model_of(fast=not official), config, adamw, batch_size=6)
    resumed.load(state)
    rest = []
    for number in (2, 3):
        resumed.run(*batch_of(number), patch=1, lr=1e-2 / (number + 1))
        rest.append(resumed.report().loss)
    assert rest == losses[2:]
    assert_same_weights(resumed, whole, rtol=0, atol=0)


def test_state_of_another_model_is_refused():
    step, _ = train_steps(FP32, patches=())
    other = TrainStep(model_of(ModelConfig(**{**vars(CONFIG), "dim": 32})), FP32, AdamWConfig(), batch_size=6)
    with pytest.raises(ValueError, match=r"state\['model'\]\[.*\]: expected \(.*\), got"):
        other.load(step.state())
    with pytest.raises(ValueError, match="state: expected 'ema'"):
        TrainStep(model_of(), FP32, AdamWConfig(ema=0.9), batch_size=6).load(step.state())


# Dynamo looks at .grad of all that goes into a compiled block, activations too.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_all_layers_share_what_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = ModelConfig(**{**vars(CONFIG), "num_layers": 5, "drop_path": 0.2})
    torch.compiler.reset()
    before = counters["stats"]["unique_graphs"]
    train_steps(StepConfig(precision="fp32"), patches=(2, 1, 2), model=model_of(config))
    assert counters["stats"]["unique_graphs"] - before == 2  # one for each patch


def test_loss_compiles_without_a_break():
    model = model_of().eval()
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True, dynamic=False)
    tokens, labels = batch_of(0)
    for patch in (1, 2):
        groups = group_tokens(tokens, patch)
        torch.testing.assert_close(compiled(groups, labels, patch), model.loss(groups, labels, patch))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("precision", lambda: StepConfig(precision="fp8")),
        ("precision", lambda: StepConfig(precision="bf16", official=True)),
        ("accumulate", lambda: StepConfig(accumulate=0)),
        ("batch_size", lambda: TrainStep(model_of(), StepConfig(accumulate=4), AdamWConfig(), batch_size=6)),
        ("tokens", lambda: TrainStep(model_of(), FP32, AdamWConfig(), batch_size=3).run(*batch_of(0), patch=2, lr=0.1)),
        ("batch_size", lambda: Batches(load_dataset("embedded", "test"), 401, seed=0)),
        ("batch_size", lambda: Batches(load_dataset("embedded", "test"), 9, seed=0, processes=2)),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()


def test_batches_are_a_function_of_the_step():
    dataset = load_dataset("embedded", "test")  # 400 images
    whole = Batches(dataset, 60, seed=3)
    assert whole.steps_per_epoch == 6
    tokens, labels = whole[8]
    assert tokens.shape == (60, 16, 16)
    again = Batches(dataset, 60, seed=3)[8]
    assert torch.equal(tokens, again[0])
    assert torch.equal(labels, again[1])
    parts = [Batches(dataset, 60, seed=3, rank=rank, processes=3)[8][0] for rank in range(3)]
    assert torch.equal(torch.cat(parts), tokens)
    assert not torch.equal(whole[2][0], tokens)  # the same place of another epoch
    assert not torch.equal(Batches(dataset, 60, seed=4)[8][0], tokens)
    epoch = torch.cat([whole[step][0] for step in range(6)]).flatten(1)
    assert len(epoch.unique(dim=0)) >= 355  # no image twice; a few in the data are alike


def test_command_line_takes_the_paper_and_the_preset():
    paper = parse(["--model", "XXL", "--data", "codes:DIR"])
    assert (paper.lr, paper.end_lr, paper.weight_decay, paper.beta1, paper.beta2) == (1e-4, 1e-5, 0.05, 0.9, 0.95)
    assert (paper.batch_size, paper.epochs, paper.warmup_epochs, paper.clip) == (256, 300, 5, 1.0)
    assert (paper.dropout, paper.class_dropout, paper.guidance) == (0.1, 0.1, 1.65)
    tiny = parse(["--model", "tiny", "--lr", "0.5", "--no-graph", "--levels", "3"])
    assert (tiny.data, tiny.lr, tiny.graph, tiny.levels) == ("embedded", 0.5, False, 3)
    with pytest.raises(SystemExit):
        parse(["--model", "B"])


def test_learning_rate_of_a_run():
    config = TrainConfig(data="embedded", epochs=10, warmup_epochs=1)
    schedule = config.schedule(100)
    assert schedule.boundaries == ((2, 500), (1, 1000))
    assert config.lr_at(250, schedule, 100) == pytest.approx(1e-4)
    assert config.lr_at(550, schedule, 100) == pytest.approx(0.5e-4)
    assert config.lr_at(1000 - 1, schedule, 100) == pytest.approx(1e-5, rel=0.1)


def arguments_of(folder, *others):
    """A run of 40 steps, 20 of them at patch 2, with a checkpoint every 8."""
    fixed = ["--model", "tiny", "--epochs", "0.5", "--batch-size", "20", "--workers", "0", "--checkpoint-every", "8"]
    return [*fixed, "--log-every", "5", "--output", str(folder), *others]


def logged(folder, columns=("step", "patch", "lr", "loss", "gradient_norm", "test_nll")):
    with (folder / "log.csv").open(newline="") as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    others = ("--ema", "0.9", "--evaluate-every", "30")
    # Killed in the second stage, between two checkpoints; the other run is never stopped.
    run = ["reference.train", *arguments_of(tmp_path / "killed", *others)]
    kill_when(lambda: any(path.name == "step-00000024.pt" for path in checkpoints(tmp_path / "killed")), *run)
    assert 24 <= load_latest(tmp_path / "killed")["step"] < 40
    command = [sys.executable, "-m", *run]
    resumed = subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=120, text=True)
    assert "training from step" in resumed.stdout

    command = [sys.executable, "-m", "reference.train", *arguments_of(tmp_path / "whole", *others)]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=120)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert [row[0] for row in logged(tmp_path / "whole")][-3:] == ["32", "35", "40"]
    killed, whole = load_latest(tmp_path / "killed"), load_latest(tmp_path / "whole")
    assert killed["step"] == whole["step"] == 40
    for part in ("model", "ema", "exp_avg", "exp_avg_sq", "counters"):
        for name, tensor in whole[part].items():
            assert torch.equal(killed[part][name], tensor), f"{part} {name}"
    assert torch.equal(killed["random"][0]["cpu"], whole["random"][0]["cpu"])


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(tmp_path):
    others = ("--ema", "0.9", "--checkpoint-every", "1000")
    run = ["reference.train", *arguments_of(tmp_path / "stopped", *others)]
    with started(*run) as process:
        wait_until(lambda: (tmp_path / "stopped/log.csv").exists() and len(logged(tmp_path / "stopped")) > 1, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == STOPPED == 75
    stopped_at = load_latest(tmp_path / "stopped")["step"]
    assert 10 <= stopped_at < 40
    assert train.main(arguments_of(tmp_path / "stopped", *others)) == 0
    assert train.main(arguments_of(tmp_path / "whole", *others)) == 0
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    stopped, whole = load_latest(tmp_path / "stopped"), load_latest(tmp_path / "whole")
    assert all(torch.equal(tensor, stopped["ema"][name]) for name, tensor in whole["ema"].items())


def write_codes(directory):
    generator = np.random.default_rng(0)
    for kind, values in (
        ("codes", generator.integers(0, 16_384, (100, 1, 1, 16))),
        ("labels", np.arange(100)[:, None]),
    ):
        (directory / f"imagenet256_{kind}").mkdir(parents=True)
        for image, value in enumerate(values):
            np.save(directory / f"imagenet256_{kind}" / f"{image}.npy", value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_whose_reading_processes_are_signalled_too(tmp_path, number):
    """A scheduler signals every process of a job; a killed run's readers may keep its lock for a while."""
    write_codes(tmp_path / "data")
    folder = tmp_path / "run"
    arguments = arguments_of(folder, "--data", f"codes:{tmp_path}/data", "--workers", "1", "--epochs", "10")
    with started("reference.train", *arguments, start_new_session=True) as process:
        wait_until(lambda: checkpoints(folder), process)
        if number == signal.SIGTERM:
            os.killpg(process.pid, number)
            assert process.wait(60) == STOPPED
        else:
            process.send_signal(number)
            assert process.wait(60) == -number
    saved = load_latest(folder)["step"]
    assert 8 <= saved < 40
    command = [sys.executable, "-m", "reference.train", *arguments]
    resumed = subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=120, text=True)
    assert f"training from step {saved} of 40 steps" in resumed.stdout
    assert load_latest(folder)["step"] == 40


def test_two_processes_stop_after_the_same_step(tmp_path):
    _, _, *run = torchrun(2, "reference.train", *arguments_of(tmp_path, "--epochs", "5", "--checkpoint-every", "1000"))
    with started(*run) as process:
        wait_until(lambda: (tmp_path / "log.csv").exists() and len(logged(tmp_path)) > 1, process)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    saved = load_latest(tmp_path)
    assert 10 <= saved["step"] < 400
    assert saved["step"] % 5 == 0  # a report, at which all processes ask each other
    assert len(saved["random"]) == 2


def test_a_bad_state_is_not_saved_when_the_run_is_asked_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(train.Termination, "is_asked", True, raising=False)
    monkeypatch.setattr(train.Termination, "__init__", lambda self: setattr(self, "_before", None))
    bad = arguments_of(tmp_path / "bad", "--lr", "1e30", "--warmup-epochs", "0")
    run = train.Run(parse(bad), torch.device("cpu"))
    run.trainer.sums.fill_(float("nan"))
    with pytest.raises(SystemExit) as caught:
        run.train()
    assert (caught.value.code, run.step) == (75, 1)
    assert load_latest(tmp_path / "bad") is None
    assert train.main(arguments_of(tmp_path / "good")) == STOPPED
    assert load_latest(tmp_path / "good")["step"] == 1


def test_two_runs_in_one_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reference.training.processes.LOCK_SECONDS", 0.1)
    arguments = arguments_of(tmp_path / "run", "--epochs", "0.05")
    with only_run_in(tmp_path / "run"):
        assert train.main(arguments) == 1
    message = capsys.readouterr().err
    assert "stopped: [Errno 11] output: expected a folder that no other run uses, got one in which a run is" in message
    assert checkpoints(tmp_path / "run") == []
    assert train.main(arguments) == 0  # the lock went with the run
    assert train.main(arguments) == 0


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr("filelock.FileLock.acquire", lambda lock, **options: (_ for _ in ()).throw(error))
    with only_run_in(tmp_path):
        assert "its file system has no locks" in capsys.readouterr().err
    monkeypatch.setattr("filelock.FileLock.acquire", lambda lock, **options: (_ for _ in ()).throw(PermissionError))
    with pytest.raises(PermissionError), only_run_in(tmp_path):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_run_on_a_full_disk_says_so(tmp_path, capsys):
    (tmp_path / "step-00000008.partial").symlink_to("/dev/full")
    assert train.main(arguments_of(tmp_path)) == 1
    assert "stopped: [Errno 28] cannot be written, No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("step-*")] == []
    assert [row[0] for row in logged(tmp_path)] == ["5", "8"]


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_two_processes_train_like_one(tmp_path, accumulate):
    others = ("--epochs", "0.2", *WITHOUT_DROPOUT, "--evaluate-every", "16")
    run_in(2, "reference.train", *arguments_of(tmp_path / "two", *others), "--accumulate", accumulate, timeout=120)
    assert train.main(arguments_of(tmp_path / "one", *others)) == 0
    columns = ("step", "loss", "gradient_norm", "test_nll")
    two, one = logged(tmp_path / "two", columns), logged(tmp_path / "one", columns)
    assert [row[0] for row in two] == [row[0] for row in one] == ["5", "8", "10", "15", "16"]
    for ours, theirs in zip(two, one, strict=True):
        assert [float(x or 0) for x in ours] == pytest.approx([float(x or 0) for x in theirs], rel=1e-4)
    assert len(load_latest(tmp_path / "two")["random"]) == 2


def test_the_clock_counts_set_up_steps_as_long_as_later_ones(monkeypatch):
    now, launched = [0.0], [0.0]

    def wait(device=None):
        now[0] += launched[0]
        launched[0] = 0.0

    monkeypatch.setattr(reference.training.clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    clock = Clock(torch.device("cuda"), 0.0, 0.0)
    expected, expected_setup = 0.0, 0.0
    for setup_step, step in ((10.0, 1.0), (20.0, 0.25)):
        for number in range(20):
            launched[0] += setup_step if number < SETUP_STEPS else step
            clock.count(new_stage=number == 0)
            if number in (1, 10, 19):  # a report in the set-up, and two after it
                wait()
                assert clock.stop() == pytest.approx(1 / setup_step if number == 1 else 1 / step)
                now[0] += 100.0  # an evaluation
                clock.start()
        expected += 20 * step
        expected_setup += SETUP_STEPS * setup_step
        assert clock.seconds == pytest.approx(expected)
        assert clock.setup_seconds == pytest.approx(expected_setup)


def test_a_run_without_a_finite_loss_stops(tmp_path, capsys):
    status = train.main(arguments_of(tmp_path, "--lr", "1e30", "--warmup-epochs", "0", "--epochs", "0.2"))
    assert status == 1
    message = capsys.readouterr().err
    assert "stopped: loss: expected finite numbers, got loss nan" in message
    assert "steps before step 5" in message
    assert load_latest(tmp_path) is None


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    arguments = arguments_of(tmp_path, "--epochs", "0.05")
    assert train.main(arguments) == 0
    with pytest.raises(ValueError, match=r"levels: expected 2, as in the run in .*, got 1"):
        train.main([*arguments, "--levels", "1"])
    assert train.main([*arguments, "--log-every", "1"]) == 0  # finished already, and nothing that counts has changed


def write_tokens(path, num_images=60, seed=0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 30, (num_images, 4, 4)).astype(np.uint16)
    tokens[0, 0, 0] = 29  # the vocabulary is read off the ids
    labels = np.arange(num_images, dtype=np.uint8) % 3
    np.savez(path, train=tokens, test=tokens[:5], train_labels=labels, test_labels=labels[:5])


def test_a_run_goes_on_with_its_own_data_only(tmp_path, capsys):
    data, folder = tmp_path / "tokens.npz", tmp_path / "run"
    arguments = arguments_of(folder, "--data", f"npz:{data}", "--epochs", "2")  # 6 steps
    write_tokens(data)
    assert train.main(arguments) == 0
    write_tokens(data, seed=1)
    with pytest.raises(
        ValueError, match=r"^data: expected content [0-9a-f]{64}, as in the run in .*run, got [0-9a-f]{64}"
    ):
        train.main(arguments)
    write_tokens(data, num_images=40)
    with pytest.raises(ValueError, match=r"^data: expected images 60, as in the run in .*run, got 40 from npz:"):
        train.main(arguments)
    # a checkpoint of before there was a fingerprint: read, with a note, but never past the end of the run
    (path,) = checkpoints(folder)[-1:]
    state = torch.load(path, weights_only=True)
    del state["data"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"more than the 6 steps that the run in .*, got 40, which make 4"):
        train.main(arguments)
    write_tokens(data)
    capsys.readouterr()
    assert train.main(arguments) == 0
    assert "does not say what its data was" in capsys.readouterr().err


@pytest.mark.gpu
# Dynamo looks at .grad of all that goes into a compiled block, activations too. It hides the warning by replacing
# warnings.showwarning, which a warning that is an error never reaches.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_graph_computes_what_ordinary_steps_compute(compile, accumulate):
    config = ModelConfig(**{**vars(CONFIG), "dim": 64, "vocab_size": 64})
    patches = (2,) * 6 + (1,) * 6
    results = []
    for graph, how in ((False, False), (True, compile)):
        torch.compiler.reset()
        step_config = StepConfig(precision="bf16", compile=how, graph=graph, accumulate=accumulate)
        results.append(train_steps(step_config, patches=patches, device="cuda", model=model_of(config, device="cuda")))
    assert results[1][1] == pytest.approx(results[0][1], rel=2e-2)


@pytest.mark.gpu
def test_a_graph_draws_new_dropout_in_every_step():
    config = ModelConfig(**{**vars(CONFIG), "dropout": 0.5, "token_dropout": 0.5})
    step = TrainStep(model_of(config, device="cuda"), StepConfig(compile=False), AdamWConfig(), batch_size=6)
    losses = []
    for _ in range(8):
        step.run(*batch_of(0), patch=1, lr=0.0)
        losses.append(step.report().loss)
    assert len(set(losses)) == len(losses)
