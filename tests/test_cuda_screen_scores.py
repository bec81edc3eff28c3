"""global_topk's scores by tiles, which sm_90a multiplies and tests/cuda_emulation in its place: the supports stay exact."""

# fixtures of another module's tests
# ruff: noqa: F401, F811
from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulation import build
from hard_rows import SCORES, inf, nan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import normal
from test_kernel_global_topk import given_up
from torch import Tensor

from sparc_fast.ops import reference

kernel = importlib.import_module("sparc_fast.kernels.global_topk")

pytestmark = build.between_interpreted()
L = 403


@pytest.fixture(autouse=True)
def screened(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether tiles were taken, call by call; chunks are so short that a few hundred latents need several steps."""
    taken: list[bool] = []
    screen = cuda._screen

    def noted(*arguments: Any) -> bool:
        taken.append(screen(*arguments))
        return taken[-1]

    monkeypatch.setattr(cuda, "_screen", noted)
    monkeypatch.setattr(kernel, "chunk_length", lambda rows, L, *device: min(30, L))
    return taken


def check(cuda: ModuleType, operands: tuple[Tensor, ...], k: int) -> None:
    assert torch.equal(cuda.global_topk(*operands, k), reference.global_topk(*operands, k))


def of_bias(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ones(1, 8), torch.zeros(len(scores), 8).bfloat16(), torch.zeros(8), scores[None]


@pytest.mark.parametrize("kind", list(SCORES))
def test_supports_are_exact_on_hard_rows(
    kind: str, cuda: ModuleType, screened: list[bool], given_up: list[int]
) -> None:  # fmt: skip
    check(cuda, of_bias(SCORES[kind](L)), 20)
    assert screened == [True]
    assert given_up == [0]


def test_hard_rows_of_weights_are_told_apart_in_one_tile(cuda: ModuleType, screened: list[bool]) -> None:
    rows = [row(L) for row in SCORES.values()]
    W_enc = torch.stack([row for row in rows if row.isfinite().all()], 1).bfloat16()
    kinds = W_enc.shape[1]
    padded = torch.nn.functional.pad(W_enc, (0, 24 - kinds))
    check(cuda, (torch.eye(24)[:kinds], padded, torch.zeros(24), torch.zeros(1, L)), 20)
    assert screened == [True]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.sampled_from([1, 2, 130]),
    L=st.integers(31, 600),
    D=st.integers(1, 10).map(lambda vectors: 8 * vectors),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    x_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    span=st.sampled_from([1, 3, 1000]),
    order=st.integers(0, 4),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_supports_equal_the_reference_at_any_shape(
    N: int, L: int, D: int, dtype: torch.dtype, x_dtype: torch.dtype, span: int, order: int, seed: int,
    data: st.DataObject, cuda: ModuleType,
) -> None:  # fmt: skip
    k = data.draw(st.integers(1, min(L, 40)), label="k")
    shapes = enumerate([(N, D), (L, D), (D,), (2, L)])
    x, W_enc, pre_bias, bias = ((normal(*shape, seed=seed + i) * span).round() for i, shape in shapes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_EMULATION_SCHEDULE", str(order))
        check(cuda, (x.to(x_dtype), W_enc.to(dtype), pre_bias.to(x_dtype), bias), k)


@pytest.mark.parametrize("order", ["ascending", "descending", "all equal", "one by one"])
def test_sorted_latents_and_equal_scores_fill_no_list(
    order: str, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, given_up: list[int]
) -> None:  # fmt: skip
    monkeypatch.setattr(kernel, "SPARE", 0)  # of 8 k candidates, a step brings about 3 k to k
    scores = torch.arange(L) % 40.0 if order == "one by one" else SCORES[order](L)
    check(cuda, of_bias(scores), 9)
    assert given_up == [0]


def test_samples_that_are_no_numbers_zero_or_too_large_change_no_others(
    cuda: ModuleType, screened: list[bool], given_up: list[int]
) -> None:  # fmt: skip
    x, W_enc = normal(7, 40), normal(L, 40, seed=1).bfloat16()
    x[1, 3], x[2], x[3], x[4] = nan, 0, 1e-30, 3e38
    x[5, 0] = inf
    check(cuda, (x, W_enc, torch.zeros(40), normal(2, L, seed=2)), 11)
    assert screened == [True]
    assert given_up == [2]


def test_latents_that_are_no_numbers_are_placed_as_the_reference_places_them(cuda: ModuleType) -> None:
    x, W_enc, bias = normal(2, 40), normal(L, 40, seed=1).bfloat16(), normal(1, L, seed=2)
    W_enc[5], W_enc[77, 3], W_enc[78, 4], W_enc[200, 1], W_enc[300] = 0, nan, inf, 3e38, 1e-38
    bias[0, 6], bias[0, 79], bias[0, 200], bias[0, 90] = 1e30, -inf, nan, -1e30
    check(cuda, (x, W_enc, torch.zeros(40), bias), 11)


def test_what_is_given_up_does_not_depend_on_the_order_of_threads(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, given_up: list[int]
) -> None:  # fmt: skip
    # of large samples the scores differ less than their bound
    monkeypatch.setattr(kernel, "ROOM", 1)
    monkeypatch.setattr(kernel, "SPARE", 140)
    W_enc = (normal(64) + 1e-2 * normal(L, 64, seed=1)).bfloat16()
    x = normal(4, 64) * 1e-2
    x[::2] *= 1e6
    operands = x, W_enc, torch.zeros(64), normal(1, L, seed=2)
    for schedule in range(3):
        monkeypatch.setenv("CUDA_EMULATION_SCHEDULE", str(schedule))
        check(cuda, operands, 20)
    assert given_up == [2] * 3


def test_tiles_are_of_16_bit_rows_in_whole_vectors_on_a_device_that_multiplies_them(
    cuda: ModuleType, screened: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    x, W_enc, bias = normal(2, 48), normal(90, 48, seed=1).bfloat16(), normal(1, 90, seed=2)
    wide, zeros = W_enc.float(), torch.zeros(48)
    columns = slice(8, 32), slice(3, 27)
    check(cuda, (x[:, columns[0]], W_enc[:, columns[0]], zeros[columns[0]], bias), 5)
    check(cuda, (x[:, columns[1]], W_enc[:, columns[1]], zeros[columns[1]], bias), 5)
    check(cuda, (x[:, :20], W_enc[:, :20], zeros[:20], bias), 5)
    check(cuda, (x, W_enc[:30], zeros, bias[:, :30]), 5)
    check(cuda, (x, wide, zeros, bias), 5)  # a copy of it is multiplied, chunk by chunk
    monkeypatch.setattr(cuda._cuda, "screens_scores", lambda: False)
    check(cuda, (x, W_enc, zeros, bias), 5)
    assert screened == [True, False, False, False, False]
