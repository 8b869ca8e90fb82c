"""The script that times the sampler: its parts, its bytes, and its end."""

import json

import pytest

from bench import sample_time
from reference.network.model import ModelConfig, Transformer
from tests.conftest import INTERPRETED

SMALL = ModelConfig.named("tiny", vocab_size=50, grid=(4, 4), num_classes=10)


def test_parts_and_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_time.ModelConfig, "named", lambda size: SMALL)
    file = tmp_path / "times.json"
    command = ["--cells", "tiny:2", "--ways", "kernels", "plain", "--calls", "1", "--device", "cpu"]
    results = sample_time.measure(sample_time.parse([*command, "--json", str(file)]))
    assert json.loads(file.read_text()) == results
    kernels, plain = results["parts"]
    assert [kernels["way"], plain["way"]] == ["kernels", "plain"]
    assert ("skipped" in kernels) == (not INTERPRETED)  # the CPU has none
    assert plain["ms_a_token"] == pytest.approx(1e3 * plain["seconds"][0] / 16)
    assert plain["images_per_second"] == pytest.approx(2 / plain["seconds"][0])


def test_no_part_is_begun_past_the_limit():
    results = sample_time.measure(sample_time.parse(["--cells", "B:64", "--device", "cpu", "--limit", "-1"]))
    assert len(results["parts"]) == 3
    assert all("skipped" in part for part in results["parts"])


def test_bytes():
    found = sample_time.bytes_of_a_token(Transformer(SMALL), images=3, rows=6)
    layer = 4 * 64 * 64 + 3 * 64 * 256 + 2 * 64
    assert found["weights"] == 4 * (2 * layer + 64 + 50 * 64)
    assert found["cache"] == sum(4 * 6 * 2 * 2 * 64 * (position + 1) for position in range(16)) / 16
    assert found["logits and noise"] == 2 * 4 * 6 * 50 + 2 * 4 * 3 * 50


def test_cells_are_checked(capsys):
    for wrong in ("B", "B:0", "Q:4", "B:-1"):
        with pytest.raises(SystemExit):
            sample_time.parse(["--cells", wrong])
        assert "expected SIZE:IMAGES" in capsys.readouterr().err
