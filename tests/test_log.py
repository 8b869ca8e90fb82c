"""The log of a run: what is kept after a power cut, what is refused, and TensorBoard."""

import sys

import pytest

from reference.training.log import COLUMNS, Log, read_log

ROW = dict.fromkeys(COLUMNS, 0.5) | {"step": 3, "test_nll": None, "test_weights": "raw"}


def write_log(folder, steps=(1, 2, 3)):
    log = Log(folder, 0, tensorboard=False)
    for step in steps:
        log.write(ROW | {"step": step})
    log.sync()
    log.close()
    return folder / "log.csv"


def steps_after(folder, first_step=9):
    Log(folder, first_step, tensorboard=False).close()
    return [row["step"] for row in read_log(folder / "log.csv")]


def test_a_run_that_goes_on_keeps_the_lines_up_to_its_checkpoint(tmp_path):
    path = write_log(tmp_path)
    whole = path.read_bytes()
    assert steps_after(tmp_path) == ["1", "2", "3"]
    assert path.read_bytes() == whole
    assert steps_after(tmp_path, first_step=2) == ["1", "2"]
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
    row = read_log(path)[1]
    assert (row["loss"], row["test_nll"], row["test_weights"]) == ("0.5", "", "raw")


@pytest.mark.parametrize("end", [b"4", b"4,0.5,0.5", b"\0" * 300, b"4,0.5" + b"\0" * 4096, b"\0", b"4,\xff"])
def test_a_last_line_that_a_power_cut_left_is_dropped(tmp_path, capsys, end):
    path = write_log(tmp_path)
    path.write_bytes(path.read_bytes() + end)
    assert steps_after(tmp_path) == ["1", "2", "3"]
    assert "log.csv: its last line was cut short, and is left out" in capsys.readouterr().err


def test_a_last_line_with_all_its_columns_may_be_cut_too(tmp_path):
    path = write_log(tmp_path)
    path.write_bytes(path.read_bytes()[:-2])  # without its end, who knows how many digits are missing
    assert steps_after(tmp_path) == ["1", "2"]


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"step,epo", b"step,epo\0\0"])
def test_a_log_cut_in_its_first_line_begins_anew(tmp_path, content):
    (tmp_path / "log.csv").write_bytes(content)
    assert steps_after(tmp_path) == []


@pytest.mark.parametrize("content", [b"time,price\n1,2\n", b"step,loss\n1,2\n", b"my notes", b"\x89PNG\r\n\x1a\n"])
def test_a_foreign_log_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"log\.csv: expected a log of this trainer's, .* choose another --output"):
        Log(tmp_path, 0, tensorboard=False)
    assert path.read_bytes() == content


def test_a_broken_line_before_the_last_is_named(tmp_path):
    path = write_log(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for broken in (b"4\r\n", lines[2].replace(b"2", b"x", 1)):
        path.write_bytes(b"".join([*lines[:2], broken, lines[3]]))
        with pytest.raises(ValueError, match=rf"log\.csv, line 3: expected {len(COLUMNS)} columns and a step, got"):
            Log(tmp_path, 9, tensorboard=False)


def test_a_log_of_before_a_column_was_added(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("".join(",".join(line) + "\r\n" for line in (COLUMNS[:-1], ["7"] * 12)), newline="")
    assert steps_after(tmp_path) == ["7"]
    assert read_log(path)[0]["test_weights"] == ""


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = Log(tmp_path, 0, tensorboard=True)
    log.write(ROW)
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(COLUMNS) - {"step", "test_nll", "test_weights"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]


def test_tensorboard_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="tensorboard: expected the package, found none: pip install"):
        Log(tmp_path, 0, tensorboard=True)
