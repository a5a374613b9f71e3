"""Both generations' schedules against a plain restatement, and at the steps where something changes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ConfigError
from model.schedule import Schedule


def feb(step: int, N: int) -> tuple[float, float, float]:
    lr = min(1.0, (N - step) / round(0.5 * N)) if round(0.5 * N) else 1.0
    return lr, 0.85 + 0.10 * min(step / 300, 1.0), 1 - step / N


def head(step: int, N: int) -> tuple[float, float, float]:
    down = round(0.65 * N)
    left = min(1.0, (N - step) / down) if down else 1.0
    lr = (step + 1) / 40 if step < 40 else left + 0.05 * (1 - left)
    momentum = 0.85 + 0.12 * step / 400 if step < 400 else 0.97 - 0.07 * (1 - left)
    return lr, momentum, 0.5 * (1 + math.cos(math.pi * step / N))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([("feb", feb), ("head", head)]), st.integers(1, 20000), st.floats(0, 1, exclude_max=True))
def test_every_step(generation: tuple, N: int, share: float) -> None:
    name, restated = generation
    step = int(share * N)
    hyper = Schedule.for_generation(N, name).at(step)
    assert (hyper.lr_mult, hyper.momentum, hyper.wd_mult) == pytest.approx(restated(step, N))


def test_run_6_at_its_corners() -> None:
    at = Schedule.for_generation(5568, "head").at
    assert (at(0).lr_mult, at(39).lr_mult, at(40).lr_mult) == (1 / 40, 1.0, 1.0)
    start = 5568 - 3619  # the warm-down is 65 % of the run
    assert at(start).lr_mult == 1.0 > at(start + 1).lr_mult
    assert at(5567).lr_mult == pytest.approx(0.05 + 0.95 / 3619)
    assert (at(0).momentum, at(400).momentum, at(start).momentum) == (0.85, 0.97, 0.97)
    assert at(5567).momentum == pytest.approx(0.90, abs=1e-4)
    assert at(2784).wd_mult == pytest.approx(0.5)


def test_run_1_at_its_corners() -> None:
    at = Schedule.for_generation(16704, "feb").at
    assert (at(0).lr_mult, at(8352).lr_mult, at(16703).lr_mult) == (1.0, 1.0, 1 / 8352)
    assert (at(0).momentum, at(300).momentum, at(16703).momentum) == pytest.approx((0.85, 0.95, 0.95))
    assert (at(0).wd_mult, at(4176).wd_mult) == (1.0, 0.75)


def test_values_can_be_changed() -> None:
    schedule = Schedule.for_generation(100, "feb", final_lr=0.5, warmup_steps=10)
    assert (schedule.at(0).lr_mult, schedule.at(75).lr_mult) == (0.1, 0.75)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"steps": 0}, "a run of 0 steps"),
        ({"warmdown_ratio": 1.5}, "warmdown_ratio is 1.5"),
        ({"decay_shape": "step"}, "decay_shape is 'step'"),
        ({"generation": "may"}, "no such generation: 'may'"),
    ],
)
def test_bad_schedules_are_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Schedule.for_generation(**{"steps": 10, **changes})
