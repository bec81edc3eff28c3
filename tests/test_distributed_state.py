"""A shared model and its optimizer as torch.distributed.checkpoint takes them: written and read by a user's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import NEED_RANKS, Ranks, own
from torch import Tensor

import sparc_fast as sf
from sparc_fast.distributed import State, shard

pytestmark = NEED_RANKS
WIDTHS = {"a": 16, "b": 7}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32": ({}, {}),
    "bfloat16, lazy": ({"dtype": torch.bfloat16}, {"lazy": "replay", "moments": "bfloat16"}),
    "local, frozen": ({"selection": "local"}, {"freeze": "encoder"}),
    "batch": ({"selection": "batch"}, {}),
    "jumprelu, private": ({"selection": "jumprelu", "private": {"a": 12, "b": 9}, "private_k": 2}, {}),
    "jumprelu, nested": ({"selection": "jumprelu", "matryoshka": [7, 20]}, {}),
    "private": ({"private": {"a": 9, "b": 20}, "private_k": 2}, {"lazy": "replay"}),
}


def made(variant: str, seed: int, shared: bool = True) -> tuple[sf.SPARC, sf.SparcAdam]:
    of_model, of_optimizer = VARIANTS[variant]
    torch.manual_seed(seed)
    model = sf.SPARC(WIDTHS, 50, 4, **of_model)
    model = shard(model) if shared else model
    return model, sf.SparcAdam(model, 1e-2, **of_optimizer)


def train(optimizer: sf.SparcAdam, steps: range) -> None:
    for step in steps:
        x = torch.randn(24, 23, generator=torch.Generator().manual_seed(step))
        optimizer.step(own(x) if torch.distributed.is_initialized() else x)


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    """All rows of everything."""
    from torch.distributed.tensor import DTensor

    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in state.items()
    }


def saved(folder: Path, variant: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """(all rows when they were saved, and some steps later, the names of DTensors)"""
    from torch.distributed.checkpoint import save
    from torch.distributed.tensor import DTensor, Shard

    model, optimizer = made(variant, 1)
    train(optimizer, range(5))
    state = State(model, optimizer)
    save({"training": state}, checkpoint_id=folder)
    of_ranks = state.state_dict()
    names = [name for name, value in of_ranks.items() if isinstance(value, DTensor)]
    for name in names:
        (placement,) = of_ranks[name].placements
        assert placement == Shard(1 if "latent_bias" in name or "latent_threshold" in name else 0)
    assert of_ranks["model.W_dec"].to_local().data_ptr() == model.W_dec.data_ptr()
    then = whole(of_ranks)
    train(optimizer, range(5, 9))
    return then, whole(state.state_dict()), names


def loaded(folder: Path, variant: str, fresh: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(all rows as they are read, and some steps later)"""
    from torch.distributed.checkpoint import load

    is_shared = torch.distributed.is_initialized()
    model, optimizer = made(variant, 2, is_shared)
    if not fresh:
        train(optimizer, range(20, 22))
    state = State(model, optimizer)
    load({"training": state}, checkpoint_id=folder, no_dist=not is_shared)
    then = whole(state.state_dict())
    train(optimizer, range(5, 9))
    return then, whole(state.state_dict())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_two_ranks_save_two_go_on_with_and_others_read(
    two: Ranks, three: Ranks, tmp_path: Path, variant: str
) -> None:
    of_both = two(saved, tmp_path, variant)
    then, later, _ = of_both[0]
    for _, _, names in of_both:
        assert {"model.W_enc", "model.W_dec", "model.latent_bias", "model.silence"} <= set(names)
        assert "optimizer.W_dec.exp_avg_sq" in names
        assert ("optimizer.W_enc.exp_avg" in names) == (variant != "local, frozen")
    for fresh in (True, False):
        for read, went_on in two(loaded, tmp_path, variant, fresh):
            assert_same(read, then)
            assert_same(went_on, later)
        for read, _ in three(loaded, tmp_path, variant, fresh):
            assert_same(read, then)
        read, _ = loaded(tmp_path, variant, fresh)
        assert_same(read, then)


def of_weights_alone(folder: Path) -> tuple[bool, list[str]]:
    from torch.distributed.checkpoint import load, save

    model, other = shard(sf.SPARC(WIDTHS, 50, 4)), shard(sf.SPARC(WIDTHS, 50, 4))
    save(State(model).state_dict(), checkpoint_id=folder)
    load(State(other).state_dict(), checkpoint_id=folder)
    wrong = []
    _, optimizer = made("float32", 1)
    for refuse in (
        lambda: State(model).load_state_dict(State(shard(sf.SPARC(WIDTHS, 40, 4))).state_dict()),
        lambda: State(model).load_state_dict({}),
        lambda: State(model, optimizer),
    ):
        with pytest.raises(ValueError, match="must") as error:
            refuse()
        wrong.append(str(error.value))
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)), wrong


def test_weights_alone_are_read_in_place_and_those_of_another_model_are_refused(two: Ranks, tmp_path: Path) -> None:
    for same, (other_shape, nothing, other_model) in two(of_weights_alone, tmp_path):
        assert same
        assert "state_dict must hold model.W_enc [25, 23] of this rank, got [20, 23]" in other_shape
        assert "state_dict must hold model.W_enc [25, 23] of this rank, got none" in nothing
        assert "optimizer must be of the model" in other_model
