"""Checkpoints: never half of one, the last two kept, and models read from ours and from official ones."""

import doctest
import errno
import math
from pathlib import Path

import pytest
import torch

from reference.network.model import ModelConfig, Transformer
from reference.training import checkpoint
from reference.training.checkpoint import load_latest, load_model, save, write_json


def state_at(step, size=4):
    return {"step": step, "model": {"weight": torch.full((size,), float(step))}}


def test_docstrings_run():
    assert doctest.testmod(checkpoint).failed == 0


def test_last_two_are_kept(tmp_path):
    for step in (5, 50, 500, 5000):
        save(tmp_path, state_at(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000500.pt", "step-00005000.pt"]
    assert load_latest(tmp_path)["model"]["weight"].tolist() == [5000.0] * 4


def test_no_checkpoint_yet(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None


def test_a_write_that_stops_half_way_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, state_at(1))

    def stop_half_way(state, file):
        file.write(b"half of a checkpoint")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, state_at(2))
    assert (tmp_path / "step-00000002.partial").exists()
    assert load_latest(tmp_path)["step"] == 1
    save(tmp_path, state_at(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001.pt", "step-00000003.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, content):
    save(tmp_path, state_at(1))
    newest = save(tmp_path, state_at(2, size=5000))
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert load_latest(tmp_path)["step"] == 1
    assert "step-00000002.pt cannot be read" in capsys.readouterr().err
    (tmp_path / "step-00000001.pt").write_bytes(b"")
    with pytest.raises(RuntimeError, match="none of its 2 checkpoints can be read"):
        load_latest(tmp_path)


def test_a_flipped_byte_is_noticed(tmp_path, capsys):
    save(tmp_path, state_at(1, size=64))
    newest = save(tmp_path, state_at(2, size=64))
    whole = newest.read_bytes()
    # in the middle of the weights: a number among others, which nothing else would tell from a right one
    place = whole.index(torch.full((64,), 2.0).numpy().tobytes()) + 101
    newest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert load_latest(tmp_path)["step"] == 1
    assert "is not what was written, by its checksum" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"step-00000002\.pt: expected a whole checkpoint, it cannot be read"):
        load_model(newest)
    # anywhere: either it is noticed, or it stands where nothing is read
    for place in range(0, len(whole), 7):
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        state = load_latest(tmp_path)
        assert state["step"] in (1, 2)
        assert state["model"]["weight"].tolist() == [float(state["step"])] * 64


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    save(tmp_path, state_at(1))
    for size in (1, 2**20):
        (tmp_path / "step-00000002.partial").symlink_to("/dev/full")
        with pytest.raises(OSError, match="cannot be written, No space left on device") as caught:
            save(tmp_path, state_at(2, size=size))
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "step-00000002.pt"))
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    (tmp_path / "results.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot be written, No space left on device"):
        write_json(tmp_path / "results.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_our_checkpoint_gives_the_model_back(tmp_path):
    config = ModelConfig(vocab_size=30, grid=(4, 8), num_classes=5, dim=24, num_layers=2, num_heads=2)
    weights, averages = Transformer(config).state_dict(), Transformer(config).state_dict()
    fields = {"model_config": vars(config), "step": 1}
    path = save(tmp_path, {**fields, "model": weights, "ema": averages})
    for source in (path, tmp_path):
        for ema, expected in ((True, averages), (False, weights)):
            model = load_model(source, ema=ema)
            assert model.config == config
            assert not model.training
            assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


# The official training script saves {"model": ...}, and published files hold that or the weights alone.
@pytest.mark.parametrize("wrapped", [True, False])
def test_official_checkpoint(tmp_path, wrapped):
    config = ModelConfig.named("tiny", vocab_size=30, grid=(24, 24), num_classes=7)
    weights = Transformer(config).state_dict()
    path = tmp_path / "c2i_tiny_384.pt"
    torch.save({"model": weights, "steps": 7} if wrapped else weights, path)
    model = load_model(path, grid=(24, 24))
    assert model.config == config
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_model_is_refused(tmp_path):
    torch.save({"model": {"weight": torch.ones(2)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"tok_embeddings\.weight is missing"):
        load_model(tmp_path / "other.pt")
    odd = Transformer(ModelConfig(vocab_size=30, num_classes=5, dim=24, num_layers=2, num_heads=2))
    torch.save(odd.state_dict(), tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="expected the dimensions of one of"):
        load_model(tmp_path / "odd.pt")
    with pytest.raises(FileNotFoundError, match="expected checkpoints"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "missing.pt")


WEIGHTS = {"tok_embeddings.weight": torch.ones(3, 64), "cls_embedding.embedding_table.weight": torch.ones(3, 64)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "expected a checkpoint, which is a dictionary, got a Tensor"),
        ([1, 2], "expected a checkpoint, which is a dictionary, got a list"),
        ({"model": [1, 2]}, "expected a dictionary of tensors, got a list"),
        ({"model": {"a": torch.ones(2)}, "model_config": {"dim": 3}}, "expected a checkpoint of this architecture"),
        ({"model": {"a": torch.ones(2)}, "model_config": 3}, "expected a checkpoint of this architecture"),
        (dict.fromkeys(WEIGHTS, 1), "expected a checkpoint of this architecture"),
        ({name: torch.ones(3) for name in WEIGHTS}, "expected a checkpoint of this architecture"),
        (WEIGHTS, "expected the dimensions of one of"),
        (print, "expected a whole checkpoint, it cannot be read"),  # what only an unsafe load would take
        (b"not a checkpoint", "expected a whole checkpoint, it cannot be read"),
        (b"", "expected a whole checkpoint, it cannot be read"),
    ],
)
def test_something_else_is_a_value_error_that_names_the_file(tmp_path, content, message):
    path = tmp_path / "other.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=rf"other\.pt: .*{message}"):
        load_model(path)


def test_missing_weights_and_weights_that_are_not_finite(tmp_path):
    config = ModelConfig.named("tiny", vocab_size=30, grid=(4, 4), num_classes=5)
    weights = Transformer(config).state_dict()
    state = {"model": weights, "model_config": vars(config)}
    for value in (math.nan, math.inf):
        weights["norm.weight"][3] = value
        torch.save(state, tmp_path / "strange.pt")
        with pytest.raises(ValueError, match=r"strange\.pt: expected finite weights, .* in norm\.weight"):
            load_model(tmp_path / "strange.pt")
    del weights["norm.weight"]
    torch.save(state, tmp_path / "strange.pt")
    with pytest.raises(ValueError, match=r"(?s)strange\.pt: expected a checkpoint of this architecture.*norm\.weight"):
        load_model(tmp_path / "strange.pt")
