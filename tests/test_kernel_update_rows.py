"""What the Triton kernels of the backward pass and the optimizer do beyond what every backend must."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from accuracy import assert_equal, check_accuracy, check_replayed_rows
from operands import (
    SEED,
    STEP,
    SUPPORTS,
    Operands,
    kernel_device,
    move_rows,
    operands,
    rows_to_update,
    samples_of,
    seeded,
)
from torch import Tensor

from sparc_fast.ops import reference
from sparc_fast.ops.row_step import DecoderRows

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter
# modules, not the functions of the same names that the package offers
decode_loss, inverse, launching, nested_decode_loss, segment_sums, update, gradients = (
    import_module(f"sparc_fast.kernels.{name}")
    for name in (
        "decode_loss", "invert_indices", "launching", "nested_decode_loss", "segment_sums", "update_rows",
        "weight_gradients",
    )
)  # fmt: skip
KERNELS: Any = import_module("sparc_fast.kernels")
DEVICE = kernel_device()
BETAS, EPS = (0.9, 0.999), 1e-8


def on_device(o: Operands) -> Operands:
    return replace(o.map(lambda tensor: tensor.to(DEVICE)), indices=o.indices.to(DEVICE))


def check(name: str, o: Operands) -> None:
    check_accuracy(name, on_device(o), KERNELS)


def step(rows: list[Tensor], o: Operands, t: int | Tensor = STEP, lr: float | Tensor = 0.01, **more: object) -> tuple:
    """`move_rows` by the kernels."""
    return move_rows(KERNELS, rows, o, inverse=inverse.invert_indices(o.indices, len(rows[0])), lr=lr, step=t, **more)


@pytest.mark.covering(2)
@SUPPORTS
@pytest.mark.parametrize("name", ["weight_gradients", "update_rows"])
@pytest.mark.parametrize("piece", [1, 4, 7])
def test_a_latent_in_many_samples_is_summed_in_pieces(
    name: str, piece: int, per_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_sums, "PIECE", piece)
    check(name, operands(((20, 16), 30, 9, 4), torch.float32, per_stream))


def test_a_latent_in_every_sample_beside_rare_ones_is_summed_in_pieces() -> None:
    o = operands(((20, 16), 300, 40, 3), torch.bfloat16)
    o.indices[:, 0] = 11
    check("update_rows", o)


@SUPPORTS
def test_the_bits_of_a_gradient_do_not_show_how_many_rows_were_in_flight(
    per_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    o = on_device(operands(((20, 16), 30, 9, 4), torch.float32, per_stream))
    samples = samples_of(o, inverse.invert_indices(o.indices, len(o.W_enc)))
    tile, found = segment_sums.tile, []
    for rows, latents in ((1, 1), (4, 1), (2, 4)):
        chosen = {"ROWS": rows, "LATENTS": latents}
        monkeypatch.setattr(gradients, "tile", lambda *args, chosen=chosen, **more: tile(*args, **more) | chosen)
        found.append(KERNELS.weight_gradients(*samples, o.d_streams))
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


def test_products_are_fused_with_sums_whatever_triton_does_unless_told() -> None:
    started: list[dict[str, object]] = []
    kernel = {(2,): lambda *args, **options: started.append(options)}
    launching.launch(kernel, (2,), torch.zeros(1), num_warps=2)
    launching.launch(kernel, (2,), torch.zeros(1), enable_fp_fusion=False)
    assert started == [{"num_warps": 2, "enable_fp_fusion": True}, {"enable_fp_fusion": False}]


def test_rows_farther_apart_than_32_bits_count_are_copied() -> None:
    far = torch.empty_strided((2, 16), (2**31, 1), dtype=torch.float32, device="meta")
    assert launching.dense_rows(far).stride(0) == 16
    near = torch.randn(3, 20)[:, :16]
    assert launching.dense_rows(near).data_ptr() == near.data_ptr()


@SUPPORTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_streams_too_wide_for_registers_go_through_memory(
    dtype: torch.dtype, per_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "WHOLE_ROW", 32)
    for name in ("update_rows", "update_rows, bfloat16 moments", "step_rows", "step_rows, bfloat16 moments"):
        check(name, operands(((100, 7), 5, 20, 3), dtype, per_stream))


def test_rows_in_memory_round_moments_to_the_bits_of_rows_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    o = on_device(operands(((100, 7), 5, 20, 3), torch.float32))
    results = []
    for whole_row in (4096, 32):
        monkeypatch.setattr(update, "WHOLE_ROW", whole_row)
        results.append([t.to(DEVICE) for t in rows_to_update(o, narrow=True)])
        step(results[-1], o, seed=SEED)
    for registers, memory in zip(*(rows[2:] for rows in results), strict=True):
        assert (registers != memory).float().mean() < 0.01  # where a sum in another order crosses a rounding


def test_launch_choices_change_no_result_but_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("encoder_choice", "decoder_choice"):
        chosen = {"LATENTS": 1, "ROWS": 2, "BLOCK_D": 64, "num_warps": 2}
        monkeypatch.setattr(update, name, lambda d_streams, dtype, chosen=chosen: chosen)
    monkeypatch.setattr(update, "MOST_BLOCKS", 3)
    check("update_rows", operands(((64, 48), 6, 10, 3), torch.float32))


@pytest.mark.covering(2)
@pytest.mark.parametrize("whole_row", [4096, 16], ids=["rows in registers", "rows in memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow", [False, True], ids=["float32 moments", "bfloat16 moments"])
def test_replayed_rows_equal_rows_that_were_never_left_behind(
    narrow: bool, dtype: torch.dtype, whole_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "WHOLE_ROW", whole_row)
    with DEVICE:
        check_replayed_rows(KERNELS, (33, 20), 9, 2, dtype, [0.1, 0.03, 0.01, 0.3], narrow=narrow)


@pytest.mark.parametrize("whole_row", [4096, 16], ids=["rows in registers", "rows in memory"])
def test_the_norm_of_a_row_does_not_depend_on_the_order_of_its_columns(
    whole_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replayed(rows: list[Tensor]) -> list[Tensor]:
        rows = [tensor.clone() for tensor in rows]
        last_step = torch.zeros(50, dtype=torch.int64, device=DEVICE)
        moved = DecoderRows(rows[0], rows[1:], (90,), last_step)
        KERNELS.replay_rows(moved, torch.arange(50, device=DEVICE), history)
        return rows

    _, W_dec, _, _, m, v = (t.to(DEVICE) for t in rows_to_update(operands(((90,), 1, 50, 2), torch.float32)))
    history = torch.tensor([(0.1, *BETAS, EPS)] * 3, dtype=torch.float64, device=DEVICE)
    plain = replayed([W_dec, m, v])
    order = torch.randperm(90, generator=seeded(0)).to(DEVICE)
    monkeypatch.setattr(update, "WHOLE_ROW", whole_row)
    assert_equal(replayed([t[:, order].contiguous() for t in (W_dec, m, v)]), [t[:, order] for t in plain])
    torch.testing.assert_close(plain[0].double().norm(dim=1), torch.ones(50).double().to(DEVICE), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_latents_outside_the_dictionary_are_in_no_segment(dtype: torch.dtype) -> None:
    indices = torch.tensor([[0, 33, 2], [-1, 2, 32], [2**31 - 1, -(2**31), 0]], dtype=dtype, device=DEVICE)
    if dtype == torch.int64:
        indices[0, 1] = 2**32 + 5  # would be 5 in 32 bits
    offsets, entries = inverse.invert_indices(indices, 33)
    flat = indices.flatten()
    for l in range(33):
        found = entries[offsets[l] : offsets[l + 1]]
        assert torch.equal(found, (flat == l).nonzero()[:, 0])
    silence = torch.arange(33, device=DEVICE)
    KERNELS.count_silence(silence, torch.ones(3, 1, 3, device=DEVICE), indices)
    assert (silence == 0).nonzero()[:, 0].tolist() == [0, 2, 32]


def test_a_latent_no_sample_has_gets_no_gradient() -> None:
    o = on_device(operands("ragged", torch.float32))
    samples = samples_of(o, inverse.invert_indices(o.indices, 33))
    of_nobody = ~torch.isin(torch.arange(33, device=DEVICE), o.indices)
    found = KERNELS.weight_gradients(*samples, o.d_streams)
    assert not any(gradient[of_nobody].any() for gradient in found[:2])


def test_operands_may_be_of_different_types() -> None:
    o = on_device(operands("ragged", torch.float32))
    rows, expected = ([t.to(DEVICE) for t in rows_to_update(o)] for _ in range(2))
    mixed = replace(o, x=o.x.bfloat16(), grad_values=o.grad_values.half(), grad_recons=o.grad_recons.bfloat16())
    grads = step(rows, mixed)
    exact = move_rows(reference, expected, replace(mixed, grad_recons=mixed.grad_recons.float()))
    torch.testing.assert_close([*rows, *grads], [*expected, *exact], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("whole_row", [4096, 16], ids=["rows in registers", "rows in memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_nan_makes_its_row_of_a_stream_nan_and_no_other(
    dtype: torch.dtype, whole_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "WHOLE_ROW", whole_row)
    o = on_device(operands(((33, 20), 3, 14, 2), dtype))
    ours, expected = ([t.to(DEVICE) for t in rows_to_update(o)] for _ in range(2))
    for rows in (ours, expected):
        rows[1][5, 7] = torch.nan
    step(ours, o)
    move_rows(reference, expected, o)
    nan = torch.zeros(14, 53, dtype=torch.bool, device=DEVICE)
    nan[5, :33] = True
    assert torch.equal(expected[1].isnan(), nan)
    assert torch.equal(ours[1].isnan(), nan)

    last_step = torch.zeros(14, dtype=torch.int64, device=DEVICE)
    history = torch.tensor([(0.1, *BETAS, EPS)] * 2, dtype=torch.float64, device=DEVICE)
    rows = [t.to(DEVICE) for t in rows_to_update(o)]
    rows[1][5, 7] = torch.nan
    left_behind = DecoderRows(rows[1], rows[4:], o.d_streams, last_step)
    KERNELS.replay_rows(left_behind, torch.arange(14, device=DEVICE), history)
    assert torch.equal(rows[1].isnan(), nan)


def test_what_a_captured_graph_reads_is_kept_for_good() -> None:
    device = torch.device(DEVICE)
    made: dict[str, Callable[[int], Tensor]] = {
        "columns": lambda i: launching.column_blocks((16, 16 + i), 16, device),
        "betas": lambda i: update.settings_on(0.5 + i / 10000, 0.999, 1e-8, device),
        "weights": lambda i: decode_loss.weights_on((1.0, float(i)), device),
        "sizes": lambda i: nested_decode_loss._sizes((1, 2 + i), device),
    }
    for name, make in made.items():
        first = [make(i) for i in range(1000)]
        assert all(make(i) is tensor for i, tensor in enumerate(first)), name
