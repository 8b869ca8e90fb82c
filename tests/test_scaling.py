"""The measurement of steps on several GPUs, on the CPU, and what the exchange costs on paper."""

import doctest
import json
import subprocess
import sys

import pytest
import torch

from reference import communication, scaling
from reference.communication import Model, images_that_hide, parts_that_hide, step_on_many
from tests.processes import ROOT, environment, run_in, torchrun

SMALL = ["--patches", "2,1", "--grid", "8", "--vocab-size", "64", "--compile", "off", "--steps", "2"]
CELL = {
    "model": "B", "images": 256, "patch": 4, "processes": 1, "way": "one", "median_ms": 7.0, "fastest_ms": 6.9,
    "slowest_ms": 7.2, "images_per_second": 36_571.0, "peak_gib": 3.5, "device": "GPU", "torch": "2",
}  # fmt: skip


@pytest.mark.parametrize("module", [communication, scaling])
def test_docstrings_run(module):
    assert doctest.testmod(module).failed == 0


def test_every_way_is_measured_and_the_command_goes_on(tmp_path):
    path = tmp_path / "scaling.json"
    known = CELL | {"model": "small", "images": 2, "patch": 1}
    path.write_text(json.dumps({"cells": [known, known | {"patch": 2, "error": "not over after 60 s"}]}))
    said = run_in(2, "reference.scaling", "--cells", "tiny:4,small:2", *SMALL, "--json", path).stdout
    assert said.count("…") == 14  # not what the file has, failed or not
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) == 16
    new = [cell for cell in cells if cell["device"] == "cpu"]
    assert {(cell["way"], cell["processes"]) for cell in new} == {
        ("one", 1), ("replicated", 2), ("sharded", 2), ("ddp", 2),
    }  # fmt: skip
    for cell in new:
        assert cell["images_per_second"] == pytest.approx(
            1e3 * cell["images"] * cell["processes"] / cell["median_ms"], rel=1e-6
        )
        assert ("alone_ms" in cell) == (cell["way"] in ("replicated", "sharded"))
    # bf16: all gradients once, and once more or the weights, over two processes; the buckets are padded.
    sent = {cell["exchanged_bytes"] for cell in new if cell["model"] == "tiny" and "exchanged_bytes" in cell}
    parameters = sum(p.numel() for p in scaling.step_of(
        {"model": "tiny", "way": "one", "images": 1}, scaling.parse(["--report", "x", *SMALL]), torch.device("cpu")
    ).model.parameters())  # fmt: skip
    assert all(2 * parameters <= size <= 2.2 * parameters for size in sent)

    reported = subprocess.run(
        [sys.executable, "-m", "reference.scaling", "--report", str(path)],
        capture_output=True, text=True, check=True, env=environment(), cwd=ROOT,
    ).stdout  # fmt: skip
    assert reported.strip() in said
    assert "| small | 2 | 2 | 1 | one | not over after 60 s | | | | | | |" in reported
    assert reported.count("| tiny | 4 | 2 | sharded |") == 1  # what two levels cost


def test_what_there_is_no_time_for_is_left(tmp_path):
    path = tmp_path / "scaling.json"
    command = torchrun(2, "reference.scaling", "--cells", "tiny:4", *SMALL, "--json", path)
    # The first part takes longer than its limit.
    ended = subprocess.run(
        [*command, "--part-limit", "0.01"], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    assert ended.returncode != 0
    assert "stopped: ('tiny', 4, 2, 'one', 1) is not over after 0.01 s; the same command goes on" in ended.stdout
    (cell,) = json.loads(path.read_text())["cells"]
    assert cell["error"] == "not over after 0.01 s"
    ended = subprocess.run([*command, "--time-limit", "0"], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert ended.returncode != 0
    assert "no time was left for all parts after 0 s" in ended.stdout
    assert len(json.loads(path.read_text())["cells"]) == 1


def test_the_table_of_two_gpus():
    two = CELL | {"processes": 2, "way": "sharded", "median_ms": 8.0, "images_per_second": 64_000.0, "alone_ms": 0.9}
    table = scaling.report([two | {"nccl_ms": 1.25, "exposed_ms": 0.125}, CELL]).splitlines()
    assert table[2:4] == [
        "| B | 256 | 4 | 1 | one | 7.00 | 36571 | 1.00 | 3.5 | - | - | - |",
        "| B | 256 | 4 | 2 | sharded | 8.00 | 64000 | 0.88 | 3.5 | 0.90 | 1.25 | 0.12 |",
    ]


def test_what_was_measured_beside_what_paper_says(tmp_path, capsys):
    path = tmp_path / "scaling.json"
    two = CELL | {"processes": 2, "way": "sharded", "images_per_second": 64_000.0}
    path.write_text(json.dumps({"cells": [CELL, two, two | {"way": "ddp"}, two | {"way": "replicated", "error": "x"}]}))
    assert communication.main(["--measured", str(path)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 1
    assert rows[0].startswith("| B | 256 | 4 | 2 | sharded | 0.88 | ")
    assert 0.8 < float(rows[0].split(" | ")[-1].strip(" |")) < 1.1


def test_options_are_checked():
    for wrong in (["--cells", "huge:4"], ["--ways", "zero"], []):  # the last is without torchrun
        with pytest.raises(SystemExit):
            scaling.parse(wrong)


# 1 GB of gradients, a thousand bytes of it in the last bucket; forward and backward take 10 ms and 1 ms an image.
MODEL = Model(500_000_000, 500, 0.010 + 0.005, 0.001)


def test_a_step_among_many():
    """Each GPU sends 15/16 of 1 GB at 50 GB/s, 18.75 ms, twice; the update takes 5 ms, the copies 0.67."""
    alone = 10 + 100 + 5
    hidden = step_on_many(MODEL, 100, 16, 1)  # the backward takes 73 ms
    assert (hidden.adding_up, hidden.handing_out) == pytest.approx((18.75, 18.75))
    assert hidden.milliseconds == pytest.approx(10 + 100 + 0.667 + 18.75, abs=1e-2)
    assert hidden.efficiency == pytest.approx(alone / hidden.milliseconds)
    bound = step_on_many(MODEL, 2, 16, 1)  # 8 ms
    assert bound.milliseconds == pytest.approx(12 + 0.667 + 18.75 - 8 + 18.75, abs=1e-2)
    replicated = step_on_many(MODEL, 2, 16, 1, sharded=False)
    assert replicated.milliseconds == pytest.approx(12 + 0.667 + 37.5 - 8 + 5, abs=1e-2)
    parts = step_on_many(MODEL, 2, 16, 1, parts=4)
    assert parts.milliseconds == pytest.approx(bound.milliseconds + 3 * 12)
    assert images_that_hide(MODEL, 16, 1) == 19  # 18.75 ms are two thirds of 28.1
    least = parts_that_hide(MODEL, 2, 16, 1)
    efficiencies = [step_on_many(MODEL, 2, 16, 1, parts=number).efficiency for number in (least - 1, least)]
    assert efficiencies[0] < 0.9 <= efficiencies[1]


def test_the_page_shows_what_the_command_says(tmp_path, capsys):
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert communication.main(["--json", str(tmp_path / "paper.json")]) == 0
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page
    assert json.loads((tmp_path / "paper.json").read_text()) == json.loads(
        (ROOT / "docs" / "distributed" / "paper.json").read_text()
    )
    assert (tmp_path / "paper.png").stat().st_size > 10_000
