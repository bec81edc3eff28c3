from __future__ import annotations

import pytest
import torch
from accuracy import assert_equal
from operands import SEED, STEP, Operands, fitting, move_rows, operands, operators_of, rows_to_update, run, seeded
from torch import Tensor

from sparc_fast.ops import reference
from sparc_fast.ops.row_step import AdamStep, Gradients, Rows


def test_it_equals_gradients_then_projection_then_adam_then_unit_norm(backend: str) -> None:
    o = operands("ragged", torch.float64)
    W_enc, W_dec, *moments = rows_to_update(o)
    grad_W_enc, grad_W_dec, _ = reference.weight_gradients(
        o.x, o.pre_bias, o.values, o.grad_values, o.grad_recons, *o.inverse, o.d_streams
    )
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


def test_columns_of_a_wider_matrix_are_updated_in_place_and_nothing_beside_them(backend: str) -> None:
    o = operands("ragged", torch.float32)
    expected = run("update_rows", o, backend)
    wider = [torch.full((33, 120), 7.0) for _ in range(6)]
    inner = [tensor[:, 5:113] for tensor in wider]
    for window, tensor in zip(inner, rows_to_update(o), strict=True):
        window.copy_(tensor)
    move_rows(operators_of(backend), inner, o)
    for window, outer, result in zip(inner, wider, expected, strict=False):
        assert torch.equal(window, result)
        assert (outer[:, :5] == 7).all()
        assert (outer[:, 113:] == 7).all()


def test_autograd_notices_that_weights_changed(backend: str) -> None:
    o = operands("ragged", torch.float32)
    W_enc, W_dec = o.W_enc.clone(), o.W_dec.clone()
    versions = W_enc._version, W_dec._version
    move_rows(operators_of(backend), [W_enc, W_dec, *(torch.zeros_like(W_enc) for _ in range(4))], o, step=1)
    assert W_enc._version > versions[0]
    assert W_dec._version > versions[1]


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


def test_a_step_on_the_device_rounds_as_a_number_does(backend: str) -> None:
    o = fitting(operands("ragged", torch.float32), backend)
    rows = rows_to_update(o, narrow=True)
    number, tensor = (stepped(o, backend, rows, SEED, step) for step in (1234, torch.tensor(1234.0)))
    assert_equal(number[2:], tensor[2:])


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
