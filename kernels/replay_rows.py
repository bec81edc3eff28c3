"""Decoder rows that `update_rows` left behind are taken through the steps they missed, in place.

A step without an entry has gradient 0: the moments decay, the row still moves, and is brought back to unit norm. The
step is made of the same functions as in `update_rows`, whose bits depend on the row alone; several steps are made
while a row is in registers. Streams wider than WHOLE_ROW go through memory in every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.adam import Constants, adam
from sparc_fast.kernels.launching import launch
from sparc_fast.kernels.segment_sums import Columns, column_block
from sparc_fast.kernels.update_rows import (
    InPlace,
    decoder_choice,
    grain,
    rounded_moments,
    scale_wide_rows,
    squares_of,
    store_copy,
    unit_norm,
    wide_norm,
)
from sparc_fast.ops.reference import rounding_seed
from sparc_fast.ops.row_step import DecoderRows


def choice(d_streams: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
    # estimated, not measured: as in update_rows, without rows of a gradient in flight
    return {name: value for name, value in decoder_choice(d_streams, dtype).items() if name != "ROWS"}


def replay_rows(rows: DecoderRows, latents: Tensor, history: Tensor, seed: int | None = None) -> None:
    W_dec, moments, d_streams, last_step, copy = rows
    width, R, L, T = max(d_streams), len(latents), len(W_dec), len(history)
    first_step = torch.ones((), dtype=torch.float64, device=W_dec.device)
    rounding = rounding_seed(W_dec, moments, seed)
    constants, noise, _ = Constants.of(history[:, 0], history[:, 1:], first_step, T, W_dec.dtype, rounding).write()
    chosen = choice(d_streams, W_dec.dtype)
    streams = Columns.of(d_streams, width, W_dec.device)
    grid = (triton.cdiv(R, chosen["LATENTS"]), len(d_streams))
    kernel = _replay_rows_kernel if chosen["BLOCK_D"] >= width else _replay_wide_rows_kernel
    latents = latents.contiguous()
    with InPlace(W_dec, *moments, copy) as moved:
        launch(
            kernel, grid, *moved, constants, noise, latents, last_step, streams.table, R, L, T,
            GRAIN=grain(width), ALIGN=streams.ALIGN, **chosen,
        )  # fmt: skip
    # not by the kernel above: its programs for other streams may yet read it
    launch(_note_kernel, (triton.cdiv(R, 256),), last_step, latents, R, L, T, BLOCK=256, num_warps=4)
    torch.autograd.graph.increment_version([last_step])


@triton.jit
def missed_steps(latents, last_step, R, L, T, LATENTS: tl.constexpr):
    """Latents of this program and how many steps each has made; T where there is no such latent."""
    r = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    l = tl.load(latents + r, mask=r < R, other=-1)
    exists = (l >= 0) & (l < L)
    made = tl.load(last_step + l, mask=exists, other=T)
    return l, tl.maximum(tl.minimum(made, T), 0).to(tl.int32)


@triton.jit(do_not_specialize=["R", "T"])
def _replay_rows_kernel(
    W, stride_W, M, stride_M, V, stride_V, copy, stride_copy, constants, noise, latents, last_step, table,
    R, L, T, GRAIN: tl.constexpr, ALIGN: tl.constexpr, LATENTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, last, _ = column_block(table, tl.program_id(1), ALIGN)
    columns = first + tl.arange(0, BLOCK_D)
    l, made = missed_steps(latents, last_step, R, L, T, LATENTS)
    mask = (made < T)[:, None] & (columns < last)[None, :]
    at = l.to(tl.int64)[:, None]
    w = tl.load(W + at * stride_W + columns[None, :], mask=mask, other=0)
    m = tl.load(M + at * stride_M + columns[None, :], mask=mask, other=0).to(w.dtype)
    v = tl.load(V + at * stride_V + columns[None, :], mask=mask, other=0).to(w.dtype)
    for t in range(tl.min(made, 0), T):
        missed = mask & (made <= t)[:, None]
        moved, m_moved, v_moved = adam(w, tl.zeros_like(w), m, v, constants + t * 7)
        m_moved, v_moved = rounded_moments(m_moved, v_moved, noise, t, 1, l, columns)
        moved = unit_norm(tl.where(missed, moved, 0.0), GRAIN)
        w, m, v = tl.where(missed, moved, w), tl.where(missed, m_moved, m), tl.where(missed, v_moved, v)
    tl.store(W + at * stride_W + columns[None, :], w, mask=mask)
    tl.store(M + at * stride_M + columns[None, :], m, mask=mask)
    tl.store(V + at * stride_V + columns[None, :], v, mask=mask)
    store_copy(copy, at * stride_copy + columns[None, :], w, mask)


@triton.jit(do_not_specialize=["R", "T"])
def _replay_wide_rows_kernel(
    W, stride_W, M, stride_M, V, stride_V, copy, stride_copy, constants, noise, latents, last_step, table,
    R, L, T, GRAIN: tl.constexpr, ALIGN: tl.constexpr, LATENTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, last, _ = column_block(table, tl.program_id(1), ALIGN)
    l, made = missed_steps(latents, last_step, R, L, T, LATENTS)
    at = l.to(tl.int64)[:, None]
    for t in range(tl.min(made, 0), T):
        missed = made <= t
        largest = tl.zeros([LATENTS], tl.float64)
        for column in range(first, last, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            mask = missed[:, None] & (columns < last)[None, :]
            w = tl.load(W + at * stride_W + columns[None, :], mask=mask, other=0)
            m = tl.load(M + at * stride_M + columns[None, :], mask=mask, other=0)
            v = tl.load(V + at * stride_V + columns[None, :], mask=mask, other=0)
            w, m, v = adam(w, tl.zeros_like(w), m, v, constants + t * 7)
            m, v = rounded_moments(m, v, noise, t, 1, l, columns)
            largest = tl.maximum(largest, tl.max(squares_of(tl.where(mask, w, 0.0)), 1))
            tl.store(W + at * stride_W + columns[None, :], w, mask=mask)
            tl.store(M + at * stride_M + columns[None, :], m, mask=mask)
            tl.store(V + at * stride_V + columns[None, :], v, mask=mask)
        tl.debug_barrier()  # what one thread stored, another loads
        factor = wide_norm(W, at, stride_W, largest, missed, first, last, GRAIN, BLOCK_D)
        tl.debug_barrier()
        scale_wide_rows(W, at, stride_W, copy, stride_copy, factor, missed, first, last, BLOCK_D)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["R", "T"])
def _note_kernel(last_step, latents, R, L, T, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    l = tl.load(latents + r, mask=r < R, other=-1)
    tl.store(last_step + l, tl.zeros_like(l) + T, mask=(l >= 0) & (l < L))
