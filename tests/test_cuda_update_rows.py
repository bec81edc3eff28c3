"""The CUDA kernels of update_rows and replay_rows, run on the host by tests/cuda_emulation."""

# tests of every backend are imported to run here as well
# ruff: noqa: F401

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy import assert_equal, check_accuracy, check_replayed_rows
from cuda_emulation import build
from cuda_emulation.build import planned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import CASES, OPERATORS, STEP, SUPPORTS, Operands, move_rows, operands, rows_to_update, seeded, sliced
from test_update_rows import (
    test_a_lazy_step_moves_decoder_rows_with_entries_bit_for_bit_and_no_others,
    test_a_zero_decoder_row_without_gradient_stays_zero,
    test_columns_of_a_wider_matrix_are_updated_in_place_and_nothing_beside_them,
    test_copies_are_rounded_as_torch_rounds,
    test_given_gradients_move_rows_that_are_not_used_in_a_dense_step_alone,
    test_it_equals_gradients_then_projection_then_adam_then_unit_norm,
    test_rates_and_steps_on_the_device_give_the_same_bits,
    test_what_a_sample_does_not_use_cannot_harm_a_gradient,
)
from torch import Tensor

import sparc_fast as sf
from sparc_fast.ops import backends, reference
from sparc_fast.ops.row_step import AdamStep, DecoderRows, Gradients, Rows

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no g++")
NAMES = ["update_rows", "update_rows lazily", "step_rows", "step_rows lazily", "replay_rows"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BETAS, EPS = (0.9, 0.999), 1e-8
WIDE = (4100, 9)  # a block holds 4096 columns


BACKENDS = ["cuda"]


@pytest.fixture(autouse=True)
def emulated(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes by that name, on tensors of the host."""
    monkeypatch.setitem(backends._BACKENDS, "cuda", cuda)
    monkeypatch.setitem(backends._AVAILABLE, torch.get_default_device().type, ("reference", "triton", "cuda"))


@pytest.fixture
def without_triton(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows is done by the CUDA kernels."""

    def refused(operator: str, *_: Any) -> None:
        raise AssertionError(f"{operator} went to Triton")

    monkeypatch.setattr(cuda, "_in_triton", refused)


@pytest.mark.covering(3)
@SUPPORTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [*CASES, "wide"])
def test_rows_are_moved_as_accurately_as_by_plain_pytorch(
    case: str, name: str, dtype: torch.dtype, per_stream: bool, cuda: ModuleType, without_triton: None
) -> None:
    check_accuracy(name, operands((WIDE, 4, 3, 2) if case == "wide" else case, dtype, per_stream), cuda)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    N=st.integers(0, 40),
    L=st.integers(1, 30),
    data=st.data(),
    per_stream=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    order=st.integers(0, 4),
)
def test_moved_rows_equal_the_reference_at_any_shape(
    widths: list[int], N: int, L: int, data: st.DataObject, per_stream: bool, dtype: torch.dtype, seed: int, order: int,
    cuda: ModuleType,
) -> None:  # fmt: skip
    k = data.draw(st.integers(1, L), label="k")
    blocks, piece = data.draw(st.integers(1, 9), label="blocks"), data.draw(st.integers(1, 20), label="piece")
    # a sum of few terms may cancel, so that its accuracy is luck: this is about shapes
    tolerance = {torch.float32: 1e-4}.get(dtype, 0.05)
    o = operands((tuple(widths), N, L, k), dtype, per_stream, seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_EMULATION_SCHEDULE", str(order))
        planned(cuda, patched, "UpdatePlan", blocks=blocks, piece=piece)
        got = OPERATORS["update_rows"](o, cuda)
    for ours, exact in zip(got, OPERATORS["update_rows"](o.to(torch.float64), reference), strict=True):
        scale = float(exact.abs().max()) + 1 if exact.numel() else 1
        torch.testing.assert_close(ours.to(exact.dtype), exact, rtol=0, atol=tolerance * scale)


@SUPPORTS
@pytest.mark.parametrize("piece", [1, 4, 7, 29, 30, 31])
def test_a_latent_in_many_samples_is_summed_in_pieces(
    piece: int, per_stream: bool, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(cuda, monkeypatch, "UpdatePlan", piece=piece)
    o = operands(((20, 16), 30, 9, 4), torch.float32, per_stream)
    o.indices[..., 0] = 3
    check_accuracy("update_rows", o, cuda)


@pytest.mark.parametrize("often", [127, 128, 129, 300])
def test_a_latent_in_frequent_use_beside_rare_ones(often: int, cuda: ModuleType) -> None:
    o = operands(((20, 16), 300, 40, 3), torch.bfloat16)
    o.indices[o.indices == 11] = 12
    o.indices[:often, 0] = 11
    check_accuracy("update_rows", o, cuda)


@pytest.mark.covering(2)
@SUPPORTS
@pytest.mark.parametrize("blocks", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", ["update_rows", "step_rows"])
def test_neither_the_grid_nor_the_order_of_threads_shows_in_a_bit(
    name: str, blocks: int, per_stream: bool, schedule: None, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    o = operands(((20, 300), 40, 60, 5), torch.bfloat16, per_stream)
    o.indices[..., 0] = 3
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_EMULATION_SCHEDULE", "0")
        planned(cuda, patched, "UpdatePlan", blocks=3, piece=6)
        expected = OPERATORS[name](o, cuda)
    planned(cuda, monkeypatch, "UpdatePlan", blocks=blocks, piece=6)
    assert_equal(OPERATORS[name](o, cuda), expected)


@pytest.mark.covering(2)
@SUPPORTS
@pytest.mark.parametrize("blocks", [1, 7])
@pytest.mark.parametrize("name", ["update_rows", "update_rows lazily", "step_rows"])
def test_rows_that_bulk_copies_bring_are_moved_to_the_same_bits(
    name: str, blocks: int, per_stream: bool, schedule: None, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    o = operands(((24, 312, 8), 30, 40, 5), torch.bfloat16, per_stream)
    o.indices[..., 0] = 3
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_EMULATION_SCHEDULE", "0")
        planned(cuda, patched, "UpdatePlan", blocks=blocks, piece=6)
        expected = OPERATORS[name](o, cuda)
    planned(cuda, monkeypatch, "UpdatePlan", blocks=blocks, piece=6, stages_rows=True)
    assert_equal(OPERATORS[name](o, cuda), expected)


def test_the_grid_grows_with_the_device_and_pieces_do_not_change(cuda: ModuleType) -> None:
    streams = cuda._cuda.Streams([1024, 768, 768])
    plans = [cuda._cuda.UpdatePlan(streams, False, multiprocessors) for multiprocessors in (108, 132)]
    assert plans[0].blocks < plans[1].blocks
    assert plans[0].piece == plans[1].piece


@SUPPORTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_samples_every_row_takes_its_step(dtype: torch.dtype, per_stream: bool, cuda: ModuleType) -> None:
    o = operands("ragged", dtype, per_stream).samples(slice(0, 0))
    check_accuracy("update_rows", o, cuda)
    moved, start = OPERATORS["update_rows"](o, cuda), rows_to_update(o)
    assert all((a != b).any(1).all() for a, b in zip(moved[2:6], start[2:], strict=True))
    assert not moved[6].any()
    assert not moved[7].any()


@pytest.mark.parametrize(("d_streams", "eps"), [((33, 20), EPS), ((33, 20), 0.0), ((300, 520), EPS), (WIDE, EPS)])
def test_replayed_rows_equal_rows_that_were_never_left_behind(
    d_streams: tuple[int, ...], eps: float, cuda: ModuleType, without_triton: None
) -> None:
    check_replayed_rows(cuda, d_streams, 6, 2, torch.bfloat16, [0.1, 0.03, 0.01, 0.02], eps)


def test_replaying_many_steps_equals_steps_without_entries(cuda: ModuleType) -> None:
    d_streams, L, steps = (7, 1, 100), 12, 100
    m = torch.randn(L, 108, generator=seeded(0)) * 10.0 ** -torch.arange(L)[:, None]
    W_dec = torch.randn(L, 108, generator=seeded(1))
    reference.normalize_rows(W_dec, d_streams)
    dense, lazy = ([tensor.clone() for tensor in (W_dec, m, m.square())] for _ in range(2))
    of_encoder = [torch.zeros(L, 108) for _ in range(3)]
    o = operands((d_streams, 1, L, 1), torch.float32).samples(slice(0, 0))
    history = torch.tensor([(0.01 / t, *BETAS, EPS) for t in range(1, steps + 1)], dtype=torch.float64)
    for t in range(1, steps + 1):
        move_rows(cuda, [of_encoder[0], dense[0], *of_encoder[1:], *dense[1:]], o, step=t, lr=0.01 / t)
    last_step = torch.zeros(L, dtype=torch.int64)
    left_behind = DecoderRows(lazy[0], lazy[1:], d_streams, last_step)
    cuda.replay_rows(left_behind, torch.arange(0, L, 2), history[: steps // 2])
    assert last_step.unique().tolist() == [0, steps // 2]
    cuda.replay_rows(left_behind, torch.arange(L), history)
    assert_equal(lazy, dense)


def test_a_lazy_training_run_is_the_dense_one_bit_for_bit(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name: getattr(cuda, name) for name in ("update_rows", "step_rows", "replay_rows")}
    operators = {**vars(reference), **own}
    monkeypatch.setitem(backends._BACKENDS, "reference", SimpleNamespace(**operators))
    runs = []
    for lazy in (None, "replay"):
        torch.manual_seed(0)
        model = sf.SPARC({"a": 12, "b": 7, "c": 5}, 96, 3, backend="reference", auxk=4, dead_after=60)
        runs.append(sf.SparcAdam(model, lr=1e-2, lazy=lazy))
    mixing = torch.randn(6, 24, generator=seeded(1))
    for t in range(20):
        x = torch.randn(6, 6, generator=seeded(t)) @ mixing
        dense, late = (run.step(x.split(4) if t % 2 else x) for run in runs)
        assert torch.equal(dense.total, late.total)
    behind = runs[1]._behind
    assert behind is not None
    assert (behind.last_step < 20).any()
    expected, got = (run.model.state_dict() for run in runs)
    assert_equal([got[name] for name in expected], list(expected.values()))


def test_inputs_may_be_slices_of_wider_tensors(cuda: ModuleType) -> None:
    for dtype in DTYPES:
        o = operands(((64, 16), 9, 20, 3), dtype)
        plain, apart = rows_to_update(o), rows_to_update(o)
        assert_equal((*move_rows(cuda, apart, o.map(sliced)), *apart), (*move_rows(cuda, plain, o), *plain))


def test_gradients_of_another_type_than_the_inputs_lose_nothing(cuda: ModuleType, without_triton: None) -> None:
    for x, grad in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        narrow, grad_recons = operands("ragged", x), operands("ragged", grad).grad_recons
        o = Operands(**{**vars(narrow), "grad_recons": grad_recons})
        expected = Operands(**{**vars(narrow.to(torch.float32)), "grad_recons": grad_recons.float()})
        got, wide = rows_to_update(o), rows_to_update(o)
        assert_equal((*move_rows(cuda, got, o), *got), (*move_rows(cuda, wide, expected), *wide))


def test_latents_outside_the_dictionary_are_in_no_segment(cuda: ModuleType) -> None:
    o = operands("ragged", torch.float32)
    o.indices[1, 0], o.indices[3, 2] = -1, 33
    offsets, entries = cuda.invert_indices(o.indices, 33)
    inside = (o.indices >= 0) & (o.indices < 33)
    values, grad_values = (t * inside[:, None] for t in (o.values, o.grad_values))
    kept = o.indices.clamp(0, 32)
    rows, expected = rows_to_update(o), rows_to_update(o)
    move_rows(cuda, rows, o, inverse=(offsets, entries))
    move_rows(cuda, expected, replace(o, values=values, grad_values=grad_values, indices=kept))
    assert_equal(rows, expected)


def test_latents_outside_the_dictionary_are_not_replayed(cuda: ModuleType) -> None:
    _, W_dec, _, _, m, v = rows_to_update(operands("ragged", torch.float32))
    rows, expected = ([t.clone() for t in (W_dec, m, v)] for _ in range(2))
    history = torch.tensor([(0.1, *BETAS, EPS)] * 3, dtype=torch.float64)
    made, made_expected = torch.zeros(33, dtype=torch.int64), torch.zeros(33, dtype=torch.int64)
    cuda.replay_rows(DecoderRows(rows[0], rows[1:], (7, 1, 100), made), torch.tensor([-1, 5, 33]), history)
    cuda.replay_rows(DecoderRows(expected[0], expected[1:], (7, 1, 100), made_expected), torch.tensor([5]), history)
    assert_equal([*rows, made], [*expected, made_expected])
    assert made.sum() == 3


@pytest.mark.parametrize("what", ["float64", "narrow moments", "65 streams"])
def test_what_the_kernels_do_not_do_triton_does_in_every_operator(
    what: str, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def in_triton(operator: str, *_: Any) -> tuple[Tensor, Tensor]:
        asked.append(operator)
        return torch.zeros(0), torch.zeros(0)

    monkeypatch.setattr(cuda, "_in_triton", in_triton)
    dtype = torch.float64 if what == "float64" else torch.float32
    o = operands(((1,) * 65 if what == "65 streams" else (7, 1), 2, 5, 2), dtype)
    rows = rows_to_update(o)
    if what == "narrow moments":
        rows[2:] = [moment.bfloat16() for moment in rows[2:]]
    move_rows(cuda, rows, o)
    history = torch.tensor([(0.1, *BETAS, EPS)], dtype=torch.float64)
    last_step = torch.zeros(5, dtype=torch.int64)
    cuda.replay_rows(DecoderRows(rows[1], rows[4:], o.d_streams, last_step), torch.arange(5), history)
    samples = o.x, o.pre_bias, o.values, o.grad_values, o.grad_recons, *o.inverse
    gradients = Gradients(*reference.weight_gradients(*samples, o.d_streams)[:2], last_step > 0)
    cuda.step_rows(Rows(*rows[:2], rows[2:], o.d_streams), gradients, AdamStep(0.01, BETAS, EPS, STEP))
    assert asked == ["update_rows", "replay_rows", "step_rows"]


def test_a_plan_without_blocks_or_entries_is_refused(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    o = operands("ragged", torch.float32)
    planned(cuda, monkeypatch, "UpdatePlan", blocks=0)
    with pytest.raises(ValueError, match="the plan needs at least one block and entry"):
        move_rows(cuda, rows_to_update(o), o)
