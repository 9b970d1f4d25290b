"""Schedules against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from gpt_lightning.training.schedules import constant, cosine, linear, wsd


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.2),  # 1 / (4 + 1)
        (1, 0.4),
        (2, 0.6),
        (3, 0.8),
        (4, 1.0),  # the peak
        (7, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2),  # a quarter of the 12 steps that are left
        (10, 0.55),  # half way: the mean of 1 and 0.1
        (16, 0.1),
        (99, 0.1),  # after the end
    ],
)
def test_cosine_factor(step: int, factor: float) -> None:
    assert cosine(step, max_steps=16, warmup_steps=4, min_lr_ratio=0.1) == pytest.approx(factor)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.5), (1, 1.0), (2, 0.8), (3, 0.6), (5, 0.2), (6, 0.2)])
def test_linear_factor(step: int, factor: float) -> None:
    assert linear(step, max_steps=5, warmup_steps=1, min_lr_ratio=0.2) == pytest.approx(factor)


@pytest.mark.parametrize(("step", "factor"), [(0, 1 / 3), (1, 2 / 3), (2, 1.0), (500, 1.0)])
def test_constant_factor(step: int, factor: float) -> None:
    assert constant(step, max_steps=501, warmup_steps=2) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.5), (1, 1.0), (5, 1.0), (6, 1.0), (7, 0.775), (8, 0.55), (9, 0.325), (10, 0.1)]
)
def test_wsd_factor(step: int, factor: float) -> None:
    # the last 40 % of 10 steps fall from 1 to 0.1
    value = wsd(step, max_steps=10, warmup_steps=1, decay_ratio=0.4, min_lr_ratio=0.1)
    assert value == pytest.approx(factor)


def test_warmup_starts_at_the_given_ratio() -> None:
    # a peak of 3e-4 that begins at 3e-7
    factors = [
        cosine(step, max_steps=2000, warmup_steps=1000, warmup_start_ratio=1e-3) for step in (0, 500, 1000)
    ]
    assert factors == pytest.approx([1e-3, 0.5005, 1.0])


@pytest.mark.parametrize("schedule", [constant, cosine, linear, wsd])
def test_no_warmup_begins_at_the_peak(schedule) -> None:
    assert schedule(0, max_steps=10) == 1.0


@pytest.mark.parametrize("schedule", [constant, cosine, linear, wsd])
def test_warmup_that_does_not_fit_is_refused(schedule) -> None:
    with pytest.raises(ValueError, match=r"scheduler.warmup_steps=10 .* 10 optimizer steps"):
        schedule(0, max_steps=10, warmup_steps=10)


@pytest.mark.parametrize("key", ["min_lr_ratio", "warmup_start_ratio"])
@pytest.mark.parametrize("schedule", [linear, cosine, wsd])
def test_ratio_above_one_is_refused(schedule, key: str) -> None:
    with pytest.raises(ValueError, match=rf"scheduler.{key}=1.5 is a share"):
        schedule(0, max_steps=10, **{key: 1.5})


def test_decay_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scheduler.decay_ratio=1.5 is a share"):
        wsd(0, max_steps=10, decay_ratio=1.5)


@pytest.mark.parametrize(("max_steps", "warmup"), [(9, 0), (59, 5), (990, 99), (5000, 100)])
def test_default_warmup_is_a_tenth_of_the_run_and_at_most_a_hundred_steps(
    max_steps: int, warmup: int
) -> None:
    for step in range(warmup):
        factor = constant(step, max_steps=max_steps, warmup_steps=None)
        assert factor == pytest.approx((step + 1) / (warmup + 1))
    assert constant(warmup, max_steps=max_steps, warmup_steps=None) == 1.0


@pytest.mark.parametrize(("schedule", "end"), [(cosine, 0.1), (linear, 0.0), (wsd, 0.0)])
def test_factor_at_the_end_without_a_given_ratio(schedule, end: float) -> None:
    assert schedule(10, max_steps=10) == pytest.approx(end)
