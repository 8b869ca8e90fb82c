"""The evidence behind the claim: journals, budgets, scores of samples and their tables, and parts at a tiny size."""

import doctest
import json
import statistics
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from reference import claim, evidence
from reference.claim import WAYS, Way, compare, steps_of
from reference.comparison import evidence_report, journal, sample_report, sample_scores
from reference.comparison.journal import Budget, Journal
from reference.comparison.sample_report import best_guidance, of_runs, paired
from reference.comparison.sample_scores import SampleObserver, SampleScores, choose
from reference.evidence import LANGUAGE, PARTS
from reference.network.model import ModelConfig
from reference.sample import Sampler
from reference.score import fit_gaussian, frechet_distance, image_features
from reference.tokens.codes import load_dataset, load_tokenizer
from reference.train import Run
from reference.training.checkpoint import load_model
from reference.training.config import PRESETS
from reference.training.log import read_log
from reference.training.processes import Stopped
from tests.comparisons import MeanColour, outcome_of, small_data

CPU = torch.device("cpu")


@pytest.mark.parametrize("module", [journal, sample_scores, sample_report, evidence])
def test_docstrings_run(module):
    assert doctest.testmod(module).failed == 0


def test_a_journal_keeps_whole_lines(tmp_path):
    path = tmp_path / "folder" / "journal.jsonl"
    Journal(path).add({"way": "plain", "seed": 0, "value": 1.5})
    with path.open("ab") as file:
        file.write(b'{"way": "pla')  # killed while it wrote
    again = Journal(path)
    assert again.entries == [{"way": "plain", "seed": 0, "value": 1.5}]
    again.add({"way": "plain", "seed": 1})
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [0, 1]
    path.write_text('{"way": 1}\nnonsense\n{}\n')
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 2: expected a JSON object, got b'nonsense'"):
        Journal(path)


def run_config(tmp_path, name, **changes):
    small_data(tmp_path / "tokens.npz")
    config = replace(PRESETS["tiny"], data=f"npz:{tmp_path}/tokens.npz", batch_size=6, epochs=2.0, evaluate_every=5)
    return replace(config, output=str(tmp_path / name), **changes)


def test_a_run_stops_at_its_deadline_and_goes_on(tmp_path):
    whole = Run(run_config(tmp_path, "whole"), CPU)
    whole.train()
    first = Run(run_config(tmp_path, "parts"), CPU)
    first.watch = lambda run: setattr(run, "deadline", time.monotonic() if run.step == 10 else run.deadline)
    with pytest.raises(Stopped):
        first.train()
    assert first.step == 10
    second = Run(run_config(tmp_path, "parts"), CPU)
    seen = []
    second.watch = lambda run: seen.append((run.step, run.clock.seconds))
    second.train()
    assert [step for step, _ in seen] == [15, 20]
    rows = [read_log(run.folder / "log.csv") for run in (whole, second)]
    assert [row["test_nll"] for row in rows[0]] == [row["test_nll"] for row in rows[1]]


def test_the_time_of_a_watch_does_not_count(tmp_path):
    run = Run(run_config(tmp_path, "run", epochs=1.0), CPU)
    run.watch = lambda run: time.sleep(0.3)
    begin = time.perf_counter()
    run.train()
    assert run.clock.seconds < time.perf_counter() - begin - 0.55  # two evaluations


def test_a_comparison_leaves_what_does_not_fit(tmp_path):
    config = run_config(tmp_path, "compared", epochs=1.0)
    with pytest.raises(Stopped):
        compare(config, WAYS[:2], [0], CPU, budget=Budget(-1))
    outcomes, _ = compare(config, WAYS[:2], [0], CPU, budget=Budget(600))
    assert [outcome.way for outcome in outcomes] == ["plain", "two levels"]
    assert all(outcome.wall_seconds >= outcome.seconds > 0 for outcome in outcomes)
    assert outcomes[1].curve["patch"] == [2, 1]
    assert outcomes[0].curve["loss"][-1] != outcomes[0].curve["nll"][-1]
    # Seed 1 would take as long as seed 0 did.
    with pytest.raises(Stopped):
        compare(config, WAYS[:2], [0, 1], CPU, budget=Budget(outcomes[0].wall_seconds / 2))
    assert len(compare(config, WAYS[:2], [0], CPU)[0]) == 2


