"""The report of errors: the exact results are exact, the command sees faults, and its page says what was measured."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import bench.accuracy
from bench.accuracy import measure
from bench.cases.accuracy_cases import GAPS, LINEAR, LOSS, OURS, PYTORCH, Case, cases_of
from bench.cases.contenders import BY_NAME
from bench.cases.exact import exact_rows, half_ulps
from bench.reporting import accuracy_page
from bench.reporting.accuracy_records import read_records, write_records
from tests.conftest import INTERPRETED

CPU = torch.device("cpu")


def test_exact_rows_are_fp64s_where_nothing_cancels():
    logits, groups = 3 * torch.randn(20, 40, dtype=torch.float64) + 7, torch.randint(40, (20, 3))
    logits.requires_grad_()
    log_softmax = torch.log_softmax(logits, 1)
    losses = -log_softmax.gather(1, groups)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    exact = exact_rows(logits.detach(), groups)
    expected = (losses, torch.logsumexp(logits, 1), -(log_softmax.exp() * log_softmax).sum(1), gradient)
    for ours, theirs in zip(exact, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("gap", [14.0, 30.0, 60.0, 900.0])
def test_exact_rows_that_are_sure(gap):
    """The loss of `[[gap, 0]]` is log1p(e^-gap): to the last places, and by its own series for small ones."""
    logits = torch.tensor([[gap, 0.0]], dtype=torch.float64)
    small = torch.exp(-torch.tensor(gap, dtype=torch.float64)).item()
    sure = exact_rows(logits, torch.tensor([[0]]))
    series = small - small**2 / 2
    assert sure.losses.item() == pytest.approx(series, rel=1e-11)
    assert sure.gradient[0].tolist() == pytest.approx([-small / (1 + small), small / (1 + small)], rel=1e-14)
    assert sure.entropy.item() == pytest.approx(small * (1 + gap), rel=1e-5)
    wrong = exact_rows(logits, torch.tensor([[1]]))
    assert wrong.losses.item() == pytest.approx(gap + series, rel=1e-15)
    assert wrong.gradient.abs().sum().item() == pytest.approx(2.0, rel=1e-5)


def test_half_ulps():
    values = torch.tensor([1.0, 1.5, 2.0, -0.75, 0.0], dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    assert half_ulps(values, torch.bfloat16)[:4].tolist() == [eps / 2, eps / 2, eps, eps / 4]
    assert 0 < half_ulps(values, torch.float16)[4] < 1e-7


@pytest.mark.parametrize("kind", ["cpu", "cuda", "interpreter"])
def test_cases(kind):
    cases = cases_of(kind)
    assert len(set(cases)) == len(cases)
    assert {case.operation for case in cases} == {LOSS, LINEAR, "group_mean"}
    assert all(case.offset < 65504 for case in cases if case.dtype == "fp16")
    assert any(case.rows >= 4096 and case.operation == LINEAR for case in cases) == (kind == "cuda")


def test_a_loss_from_its_lse_is_seen(monkeypatch):
    """What this page is for: a formulation that cancels at an offset has a large ratio, PyTorch's own has 1."""

    def rows(subtract):
        def formulation(logits, groups, options):
            found = bench.accuracy._torch_rows(logits, groups, torch.float32, options)
            return {**found, "loss": subtract(logits, groups, found)}

        return formulation

    case = Case(LOSS, "fp32", 33, 500, offset=1000.0)
    monkeypatch.setattr(bench.accuracy, "_our_rows", rows(lambda logits, groups, found: found["loss"]))
    assert accuracy_page.ratios([r for r in measure(case, CPU) if r.quantity == "loss"])[1] <= 1
    monkeypatch.setattr(
        bench.accuracy,
        "_our_rows",
        rows(lambda logits, groups, found: found["lse"][:, None] - logits.gather(1, groups)),
    )
    assert min(accuracy_page.ratios([r for r in measure(case, CPU) if r.quantity == "loss"])) > 10


def test_signs_are_counted(monkeypatch):
    def nothing(logits, groups, options):
        return {"loss": -torch.ones(groups.shape), "gradient": torch.ones_like(logits)}

    monkeypatch.setattr(bench.accuracy, "_our_rows", nothing)
    found = {r.quantity: r for r in measure(Case(LOSS, "fp32", 33, 50, gap=20.0), CPU) if r.contender == OURS}
    assert (found["loss"].wrong_sign, found["loss"].zero) == (1.0, 0.0)
    assert (found["gradient"].wrong_sign, found["gradient"].row_sum) == (1.0, 1.0)


