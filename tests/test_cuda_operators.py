"""The CUDA kernels, run on the host by tests/cuda_emulation: the same results as the reference, in any order of threads."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from cuda_emulation import build
from cuda_emulation.build import planned
from hard_rows import SCORES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import normal, seeded
from torch import Tensor

from sparc_fast.ops import reference

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no g++")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(cuda: ModuleType, scores: Tensor, k: int) -> None:
    assert torch.equal(cuda.topk_rows(scores, k), reference.topk_rows(scores, k))


ROWS = {**SCORES, "the largest at the sampled places": lambda L: normal(L) + 9.0 * (torch.arange(L) % (L // 16) < 32)}


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(ROWS))
@pytest.mark.parametrize("in_steps", [False, True], ids=["at once", "in steps"])
def test_topk_rows_are_exact_on_hard_rows(
    kind: str, dtype: torch.dtype, in_steps: bool, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.stack([ROWS[kind](9000), ROWS[kind](9000).flip(0)]).to(dtype)
    if in_steps:
        rows = rows[:, :2500]
        planned(cuda, monkeypatch, "TopkPlan", threads=64, capacity=200, sample=0)
    for k in (1, 50):
        check(cuda, rows, k)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(N=st.integers(0, 3), L=st.integers(1, 600), data=st.data(), seed=st.integers(0, 2**31), order=st.integers(0, 4))
def test_topk_rows_equal_the_reference_at_any_shape(
    N: int, L: int, data: st.DataObject, seed: int, order: int, cuda: ModuleType
) -> None:
    k = data.draw(st.integers(1, L), label="k")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    distinct = data.draw(st.sampled_from([1, 3, 1000]), label="distinct values")
    sample = min(32 * data.draw(st.integers(0, 8), label="sample / 32"), L // 32 * 32)
    parts = data.draw(st.integers(1, max(1, L // (k + 8))), label="parts")
    choices = {
        "threads": 64,
        "capacity": k + 64 + sample,
        "parts": parts,
        "sample": sample,
        "rank": data.draw(st.integers(1, max(sample, 1)), label="rank"),
    }
    scores = (normal(N, L, seed=seed) * distinct).round().to(dtype)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_EMULATION_SCHEDULE", str(order))
        planned(cuda, patched, "TopkPlan", **choices)
        check(cuda, scores, k)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"threads": 64, "capacity": 300, "sample": 256, "rank": 256},
        {"threads": 64, "capacity": 300, "sample": 256, "rank": 1},
        {"threads": 32, "capacity": 140, "parts": 7, "sample": 64, "rank": 12},
    ],
    ids=["its own choices", "no room for all above the threshold", "too few above the threshold", "in parts"],
)
def test_topk_rows_do_not_depend_on_the_order_of_threads(
    choices: dict[str, int], schedule: None, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(cuda, monkeypatch, "TopkPlan", **choices)
    scores = normal(2, 4000)
    scores[1] = scores[1].round(decimals=1)
    check(cuda, scores, 30)
    check(cuda, scores.bfloat16(), 30)


@pytest.mark.parametrize("k", [1, 2047, 2048])
def test_topk_rows_may_be_as_long_and_wide_as_promised(k: int, cuda: ModuleType) -> None:
    check(cuda, normal(1, 30000), k)


def test_long_rows_are_cut_in_parts_when_they_are_few(cuda: ModuleType) -> None:
    assert cuda._cuda.TopkPlan(1, 2**21, 64, 132).parts == 64
    assert cuda._cuda.TopkPlan(4096, 2**21, 64, 132).parts == 1
    check(cuda, normal(1, 2**17).round(decimals=1).bfloat16(), 64)
    check(cuda, normal(1, 2**17).round(decimals=2), 64)


def test_topk_rows_may_be_slices_of_wider_tensors(cuda: ModuleType) -> None:
    for dtype in DTYPES:
        wide = torch.full((4, 3010), torch.nan, dtype=dtype)
        for begin in range(9):
            rows = wide[1:3, begin : begin + 3000]
            rows.copy_(normal(2, 3000))
            check(cuda, rows, 20)
            rows.fill_(torch.nan)
    check(cuda, normal(3000, 2).T, 20)


def test_a_plan_that_does_not_fit_is_refused(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(cuda, monkeypatch, "TopkPlan", capacity=10)
    with pytest.raises(ValueError, match="the plan does not fit the rows"):
        cuda.topk_rows(normal(2, 100), 5)


def check_inverse(cuda: ModuleType, indices: Tensor, L: int) -> None:
    offsets, entries = cuda.invert_indices(indices, L)
    expected_offsets, expected = reference.invert_indices(indices, L)
    assert offsets.dtype == entries.dtype == torch.int64
    assert torch.equal(offsets, expected_offsets)
    assert torch.equal(entries, expected)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(0, 60),
    k=st.integers(1, 20),
    L=st.integers(1, 700),
    order=st.integers(0, 4),
    few=st.sampled_from([-1, 2**15]),
)
def test_inverse_indices_equal_the_reference_at_any_shape(
    N: int, k: int, L: int, order: int, few: int, cuda: ModuleType
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_EMULATION_SCHEDULE", str(order))
        patched.setattr(cuda, "FEW", few)
        check_inverse(cuda, torch.randint(0, L, (N, k), generator=seeded(N), dtype=torch.int32), L)


@pytest.mark.parametrize("few", [-1, 2**15])
@pytest.mark.parametrize("often", [33, 2048, 2049, 9000])
def test_a_latent_in_frequent_use_has_its_entries_in_order(
    often: int, few: int, schedule: None, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "FEW", few)
    indices = torch.randint(0, 500, (12000,), generator=seeded(0), dtype=torch.int32)
    indices[torch.randperm(12000, generator=seeded(1))[:often]] = 499
    check_inverse(cuda, indices.view(-1, 3), 500)


@pytest.mark.parametrize("few", [-1, 2**15])
def test_latents_outside_the_dictionary_are_in_no_segment(
    few: int, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "FEW", few)
    indices = torch.tensor([[0, 33, 2], [-1, 2, 32], [2**31 - 1, -(2**31), 0]])
    for kind in (torch.int32, torch.int64):
        chosen = indices.to(kind)
        if kind == torch.int64:
            chosen[0, 1] = 2**32 + 5  # would be 5 in 32 bits
        offsets, entries = cuda.invert_indices(chosen, 33)
        for l in range(33):
            assert torch.equal(entries[offsets[l] : offsets[l + 1]], (chosen.flatten() == l).nonzero()[:, 0])
