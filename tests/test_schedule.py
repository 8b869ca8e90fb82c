"""The schedule: stages, learning-rate factor, cost, errors."""

import dataclasses
import doctest
import itertools
import pickle

import pytest

import npp_kernels.schedule
from npp_kernels import PatchSchedule, Stage


def test_docstrings_run():
    assert doctest.testmod(npp_kernels.schedule).failed == 0


# The official script's epoch ranges at 300 epochs and rate 0.5 are [150, 300], [75, 150, 300] and [37, 75, 150, 300].
@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (1, ((1, 300),)),
        (2, ((2, 150), (1, 300))),
        (3, ((4, 75), (2, 150), (1, 300))),
        (4, ((8, 37), (4, 75), (2, 150), (1, 300))),
    ],
)
def test_boundaries_of_the_official_script(levels, expected):
    schedule = PatchSchedule.coarse_to_fine(levels, 300)
    assert schedule.boundaries == expected
    assert schedule == PatchSchedule(list(expected))
    assert schedule.total_steps == 300


def test_a_run_of_one_step():
    assert PatchSchedule.coarse_to_fine(1, 1).boundaries == ((1, 1),)


def test_other_rate():
    assert PatchSchedule.coarse_to_fine(3, 1000, rate=0.3).boundaries == ((4, 90), (2, 300), (1, 1000))


def test_stage_of_every_step():
    schedule = PatchSchedule([((1, 2), 3), (2, 4), (1, 9)])
    found = [schedule.at(step) for step in range(9)]
    assert [stage.index for stage in found] == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert found[0] == Stage(0, (1, 2), 0, 3)
    assert found[3] == Stage(1, 2, 3, 4)
    assert found[8] == schedule.stages[-1] == Stage(2, 1, 4, 9)


@pytest.mark.parametrize("step", [-1, 9, 10**12])
def test_step_outside_the_run(step):
    schedule = PatchSchedule([(2, 4), (1, 9)])
    with pytest.raises(IndexError, match=f"step: expected 0 to 8, got {step}"):
        schedule.at(step)
    with pytest.raises(IndexError, match="step"):
        schedule.lr_factor(step, 1, 0.1, 0.1)


def official_factor(step, start, end, warmup_steps, decay_ratio, end_factor):
    """The official script's three phases, as its text describes them."""
    decay_steps = (end - start) * decay_ratio
    constant_steps = (end - start) - warmup_steps - decay_steps
    if step < start + warmup_steps:
        return (step - start) / max(1, warmup_steps)
    if step < start + warmup_steps + constant_steps:
        return 1.0
    progress = (step - (start + warmup_steps + constant_steps)) / decay_steps
    return end_factor + (1 - end_factor) * max(0.0, 1.0 - progress)


@pytest.mark.parametrize(("warmup_steps", "decay_ratio", "end_factor"), [(10, 0.2, 0.1), (0, 0.5, 0.0), (25, 0.0, 0.3)])
def test_learning_rate_of_the_official_script(warmup_steps, decay_ratio, end_factor):
    schedule = PatchSchedule.coarse_to_fine(3, 400)
    for step in range(400):
        stage = schedule.at(step)
        expected = official_factor(step, stage.start, stage.end, warmup_steps, decay_ratio, end_factor)
        assert schedule.lr_factor(step, warmup_steps, decay_ratio, end_factor) == pytest.approx(expected, abs=1e-12)


def test_a_stage_shorter_than_its_warmup_and_decay_stays_continuous():
    schedule = PatchSchedule([(2, 10), (1, 100)])
    factors = [schedule.lr_factor(step, 8, 0.8, 0.0) for step in range(10)]
    assert max(factors) < 1
    assert max(abs(b - a) for a, b in itertools.pairwise(factors)) <= 1 / 8 + 1e-12


def test_cost_by_tokens():
    # Half of the run at a quarter of the tokens; and a quarter at 1/16, a quarter at 1/4, half at 1.
    assert PatchSchedule.coarse_to_fine(1, 100).relative_cost((16, 16)) == 1.0
    assert PatchSchedule.coarse_to_fine(2, 100).relative_cost((16, 16)) == 0.625
    assert PatchSchedule.coarse_to_fine(3, 100).relative_cost((16, 16)) == 0.578125
    assert PatchSchedule([((1, 4), 50), (1, 100)]).relative_cost((16, 16)) == 0.625
    assert PatchSchedule([((4,), 50), ((1,), 100)]).relative_cost((64,)) == 0.625
    assert PatchSchedule([(2, 50), (1, 100)]).relative_cost((4, 4, 4)) == (1 / 8 + 1) / 2


