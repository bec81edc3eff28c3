"""Gradients of every parameter against a dense float64 implementation of the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import Weights, objective
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import fast_backends

import sparc_fast as sf


def random_model(widths: list[int], L: int, k: int, selection: str, backend: str, **kwargs: Any) -> sf.SPARC:
    d_streams = {f"stream{s}": width for s, width in enumerate(widths)}
    model = sf.SPARC(d_streams, L, k, selection=selection, backend=backend, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model._clear_private()
    return model


def assert_same_gradients(model: sf.SPARC, truth: Weights) -> None:
    for name, expected in truth.gradients().items():
        grad = model.get_parameter(name).grad
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.covering(3)
@pytest.mark.parametrize("selection", ["global", "local", "batch"])
@pytest.mark.parametrize("widths", [[7], [100, 1], [7, 384, 1], [3, 1, 7, 5], [1, 7, 2, 100, 3]], ids=str)
@pytest.mark.parametrize("k", [1, 3, 17])
def test_gradients_equal_the_dense_float64_equations(widths: list[int], k: int, selection: str, backend: str) -> None:
    torch.manual_seed(len(widths) * 31 + k)
    model = random_model(widths, 17, k, selection, backend)
    inputs = {name: torch.randn(9, width, dtype=torch.float64) for name, width in model.d_streams.items()}
    loss = model.loss(inputs, cross_loss_coef=0.7)
    truth = Weights.of(model)
    expected = objective(truth, list(inputs.values()), k, selection, 0.7)
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=1e-12)
    loss.total.backward()
    expected.backward()
    assert_same_gradients(model, truth)


@settings(max_examples=50, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    N=st.integers(1, 6),
    n_shared=st.integers(1, 12),
    data=st.data(),
    selection=st.sampled_from(["global", "local", "batch"]),
    cross=st.sampled_from([0.0, 1.0, 2.5]),
    seed=st.integers(0, 2**31),
)
def test_gradients_with_auxk_equal_the_dense_equations_for_any_shape(
    widths: list[int], N: int, n_shared: int, data: st.DataObject, selection: str, cross: float, seed: int
) -> None:
    counts = data.draw(st.just([0] * 4) | st.lists(st.integers(0, 5), min_size=4, max_size=4), label="private")
    private = {f"stream{s}": n for s, n in enumerate(counts[: len(widths)]) if n}
    private_k = {name: data.draw(st.integers(1, n), label=f"of {name}") for name, n in private.items()}
    L, k = n_shared + sum(private.values()), data.draw(st.integers(1, n_shared), label="k")
    dead = torch.tensor(data.draw(st.lists(st.booleans(), min_size=L, max_size=L), label="dead"))
    for backend in fast_backends():
        torch.manual_seed(seed)
        of_streams = {"private": private, "private_k": private_k or None}
        model = random_model(widths, L, k, selection, backend, auxk=3, dead_after=5, **of_streams)
        model.silence[dead] = 6
        inputs = {name: torch.randn(N, width, dtype=torch.float64) for name, width in model.d_streams.items()}
        loss = model.loss(inputs, cross_loss_coef=cross, auxk_coef=0.25)
        truth = Weights.of(model)
        own = {model.streams.index(name): (some, private_k[name]) for name, some in model.private_latents.items()}
        expected = objective(truth, list(inputs.values()), k, selection, cross, dead, 3, 0.25, own)
        torch.testing.assert_close(loss.total, expected, rtol=1e-9, atol=1e-11)
        loss.total.backward()
        expected.backward()
        assert_same_gradients(model, truth)


@pytest.mark.parametrize("selection", ["global", "local", "batch"])
def test_forward_and_loss_have_the_same_value_and_gradients(selection: str, backend: str) -> None:
    torch.manual_seed(3)
    model = random_model([5, 8, 3], 20, 4, selection, backend)
    inputs = {name: torch.randn(6, width, dtype=torch.float64) for name, width in model.d_streams.items()}
    fused = model.loss(inputs, cross_loss_coef=1.5)
    fused.total.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = model(inputs, cross_loss_coef=1.5).loss
    torch.testing.assert_close(loss.total, fused.total)
    torch.testing.assert_close(loss.nmse, fused.nmse)
    loss.total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])


def test_encode_and_translate_are_differentiable_in_inputs_and_weights(backend: str) -> None:
    torch.manual_seed(4)
    model = random_model([4, 6], 12, 3, "global", backend)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = model.translate({"stream0": x}, "stream0", "stream1")
    assert torch.autograd.gradcheck(lambda x: model.translate({"stream0": x}, "stream0", "stream1"), (x,))
    y.square().sum().backward()
    truth = Weights.of(model)
    h = (x.detach().clone().requires_grad_() - truth.pre_bias[0]) @ truth.W_enc[0].T + truth.latent_bias[0]
    mask = torch.zeros_like(h).scatter(1, h.topk(3).indices, 1.0)
    expected = (torch.relu(h) * mask) @ truth.W_dec[1] + truth.pre_bias[1]
    torch.testing.assert_close(y, expected)
    expected.square().sum().backward()
    assert_same_gradients(model, truth)


def test_a_batch_without_some_streams_trains_the_streams_it_has(backend: str) -> None:
    torch.manual_seed(5)
    model = random_model([4, 6, 3], 12, 3, "global", backend)
    inputs = {name: torch.randn(5, model.d_streams[name], dtype=torch.float64) for name in ("stream0", "stream2")}
    model.loss(inputs).total.backward()
    truth = Weights.of(model)
    present = Weights(*[[parts[0], parts[2]] for parts in vars(truth).values()])
    objective(present, list(inputs.values()), 3, "global", 1.0).backward()
    assert_same_gradients(model, truth)


def test_frozen_parameters_get_no_gradient(backend: str) -> None:
    torch.manual_seed(6)
    model = random_model([4, 6], 12, 3, "global", backend)
    model.W_enc.requires_grad_(False)
    model.loss(torch.randn(5, 10, dtype=torch.float64)).total.backward()
    assert model.W_enc.grad is None
    assert model.W_dec.grad is not None