@pytest.mark.skipif(INTERPRETED, reason="starts with the PyTorch path")
def test_the_command_writes_results_and_tables(tmp_path):
    page, out = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("# Title\n<!-- results:cpu -->\nold\n<!-- /results:cpu -->\nend\n", encoding="utf-8")
    assert bench.accuracy.main(["--quick", "--out", str(out), "--page", str(page)]) == 0
    about, records = read_records(out)
    assert about["kind"] == "cpu"
    assert {record.contender for record in records} == {OURS, PYTORCH}
    assert {record.case for record in records} == set(cases_of("cpu", quick=True))
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.startswith("# Title\n")
    assert text.endswith("<!-- /results:cpu -->\nend\n")
    assert "| loss |" in text
    assert "`group_mean`: means" in text

    again = tmp_path / "again.json"
    write_records(again, about, records)
    assert json.loads(again.read_text()) == json.loads(out.read_text())
    assert bench.accuracy.main(["--results", str(again), "--page", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.skipif(INTERPRETED, reason="starts with the PyTorch path")
def test_a_command_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    page, out = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("<!-- results:cpu -->\n<!-- /results:cpu -->\n", encoding="utf-8")
    cases, measured = cases_of("cpu", quick=True), []

    def killed_at_the_third(case, device):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case)
        return measure(case, device)

    monkeypatch.setattr(bench.accuracy, "measure", killed_at_the_third)
    arguments = ["--quick", "--out", str(out), "--page", str(page)]
    with pytest.raises(KeyboardInterrupt):
        bench.accuracy.main(arguments)
    assert not out.exists()
    monkeypatch.setattr(bench.accuracy, "measure", lambda case, device: measured.append(case) or measure(case, device))
    assert bench.accuracy.main(arguments) == 0
    assert measured == list(cases)
    assert {record.case for record in read_records(out)[1]} == set(cases)
    assert [path.name for path in tmp_path.glob("results*")] == ["results.json"]

    partial = tmp_path / "results.json.partial"
    about, records = read_records(out)
    write_records(partial, about | {"device": "another"}, records)
    with pytest.raises(ValueError, match=r"partial: expected results of this machine, got .*'device': 'another'"):
        bench.accuracy.main(arguments)


def test_peers_take_part_on_a_gpu_and_may_fail(monkeypatch, capsys):
    """The peers' way through, walked by a contender of PyTorch's in their place."""
    honest = {name: replace(BY_NAME[LOSS, "honest_eager"], name=name) for name in ("liger", "quack")}
    monkeypatch.setattr(bench.accuracy, "BY_NAME", {(LOSS, name): contender for name, contender in honest.items()})
    gpu, case = SimpleNamespace(type="cuda"), Case(LOSS, "fp32", 512, 20)
    logits, groups = bench.accuracy._logits(case, CPU)

    def compute(name):
        if name == "quack":
            raise NotImplementedError("no such vocabulary")
        return bench.accuracy._peer_rows(case, name, logits, groups)

    found = bench.accuracy._peer_results(case, gpu, compute)
    assert list(found) == ["Liger"]
    exact = exact_rows(logits, groups)
    torch.testing.assert_close(found["Liger"]["loss"], exact.losses.float())
    torch.testing.assert_close(found["Liger"]["gradient"], (exact.gradient / 20).float())
    assert "QuACK cannot compute Case(" in capsys.readouterr().out
    for left_out in (replace(case, group_size=4), replace(case, vocab_size=33), replace(case, option="z-loss")):
        assert not bench.accuracy._peer_results(left_out, gpu, compute)
    assert not bench.accuracy._peer_results(case, CPU, compute)


def test_a_page_without_markers_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the markers <!-- results:cpu -->"):
        accuracy_page.fill_page(page, {"kind": "cpu", "device": "", "versions": {}, "date": ""}, [])


def test_the_large_cases_have_a_table_of_their_own():
    records = measure(Case(LINEAR, "fp32", 40, 4096, 1, 8, gap=10.0), CPU)
    about = {"device": "a GPU", "versions": {}, "date": "2026-11-25"}
    one_gap = [replace(r, case=replace(r.case, gap=gap)) for r in records for gap in GAPS]
    assert "4096 rows in bf16" in accuracy_page.section(about, one_gap)
