from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_equal
from operands import (
    SEED,
    STEP,
    Operands,
    fitting,
    move_rows,
    operands,
    operators_of,
    rows_to_update,
    run,
    samples_of,
    seeded,
)
from torch import Tensor

from sparc_fast.ops import reference
from sparc_fast.ops.row_step import AdamStep, Gradients, Rows


def test_it_equals_gradients_then_projection_then_adam_then_unit_norm(backend: str) -> None:
    o = operands("ragged", torch.float64)
    W_enc, W_dec, *moments = rows_to_update(o)
    grad_W_enc, grad_W_dec, _ = reference.weight_gradients(*samples_of(o), o.d_streams)
    start, parameters = W_dec.clone(), [torch.nn.Parameter(W.clone()) for W in (W_enc, W_dec)]
    for part, unit in zip(grad_W_dec.split(o.d_streams, dim=1), start.split(o.d_streams, dim=1), strict=True):
        part -= (part * unit).sum(1, keepdim=True) * unit
    adam = torch.optim.Adam(parameters, lr=0.01)
    for i, (parameter, grad) in enumerate(zip(parameters, (grad_W_enc, grad_W_dec), strict=True)):
        parameter.grad = grad
        m, v = moments[2 * i : 2 * i + 2]
        adam.state[parameter] = {"step": torch.tensor(STEP - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    adam.step()
    W_enc, W_dec = run("update_rows", o, backend)[:2]
    torch.testing.assert_close(W_enc, parameters[0].detach(), rtol=1e-12, atol=1e-12)
    for part, moved in zip(W_dec.split(o.d_streams, dim=1), parameters[1].split(o.d_streams, dim=1), strict=True):
        torch.testing.assert_close(part, torch.nn.functional.normalize(moved.detach()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_lazy_step_moves_decoder_rows_with_entries_bit_for_bit_and_no_others(
    dtype: torch.dtype, backend: str
) -> None:
    o = operands("few samples of many latents", dtype)
    start, dense = rows_to_update(o), run("update_rows", o, backend)
    *lazy, last_step = run("update_rows lazily", o, backend)
    used = torch.isin(torch.arange(500), o.indices)
    assert 0 < used.sum() < 500
    assert torch.equal(last_step, torch.where(used, STEP, STEP - 1))
    for i, (before, all_rows, some_rows) in enumerate(zip(start, dense, lazy, strict=False)):
        of_decoder = i in (1, 4, 5)
        expected = torch.where(used[:, None], all_rows, before) if of_decoder else all_rows
        assert torch.equal(some_rows, expected)
    assert_equal(lazy[6:], dense[6:])


def test_decoder_rows_have_unit_norm_in_every_stream(backend: str) -> None:
    o = operands("several column runs", torch.float32)
    W_dec = run("update_rows", o, backend)[1]
    for part in W_dec.split(o.d_streams, dim=1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(len(part)))


def test_a_zero_decoder_row_without_gradient_stays_zero(backend: str) -> None:
    o = operands("ragged", torch.float32)
    W_enc, W_dec = o.W_enc.clone(), o.W_dec.clone()
    unused = int(torch.isin(torch.arange(33), o.indices).logical_not().nonzero()[0])
    W_dec[unused] = 0
    move_rows(operators_of(backend), [W_enc, W_dec, *(torch.zeros_like(W_enc) for _ in range(4))], o, step=1)
    assert not W_dec[unused].any()
    assert W_dec.isfinite().all()


@pytest.mark.parametrize("window", [lambda t: t[:, 5:113], lambda t: t[:, 1::2][:, :108]], ids=["beside", "apart"])
def test_columns_of_a_wider_matrix_are_updated_in_place_and_nothing_beside_them(
    window: Callable[[Tensor], Tensor], backend: str
) -> None:
    o = operands("ragged", torch.float32)
    wider = [torch.full((33, 220), torch.nan) for _ in range(6)]
    inner = [window(tensor) for tensor in wider]
    if backend in ("cpu", "reference") and inner[0].stride(1) > 1:
        pytest.skip("PyTorch sums in another order what lies apart")
    for columns, tensor in zip(inner, rows_to_update(o), strict=True):
        columns.copy_(tensor)
    versions = [columns._version for columns in inner]
    move_rows(operators_of(backend), inner, o)
    assert_equal(inner, run("update_rows", o, backend)[:6])
    assert all(columns._version > version for columns, version in zip(inner, versions, strict=True))
    assert all(tensor.isfinite().sum() == 33 * 108 for tensor in wider)


def test_what_a_sample_does_not_use_cannot_harm_a_gradient(backend: str) -> None:
    if backend == "reference":
        pytest.skip("it multiplies whatever is there by 0")
    o = operands("ragged", torch.float32)
    o.values[2] = 0  # nothing of sample 2 fires
    expected = run("update_rows", o, backend)
    o.x[2], o.grad_recons[2] = torch.nan, torch.inf
    assert_equal(run("update_rows", o, backend), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy about infinities
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_rounded_as_torch_rounds(dtype: torch.dtype, backend: str) -> None:
    o = operands(((64,), 1, 600, 1), dtype).samples(slice(0, 0))
    bits = torch.randint(-(2**31), 2**31, (600, 64), generator=seeded(0), dtype=torch.int32)
    bits[::2] = bits[::2] & 0x0FFFFFFF | 0x30000000  # of magnitudes near those of float16
    bits[1::4] &= -0x1000  # ties
    W_enc = bits.view(torch.float32).clone()
    W_enc[0, :8] = torch.tensor([0.0, -0.0, 1.01171875, 3.4e38, torch.inf, -torch.inf, 1e-40, 65504.0])
    rows = [W_enc.clone(), o.W_dec.float(), *(torch.zeros(600, 64) for _ in range(4))]
    copies = [torch.zeros(600, 64, dtype=dtype) for _ in range(2)]
    move_rows(operators_of(backend), rows, o, lr=0.0, copies=copies)
    assert_equal([rows[0]], [W_enc], equal_nan=True)
    assert_equal(copies, [W.to(dtype) for W in rows[:2]], equal_nan=True)


@pytest.mark.parametrize("lazy", [False, True])
def test_given_gradients_move_rows_that_are_not_used_in_a_dense_step_alone(lazy: bool, backend: str) -> None:
    o = fitting(operands("ragged", torch.float32), backend)
    L, D = o.W_enc.shape
    gradients = torch.randn(2, L, D, generator=seeded(2))
    used = torch.arange(L) % 3 > 0
    results = []
    for said in (used, torch.ones_like(used)):
        W_enc, W_dec, *moments = rows = rows_to_update(o)
        last_step = torch.zeros(L, dtype=torch.int64) if lazy else None
        given = Gradients(*gradients, said)
        adam = AdamStep(0.01, (0.9, 0.999), 1e-8, STEP)
        moved = Rows(W_enc, W_dec, moments, o.d_streams, None, last_step)
        operators_of(backend).step_rows(moved, given, adam)
        assert lazy == (last_step is not None and torch.equal(last_step, STEP * said))
        results.append(rows)
    for i, (before, some, every) in enumerate(zip(rows_to_update(o), *results, strict=True)):
        left = lazy and i in (1, 4, 5)
        assert torch.equal(some, torch.where(used[:, None], every, before) if left else every)


def stepped(o: Operands, backend: str, rows: list[Tensor], seed: int | None, step: int | Tensor = STEP) -> list[Tensor]:
    """Copies of W_enc, W_dec and their moments after a step."""
    rows = [tensor.clone() for tensor in rows]
    move_rows(operators_of(backend), rows, o, step=step, seed=seed)
    return rows


@pytest.mark.parametrize("case", ["ragged", "several column runs"])
def test_rows_move_by_moments_that_are_not_yet_rounded_and_these_are_rounded_as_the_reference_says(
    case: str, backend: str
) -> None:
    o = fitting(operands(case, torch.float32), backend)
    narrow = rows_to_update(o, narrow=True)
    exact = stepped(o, backend, [tensor.float() for tensor in narrow], None)
    got = stepped(o, backend, narrow, SEED)
    latents, D = torch.arange(len(o.W_enc)), o.W_enc.shape[1]
    for i in range(2):
        assert torch.equal(got[i], exact[i])
        noise = reference.rounding_noise(SEED, STEP, i, latents, D)
        for at, random in ((2 + 2 * i, noise & 0xFFFF), (3 + 2 * i, noise >> 16)):
            assert torch.equal(got[at], reference.round_to_bfloat16(exact[at], random))


def test_the_same_seed_gives_the_same_bits_and_another_seed_or_step_others(backend: str) -> None:
    o = fitting(operands("ragged", torch.float32), backend)
    rows = rows_to_update(o, narrow=True)
    first, again, other = (stepped(o, backend, rows, seed) for seed in (SEED, SEED, SEED + 1))
    later = stepped(o, backend, rows, SEED, STEP + 1)
    assert_equal(first, again)
    assert_equal(first[:2], other[:2])
    for moments in (other[2:], later[2:]):
        for a, b in zip(first[2:], moments, strict=True):
            assert 0.2 < (a != b).float().mean() < 0.8


@pytest.mark.parametrize("narrow", [False, True], ids=["float32 moments", "bfloat16 moments"])
def test_rates_and_steps_on_the_device_give_the_same_bits(narrow: bool, backend: str) -> None:
    o = fitting(operands("ragged", torch.float32), backend)
    numbers, tensors = rows_to_update(o, narrow), rows_to_update(o, narrow)
    last_steps = [torch.zeros(33, dtype=torch.int64) for _ in range(2)]
    b, lr = operators_of(backend), torch.tensor(0.0123, dtype=torch.float64)
    move_rows(b, numbers, o, step=1234, lr=0.0123, last_step=last_steps[0], seed=SEED)
    move_rows(b, tensors, o, step=torch.tensor(1234.0), lr=lr, last_step=last_steps[1], seed=SEED)
    assert_equal([*numbers, last_steps[0]], [*tensors, last_steps[1]])
    assert last_steps[0].max() == 1234


def test_moments_that_are_not_finite_stay_so_and_second_moments_never_fall_below_0(backend: str) -> None:
    o = fitting(operands("ragged", torch.float32), backend)
    rows = rows_to_update(o, narrow=True)
    rows[2][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    rows[3][0, :3] = torch.tensor([torch.nan, torch.inf, 0.0])
    rows[3][1], rows[5][1] = 0.0, 2.0**-133  # the smallest that bfloat16 holds
    _, _, m, v, _, v_dec = stepped(o, backend, rows, SEED)
    assert not m[0, :3].isfinite().any()
    assert not v[0, :2].isfinite().any()
    assert (v[1:] >= 0).all()
    assert (v_dec >= 0).all()


def test_bfloat16_moments_without_a_seed_are_refused(backend: str) -> None:
    o = fitting(operands("ragged", torch.float32), backend)
    with pytest.raises(ValueError, match="seed must be an integer where moments are bfloat16, got None"):
        stepped(o, backend, rows_to_update(o, narrow=True), None)
