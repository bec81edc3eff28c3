"""What is frozen has no moments; that it stays bit for bit, and what is trained moves, test_optim shows."""

from __future__ import annotations

import pytest
import torch
from torch_adam import batches, make, train

import sparc_fast as sf


def test_what_is_frozen_has_no_moments() -> None:
    sizes = {}
    for freeze in ((), "encoder", "decoder", ("a", "b"), ("a", "b", "encoder")):
        optimizer = sf.SparcAdam(make(dtype=torch.bfloat16), freeze=freeze)
        train(batches(1, torch.bfloat16), optimizer)
        state = optimizer.state_dict()["state"].values()
        sizes[freeze] = sum(tensor.numel() for of in state for key, tensor in of.items() if key != "step") // 3
    L, D = 48, 24
    assert sizes == {
        (): 2 * L * D + D + 3 * L,
        "encoder": L * D,
        "decoder": L * D + 3 * L,
        ("a", "b"): 2 * L * 5 + 5 + L,
        ("a", "b", "encoder"): L * 5,
    }


def test_the_state_of_another_choice_is_refused() -> None:
    optimizer = sf.SparcAdam(make(), freeze=["b"])
    train(batches(1), optimizer)
    with pytest.raises(ValueError, match=r"state_dict must hold a float exp_avg \[48, 24\] of W_enc"):
        sf.SparcAdam(make()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("encodr", r"freeze must be of \('encoder', 'decoder', 'a', 'b', 'c'\), got 'encodr'"),
        (["encoder", "decoder"], "freeze must leave something to train"),
        (["c", "b", "a"], "freeze must leave something to train"),
    ],
    ids=str,
)
def test_a_choice_that_makes_no_sense_is_named(freeze: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.SparcAdam(make(), freeze=freeze)
