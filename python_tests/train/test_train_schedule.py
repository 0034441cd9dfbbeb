"""Learning-rate factors at steps worked out by hand."""

from __future__ import annotations

import pytest
from support import training  # noqa: F401

from train.schedule import SCHEDULES, lr_factor


def test_polynomial_is_a_power_of_what_is_left() -> None:
    values = [lr_factor(s, 4, schedule="polynomial", power=2.0) for s in range(4)]
    assert values == pytest.approx([1.0, 0.5625, 0.25, 0.0625])


def test_cosine_falls_from_one_through_a_half() -> None:
    values = [lr_factor(s, 4, schedule="cosine") for s in (0, 1, 2, 4)]
    assert values == pytest.approx([1.0, 0.8535534, 0.5, 0.0])


def test_step_multiplies_by_gamma_from_each_milestone_on() -> None:
    values = [
        lr_factor(s, 10, schedule="step", milestones=[2, 5], gamma=0.1) for s in (1, 2, 4, 5, 9)
    ]
    assert values == pytest.approx([1.0, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_linearly_to_the_peak(schedule: str) -> None:
    def factor(step: int) -> float:
        return lr_factor(step, 20, schedule=schedule, warmup_steps=4, milestones=[10])

    assert [factor(s) for s in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factor(4) == pytest.approx(1.0)  # the decay starts at the peak
    rest = [factor(s) for s in range(4, 20)]
    assert rest == sorted(rest, reverse=True)


def test_warm_up_as_long_as_the_run() -> None:
    assert lr_factor(3, 4, schedule="cosine", warmup_steps=4) == 1.0
    assert lr_factor(4, 4, schedule="cosine", warmup_steps=4) == 1.0


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="schedule"):
        lr_factor(0, 4, schedule="magic")