def test_the_command_stops_at_its_budget_and_reports_what_is_there(tmp_path, capsys):
    small_data(tmp_path / "tokens.npz")
    fixed = ["--model", "tiny", "--data", f"npz:{tmp_path}/tokens.npz", "--batch-size", "6", "--epochs", "1"]
    arguments = [*fixed, "--seeds", "0", "--output", str(tmp_path / "out")]
    with pytest.raises(Stopped):
        claim.main([*arguments, "--budget", "0"])
    assert not (tmp_path / "out" / "report.md").exists()
    claim.main(arguments)
    with pytest.raises(Stopped):
        claim.main([*arguments, "--seeds", "0,1", "--budget", "0"])
    assert "Seeds: 0. Scored" in (tmp_path / "out" / "report.md").read_text()


def test_shares_and_levels_cost_what_two_levels_cost():
    config, model = PRESETS["S"], ModelConfig.named("S", vocab_size=1024, num_classes=10)
    ways = PARTS["share"].ways
    budget = 3000 * model.training_flops(1) * 0.619
    for way in ways:
        steps = steps_of(way, ways, config, model, 3000, {})
        stages = way.schedule(steps, config).stages
        cost = sum((stage.end - stage.start) * model.training_flops(stage.patch) for stage in stages)
        assert cost == pytest.approx(budget, rel=2e-3), way.name
    assert [round(way.schedule(1000, config).stages[0].end / 1000, 2) for way in ways[:2]] == [0.25, 0.75]
    changed = Way("plain, rate 0.002", 1, "operations", lr=2e-3).changed(config)
    assert (changed.lr, changed.end_lr, changed.levels) == (2e-3, pytest.approx(2e-4), 1)


def test_images_to_compare_with(tmp_path):
    test, train = load_dataset("embedded", "test"), load_dataset("embedded", "train")
    first, data, others = choose(test, train, 200)
    assert data is test
    assert len({*first, *others}) == 400
    first, data, others = choose(test, train, 300)
    assert data is train
    assert len(set(first)) == len(set(others)) == 300
    with pytest.raises(ValueError, match=r"samples: expected at most 400, .*, got 401"):
        choose(test, train, 401)


def test_npz_files_may_have_images(tmp_path):
    small_data(tmp_path / "tokens.npz")
    arrays = dict(np.load(tmp_path / "tokens.npz"))
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8)).astype(np.uint8)

    def load(split, **changed):
        np.savez(tmp_path / "images.npz", **arrays, **changed)
        return load_dataset(f"npz:{tmp_path}/images.npz", split)

    assert load("test").images is None
    assert np.array_equal(load("test", test_images=images[:30]).images, images[:30])
    data = load("train", train_images=images[:20])
    assert choose(load("test", test_images=images[:30]), data, 20)[2].max() < 20
    with pytest.raises(ValueError, match="test_images: expected uint8, 30 images, got uint8 of shape"):
        load("test", test_images=images[:29])
    with pytest.raises(ValueError, match="train_images: expected uint8, at most 60 images, got float64"):
        load("train", train_images=images[:20].astype(float))


def test_precision_and_recall_by_hand():
    pytest.importorskip("torch_fidelity", reason="needs torch-fidelity", exc_type=ImportError)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(60, 3, generator=generator)
    found = torch.cat((torch.randn(30, 3, generator=generator), 3 + torch.randn(20, 3, generator=generator)))
    scores = sample_scores.neighbourhoods(found, real)
    expected = {}
    for name, inside, of in (("precision", real, found), ("recall", found, real)):
        radii = torch.cdist(inside, inside).sort(dim=1).values[:, 3]  # itself is the first
        expected[name] = (torch.cdist(of, inside) <= radii).any(1).float().mean().item()
    assert scores == pytest.approx(expected)
    assert 0.4 < scores["precision"] < 0.9


@pytest.fixture
def few(monkeypatch):
    """A feature network of three features, and precision and recall left out, which need an optional package."""
    network = MeanColour()
    monkeypatch.setattr("reference.claim.feature_network", network.to)
    monkeypatch.setattr(sample_scores, "neighbourhoods", lambda features, reference: {})
    return network


