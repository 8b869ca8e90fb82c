"""Language models at equal seconds: the text, its score by hand, lengths of the ways, and a comparison that goes on."""

import doctest
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from reference import language
from reference.comparison import language_report
from reference.comparison.journal import Budget, Journal
from reference.language import TINY, WAYS, Text, Training
from reference.tokens import corpus
from reference.tokens.corpus import Corpus, is_held_out, load_corpus, source_files
from reference.training.processes import Stopped

CPU = torch.device("cpu")


def test_docstrings_run():
    assert doctest.testmod(language).failed == 0


def test_sources_are_under_the_licences_that_were_checked(monkeypatch):
    files = source_files("networkx")
    assert "def shortest_path(" in files["networkx/algorithms/shortest_paths/generic.py"]
    monkeypatch.setitem(corpus.LICENCES, "networkx", "GPL")
    with pytest.raises(ValueError, match=r"networkx: expected a licence of GPL, got '.*BSD"):
        source_files("networkx")


def test_tokens_stand_for_the_bytes_of_the_text():
    pytest.importorskip("tokenizers", reason="needs tokenizers, which transformers brings")
    found = load_corpus(300, max_files=60)
    assert len(found.token_bytes) == found.source["vocab_size"] == 300
    assert found.token_bytes[found.test].sum() == found.source["held_out_bytes"]
    assert found.token_bytes[found.train].sum() == found.source["bytes"] - found.source["held_out_bytes"]
    in_bytes = load_corpus(256, max_files=60)
    assert len(in_bytes.test) == in_bytes.source["held_out_bytes"] > 1.2 * len(found.test)
    with pytest.raises(ValueError, match="vocab_size: expected 256 to 65536, got 255"):
        load_corpus(255)


def test_one_file_in_fifty_is_held_out():
    assert 5 < sum(is_held_out(f"torch/{number}.py") for number in range(1000)) < 40


SOURCE = {"packages": {"torch": "2"}, "files": 9, "bytes": 4000, "held_out_bytes": 1500, "vocab_size": 7}


def small_corpus():
    generator = np.random.default_rng(0)
    tokens = (generator.integers(0, 2, 3000).cumsum() % 7).astype(np.uint16)
    return Corpus(tokens[:2000], tokens[2000:], np.array([1, 2, 1, 3, 1, 1, 2]), SOURCE)


@pytest.fixture
def llama():
    return pytest.importorskip("transformers", reason="needs transformers")


def test_nats_per_byte_by_hand(llama):
    config = replace(TINY, length=16, held_out_examples=5)
    text = Text(small_corpus(), config, CPU)
    training = Training(WAYS[0], config, 7, 0, CPU)
    nats, number = 0.0, 0
    with torch.no_grad():
        for ids in text.held_out:
            logits = training.model(input_ids=ids[None]).logits[0].log_softmax(-1)
            for place in range(1, 16):
                nats -= logits[place - 1, ids[place]].item()
                number += int(text.token_bytes[ids[place]])
    assert text.held_out.shape == (5, 16)
    assert training.nats_per_byte(text, batch_size=2) == pytest.approx(nats / number, rel=1e-5)
    assert training.model.training


def test_examples_are_stretches_of_the_text():
    text = Text(small_corpus(), replace(TINY, length=16), CPU)
    ids = text.batch(4, 32, torch.Generator().manual_seed(0))
    whole = text.train.tolist()
    assert all(any(whole[i : i + 32] == row for i in range(len(whole))) for row in ids.tolist())
    with pytest.raises(ValueError, match="expected enough text for an example held out, got 1000 tokens"):
        Text(small_corpus(), replace(TINY, length=1001), CPU)


def test_ways_take_the_seconds_that_they_are_given():
    for way in WAYS:
        fine, coarse = 0.02, 0.02 if way.longer == 4 else 0.006
        steps = way.steps(40.0, fine, coarse)
        assert steps[0] * coarse + steps[1] * fine == pytest.approx(40, rel=1e-3)
        assert way.schedule(steps).total_steps == sum(steps)
    patches, tokens = WAYS[1].steps(40.0, 0.02, 0.006)
    assert patches == pytest.approx(2 * tokens, abs=1)  # examples of the same length: two thirds of the data


