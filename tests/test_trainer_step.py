"""The benchmark of the official training step, on a stand-in for the official code, without its compiler."""

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment

GPT = """
from types import SimpleNamespace as ModelArgs
from examples.llamagen_model import Transformer as Small


def Transformer(config):
    return Small(vocab_size=config.vocab_size, dim=config.dim, n_layer=config.n_layer, n_head=config.n_head,
                 num_classes=config.num_classes, dropout=config.token_dropout_p)
"""


def run(folder, *arguments):
    models = folder / "official" / "autoregressive" / "models"
    models.mkdir(parents=True)
    (models / "gpt.py").write_text(GPT)
    command = [sys.executable, "-m", "bench.trainer_step", "--official", str(folder / "official"), "--size", "tiny"]
    command += ["--images", "2", "--compile-ahead", "0", "--seconds", "0.1", "--json", str(folder / "out.json")]
    variables = environment() | {"TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(
        [*command, *arguments], env=variables, capture_output=True, text=True, timeout=180, cwd=ROOT
    )
    return result, json.loads((folder / "out.json").read_text())["cells"]


def test_times_every_part_of_the_same_training(tmp_path):
    result, cells = run(tmp_path, "--patches", "4", "--modes", "compile")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [(cell["contender"], cell["mode"]) for cell in cells] == [
        (contender, mode) for contender in ("official", "patched") for mode in ("compile", "graph")
    ]
    assert all(cell["median_ms"] > 0 and cell["steps"] >= 20 for cell in cells)
    assert cells[0]["loss"][0] == pytest.approx(cells[2]["loss"][0], rel=1e-3)  # after ten steps
    assert "| patched, graph | " in result.stdout


def test_what_there_is_no_time_for_is_written_down(tmp_path):
    result, cells = run(tmp_path, "--patches", "4,1", "--time-limit", "0")
    assert result.returncode == 1
    assert len(cells) == 8
    assert all("no time left" in cell["error"] for cell in cells)


def test_a_part_that_fails_does_not_end_the_others(tmp_path):
    result, cells = run(tmp_path, "--patches", "3", "--modes", "compile")  # which does not divide the grid
    assert result.returncode == 1
    assert [cell["contender"] for cell in cells] == ["official", "patched"]
    assert all("ValueError: p: expected a patch that divides" in cell["error"] for cell in cells)