def test_samples_are_scored_once(tmp_path, few, monkeypatch):
    config = run_config(tmp_path, "scored", epochs=1.0)

    def observe(scales, budget=None):
        return SampleObserver(
            config.data, few, tmp_path / "scored", 10, scales, budget or Budget(None), watched_seed=0, over_time=5
        )

    compare(config, WAYS[:1], [0], CPU, observer=observe([1.0, 2.0]))
    before = Journal(tmp_path / "scored" / "samples.jsonl").entries
    assert [entry.get("guidance") for entry in before] == [None, 1.0, 2.0]
    assert before[0]["way"] == "real to real"
    sampler = Sampler(load_model(tmp_path / "scored" / "plain-0"), batch_size=10, guidance=2.0)
    test, _, others = choose(load_dataset(config.data, "test"), load_dataset(config.data, "train"), 10)[:3]
    data = load_dataset(config.data, "test")
    tokens = sampler(data.batch(others)[1], torch.Generator().manual_seed(0))
    tokenizer = load_tokenizer(config.data)
    fits = [fit_gaussian(image_features(few, tokenizer.decode(each.numpy()))) for each in (tokens, data.batch(test)[0])]
    assert before[2]["frechet"] == pytest.approx(frechet_distance(*fits))
    kept = np.load(tmp_path / "scored" / "samples" / "plain-0-2.npy")
    assert kept.shape[1:] == (4, 4)

    outcomes, folders = compare(config, WAYS[:1], [0], CPU)
    sampled = []
    sample = SampleScores.sample
    monkeypatch.setattr(SampleScores, "sample", lambda *values: sampled.append(values[2]) or sample(*values))
    with pytest.raises(Stopped):
        observe([1.0, 2.0, 3.0], Budget(-1)).finish(outcomes[0], folders["plain", 0])
    assert sampled == []
    observe([1.0, 2.0, 3.0]).finish(outcomes[0], folders["plain", 0])
    assert sampled == [3.0]
    assert Journal(tmp_path / "scored" / "samples.jsonl").entries[:3] == before


# As in test_train_step: Dynamo looks at .grad of all that goes into a compiled block.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_scores_while_a_run_trains_change_nothing(name, tmp_path, few):
    device = torch.device(name)
    config = run_config(tmp_path, "watched", epochs=3.0)
    observer = SampleObserver(
        config.data, few.to(device), tmp_path / "watched", 10, [1.0], Budget(None), watched_seed=0, over_time=5
    )
    watched = compare(config, WAYS[:1], [0, 1], device, observer=observer)[0]
    points = Journal(tmp_path / "watched" / "over_time.jsonl").entries
    assert [(point["run"], point["step"]) for point in points] == [("plain-0", 10), ("plain-0", 20)]
    alone = compare(replace(config, output=str(tmp_path / "alone")), WAYS[:1], [0, 1], device)[0]
    for one, other in zip(watched, alone, strict=True):
        assert one.curve["nll"] == pytest.approx(other.curve["nll"], rel=0 if name == "cpu" else 1e-3)


ENTRIES = [
    {"way": way, "seed": seed, "guidance": guidance, "samples": 5, "frechet": value + seed / 10, "precision": 0.5,
     "recall": 0.25}
    for way, scores in (("plain", {1.0: 5.0, 2.0: 4.0}), ("two levels", {1.0: 4.5, 2.0: 4.7}))
    for guidance, value in scores.items() for seed in (0, 1)
] + [{"way": "real to real", "samples": 5, "frechet": 1.0, "precision": 0.75, "recall": 0.75}]  # fmt: skip


def test_tables_of_samples():
    lines = sample_report.table(ENTRIES).splitlines()
    assert lines[0] == "| Fréchet distance | guidance 1 | guidance 2 | best | precision | recall |"
    assert "| plain | 5.05 ± 0.07 | 4.05 ± 0.07 | 2 | 0.500 ± 0.000 | 0.250 ± 0.000 |" in lines
    assert lines[-1] == "| real to real | 1.00 |  |  | 0.750 | 0.750 |"
    one_scale = [entry for entry in ENTRIES if entry.get("guidance") != 1.0]
    assert sample_report.table(one_scale).splitlines()[0] == "| Fréchet distance | guidance 2 | precision | recall |"
    assert sample_report.table(one_scale).splitlines()[-1] == "| real to real | 1.00 | 0.750 | 0.750 |"
    ways = of_runs(ENTRIES)
    assert (best_guidance(ways["plain"]), best_guidance(ways["two levels"])) == (2.0, 1.0)
    assert paired(ways, "two levels", "plain", 1.0) == pytest.approx([-0.5, -0.5])
    assert paired(ways, "two levels", "plain", None) == pytest.approx([0.5, 0.5])
    assert paired(ways, "two levels", "plain, same seconds", None) == []
    # A guidance that one seed has alone is not the best of all.
    one = {"way": "plain", "seed": 0, "guidance": 3.0, "samples": 5, "frechet": 0.1}
    assert best_guidance(of_runs([*ENTRIES, one])["plain"]) == 2.0
    text = sample_report.differences(ENTRIES, ["two levels"], ["plain"])
    assert "| two levels minus plain | -0.50 ± 0.00 | +0.70 ± 0.00 | +0.50 ± 0.00 |" in text


