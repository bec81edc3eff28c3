"""What holds for the kernels of decoding, beyond what holds for every operator: each way they can be launched."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from accuracy import assert_equal, compare
from operands import OPERATORS, SUPPORTS, Operands, kernel_device, operands
from torch import Tensor

from sparc_fast.ops import reference

pytest.importorskip("triton")

NAMES = [
    "support_values", "support_values_grad_x", "sparse_decode", "sparse_decode_grad_values", "decode_loss",
    "nested_decode_loss",
]  # fmt: skip
DECODERS = pytest.mark.parametrize("name", NAMES[2:])
LOSSES = pytest.mark.parametrize("name", ["decode_loss", "nested_decode_loss"])
MODULES = {name: import_module(f"sparc_fast.kernels.{name}") for name in NAMES}
KERNELS: Any = import_module("sparc_fast.kernels")
DEVICE = kernel_device()
CASE = (7, 40, 5), 3, 20, 6
# NumPy, which Triton's interpreter computes with, warns of inf * 0
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
EVERY_OPERATOR = pytest.mark.parametrize("name", NAMES)


def run(name: str, o: Operands) -> tuple[Tensor, ...]:
    tensors = {key: value.to(DEVICE) for key, value in vars(o).items() if isinstance(value, Tensor)}
    return tuple(result.to(o.x.device) for result in OPERATORS[name](replace(o, **tensors), KERNELS))


def choose(monkeypatch: pytest.MonkeyPatch, name: str, **chosen: Any) -> None:
    chosen_before = MODULES[name].choice
    monkeypatch.setattr(MODULES[name], "choice", lambda *args: {**chosen_before(*args), **chosen})


def check_accuracy(name: str, o: Operands) -> None:
    compare(run(name, o), OPERATORS[name](o, reference), OPERATORS[name](o.to(torch.float64), reference))


@pytest.mark.covering(2)
@SUPPORTS
@DECODERS
@pytest.mark.parametrize("slots", [4, 16], ids=["multiply-adds", "tensor cores"])
def test_either_way_to_multiply_is_accurate(
    name: str, slots: int, per_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, name, TENSOR_CORES=slots == 16, SLOTS=slots, BLOCK_K=16)
    check_accuracy(name, operands(CASE, torch.bfloat16, per_stream))


@pytest.mark.covering(2)
@LOSSES
@SUPPORTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_supports_too_long_to_be_kept_are_gathered_again(
    name: str, per_stream: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, name, KEPT=False, BLOCK_K=16, BLOCK_D=16, CHUNK=16)
    o = operands(((7, 40), 2, 50, 37), dtype, per_stream)
    o.indices[1, ..., -3:], o.values[1, ..., -3:] = -1, 0
    check_accuracy(name, o)


@SUPPORTS
def test_streams_may_be_cut_into_chunks(per_stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("decode_loss", "nested_decode_loss", "support_values"):
        choose(monkeypatch, name, BLOCK_D=16, CHUNK=32)
        check_accuracy(name, operands(CASE, torch.float32, per_stream))


@DECODERS
def test_more_sources_than_a_program_takes_are_taken_by_several(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, name, SOURCES=2, SLOTS=2)
    check_accuracy(name, operands(CASE, torch.float32))


@EVERY_OPERATOR
@pytest.mark.parametrize("latent", [-1, 20, 2**31 - 1])
def test_a_latent_that_does_not_exist_contributes_nothing(name: str, latent: int) -> None:
    o = operands(CASE, torch.float32)
    outside, absent = o.indices.clone(), o.indices.clone()
    outside[1, 2], absent[1, 2] = latent, 0
    zero = torch.ones_like(o.values).index_put_((torch.tensor(1), torch.arange(3), torch.tensor(2)), torch.tensor(0.0))
    got = run(name, replace(o, indices=outside, values=torch.where(zero == 0, torch.inf, o.values)))
    expected = list(run(name, replace(o, indices=absent, values=o.values * zero)))
    of_values = {"support_values": 0, "sparse_decode_grad_values": 0, "decode_loss": 2, "nested_decode_loss": 2}
    if name in of_values:
        expected[of_values[name]] = expected[of_values[name]] * zero
    assert_equal(got, expected)


@pytest.mark.covering(2)
@EVERY_OPERATOR
@SUPPORTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_a_number_stays_in_its_sample(name: str, per_stream: bool, dtype: torch.dtype) -> None:
    o = operands(CASE, dtype, per_stream)
    clean = run(name, o)
    for tensor in (o.x, o.values, o.grad_values, o.grad_recons, o.scale):
        tensor[1] = torch.nan
    o.values[1, :, 0] = torch.inf
    got = run(name, o)
    for a, b in zip(got, clean, strict=True):
        if a.ndim == 4:  # of nested dictionaries
            a, b = a.transpose(0, 1), b.transpose(0, 1)
        if len(a) == len(o.x) and a.ndim > 1 and a.shape != (3, 3):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert not all(torch.isfinite(a).all() for a in got) or name == "support_values_grad_x"


@pytest.mark.covering(2)
@LOSSES
@SUPPORTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pair_of_weight_zero_is_not_computed_whatever_it_holds(
    name: str, per_stream: bool, dtype: torch.dtype
) -> None:
    o = operands(CASE, dtype, per_stream)
    weights = (1.0, 2.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0, 3.0)
    clean = run(name, replace(o, weights=weights))
    o.values[:, 1] = torch.nan
    nmse, grad_recons, grad_values, grad_pre_bias = got = run(name, replace(o, weights=weights))
    assert not nmse[..., 1, :].any()
    assert not nmse[..., 2, 1].any()
    assert not grad_recons[..., 1, :].any()
    assert not grad_values[:, 1].any()
    assert torch.isfinite(grad_pre_bias).all()
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b)


def test_a_weight_too_small_for_the_sums_still_counts() -> None:
    o = replace(operands(CASE, torch.float32), weights=(1e-60,) * 9)
    nmse, grad_recons, *_ = run("decode_loss", o)
    assert (nmse > 0).all()
    assert not grad_recons.any()


@pytest.mark.parametrize("name", ["support_values", "sparse_decode", "decode_loss", "nested_decode_loss"])
def test_weights_may_be_wider_than_the_samples(name: str) -> None:
    o = operands(CASE, torch.bfloat16)
    wide = {key: getattr(o, key).float() for key in ("W_enc", "W_dec", "pre_bias", "latent_bias", "scale")}
    check_accuracy(name, replace(o, **wide))
