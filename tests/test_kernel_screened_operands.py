"""Samples that are multiplied as they are, or centred: the bound holds, and no support depends on which."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hard_rows import VECTORS, inf, nan, vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import kernel_device, seeded
from test_kernel_global_topk import all_given_up
from torch import Tensor

from sparc_fast.ops import reference

pytest.importorskip("triton")
from sparc_fast.kernels.screened_operands import prepare

kernel = importlib.import_module("sparc_fast.kernels.global_topk")

# infinite and NaN intervals are part of the method; the interpreter computes them with numpy
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = kernel_device()


def prepared(
    x: Tensor, W: Tensor, pre_bias: Tensor, latent_bias: Tensor, first: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(X, of_x, float32 biases, ||w||) where x is, of the samples from `first` on."""
    D, L, here = x.shape[1], len(W), len(x) - first
    biases = kernel._biases(L, DEVICE)
    X = torch.empty(here, D, dtype=torch.bfloat16, device=DEVICE)
    of_x = torch.full((4, here), nan, device=DEVICE)
    w_norm = torch.full((L,), nan, device=DEVICE)
    numbers = 1 + math.ldexp(D + 48, -24), math.ldexp(math.sqrt(D), -63), math.ldexp(D / 256 + 64, -23)
    operands = [o.to(DEVICE) for o in (x, W, pre_bias, latent_bias)]
    prepare(biases, w_norm, X, of_x, *operands, first, here, *numbers)
    return X.to(x.device), of_x.to(x.device), biases[1].to(x.device), w_norm.to(x.device)


@pytest.mark.parametrize("away", [0.0, 0.5, 2.0, 4.0, 100.0])
@pytest.mark.parametrize("D", [3, 300])
def test_a_product_and_its_bias_are_no_farther_from_the_score_than_the_bound(D: int, away: float) -> None:
    g = seeded(0)
    pre_bias = (away * torch.randn(D, generator=g)).bfloat16()
    x, W = (torch.randn(70, D, generator=g) + pre_bias.float()).bfloat16(), torch.randn(90, D, generator=g).bfloat16()
    latent_bias = torch.randn(3, 90, generator=g).bfloat16()
    X, (norm, residual, inverse, size), bias, w_norm = prepared(x, W, pre_bias, latent_bias)
    centred = (x.float() - pre_bias.float()).double()
    exact = centred @ W.double().T + latent_bias.double().sum(0)
    apart = (X.double() @ W.double().T + bias.double() - exact).abs()
    assert (apart <= residual.double()[:, None] * w_norm.double() + 2.0**-23 * bias.double().abs()).all()
    assert (norm >= X.double().norm(dim=1) - residual).all()
    assert (size >= centred.norm(dim=1)).all()
    assert (w_norm >= W.double().norm(dim=1)).all()
    assert (inverse == 1).all()
    assert (size < 1.01 * centred.norm(dim=1)).all()


@pytest.mark.parametrize(("away", "as_they_are"), [(0.0, True), (2.0, True), (4.0, False), (nan, False)])
def test_samples_far_from_zero_are_centred_and_others_keep_every_bit(away: float, as_they_are: bool) -> None:
    g = seeded(0)
    pre_bias, W = torch.full((40,), away).bfloat16(), torch.randn(50, 40, generator=g).bfloat16()
    x = (torch.randn(9, 40, generator=g) + pre_bias.nan_to_num().float()).bfloat16()
    X, of_x, *_ = prepared(x, W, pre_bias, torch.zeros(1, 50).bfloat16())
    assert torch.equal(X, x) == as_they_are
    later, of_later, *_ = prepared(x, W, pre_bias, torch.zeros(1, 50).bfloat16(), first=4)
    assert torch.equal(later.nan_to_num(), X[4:].nan_to_num())
    assert torch.equal(of_later.nan_to_num(), of_x[:, 4:].nan_to_num())


def test_a_row_of_zeros_without_a_centre_has_no_error() -> None:
    x, W = torch.zeros(2, 20).bfloat16(), torch.randn(6, 20, generator=seeded(0)).bfloat16()
    W[3] = 0
    _, of_x, _, w_norm = prepared(x, W, torch.zeros(20).bfloat16(), torch.zeros(1, 6).bfloat16())
    assert of_x[:2].eq(0).all()
    assert w_norm[3] == 0


@settings(max_examples=10, deadline=None)
@given(
    x_kind=st.sampled_from(VECTORS),
    W_kind=st.sampled_from(VECTORS),
    D=st.integers(1, 70),
    L=st.integers(1, 150),
    away=st.sampled_from([0.0, 0.3, 2.0, 1e3, inf, nan]),
    N=st.integers(1, 6),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_no_rows_and_no_centre_break_the_bound(
    x_kind: str, W_kind: str, D: int, L: int, away: float, N: int, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, min(L, 40)), label="k")
    generator = seeded(seed)
    x, W_enc = vectors(x_kind, N, D, generator).bfloat16(), vectors(W_kind, L, D, generator).bfloat16()
    pre_bias = (away * torch.randn(D, generator=generator, device=x.device)).bfloat16()
    bias = torch.randn(2, L, generator=generator, device=x.device).bfloat16()
    with pytest.MonkeyPatch.context() as small:
        small.setattr(kernel, "ROWS", 3)  # samples beyond these are prepared by themselves
        x, W_enc, pre_bias, bias = (o.to(DEVICE) for o in (x, W_enc, pre_bias, bias))
        found = kernel.global_topk(x, W_enc, pre_bias, bias, k)
    in_full = torch.empty_like(found)
    every = torch.arange(N, dtype=torch.int32)
    of_bias = reference.summed_bias(bias)
    rest = k, torch.float32, in_full, every.to(DEVICE), all_given_up(N), None
    kernel._in_full(x, W_enc, pre_bias, of_bias, *rest)
    assert torch.equal(found, in_full)
