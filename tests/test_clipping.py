"""Gradients clipped by their global norm: that it is clip_grad_norm_'s, of what is trained, test_optim shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch_adam import assert_same, batches, make, train
from training_runs import config, trained

import sparc_fast as sf


@pytest.mark.parametrize("lazy", [None, "replay"])
def test_a_norm_that_is_never_exceeded_changes_no_bit(lazy: str | None, backend: str) -> None:
    free, clipped = (sf.SparcAdam(make(backend), lr=1e-2, lazy=lazy, max_grad_norm=most) for most in (None, 1e6))
    train(batches(5), free, clipped)
    assert_same(clipped, free)


def test_a_norm_that_is_not_finite_is_an_error_and_nothing_has_moved() -> None:
    model = make(check_finite=False)
    optimizer = sf.SparcAdam(model, lr=1e-2, max_grad_norm=0.4)
    (x,) = batches(1)
    optimizer.step(x)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    steps = [float(state["step"]) for state in optimizer.state_dict()["state"].values()]
    x[3, 5] = torch.inf
    with pytest.raises(FloatingPointError, match="gradients must be finite to be clipped, got a norm of"):
        optimizer.step(x)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert [float(state["step"]) for state in optimizer.state_dict()["state"].values()] == steps


@pytest.mark.parametrize("most", [0, -1.0, float("nan")])
def test_a_norm_that_makes_no_sense_is_named(most: float) -> None:
    with pytest.raises(ValueError, match="max_grad_norm must be a number > 0 or None, got"):
        sf.SparcAdam(make(), max_grad_norm=most)


def test_a_run_clips(tmp_path: Path) -> None:
    free, clipped = (trained(tmp_path / str(most), max_grad_norm=most, steps=6).model for most in (0.0, 1e-6))
    assert not torch.equal(free.W_enc, clipped.W_enc)
    with pytest.raises(ValueError, match="max_grad_norm must be a number >= 0, got -1"):
        config(max_grad_norm=-1)
