"""Runs of the trainer that are killed or asked to stop, and go on as if nothing had happened."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from reference import train
from reference.training.checkpoint import checkpoints, load_latest
from reference.training.config import parse
from reference.training.processes import STOPPED
from tests.processes import environment, kill_when, started, torchrun, wait_until
from tests.training_cases import arguments_of, logged


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
