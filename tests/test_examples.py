"""Every example runs on the CPU, from the command line as its first lines say, and prints what a user wants to see."""

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment

FAMILIES = {
    "plain_pytorch": (["--steps", "12"], None, 3),
    "bags_of_text": (["--steps", "12"], None, 3),
    "llamagen": (["--epochs", "4"], None, 6),
    "lightning_images": (["--steps", "12"], "lightning", 3),
    "transformers_trainer": (["--steps", "12"], "transformers", 2),
}
# What the others share, and the one that has a test beside its family's.
HELPERS = {"__init__", "images", "llamagen_model", "torchtitan_bags"}


@pytest.mark.parametrize("name", FAMILIES)
def test_runs_and_prints_the_loss_of_every_stage(name, tmp_path):
    arguments, package, stages = FAMILIES[name]
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    command = [sys.executable, "-m", f"examples.{name}", *arguments]
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", result.stdout)]
    assert len(losses) == stages, result.stdout
    assert all(0 < loss < 7 for loss in losses)
    assert len(re.findall(r"\d+ ms a step", result.stdout)) == stages
    if name == "llamagen":  # with its own forward and with the patched one: the same run
        assert losses[:3] == pytest.approx(losses[3:], rel=1e-2)
        assert losses[0] == pytest.approx(losses[3], rel=1e-4)
    else:
        assert "held out" in result.stdout


def test_no_example_is_left_out():
    """A file of another family adds itself here, and is run."""
    files = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert files - HELPERS == set(FAMILIES)
    for name in files - HELPERS:
        text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        assert f"python -m examples.{name}" in text, name
