"""The CUDA kernels of values on a support, run on the host by tests/cuda_emulation: alone, and with the choice."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, assert_equal
from cuda_emulation import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import Operands, normal, operands
from test_kernel_global_topk import given_up
from torch import Tensor

import sparc_fast as sf
from sparc_fast.ops import backends, reference

__all__ = ["given_up"]  # a fixture
pytestmark = build.between_interpreted()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# the package may give its functions the names of their modules
kernel, gather = (importlib.import_module(f"sparc_fast.kernels.{name}") for name in ("global_topk", "gather"))


def encoder(o: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return o.x, o.W_enc, o.pre_bias, o.latent_bias


def check_together(
    cuda: ModuleType, of: tuple[Tensor, ...], k: int, widths: tuple[int, ...], how: str = "auto"
) -> None:
    """The support is the reference's, and its values are those that are found alone, bit for bit."""
    indices, values = cuda.encode_topk(*of, k, widths, how)
    assert torch.equal(indices, reference.global_topk(*of, k))
    assert_equal([values], [cuda.support_values(*of, indices, widths)], equal_nan=True)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    N=st.integers(0, 3),
    L=st.integers(1, 400),
    of_each=st.tuples(*[st.sampled_from(DTYPES)] * 4),
    same=st.booleans(),
    screening=st.sampled_from(["auto", "bf16", "off"]),
    spread=st.sampled_from([0.0, 1e-3, 1.0]),
    holds_nan=st.booleans(),
    order=st.integers(0, 4),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_values_have_the_same_bits_with_the_choice_and_alone(
    widths: list[int], N: int, L: int, of_each: tuple[torch.dtype, ...], same: bool, screening: str, spread: float,
    holds_nan: bool, order: int, seed: int, data: st.DataObject, cuda: ModuleType,
) -> None:  # fmt: skip
    k, D = data.draw(st.integers(1, min(L, 60)), label="k"), sum(widths)
    W_enc = normal(D, seed=seed + 1) + spread * normal(L, D, seed=seed + 2)  # the closer, the more rows are settled
    of = normal(N, D, seed=seed), W_enc, normal(D, seed=seed + 3), normal(len(widths), L, seed=seed + 4)
    of = tuple(one.to(of_each[0 if same else i]) for i, one in enumerate(of))
    if holds_nan and N:
        of[0][0, -1] = torch.nan
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_EMULATION_SCHEDULE", str(order))
        check_together(cuda, of, k, tuple(widths), screening)


def test_samples_given_up_have_values_too(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, given_up: list[int]
) -> None:
    monkeypatch.setattr(kernel, "ROOM", 1)
    monkeypatch.setattr(kernel, "SPARE", 60)
    of = [normal(3, 100) * 1e-2, normal(100) + 1e-3 * normal(1300, 100, seed=1), torch.zeros(100)]
    of[0][::2] *= 1e6  # of large samples the scores differ less than their bound
    check_together(cuda, (*of, normal(2, 1300, seed=2)), 20, (60, 40), "bf16")
    assert given_up == [2]


