"""What a run is made of before it starts: its options, its learning rate, the order of its data, its clock."""

import pytest
import torch

import reference.training.clock
from reference.tokens.batches import Batches
from reference.tokens.codes import load_dataset
from reference.training.clock import Clock
from reference.training.config import TrainConfig, parse
from reference.training.step import SETUP_STEPS


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
