"""Schedules: where they begin and end, and that they are functions of the step alone."""

from __future__ import annotations

import pytest

from sparc_fast.training import Config
from sparc_fast.training.in_memory import _schedule
from sparc_fast.training.schedules import Schedule

STREAMS = ("a", "b", "c")


def schedule(steps: int = 100, **changes: object) -> Schedule:
    return Schedule(Config(**{"n_latents": 64, "k": 4, "steps": steps, "lr": 2.0, **changes}), steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_the_cosine_is_that_of_the_training_loop_in_memory(warmup: float) -> None:
    assert [schedule(warmup=warmup).lr(step) for step in range(100)] == pytest.approx(
        [2.0 * _schedule(step, 100, warmup) for step in range(100)], rel=1e-15
    )


@pytest.mark.parametrize(("decay", "middle", "end"), [("cosine", 1.1, 0.2), ("linear", 1.1, 0.2), ("constant", 2, 2)])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end(decay: str, middle: float, end: float) -> None:
    s = schedule(decay=decay, warmup=0.2, lr_end=0.1)
    rising = [s.lr(step) for step in range(21)]
    assert rising == sorted(rising)
    assert 0 < rising[0] < 0.1
    assert s.lr(20) == 2.0
    assert s.lr(60) == pytest.approx(middle)
    assert s.lr(100) == pytest.approx(end)
    falling = [s.lr(step) for step in range(20, 100)]
    assert falling == sorted(falling, reverse=True)


def test_lambda_and_k_go_from_their_start_to_their_value() -> None:
    s = schedule(cross_loss_coef=2.0, cross_loss_start=1.0, cross_loss_ramp=0.5, k_start=14, k_ramp=0.1)
    assert [s.cross_loss_coef(step) for step in (0, 25, 50, 99)] == [1.0, 1.5, 2.0, 2.0]
    assert [s.k(step) for step in range(12)] == [14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 4]
    assert [schedule().k(0), schedule().cross_loss_coef(0)] == [4, 1.0]


def test_streams_drop_out_of_the_support_as_often_as_said_and_never_all() -> None:
    s = schedule(support_dropout=0.4)
    drawn = [s.support_from(step, STREAMS) for step in range(2000)]
    assert all(drawn)
    # given that one is left: P(kept) = 0.6 / (1 - 0.4 ** 3)
    for name in STREAMS:
        assert sum(name in kept for kept in drawn if kept) / 2000 == pytest.approx(0.641, abs=0.04)
    assert drawn == [s.support_from(step, STREAMS) for step in range(2000)]
    other = schedule(support_dropout=0.4, seed=1)
    assert drawn != [other.support_from(step, STREAMS) for step in range(2000)]
    assert schedule().support_from(0, STREAMS) is None
