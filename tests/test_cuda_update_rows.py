"""The CUDA kernels of update_rows and replay_rows, run on the host by tests/cuda_emulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy import assert_equal, check_accuracy
from cuda_emulation import build
from cuda_emulation.build import planned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import CASES, OPERATORS, STEP, SUPPORTS, Operands, move_rows, operands, rows_to_update, seeded, sliced
from torch import Tensor

import sparc_fast as sf
from sparc_fast.ops import backends, reference
from sparc_fast.ops.row_step import AdamStep, DecoderRows, Gradients, Rows

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no g++")
NAMES = ["update_rows", "update_rows lazily", "step_rows", "step_rows lazily", "replay_rows"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BETAS, EPS = (0.9, 0.999), 1e-8
WIDE = (4100, 9)  # a block holds 4096 columns


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


def test_a_zero_decoder_row_without_gradient_stays_zero(cuda: ModuleType) -> None:
    o = operands("ragged", torch.float32)
    unused = int(torch.isin(torch.arange(33), o.indices).logical_not().nonzero()[0])
    rows = [o.W_enc.clone(), o.W_dec.clone(), *(torch.zeros_like(o.W_enc) for _ in range(4))]
    rows[1][unused] = 0
    move_rows(cuda, rows, o, step=1)
    assert not rows[1][unused].any()
    assert rows[1].isfinite().all()


def test_rows_without_an_entry_are_left_behind(cuda: ModuleType) -> None:
    o = operands("few samples of many latents", torch.float32)
    start, dense = rows_to_update(o), OPERATORS["update_rows"](o, cuda)
    *lazy, last_step = OPERATORS["update_rows lazily"](o, cuda)
    used = torch.isin(torch.arange(500), o.indices)
    assert 0 < used.sum() < 500
    assert torch.equal(last_step, torch.where(used, STEP, STEP - 1))
    for i, (before, all_rows, some_rows) in enumerate(zip(start, dense, lazy, strict=False)):
        of_decoder = i in (1, 4, 5)
        assert torch.equal(some_rows, torch.where(used[:, None], all_rows, before) if of_decoder else all_rows)
    assert_equal(lazy[6:], dense[6:])


@pytest.mark.parametrize(("d_streams", "eps"), [((33, 20), EPS), ((33, 20), 0.0), ((300, 520), EPS), (WIDE, EPS)])
def test_replayed_rows_equal_rows_that_were_never_left_behind(
    d_streams: tuple[int, ...], eps: float, cuda: ModuleType, without_triton: None
) -> None:
    L, lrs = 6, [0.1, 0.03, 0.01, 0.02]
    dense = rows_to_update(operands((d_streams, 1, L, 2), torch.bfloat16))
    dense[4][1] *= 1e-6
    lazy = [tensor.clone() for tensor in dense]
    dense_copies, lazy_copies = ([W.bfloat16() for W in rows[:2]] for rows in (dense, lazy))
    last_step = torch.zeros(L, dtype=torch.int64)
    history = torch.tensor([(lr, *BETAS, eps) for lr in lrs], dtype=torch.float64)
    left_behind = DecoderRows(lazy[1], lazy[4:], d_streams, last_step, lazy_copies[1])
    for t, lr in enumerate(lrs, 1):
        o = operands((d_streams, 1, L, 2), torch.bfloat16, seed=t)
        used = o.indices[0].long()
        move_rows(cuda, dense, o, step=t, lr=lr, eps=eps, copies=dense_copies)
        cuda.replay_rows(left_behind, used, history[: t - 1])
        move_rows(cuda, lazy, o, step=t, lr=lr, eps=eps, copies=lazy_copies, last_step=last_step)
        assert (last_step[used] == t).all()
        assert torch.equal(lazy[1][used], dense[1][used])
    assert (last_step < len(lrs)).any()
    cuda.replay_rows(left_behind, torch.arange(L), history)
    assert_equal([*lazy, *lazy_copies], [*dense, *dense_copies])
    assert (last_step == len(lrs)).all()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_rounded_as_torch_rounds(dtype: torch.dtype, cuda: ModuleType) -> None:
    o = operands(((64,), 1, 600, 1), dtype).samples(slice(0, 0))
    bits = torch.randint(-(2**31), 2**31, (600, 64), generator=seeded(0), dtype=torch.int32)
    bits[::2] = bits[::2] & 0x0FFFFFFF | 0x30000000  # of magnitudes near those of float16
    bits[1::4] &= -0x1000  # ties
    W_enc = bits.view(torch.float32).clone()
    rows = [W_enc, o.W_dec.float(), *(torch.zeros(600, 64) for _ in range(4))]
    copies = [torch.zeros(600, 64, dtype=dtype) for _ in range(2)]
    move_rows(cuda, rows, o, lr=0.0, copies=copies)
    assert_equal([rows[0]], [W_enc], equal_nan=True)
    for copy, exact in zip(copies, rows, strict=False):
        assert_equal([copy], [exact.to(dtype)], equal_nan=True)


def test_rates_and_steps_on_the_device_give_the_same_bits(cuda: ModuleType) -> None:
    o = operands("ragged", torch.float32)
    numbers, tensors = rows_to_update(o), rows_to_update(o)
    last_steps = [torch.zeros(33, dtype=torch.int64) for _ in range(2)]
    move_rows(cuda, numbers, o, step=1234, lr=0.0123, last_step=last_steps[0])
    lr = torch.tensor(0.0123, dtype=torch.float64)
    move_rows(cuda, tensors, o, step=torch.tensor(1234.0), lr=lr, last_step=last_steps[1])
    assert_equal([*numbers, last_steps[0]], [*tensors, last_steps[1]])
    assert last_steps[0].max() == 1234


@pytest.mark.parametrize("window", [lambda t: t[:, 5:113], lambda t: t[:, 1::2][:, :108]], ids=["beside", "apart"])
def test_weights_may_be_columns_of_wider_tensors(window: Callable[[Tensor], Tensor], cuda: ModuleType) -> None:
    o = operands("ragged", torch.float32)
    plain = rows_to_update(o)
    wider = [torch.full((33, 220), torch.nan) for _ in plain]
    inner = [window(tensor) for tensor in wider]
    for columns, tensor in zip(inner, plain, strict=True):
        columns.copy_(tensor)
    versions = [columns._version for columns in inner]
    move_rows(cuda, plain, o)
    move_rows(cuda, inner, o)
    assert_equal(inner, plain)
    assert all(columns._version > version for columns, version in zip(inner, versions, strict=True))
    assert all(tensor.isfinite().sum() == 33 * 108 for tensor in wider)


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


def test_what_a_sample_does_not_use_cannot_harm_a_gradient(cuda: ModuleType) -> None:
    o = operands("ragged", torch.float32)
    expected = OPERATORS["update_rows"](o, cuda)
    o.values[2], o.x[2] = 0, torch.nan  # nothing of sample 2 fires
    o.grad_recons[2] = torch.inf
    without = operands("ragged", torch.float32)
    without.values[2] = 0
    got = OPERATORS["update_rows"](o, cuda)
    assert_equal(got, OPERATORS["update_rows"](without, cuda))
    assert not torch.equal(got[0], expected[0])


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
