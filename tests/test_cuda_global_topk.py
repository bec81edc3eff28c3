"""The CUDA kernels of global_topk, run on the host by tests/cuda_emulation between Triton's, which are interpreted."""

# tests of Triton's kernels are imported to run here as well, with a fixture of theirs
# ruff: noqa: F401, F811
from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulation import build
from hard_rows import SCORES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import normal, seeded
from test_kernel_global_topk import (
    given_up,
    in_full,
    test_a_latent_that_rounding_misjudges_as_far_as_the_bound_allows_is_placed,
    test_a_product_as_wrong_as_the_bound_allows_changes_no_support,
    test_a_sample_alone_equals_the_same_sample_in_a_batch_of_any_size,
    test_any_shape_any_dtype_of_each_operand,
    test_candidates_that_do_not_fit_are_never_dropped,
    test_no_rows_break_the_bound,
    test_only_samples_without_a_proof_are_scored_in_full,
    test_zero_weights_tie_everywhere_and_still_need_no_full_scores,
)
from torch import Tensor

from sparc_fast.ops import reference
from sparc_fast.ops.layout import stream_slices

# the package may give its functions the names of their modules
kernel = importlib.import_module("sparc_fast.kernels.global_topk")

pytestmark = build.between_interpreted()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def in_cuda(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests of Triton's global_topk call is that of the CUDA kernels."""
    monkeypatch.setattr(kernel, "TRITON", kernel.Selection(cuda._take_in, cuda._settle))


def small(
    cuda: ModuleType, patch: pytest.MonkeyPatch, chunk: int = 1100, sample: int | None = None, room: int | None = None
) -> None:
    """Chunks, and steps of 512 latents, so short that few latents take several; room for k + `room` candidates."""
    patch.setattr(kernel, "chunk_length", lambda rows, L, *device: min(chunk, L))
    if room is not None:
        patch.setattr(kernel, "ROOM", 1)
        patch.setattr(kernel, "SPARE", room)
    original = cuda._cuda.FilterPlan

    def plan(*arguments: int) -> Any:
        chosen = original(*arguments)
        chosen.threads = 32
        if sample is not None:
            chosen.sample = sample if sample <= arguments[0] else 0
        return chosen

    patch.setattr(cuda._cuda, "FilterPlan", plan)


def problem(scores: Tensor, of_weights: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operands of one sample with these scores, from its weights or its bias."""
    L = len(scores)
    W_enc = scores[:, None].clone() if of_weights else torch.ones(L, 1)
    bias = torch.zeros(1, L) if of_weights else scores[None]
    return torch.full((1, 1), float(of_weights)), W_enc, torch.zeros(1), bias


def check(cuda: ModuleType, operands: tuple[Tensor, ...], k: int, screening: str = "auto") -> None:
    assert torch.equal(cuda.global_topk(*operands, k, screening), reference.global_topk(*operands, k))


L, CHUNK = 1001, 700  # in no vectors of four
ROWS = {
    **SCORES,
    "low in the first chunk": lambda L: normal(L) + 20 * (torch.arange(L) >= CHUNK),
    "high in the first chunk": lambda L: normal(L) - 20 * (torch.arange(L) >= CHUNK),
    "high in the sampled places": lambda L: normal(L) + 9.0 * (torch.arange(L) % (CHUNK // 16) < 32),
}


@pytest.mark.parametrize("of_weights", [True, False], ids=["of weights", "of the bias"])
@pytest.mark.parametrize("kind", list(ROWS))
def test_supports_are_exact_on_hard_rows(
    kind: str, of_weights: bool, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROWS[kind](L)
    small(cuda, monkeypatch, CHUNK, sample=512, room=30)
    for scores in (row, row.flip(0)):
        check(cuda, problem(scores, of_weights), 20)
    if not of_weights:
        check(cuda, problem(row, of_weights), 1)
        check(cuda, problem(row[:300], of_weights), 300)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(0, 3),
    L=st.integers(1, 900),
    D=st.integers(1, 20),
    chunk=st.integers(1, 1000),
    room=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    screening=st.sampled_from(["auto", "bf16", "off"]),
    span=st.sampled_from([1, 3, 1000]),
    order=st.integers(0, 4),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_supports_equal_the_reference_at_any_shape(
    N: int, L: int, D: int, chunk: int, room: int, dtype: torch.dtype, screening: str, span: int, order: int,
    seed: int, data: st.DataObject, cuda: ModuleType,
) -> None:  # fmt: skip
    k = data.draw(st.integers(1, min(L, 60)), label="k")
    sample = data.draw(st.sampled_from([0, *(s for s in (32, 64, 512) if s >= k)]), label="sample")
    shapes = enumerate([(N, D), (L, D), (D,), (2, L)])
    x, W_enc, pre_bias, bias = ((normal(*shape, seed=seed + i) * span).round().to(dtype) for i, shape in shapes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_EMULATION_SCHEDULE", str(order))
        small(cuda, patched, chunk, sample, room)
        check(cuda, (x, W_enc, pre_bias, bias), k, screening)


@pytest.mark.parametrize("sample", [0, 512], ids=["no sample", "a sample"])
def test_a_first_threshold_is_never_too_high_and_nothing_is_given_up(
    sample: int, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, given_up: list[int]
) -> None:  # fmt: skip
    small(cuda, monkeypatch, CHUNK, sample=sample, room=100)
    kinds = ["low in the first chunk", "high in the sampled places", "ascending", "descending", "all equal"]
    for kind in kinds:
        check(cuda, problem(ROWS[kind](L), of_weights=False), 50)
    assert given_up == [0] * len(kinds)


def test_what_is_given_up_does_not_depend_on_the_order_of_threads(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, given_up: list[int]
) -> None:  # fmt: skip
    # of large samples the scores differ less than their bound
    small(cuda, monkeypatch, room=60)
    W_enc = normal(100) + 1e-3 * normal(1300, 100, seed=1)
    operands = normal(2, 100) * 1e-2, W_enc, torch.zeros(100), normal(1, 1300, seed=2)
    operands[0][::2] *= 1e6
    supports = []
    for schedule in range(4):
        monkeypatch.setenv("CUDA_EMULATION_SCHEDULE", str(schedule))
        supports.append(cuda.global_topk(*operands, 20, "bf16"))
    assert given_up == [1] * 4
    for support in supports:
        assert torch.equal(support, reference.global_topk(*operands, 20))


def test_chunks_of_any_length_give_the_same_supports(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = normal(3, 33), normal(1500, 33, seed=1), normal(33), normal(2, 1500)
    operands[1][700:] = operands[1][:800].clone()
    expected = reference.global_topk(*operands, 40)
    for chunk in (1, 77, 256, 1500):
        with monkeypatch.context() as patched:
            small(cuda, patched, max(chunk, 64))
            assert torch.equal(cuda.global_topk(*operands, 40), expected)
    assert torch.equal(cuda.global_topk(*operands, 40), expected)  # by its own choices


def test_operands_may_be_columns_off_any_vector(cuda: ModuleType) -> None:
    operands = normal(4, 61), normal(90, 61), normal(61), normal(3, 90)
    for dtype in DTYPES:
        narrow = tuple(operand.to(dtype) for operand in operands)
        x, W_enc, pre_bias, bias = narrow
        for s, cols in enumerate(stream_slices((7, 1, 53))):
            of_stream = x[:, cols], W_enc[:, cols], pre_bias[cols], bias[s : s + 1]
            assert torch.equal(cuda.global_topk(*of_stream, 6), reference.global_topk(*of_stream, 6))


def test_a_sample_wider_than_shared_memory_is_read_where_it_is(cuda: ModuleType) -> None:
    operands = normal(1, 9000), normal(40, 9000, seed=1).bfloat16(), normal(9000), normal(2, 40)
    check(cuda, operands, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [24, 300, 1000])
def test_a_score_is_summed_in_the_order_of_samples_given_up(
    D: int, dtype: torch.dtype, cuda: ModuleType, given_up: list[int]
) -> None:
    # every product has its opposite: what rounding leaves of a sum depends on the order
    W_half = normal(200, D // 2) * 10 ** torch.randint(-4, 4, (200, D // 2), generator=seeded(1))
    x_half = normal(1, D // 2, seed=2) * 10 ** torch.randint(-4, 4, (1, D // 2), generator=seeded(3))
    places = torch.randperm(D, generator=seeded(4))
    x, W_enc = torch.cat([x_half, x_half], 1)[:, places], torch.cat([W_half, -W_half], 1)[:, places].to(dtype)
    operands = x, W_enc, torch.zeros(D), torch.zeros(1, 200)
    found = cuda.global_topk(*operands, 20)
    assert given_up == [0]
    assert torch.equal(found, in_full(*operands, 20))


def test_k_may_be_as_large_as_promised_and_larger_k_is_left_to_triton(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(cuda, (normal(1, 5), normal(2300, 5, seed=1), torch.zeros(5), torch.zeros(1, 2300)), 2048)
    monkeypatch.setattr(cuda._cuda, "most_k", 30)
    monkeypatch.setattr(cuda, "_take_in", None)
    monkeypatch.setattr(kernel, "TRITON", kernel.Selection(kernel._take_in, kernel._settle_rows))
    check(cuda, (normal(1, 5), normal(300, 5, seed=1), torch.zeros(5), torch.zeros(1, 300)), 31)


def test_a_plan_that_does_not_fit_is_refused(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    small(cuda, monkeypatch, sample=32)
    with pytest.raises(ValueError, match="the plan does not fit the chunk"):
        cuda.global_topk(normal(1, 5), normal(200, 5), torch.zeros(5), torch.zeros(1, 200), 33)
