"""Private latents: part of the dictionary is one stream's alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from dense import Weights, objective
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import fast_backends, seeded
from torch import Tensor

import sparc_fast as sf

WIDTHS = {"a": 12, "b": 7, "c": 5}
PRIVATE = {"a": 9, "c": 6}
PRIVATE_K = {"a": 3, "c": 2}
RULES = ["global", "local", "batch"]


def make(selection: str = "global", dtype: torch.dtype = torch.float64, **arguments: object) -> sf.SPARC:
    torch.manual_seed(0)
    of_each = {"private": PRIVATE, "private_k": PRIVATE_K, "auxk": 6, "dead_after": 40, **arguments}
    return sf.SPARC(WIDTHS, 48, 4, selection=selection, dtype=dtype, **of_each)


def samples(n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Streams that see the same few concepts, and each some of its own."""
    g, of_concepts = seeded(seed), seeded(0)
    seen = torch.randn(n, 6, generator=g, dtype=torch.float64)
    inputs = {}
    for name, width in WIDTHS.items():
        own = torch.randn(n, 3, generator=g, dtype=torch.float64)
        both, alone = (torch.randn(m, width, generator=of_concepts, dtype=torch.float64) for m in (6, 3))
        inputs[name] = (seen @ both + own @ alone).to(dtype)
    return inputs


def randomized(model: sf.SPARC) -> sf.SPARC:
    """Biases that are not zero, and decoders that are not the encoders."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.normalize_decoder_()
    return model


def own_of(model: sf.SPARC, streams: list[str] | None = None) -> dict[int, tuple[slice, int]]:
    """As tests/dense.py takes them."""
    names = list(model.d_streams) if streams is None else streams
    of_each = model.config()["private_k"]
    return {names.index(name): (some, of_each[name]) for name, some in model.private_latents.items() if name in names}


def elsewhere(model: sf.SPARC) -> list[tuple[slice, slice, int]]:
    """(private latents, columns of a stream that is not theirs, its position)"""
    columns = model._columns()
    return [
        (some, columns[s], s)
        for name, some in model.private_latents.items()
        for s, other in enumerate(model.streams)
        if other != name
    ]


def assert_nothing_elsewhere(model: sf.SPARC) -> None:
    for some, cols, s in elsewhere(model):
        assert (model.W_enc[some, cols] == 0).all()
        assert (model.W_dec[some, cols] == 0).all()
        assert (model.latent_bias[s, some] == 0).all()


@pytest.mark.parametrize("selection", RULES)
@pytest.mark.parametrize("loss", ["nmse"])
def test_gradients_equal_the_dense_float64_equations(selection: str, loss: str, backend: str) -> None:
    model = randomized(make(selection, backend=backend, loss=loss))
    inputs = samples(11)
    found = model.loss(inputs, cross_loss_coef=0.7)
    truth = Weights.of(model)
    expected = objective(truth, list(inputs.values()), 4, selection, 0.7, private=own_of(model))
    torch.testing.assert_close(found.total, expected, rtol=1e-10, atol=1e-12)
    found.total.backward()
    expected.backward()
    for name, gradient in truth.gradients().items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-10, atol=1e-11)
    for some, cols, s in elsewhere(model):
        assert (model.W_enc.grad[some, cols] == 0).all()
        assert (model.W_dec.grad[some, cols] == 0).all()
        assert (model.latent_bias.grad[s, some] == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    N=st.integers(1, 6),
    n_shared=st.integers(1, 9),
    data=st.data(),
    selection=st.sampled_from(RULES),
    cross=st.sampled_from([0.0, 1.0, 2.5]),
    seed=st.integers(0, 2**31),
)
def test_gradients_with_auxk_equal_the_dense_equations_for_any_shape(
    widths: list[int], N: int, n_shared: int, data: st.DataObject, selection: str, cross: float, seed: int
) -> None:
    d_streams = {f"s{i}": width for i, width in enumerate(widths)}
    private = {name: n for name in d_streams if (n := data.draw(st.integers(0, 5), label=name))}
    private_k = {name: data.draw(st.integers(1, n), label=f"of {name}") for name, n in private.items()}
    L, k = n_shared + sum(private.values()), data.draw(st.integers(1, n_shared), label="k")
    dead = torch.tensor(data.draw(st.lists(st.booleans(), min_size=L, max_size=L), label="dead"))
    for backend in fast_backends():
        torch.manual_seed(seed)
        model = sf.SPARC(
            d_streams, L, k, selection=selection, private=private, private_k=private_k or None, auxk=3, dead_after=5,
            dtype=torch.float64, backend=backend,
        )  # fmt: skip
        randomized(model).silence[dead] = 6
        inputs = {name: torch.randn(N, width, dtype=torch.float64) for name, width in d_streams.items()}
        found = model.loss(inputs, cross_loss_coef=cross, auxk_coef=0.25)
        truth = Weights.of(model)
        own = own_of(model) if private else None
        expected = objective(truth, list(inputs.values()), k, selection, cross, dead, 3, 0.25, own)
        torch.testing.assert_close(found.total, expected, rtol=1e-9, atol=1e-11)
        found.total.backward()
        expected.backward()
        for name, gradient in truth.gradients().items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-11)


def plain_step(model: sf.SPARC, adam: torch.optim.Optimizer, inputs: object, **options: object) -> sf.SparcLoss:
    adam.zero_grad()
    loss = model.loss(inputs, **options)
    loss.total.backward()
    model.project_gradients_()
    adam.step()
    model.normalize_decoder_()
    return loss


@pytest.mark.parametrize("selection", RULES)
def test_sixty_steps_equal_torch_adam_with_auxk_at_work(selection: str, backend: str) -> None:
    ours, theirs = (make(selection, backend=backend) for _ in range(2))
    fused, adam = sf.SparcAdam(ours, lr=1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    used_auxk = 0
    for step in range(60):
        inputs = samples(16, step)
        if step % 3 == 2:
            del inputs["abc"[step % 9 // 3]]
        loss, expected = fused.step(inputs), plain_step(theirs, adam, inputs)
        torch.testing.assert_close(loss.total, expected.total.detach(), rtol=1e-10, atol=1e-12)
        used_auxk += loss.auxk is not None
    assert used_auxk > 10
    assert torch.equal(ours.silence, theirs.silence)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-8, atol=1e-10)
    assert_nothing_elsewhere(ours)
    assert_nothing_elsewhere(theirs)