@pytest.mark.parametrize("widths", [(264, 520, 16), (300, 33), (9000, 7)], ids=["whole", "odd", "not staged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_as_accurate_as_plain_pytorch(dtype: torch.dtype, widths: tuple[int, ...], cuda: ModuleType) -> None:
    o = operands((widths, 2, 60, 11), dtype)
    truth = reference.support_values(*(one.double() for one in encoder(o)), o.indices, widths)
    plain = reference.support_values(*encoder(o), o.indices, widths)
    assert_as_accurate(cuda.support_values(*encoder(o), o.indices, widths), plain, truth)
    check_together(cuda, encoder(o), 11, widths)


@pytest.mark.parametrize("per_stream", [False, True], ids=["shared", "per stream"])
def test_empty_slots_and_positions_that_are_no_latents_have_no_value(per_stream: bool, cuda: ModuleType) -> None:
    o = operands(((7, 24), 3, 20, 9), torch.float32, per_stream)
    expected = cuda.support_values(*encoder(o), o.indices, o.d_streams)
    empty = torch.zeros_like(o.indices, dtype=torch.bool)
    empty[..., ::3] = True
    x = torch.full_like(o.x, torch.nan)
    for nowhere in (-1, 20, 2**32, -(2**40)):
        indices = torch.where(empty, nowhere, o.indices.long())
        none = empty if per_stream else empty[:, None]
        assert_equal([cuda.support_values(*encoder(o), indices, o.d_streams)], [expected.masked_fill(none, 0)])
        of_nan = cuda.support_values(x, *encoder(o)[1:], indices, o.d_streams)
        assert torch.equal(of_nan.isnan(), ~none.expand_as(of_nan))


def test_operands_may_be_columns_and_rows_of_wider_tensors(cuda: ModuleType) -> None:
    wide_x, wide_W = normal(6, 130), normal(100, 130, seed=1)
    for dtype in DTYPES:
        for begin in range(3):
            of = [wide_x[::2, begin : begin + 48], wide_W[::2, begin : begin + 48], normal(48), normal(2, 50)]
            of = [one.to(dtype) if dtype != torch.float32 else one for one in of]
            indices, values = cuda.encode_topk(*of, 9, (16, 32))
            packed = [one.contiguous() for one in of]
            assert_equal([values], [cuda.support_values(*packed, indices, (16, 32))])
    transposed = [normal(48, 3).T, normal(48, 50).T, normal(96)[::2], normal(50, 2).T]
    check_together(cuda, tuple(transposed), 9, (16, 32))


@pytest.fixture
def left_to_triton(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operators that Triton was asked for."""
    names: list[str] = []

    def in_triton(name: str, *operands: Any) -> Any:
        names.append(name)
        return getattr(reference, name)(*operands)

    monkeypatch.setattr(cuda, "_in_triton", in_triton)
    return names


@pytest.mark.parametrize(
    "change",
    [
        lambda patch, cuda, of: [one.double() for one in of],
        lambda patch, cuda, of: patch.setattr(cuda._cuda, "most_streams", 1),
        lambda patch, cuda, of: patch.setattr(gather, "L2_BYTES", 2 * of[1].nbytes // 3 - 1),
    ],
    ids=["float64", "too many streams", "where the cache keeps chunks of columns, not rows"],
)
def test_values_are_tritons_whatever_found_the_support(
    change: Callable[..., Any], cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, left_to_triton: list[str]
) -> None:
    of = [normal(2, 400), normal(70, 400, seed=1), normal(400), normal(2, 70)]
    of = change(monkeypatch, cuda, of) or of
    indices, values = cuda.encode_topk(*of, 5, (160, 240))
    assert left_to_triton == ["support_values"]
    assert_equal([values], [reference.support_values(*of, indices, (160, 240))])


def test_k_beyond_what_is_settled_has_the_same_values(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, left_to_triton: list[str]
) -> None:
    of = normal(2, 40), normal(70, 40, seed=1), normal(40), normal(2, 70)
    expected = cuda.encode_topk(*of, 31, (16, 24))
    monkeypatch.setattr(cuda._cuda, "most_k", 30)
    assert_equal(cuda.encode_topk(*of, 31, (16, 24)), expected)
    assert not left_to_triton


@pytest.mark.parametrize("settings", [{}, {"matryoshka": [5]}, {"selection": "local"}], ids=str)
def test_a_model_trains_to_the_same_bits_whether_values_come_with_the_choice(
    settings: dict[str, Any], cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_AVAILABLE", {"cpu": ("cuda", "reference")})
    monkeypatch.setitem(backends._BACKENDS, "cuda", cuda)
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(cuda, name)
        return lambda *operands: (calls.append(name), function(*operands))[1]

    found = []
    for apart in (False, True):
        calls.clear()
        with monkeypatch.context() as patched:
            for name in ("encode_topk", "support_values"):
                patched.setattr(cuda, name, counted(name))
            if apart:
                patched.delattr(cuda, "encode_topk")
            torch.manual_seed(0)
            model = sf.SPARC({"a": 16, "b": 7}, 16, 3, backend="cuda", auxk=2, dead_after=4, **settings)
            optimizer = sf.SparcAdam(model, lr=1e-2)
            losses = [optimizer.step(normal(4, 23, seed=step)).total for step in range(3)]
            with torch.no_grad():
                codes = model.encode(normal(4, 23))
        found.append([*losses, *model.state_dict().values(), codes.values])
        together = not apart and settings.get("selection") != "local"
        assert calls.count("encode_topk") == (4 if together else 0)
    assert_equal(*found)