def test_a_comparison_goes_on_where_it_stopped(tmp_path, llama, monkeypatch, capsys):
    monkeypatch.setattr(language, "load_corpus", lambda *_: small_corpus())
    timed = {"plain": [0.01], "PatchTrain": [0.01, 0.004], "TST": [0.01, 0.01]}
    monkeypatch.setattr(language, "time_steps", lambda *_: timed)
    config = replace(TINY, length=16, seconds=0.3, held_out_examples=5, warmup_steps=2)
    language.compare(config, [0], tmp_path, CPU)
    lines = (tmp_path / "language.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines[1:]]
    assert [run["way"] for run in runs] == ["plain", "PatchTrain", "TST"]
    assert all(run["curve"]["nats"][-1] < run["curve"]["nats"][0] for run in runs)
    assert set(runs[0]["curve"]["patch"]) == {1}
    assert runs[1]["curve"]["patch"] == sorted(runs[1]["curve"]["patch"], reverse=True)
    steps = runs[2]["steps"]
    assert runs[2]["curve"]["tokens"][-1] == 16 * config.batch_size * (4 * steps[0] + steps[1])

    with pytest.raises(Stopped):
        language.compare(config, [0, 1], tmp_path, CPU, Budget(0))
    assert "plain, seed 1: left for later" in capsys.readouterr().out
    language.compare(config, [0, 1], tmp_path, CPU)
    after = (tmp_path / "language.jsonl").read_text().splitlines()
    assert after[:4] == lines
    assert len(after) == 7
    report = language_report.write_report(tmp_path)
    entries = Journal(tmp_path / "language.jsonl").entries[1:]
    ends = {(run["way"], run["seed"]): run["curve"]["nats"][-1] for run in entries}
    first, second = (ends["TST", seed] - ends["plain", seed] for seed in (0, 1))
    assert f"- TST minus plain: {(first + second) / 2:+.4f} ± {abs(first - second) / 2:.4f} nats per byte" in report
    assert (tmp_path / "language.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"config: expected .*'lr': 0\.001.*, got .*'lr': 0\.1"):
        language.compare(replace(config, lr=0.1), [0], tmp_path, CPU)


def test_steps_are_timed(llama, monkeypatch):
    monkeypatch.setattr(language, "TIMED_STEPS", 2)
    config = replace(TINY, length=16, held_out_examples=5)
    found = language.time_steps(config, Text(small_corpus(), config, CPU), 7, CPU)
    assert {name: len(seconds) for name, seconds in found.items()} == {"plain": 1, "PatchTrain": 2, "TST": 2}
    assert all(0 < value < 5 for seconds in found.values() for value in seconds)


def test_a_loss_that_is_not_finite_ends_a_run(tmp_path, llama):
    text = Text(small_corpus(), replace(TINY, length=16, held_out_examples=5), CPU)
    with pytest.raises(FloatingPointError, match="plain, seed 0: expected a finite loss, got nan at step "):
        language.train(WAYS[0], (0, 20), replace(TINY, length=16, lr=1e9, warmup_steps=0), text, 7, 0)


@pytest.mark.gpu
def test_on_a_gpu_a_step_is_a_graph_and_trains_what_it_trains_without(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(language, "load_corpus", lambda *_: small_corpus())
    config = replace(TINY, length=64, batch_size=8, seconds=0.5, held_out_examples=5)
    language.compare(config, [0], tmp_path, torch.device("cuda"))
    # Hundreds of steps on 2,000 tokens: known by heart in the end, but better than guessing one of seven.
    guessing = math.log(7) / small_corpus().token_bytes.mean()
    for run in Journal(tmp_path / "language.jsonl").entries[1:]:
        assert run["curve"]["nats"][-1] < guessing
        assert sum(run["steps"]) > 20
        assert run["setup_seconds"] > 0
    found = []
    for device in (CPU, torch.device("cuda")):
        text = Text(small_corpus(), config, device)
        text.batch = lambda size, length, _, text=text: text.train[: size * length].view(size, length)
        found.append(language.train(WAYS[1], (20, 20), config, text, 7, 0)["curve"]["nats"])
    assert found[1] == pytest.approx(found[0], rel=0.03)  # bfloat16 beside fp32
