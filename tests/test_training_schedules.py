"""Schedules: where they begin and end, and that they are functions of the step alone."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparc_fast.training import Config
from sparc_fast.training.in_memory import _schedule
from sparc_fast.training.schedules import Schedule, advice_on_few_steps

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
    assert schedule(support_dropout=0).support_from(0, STREAMS) is None


def test_support_dropout_is_on_by_default_but_under_local_selection() -> None:
    assert schedule().config.support_dropout == 0.5
    assert schedule(selection="local").config.support_dropout == 0


def epochs(n: float, **changes: object) -> Config:
    return Config(**{"n_latents": 64, "k": 4, "epochs": n, **changes})  # type: ignore[arg-type]


def test_epochs_that_make_few_steps_are_told_and_get_a_proposal() -> None:
    assert advice_on_few_steps(epochs(50), 6000) == (
        "a run of 50 steps is short: 6,000 rows in batches of 4,096, 50 epochs. "
        "batch_size = 256 and lr = 0.004 would make 1,150 of them; nothing is changed for you"
    )


def test_few_rows_get_more_epochs_too_and_a_higher_lr_stays() -> None:
    assert advice_on_few_steps(epochs(2, lr=1e-2, batch_size=700), 700) == (
        "a run of 2 steps is short: 700 rows in batches of 700, 2 epochs. "
        "batch_size = 64 and epochs = 100 would make 1,000 of them; nothing is changed for you"
    )
    assert "epochs = 1000 and lr = 0.004 would make 1,000 of them" in (
        advice_on_few_steps(epochs(2, batch_size=40), 40) or ""
    )


def test_one_step_and_one_epoch_are_told_in_the_singular() -> None:
    said = advice_on_few_steps(epochs(1, batch_size=80), 100)
    assert said is not None
    assert said.startswith("a run of 1 step is short: 100 rows in batches of 80, 1 epoch. ")


def test_enough_epochs_and_steps_that_somebody_chose_are_told_nothing() -> None:
    assert advice_on_few_steps(epochs(50), 10**6) is None
    assert advice_on_few_steps(epochs(5, batch_size=2048), 200_000) is None
    assert advice_on_few_steps(Config(n_latents=64, k=4, steps=3), 6000) is None


@given(batches=st.floats(1, 1000), n=st.floats(0.01, 300), batch=st.integers(1, 10**5))
def test_what_is_proposed_is_enough_to_be_told_nothing(batches: float, n: float, batch: int) -> None:
    rows = int(batches * batch)
    said = advice_on_few_steps(epochs(n, batch_size=batch), rows)
    if said is not None:
        proposed = {name: float(value) for name, value in re.findall(r"(batch_size|epochs) = ([\d.e+-]+)", said)}
        smaller = int(proposed.get("batch_size", batch))
        assert smaller <= batch
        assert advice_on_few_steps(epochs(proposed.get("epochs", n), batch_size=smaller), rows) is None
