"""Whole runs of the trainer: divided over processes, broken, and refused because of their folder or their data."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from reference import train
from reference.training.checkpoint import checkpoints, load_latest
from reference.training.processes import only_run_in
from tests.processes import run_in
from tests.training_cases import arguments_of, logged

WITHOUT_DROPOUT = ["--dropout", "0", "--class-dropout", "0"]


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