def test_predictions_are_of_what_is_run():
    predictions = json.loads(evidence_report.PREDICTIONS.read_text(encoding="utf-8"))
    assert {each["part"] for each in predictions} == {*PARTS, LANGUAGE}
    for each in predictions:
        assert each["low"] < each["high"]
        names = {way.name for way in WAYS} | {"PatchTrain", "TST"}
        if each["part"] in PARTS:
            names = {way.name for way in PARTS[each["part"]].ways}
            if each["part"] in evidence_report.VARIED_PARTS:
                names |= {way.name for way in PARTS[evidence_report.BASE].ways}
            scales = PARTS[each["part"]].guidance_scales
            assert each["measure"] == "nll" or (each["measure"] == "frechet" and each["guidance"] in (None, *scales))
        assert {each["one"], each["other"]} <= names


def test_predictions_stand_beside_outcomes(tmp_path):
    part = tmp_path / "cifar10"
    part.mkdir()
    scores = {"plain": (3.0, 3.1), "two levels": (2.9, 2.98)}
    runs = [outcome_of(way, seed, nll, 5.0) for way, values in scores.items() for seed, nll in enumerate(values)]
    (part / "results.json").write_text(json.dumps({"settings": {}, "outcomes": [vars(run) for run in runs]}))
    asked = {"part": "cifar10", "measure": "nll", "one": "two levels", "other": "plain", "guidance": None}
    found = evidence_report.differences(tmp_path, asked)
    assert found == pytest.approx([-0.1, -0.12])
    wide, narrow = ({**asked, "low": low, "high": 0.0, "because": "why"} for low in (-0.2, -0.1))
    lines = evidence_report.predictions_table(tmp_path, [wide, narrow, {**wide, "part": "largest"}]).splitlines()
    came = f"{statistics.mean(found):+.4f} ± 0.0100"
    assert f"| cifar10 | nll | two levels minus plain | -0.2 to +0 | why | {came} | yes |" in lines
    assert f"| cifar10 | nll | two levels minus plain | -0.1 to +0 | why | {came} | no |" in lines
    assert lines[-1].endswith("| why |  |  |")


def test_parts_run_stop_and_are_reported(tmp_path, few, capsys):
    data = tmp_path / "data"
    data.mkdir()
    small_data(data / "cifar10_tokens.npz")
    common = ["--tiny", "--data", str(data), "--output", str(tmp_path / "out")]
    with pytest.raises(Stopped):
        evidence.main(["cifar10", "overfit", *common, "--budget", "0"])
    printed = capsys.readouterr().out
    assert "cifar10: not complete" in printed
    assert "overfit: not complete" in printed
    evidence.main(["overfit", "learning_rates", *common])
    assert len(load_dataset(f"npz:{data}/cifar10_20k.npz", "train")) == 60
    evidence.main(["--report", *common])
    out = tmp_path / "out"
    report = (out / "overfit" / "report.md").read_text()
    assert report.startswith("# CIFAR-10, 20,000 images, 15 million parameters, to overfitting\n")
    assert "| two levels minus plain, same operations |" in report
    for name in ("nll.png", "samples.png", "grid.png", "over_time.png"):
        assert f"({name})" in report
        assert (out / "overfit" / name).read_bytes().startswith(b"\x89PNG")
    assert "| three levels, rate 0.002 |" in (out / "learning_rates" / "report.md").read_text()
    outcomes = (out / "outcomes.md").read_text()
    assert "| overfit | frechet, guidance 1.5 | two levels minus plain | -1 to +1.5 |" in outcomes
    # Figures alone, without samples and data, are what a page keeps.
    kept = tmp_path / "kept" / "overfit"
    kept.mkdir(parents=True)
    for name in ("results.json", "samples.jsonl", "over_time.jsonl"):
        (kept / name).write_bytes((out / "overfit" / name).read_bytes())
    (data / "cifar10_20k.npz").unlink()
    evidence.main(["--report", "--output", str(tmp_path / "kept")])
    assert (kept / "report.md").read_text() == report
    with pytest.raises(SystemExit):
        evidence.main(["sifar"])
    assert "parts: expected of cifar10, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evidence.main([])
    assert "name parts, or give --report" in capsys.readouterr().err
