"""The script that times the order of groups: every line has its parts."""

from bench import group_order


def test_table(capsys, monkeypatch):
    monkeypatch.setattr(group_order.CpuClock, "budget_seconds", 0.01)
    monkeypatch.setattr(group_order, "measure_limits", lambda clock, dtype: group_order.Limits(1e9, None, 1e9))
    group_order.main(["--small", "--device", "cpu"])
    _, _, header, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split("|")[2].strip() for line in lines] == ["real", "uniform"]
    for line in lines:
        cells = line.strip("|").split("|")
        assert len(cells) == header.count("|") - 1
        *times, shares = cells[3:]
        assert all(float(time) > 0 for time in times)
        without, given, all_of_it = (float(share) for share in shares.split("·"))
        assert without > 0
        assert all_of_it <= given