def test_cost_by_operations_counts_attention():
    schedule = PatchSchedule.coarse_to_fine(2, 100)
    narrow = schedule.relative_cost((16, 16), hidden_size=64, num_layers=12, vocab_size=512)
    wide = schedule.relative_cost((16, 16), hidden_size=4096, num_layers=12, vocab_size=512)
    # Attention is quadratic in the sequence, so the coarse half costs less than a quarter; the more, the narrower.
    assert 0.5 < narrow < wide < 0.625

    def operations(p):
        return 6 * p * (12 * 12 * 64**2 + 64 * 512) + 6 * 12 * 64 * p * (p + 1)

    assert narrow == pytest.approx((operations(64) + operations(256)) / (2 * operations(256)), rel=1e-12)


def test_schedules_are_frozen_values():
    schedule = PatchSchedule.coarse_to_fine(3, 100)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.boundaries = ()
    assert hash(schedule) == hash(PatchSchedule.coarse_to_fine(3, 100))
    assert schedule != PatchSchedule.coarse_to_fine(2, 100)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    # Two runs cut at any step are one run: nothing but the step decides.
    assert [schedule.at(step) for step in range(60)] + [schedule.at(step) for step in range(60, 100)] == [
        PatchSchedule(schedule.boundaries).at(step) for step in range(100)
    ]


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "levels", lambda: PatchSchedule.coarse_to_fine(0, 100)),
        (ValueError, "levels", lambda: PatchSchedule.coarse_to_fine(5, 100)),
        (TypeError, "levels", lambda: PatchSchedule.coarse_to_fine(2.0, 100)),
        (ValueError, "total_steps", lambda: PatchSchedule.coarse_to_fine(1, 0)),
        (ValueError, "total_steps", lambda: PatchSchedule.coarse_to_fine(4, 7)),
        (TypeError, "total_steps", lambda: PatchSchedule.coarse_to_fine(1, "7")),
        (ValueError, "rate", lambda: PatchSchedule.coarse_to_fine(2, 100, rate=1.0)),
        (ValueError, "rate", lambda: PatchSchedule.coarse_to_fine(2, 100, rate=0.0)),
        (ValueError, "boundaries", lambda: PatchSchedule([])),
        (ValueError, "boundaries", lambda: PatchSchedule([(2, 10), (1, 10)])),
        (TypeError, "boundaries", lambda: PatchSchedule([2])),
        (TypeError, "until_step", lambda: PatchSchedule([(2, 10.5)])),
        (ValueError, "patch", lambda: PatchSchedule([(0, 10)])),
        (TypeError, "patch", lambda: PatchSchedule([("2", 10)])),
        (TypeError, "step", lambda: PatchSchedule([(2, 10)]).at(True)),
        (ValueError, "warmup_steps", lambda: PatchSchedule([(2, 10)]).lr_factor(0, -1, 0.1, 0.1)),
        (ValueError, "decay_ratio", lambda: PatchSchedule([(2, 10)]).lr_factor(0, 1, 1.1, 0.1)),
        (ValueError, "end_factor", lambda: PatchSchedule([(2, 10)]).lr_factor(0, 1, 0.1, 2.0)),
        (ValueError, "patch", lambda: PatchSchedule([(3, 10)]).relative_cost((16, 16))),
        (ValueError, "patch", lambda: PatchSchedule([((2, 2), 10)]).relative_cost((16,))),
        (ValueError, "num_layers", lambda: PatchSchedule([(2, 10)]).relative_cost((4, 4), hidden_size=8, vocab_size=8)),
        (
            ValueError,
            "hidden_size",
            lambda: PatchSchedule([(2, 10)]).relative_cost((4, 4), hidden_size=0, num_layers=1, vocab_size=8),
        ),
    ],
)
def test_errors_name_the_argument(error, name, call):
    with pytest.raises(error, match=rf"^{name}: expected"):
        call()


def test_cost_counts_every_operation():
    """9 and 36 positions, and sizes whose binary digits overlap: no other operator gives the same."""

    def cost(positions):
        return 6 * positions * (12 * 5 * 30**2 + 30 * 512) + 6 * 5 * 30 * positions * (positions + 1)

    schedule = PatchSchedule([(2, 3), (1, 10)])
    found = schedule.relative_cost((6, 6), hidden_size=30, num_layers=5, vocab_size=512)
    assert found == pytest.approx((3 * cost(9) + 7 * cost(36)) / (10 * cost(36)), rel=1e-12)


def test_a_schedule_cannot_be_changed():
    with pytest.raises(AttributeError):
        PatchSchedule([(1, 10)]).boundaries = ((1, 20),)


def test_the_ends_of_the_ranges_are_in_them():
    schedule = PatchSchedule([(1, 10)])
    assert schedule.lr_factor(5, 0, 1.0, 0.0) == pytest.approx(0.5)
    assert schedule.lr_factor(5, 0, 0.0, 1.0) == 1.0
    assert schedule.lr_factor(9, 0, 1.0, 1.0) == 1.0
