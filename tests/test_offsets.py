"""Rows of weights more than 2^31 numbers apart: every offset is of 64 bits.

The matrices span more than 8 GB of addresses. What nobody writes takes no memory.
"""

from __future__ import annotations

import mmap
import sys
from dataclasses import replace

import pytest
import torch
from accuracy import assert_equal
from operands import OPERATORS, STEP, Operands, fitting, move_rows, operands, operators_of, rows_to_update
from torch import Tensor

from sparc_fast.ops.row_step import DecoderRows

STRIDE = 2**26
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="memory is granted when it is written on Linux"),
    pytest.mark.skipif(torch.get_default_device() != torch.device("cpu"), reason="a GPU grants what it has"),
]


def far(rows: Tensor) -> Tensor:
    """A copy with STRIDE numbers from one row to the next."""
    no_reserve = 0x4000  # MAP_NORESERVE, which Python does not name before 3.13
    size = len(rows) * STRIDE * rows.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    spread = torch.frombuffer(memory, dtype=rows.dtype).view(len(rows), STRIDE)[:, : rows.shape[1]]
    assert spread[-1].storage_offset() >= 2**31
    return spread.copy_(rows)


def make(dtype: torch.dtype, backend: str, per_stream: bool = False) -> Operands:
    o = fitting(operands("ragged", dtype, per_stream), backend)
    o.indices[..., -1] = len(o.W_enc) - 1  # the farthest row is used by all
    return o


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "operator",
    [
        "support_values",
        "support_values_grad_x",
        "sparse_decode",
        "sparse_decode_grad_values",
        "decode_loss",
        "nested_decode_loss",
    ],
)
def test_rows_are_gathered_from_any_offset(backend: str, operator: str, dtype: torch.dtype) -> None:
    o = make(dtype, backend)
    run = OPERATORS[operator]
    found = run(replace(o, W_enc=far(o.W_enc), W_dec=far(o.W_dec)), operators_of(backend))
    assert_equal(found, run(o, operators_of(backend)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latents_at_any_offset_are_selected(backend: str, dtype: torch.dtype) -> None:
    o = make(dtype, backend)
    o.latent_bias[:, -1] = 100
    spread, (reference, here) = far(o.W_enc), (operators_of(name) for name in ("reference", backend))
    want = reference.global_topk(o.x, o.W_enc, o.pre_bias, o.latent_bias, 3)
    assert (want[:, -1] == len(o.W_enc) - 1).all()
    assert torch.equal(here.global_topk(o.x, spread, o.pre_bias, o.latent_bias, 3), want)
    scores = reference.support_scores(o.x, o.W_enc, o.pre_bias, o.latent_bias, want)
    assert torch.equal(here.support_scores(o.x, spread, o.pre_bias, o.latent_bias, want), scores)


@pytest.mark.parametrize("lazy", [False, True])
def test_rows_are_updated_at_any_offset(backend: str, lazy: bool) -> None:
    o = make(torch.float32, backend)

    def updated(rows: list[Tensor]) -> list[Tensor]:
        last_step = torch.full((len(o.W_enc),), STEP - 1) if lazy else None
        return [*rows, *move_rows(operators_of(backend), rows, o, last_step=last_step)]

    assert_equal(updated([far(rows) for rows in rows_to_update(o)]), updated(rows_to_update(o)))


def test_rows_are_replayed_at_any_offset(backend: str) -> None:
    _, W_dec, _, _, *moments = rows_to_update(make(torch.float32, backend))
    history = torch.tensor([(0.01 / t, 0.9, 0.999, 1e-8) for t in range(1, 5)], dtype=torch.float64)
    d_streams = operands("ragged", torch.float32).d_streams

    def replayed(rows: list[Tensor]) -> list[Tensor]:
        last_step = torch.arange(len(W_dec)) % 4
        moved = DecoderRows(rows[0], rows[1:], d_streams, last_step)
        operators_of(backend).replay_rows(moved, torch.arange(len(W_dec)), history)
        return [*rows, last_step]

    spread = replayed([far(rows) for rows in (W_dec, *moments)])
    assert_equal(spread, replayed([W_dec.clone(), *(m.clone() for m in moments)]))
