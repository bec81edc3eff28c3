"""Gradients clipped by their global norm: torch.nn.utils.clip_grad_norm_ before the projection, and Adam."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from operands import seeded
from test_freezing import batches, make, parts_of, put
from training_runs import config, trained

import sparc_fast as sf

MOST = 0.4  # some batches' norms are larger, some smaller


def clipped_step(model: sf.SPARC, adam: torch.optim.Optimizer, x: object, **options: object) -> torch.Tensor:
    adam.zero_grad()
    model.loss(x, **options).total.backward()
    return apply_clipped(model, adam)


def apply_clipped(model: sf.SPARC, adam: torch.optim.Optimizer) -> torch.Tensor:
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MOST)
    model.project_gradients_()
    adam.step()
    model.normalize_decoder_()
    return norm


@pytest.mark.parametrize("way", ["whole", "lazy", "in parts", "local", "lacking streams", "a stream alone", "fvu"])
def test_clipped_steps_equal_clip_grad_norm_and_torch_adam(way: str, backend: str) -> None:
    options = {"local": {"selection": "local"}, "fvu": {"loss": "fvu"}}.get(way, {})
    ours, theirs = (make(backend, **options) for _ in range(2))
    lazy = "replay" if way == "lazy" else None
    fused = sf.SparcAdam(ours, lr=1e-2, betas=(0.5, 0.9), lazy=lazy, max_grad_norm=MOST)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.5, 0.9))
    norms = []
    for step, x in enumerate(batches(20)):
        present = None
        x = x / (1 + step % 3) ** 2
        if way == "lacking streams":
            present = torch.rand(16, 3, generator=seeded(step)) < 0.6
            present[:, 0] |= ~present.any(1)
        given = {"b": x[:, 12:19]} if way == "a stream alone" else x
        fused.step(given.split((5, 0, 11)) if way == "in parts" else given, 1 / (1 + step), present=present)
        norms.append(clipped_step(theirs, adam, given, cross_loss_coef=1 / (1 + step), present=present))
    assert min(norms) < MOST < max(norms), norms
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("freeze", ["encoder", "decoder", ["b"], ["a", "encoder"]], ids=str)
def test_the_norm_is_of_what_is_trained(freeze: object, parts: int, backend: str) -> None:
    ours, theirs = (make(backend, "local") for _ in range(2))
    fused = sf.SparcAdam(ours, lr=1e-2, betas=(0.5, 0.9), freeze=freeze, max_grad_norm=MOST)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.5, 0.9))
    before = parts_of(ours, freeze)
    for x in batches(8):
        fused.step(x if parts == 1 else x.split(8))
        adam.zero_grad()
        theirs.loss(x).total.backward()
        with torch.no_grad():
            for name, (_, is_trained) in before.items():
                if not is_trained:
                    put_gradient(theirs, name)
        apply_clipped(theirs, adam)
        with torch.no_grad():
            for name, (part, is_trained) in before.items():
                if not is_trained:
                    put(theirs, name, part)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-7, atol=1e-9)


def put_gradient(model: sf.SPARC, name: str) -> None:
    which, stream = name.split()
    places = {"a": slice(0, 12), "b": slice(12, 19), "c": slice(19, 24)}
    place = ("abc".index(stream),) if which == "latent_bias" else (..., places[stream])
    getattr(model, which).grad[place] = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipped_steps_stay_as_close_to_float64_as_plain_pytorch_does(dtype: torch.dtype, backend: str) -> None:
    ours, theirs = make(backend, dtype=torch.float32), make(backend, dtype=torch.float32)
    truth = make(backend)
    if dtype == torch.bfloat16:  # of the masters, which torch.optim.Adam has not
        ours = ours.to(dtype)
    fused = sf.SparcAdam(ours, lr=1e-3, max_grad_norm=MOST)
    adams = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (theirs, truth)]
    for x in batches(3):
        fused.step(x.to(dtype))
        clipped_step(theirs, adams[0], x.float())
        clipped_step(truth, adams[1], x)
    for name, p in truth.named_parameters():
        error = (ours.get_parameter(name).double() - p).norm()
        allowed = 2 * (theirs.get_parameter(name) - p).norm() + 1e-6 * p.norm()
        if dtype == torch.bfloat16:
            allowed = allowed + 2**-7 * p.norm() + 3e-3 * p.numel() ** 0.5
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("lazy", [None, "replay"])
def test_a_norm_that_is_never_exceeded_changes_no_bit(lazy: str | None, backend: str) -> None:
    models = [make(backend, dtype=torch.float32) for _ in range(2)]
    optimizers = [
        sf.SparcAdam(model, lr=1e-2, lazy=lazy, max_grad_norm=most)
        for model, most in zip(models, (None, 1e6), strict=True)
    ]
    for x in batches(5, torch.float32):
        for optimizer in optimizers:
            optimizer.step(x)
    for name, p in models[0].named_parameters():
        assert torch.equal(p, models[1].get_parameter(name)), name


def test_a_norm_that_is_not_finite_is_an_error_and_nothing_has_moved() -> None:
    model = make(dtype=torch.float32)
    model.check_finite = False
    optimizer = sf.SparcAdam(model, lr=1e-2, max_grad_norm=MOST)
    x = batches(1, torch.float32)[0]
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
