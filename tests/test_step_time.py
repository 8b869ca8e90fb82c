"""Measuring training steps: cells that fail, that do not fit, that are there already."""

import doctest
import gc
import json
import re
import weakref

import pytest
import torch

from reference import step_time
from reference.comparison import step_report

FIXED = ["--images", "2", "--steps", "2", "--vocab-size", "64", "--grid", "4", "--compile", "off"]


def test_docstrings_run():
    results = doctest.testmod(step_report)
    assert (results.attempted, results.failed) == (4, 0)


def test_a_cell_that_fails_does_not_stop_the_table(tmp_path, capsys):
    arguments = ["--models", "tiny", *FIXED, "--precision", "autocast", "--json", str(tmp_path / "times.json")]
    assert step_time.main([*arguments, "--patches", "3,2"]) == 1
    assert step_time.main([*arguments, "--patches", "1"]) == 0
    cells = json.loads((tmp_path / "times.json").read_text())["cells"]
    found = {(cell["patch"], cell["formulation"]): cell for cell in cells}
    assert len(found) == len(cells) == 6
    assert "does not divide" in found[3, "ours"]["error"]
    for patch in (2, 1):
        ours, official = found[patch, "ours"], found[patch, "official"]
        assert ours["loss"] == pytest.approx(official["loss"], rel=1e-2)
        assert ours["median_ms"] > 0
    cost_of_two_levels = r"^\| tiny \| 2 \| 2 \| [\d.]+ \| [\d.]+ \|$"
    assert re.search(cost_of_two_levels, capsys.readouterr().out, re.MULTILINE)
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def measured(monkeypatch):
    """Replace measuring by a memory that holds 50 images of ours and 20 of the official one; return the cells tried."""
    tried = []

    def measure(cell, options, device):
        tried.append(tuple(cell.values()))
        if cell["images"] > (50 if cell["formulation"] == "ours" else 20):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")
        if cell["patch"] == 8:
            raise RuntimeError("broken")
        figures = dict.fromkeys(("median_ms", "images_per_second", "model_tflops_per_second", "setup_seconds"), 1.0)
        return {**figures, "peak_gib": None}

    monkeypatch.setattr(step_time, "measure", measure)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # nothing is compiled, and it takes its time
    return tried


def test_max_is_the_largest_number_of_images_that_fits(tmp_path, measured, capsys):
    arguments = ["--models", "tiny", "--images", "8,max", "--patches", "2,1", "--json", str(tmp_path / "times.json")]
    assert step_time.main(arguments) == 0  # what does not fit has not failed
    official, ours = [(images, "official") for images in (256, 128, 64, 32, 16)], [(16, "ours")]
    assert [(cell[2], cell[3]) for cell in measured if cell[1] == 1 and cell[2] != 8] == official + ours
    assert [(cell[2], cell[3]) for cell in measured if cell[1] == 2 and cell[2] != 8] == [
        (16, "official"),
        (16, "ours"),
    ]
    assert "| tiny | 256 | 1 | out of memory | - | - |" in capsys.readouterr().out
    measured.clear()
    assert step_time.main([*arguments, "--formulations", "ours"]) == 0
    assert [cell[2:] for cell in measured] == [(images, "ours") for images in (256, 128, 64, 32, 32)]


def test_what_was_measured_is_kept(tmp_path, measured):
    arguments = ["--models", "tiny", "--images", "max", "--patches", "4,1", "--json", str(tmp_path / "times.json")]
    assert step_time.main([*arguments, "--time-limit", "0"]) == 1
    assert measured == []
    step_time.main(arguments)
    tried = list(measured)
    assert len(tried) == len(set(tried)) == 8
    measured.clear()
    step_time.main(arguments)
    assert measured == []
    step_time.main([*arguments, "--again"])
    assert measured == tried
    measured.clear()
    step_time.main([*arguments, "--vocab-size", "100"])  # another measurement
    assert measured == tried
    cells = json.loads((tmp_path / "times.json").read_text())["cells"]
    assert len(cells) == 8
    assert {cell["vocab_size"] for cell in cells} == {100}


def test_cells_are_compiled_ahead_in_processes_of_their_own(tmp_path, measured, monkeypatch):
    commands = []
    monkeypatch.setattr(step_time.subprocess, "run", lambda command, **options: commands.append(command))
    arguments = ["--models", "tiny", "--images", "4,max", "--patches", "2,1", "--grid", "8", "--compile", "on"]
    arguments += ["--compile-ahead", "3", "--json", str(tmp_path / "times.json")]
    assert step_time.main(arguments) == 0
    assert all(command[1:3] == ["-m", "reference.step_time"] for command in commands)
    children = [step_time.parse(command[3:]) for command in commands]
    assert {(child.grid, child.compile, child.compile_ahead, child.steps) for child in children} == {(8, "on", 0, 1)}
    asked = {(child.models[0], child.patches[0], int(child.images[0]), child.formulations[0]) for child in children}
    assert len(commands) == len(asked) == len({child.json for child in children}) == 8
    assert asked >= {cell for cell in measured if cell[2] == 4}
    assert {images for _, _, images, _ in asked} == {4, 256}
    commands.clear()
    assert step_time.main(arguments) == 0  # what does not fit is known by now, and so is what was measured
    assert [step_time.parse(command[3:]).patches for command in commands] == [[2], [2], [1]]


def test_what_failed_is_tried_again(tmp_path, measured):
    arguments = ["--models", "tiny", "--images", "2", "--patches", "8,1", "--json", str(tmp_path / "times.json")]
    assert step_time.main(arguments) == 1
    assert len(measured) == 4
    assert step_time.main(arguments) == 1
    assert measured[4:] == [("tiny", 8, 2, "official"), ("tiny", 8, 2, "ours")]


def test_a_cell_that_does_not_fit_leaves_nothing_behind(monkeypatch):
    class Model:
        pass

    alive = []

    def measure(cell, options, device):
        model = Model()
        model.itself = model
        alive.append(weakref.ref(model))
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(step_time, "measure", measure)
    gc.disable()
    try:
        cell = step_time.run_cell({"model": "tiny"}, step_time.parse([]), torch.device("cpu"))
        assert alive[0]() is None
    finally:
        gc.enable()
    assert cell["out_of_memory"]


def test_images_are_numbers_or_max():
    with pytest.raises(SystemExit):
        step_time.parse(["--images", "most"])
