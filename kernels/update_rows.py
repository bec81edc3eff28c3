"""One training step of every latent's rows, in place; a gradient never reaches memory.

The encoder's kernel sums the gradient of a latent's row (`segment_sums`) while the row and its moments are on their
way, and moves them by Adam. Each program does a block of latents, of which it also sums
    grad_pre_bias[d] = -sum_l grad_latent_bias[s(d), l] W_enc[l, d]
for the blocks to be added in order: blocks depend on L alone, and there are at most 4096, so that scratch is
[4096, D] sums. The decoder's kernel has a latent's whole row of a stream in registers: g -= <g, w> w / <w, w>, Adam,
w /= ||w||. Streams wider than WHOLE_ROW go through memory instead, a block of columns at a time, and sum their
gradient twice.

The decoder's first programs add the blocks' sums, beside those that wait for memory.

`step_rows` is the same kernels, which read a gradient where there are no values to sum it from.

Adam and the norm are written so that a row's bits depend on the row alone, not on the kernel that computes it
(`replay_rows` takes the same step in another one): `adam` is, and ||w||^2 is a float64 sum of squares cut to a common
grain, which no order can change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.adam import INTERPRETED, Constants, absorb, adam, mix, scalar, settings_on
from sparc_fast.kernels.gather import sum_rows, sum_type
from sparc_fast.kernels.launching import dense_rows, launch, next_power_of_2
from sparc_fast.kernels.segment_sums import (
    NO_PIECES,
    Columns,
    Entries,
    Pieces,
    add_bias_pieces,
    add_pieces,
    column_block,
    pieces_of,
    segment,
    tile,
    weighted_rows,
    writers,
)
from sparc_fast.ops.layout import wide_type
from sparc_fast.ops.reference import rounding_seed
from sparc_fast.ops.row_step import AdamStep, Gradients, Rows, Samples

WHOLE_ROW = 4096  # columns of a stream up to which the decoder's row stays in registers
MOST_BLOCKS = 4096  # of latents


def encoder_choice(d_streams: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
    # estimated, not measured: 4 rows of 2 KB in flight beside w, m and v, in 4 programs a multiprocessor
    return tile(d_streams, dtype, widest=1024, rows=4)


def decoder_choice(d_streams: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
    # estimated, not measured: an entry has a row of grad_recons for each source
    widest = next_power_of_2(WHOLE_ROW) if max(d_streams) <= WHOLE_ROW else min(WHOLE_ROW, 1024)
    return tile(d_streams, dtype, widest, rows=4 if len(d_streams) == 1 else 2)


def blocks_sum_choice(num_warps: int) -> dict[str, int]:
    # estimated, not measured: 32 numbers a thread, in lines of 64 bytes
    return {"SUMMED_ROWS": 64 * num_warps, "SUMMED_COLUMNS": 16}


def update_rows(rows: Rows, samples: Samples, adam: AdamStep) -> tuple[Tensor, Tensor]:
    x, grad_recons = dense_rows(samples.x), dense_rows(samples.grad_recons.detach().flatten(0, 1))
    grad_values = None if rows.W_enc is None else samples.grad_values
    constants, step = _constants(rows, adam)
    moves_decoder = rows.W_dec is not None
    batch = Entries.of(samples.values, grad_values, samples.offsets, samples.entries, moves_decoder, constants)
    grad_latent_bias = torch.empty(len(rows.d_streams), batch.n_latents, dtype=wide_type(x.dtype), device=x.device)
    pre_bias = samples.pre_bias.detach().contiguous()
    of_encoder, of_decoder = pieces_of(
        batch,
        rows.d_streams,
        None if rows.W_enc is None else x,
        pre_bias,
        grad_recons if moves_decoder else None,
    )
    parts = None
    if rows.W_enc is not None:
        parts = _update_encoder(rows, constants, grad_latent_bias, x, pre_bias, batch, of_encoder)
    if moves_decoder:
        grad_pre_bias = _update_decoder(rows, constants, step, grad_recons, batch, of_decoder, parts)
    elif parts is not None:
        grad_pre_bias = parts.sum(0)
    return grad_latent_bias, grad_pre_bias


def step_rows(rows: Rows, gradients: Gradients, adam: AdamStep) -> None:
    constants, step = _constants(rows, adam)
    constants.write()
    used = gradients.used.contiguous().view(torch.uint8)
    if rows.W_enc is not None:
        _update_encoder(rows, constants, None, dense_rows(gradients.W_enc), None, used)
    if rows.W_dec is not None:
        _update_decoder(rows, constants, step, dense_rows(gradients.W_dec), used)


class InPlace:
    """Rows of a matrix, of its two moments and of its copy, each followed by its stride, as kernels take them.

    A tensor whose columns lie apart is changed through a dense one, and copied back on leaving.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = [None if t is None else t.detach() for t in tensors]
        self.dense = [None if t is None else dense_rows(t) for t in self.tensors]

    def __enter__(self) -> list[Any]:
        return [arg for t in self.dense for arg in (t, 0 if t is None else t.stride(0))]

    def __exit__(self, *_: object) -> None:
        changed = [t for t in self.tensors if t is not None]
        for tensor, dense in zip(self.tensors, self.dense, strict=True):
            if tensor is not None and dense is not None and dense.data_ptr() != tensor.data_ptr():
                tensor.copy_(dense)
        torch.autograd.graph.increment_version(changed)


def _constants(rows: Rows, adam: AdamStep) -> tuple[Constants, Tensor]:
    """Of one step, and the number of the step."""
    W, moments = rows.weights[0], rows.their_moments
    device = W.device
    step = scalar(adam.step, torch.float64, device)
    constants = Constants.of(
        scalar(adam.lr, torch.float64, device), settings_on(*adam.betas, adam.eps, device), step, 1,
        W.dtype, rounding_seed(W, moments, adam.seed),
    )  # fmt: skip
    return constants, step


def _update_encoder(
    rows: Rows, constants: Constants, grad_latent_bias: Tensor | None, source: Tensor, pre_bias: Tensor | None,
    batch: Entries | Tensor, pieces: Pieces = NO_PIECES,
) -> Tensor:  # fmt: skip
    """Returns rows of D that add up to grad_pre_bias; none where gradients are given, which are then the source, and
    the batch says which latents are used."""
    assert rows.W_enc is not None
    L, D = rows.W_enc.shape
    chosen = encoder_choice(rows.d_streams, source.dtype)
    columns = Columns.of(rows.d_streams, chosen["BLOCK_D"], source.device)
    sums: tuple[Tensor | int | None, ...] = None, None, None, 0, None, None
    S, piece, summed = 1, 1, isinstance(batch, Entries)
    if isinstance(batch, Entries):
        assert batch.encoder is not None
        sums = batch.offsets, *batch.encoder, batch.length, *pieces
        S, piece = len(batch.encoder.coefficients), batch.PIECE
    tiles = triton.cdiv(L, chosen["LATENTS"])  # of latents
    tiles_per_block = max(triton.cdiv(tiles, MOST_BLOCKS), min(8, triton.cdiv(tiles, 256)))
    blocks = triton.cdiv(tiles, tiles_per_block)
    dtype = wide_type(source.dtype)
    pre_bias_parts = torch.empty(blocks if summed else 0, D, dtype=dtype, device=source.device)
    copy, _ = rows.copies or (None, None)
    with InPlace(rows.W_enc, *rows.moments[:2], copy) as moved:
        launch(
            _update_encoder_kernel, (blocks, len(columns.table)), *moved, *constants[:2], grad_latent_bias,
            pre_bias_parts if summed else None, tiles_per_block, source, source.stride(0), pre_bias, *sums,
            columns.table, L, D, S=S, PIECE=piece, SUM=sum_type(source), ALIGN=columns.ALIGN, **chosen,
        )  # fmt: skip
    return pre_bias_parts


def _update_decoder(
    rows: Rows, constants: Constants, step: Tensor, source: Tensor, batch: Entries | Tensor, pieces: Pieces = NO_PIECES,
    parts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The source is grad_recons as rows [N * S, D], or the gradient. Returns the sum of the rows of `parts`."""
    assert rows.W_dec is not None
    width, (L, D) = max(rows.d_streams), rows.W_dec.shape
    chosen = decoder_choice(rows.d_streams, source.dtype)
    streams = Columns.of(rows.d_streams, width, source.device)
    sums: tuple[Any, ...] = batch, None, None, 0, None
    sources, piece = 1, 1
    if isinstance(batch, Entries):
        assert batch.decoder is not None
        sums = batch.offsets, *batch.decoder, batch.length, pieces.rows
        sources, piece = len(batch.decoder.coefficients), batch.PIECE
    whole = chosen["BLOCK_D"] >= width
    _, copy = rows.copies or (None, None)
    of_sum, summing, total = blocks_sum_choice(chosen["num_warps"]), 0, source.new_empty(0)
    if parts is not None:
        total = parts.new_empty(D)
        summing = triton.cdiv(triton.cdiv(D, of_sum["SUMMED_COLUMNS"]), len(rows.d_streams))
    with InPlace(rows.W_dec, *rows.moments[2:], copy) as moved:
        launch(
            _update_decoder_kernel if whole else _update_wide_decoder_kernel,
            (summing + triton.cdiv(L, chosen["LATENTS"]), len(rows.d_streams)), *moved, *constants[:2], step,
            rows.last_step, source, source.stride(0), *sums, streams.table, L, D, total, parts,
            0 if parts is None else len(parts), summing, SOURCES=sources, PIECE=piece, SUM=sum_type(source),
            GRAIN=grain(width), ALIGN=streams.ALIGN, **of_sum, **chosen,
        )  # fmt: skip
    if rows.last_step is not None:
        torch.autograd.graph.increment_version([rows.last_step])
    return total


def grain(width: int) -> float:
    """What the largest square of a row is multiplied by to give the number whose last place all squares are cut to.

    Twice a power of two that is at least `width`: the sum of the cut squares then fits a float64.
    """
    return 2.0 * next_power_of_2(width)


@triton.jit
def squares_of(w):
    return w.to(tl.float64) * w.to(tl.float64)


@triton.jit
def sum_of_squares(squares, grain, TYPE: tl.constexpr):
    """float64 [LATENTS], the same whatever the order of the sum, for squares of a TYPE at most grain / width.

    Every square is cut to a multiple of the last place of `grain`; sums of those are exact. What is cut off is far
    below float32, and added for float64.
    """
    cut = (squares + grain[:, None]) - grain[:, None]
    total = tl.sum(cut, 1)
    if TYPE.primitive_bitwidth == 64:
        total += tl.sum(squares - cut, 1)
    return total


@triton.jit
def smallest(TYPE: tl.constexpr):
    """The smallest normal number: divides a row of zeros without harm."""
    return 2.2250738585072014e-308 if TYPE.primitive_bitwidth == 64 else 1.1754943508222875e-38


@triton.jit
def not_zero(a, TYPE: tl.constexpr):
    """a >= 0, at least `smallest`; NaN stays, which tl.maximum drops on a GPU."""
    return tl.where(a < smallest(TYPE), smallest(TYPE), a)


@triton.jit
def inverse_norm(total, TYPE: tl.constexpr):
    return (1 / not_zero(tl.sqrt(total), TYPE)).to(TYPE)


@triton.jit
def largest_size(w):
    """[LATENTS], by bits: as integers sizes are in the same order, NaN above all, and a warp has their maximum at
    once."""
    bits = tl.abs(w).to(tl.int64 if w.dtype == tl.float64 else tl.int32, bitcast=True)
    return tl.max(bits, 1).to(w.dtype, bitcast=True)


@triton.jit
def unit_norm(w, GRAIN: tl.constexpr):
    """Whole rows w [LATENTS, BLOCK_D] / ||w||."""
    total = sum_of_squares(squares_of(w), squares_of(largest_size(w)) * GRAIN, w.dtype)
    return w * inverse_norm(total, w.dtype)[:, None]


@triton.jit
def to_bfloat16(w):
    """Rounded to nearest even, where Triton's interpreter cuts off."""
    if not INTERPRETED:
        return w.to(tl.float32).to(tl.bfloat16)
    bits = w.to(tl.float32).to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(w == w, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def store_copy(copy, at, w, mask):
    if copy is not None:
        if copy.dtype.element_ty == tl.bfloat16:
            tl.store(copy + at, to_bfloat16(w), mask=mask)
        else:
            tl.store(copy + at, w.to(copy.dtype.element_ty), mask=mask)


@triton.jit
def rounded(x, random):
    """float32 x as one of the two bfloat16 beside it, for `random` in 0 ... 65535 (`reference.round_to_bfloat16`)."""
    bits = (x.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def rounded_moments(m, v, noise, t, MATRIX: tl.constexpr, l, columns):
    """The moments as they are kept: where there is noise, step t of it, rounded as `reference.rounding_noise` says."""
    if noise is not None:
        nothing = tl.zeros_like(l).to(tl.uint32)
        a = nothing + tl.load(noise + 2 * t).to(tl.uint32, bitcast=True)
        b = nothing + tl.load(noise + 2 * t + 1).to(tl.uint32, bitcast=True)
        a, b = absorb(a, b, (2 * l + MATRIX).to(tl.uint32))
        bits = mix(a[:, None] + columns.to(tl.uint32)[None, :], b[:, None])
        m, v = rounded(m, bits & 0xFFFF), rounded(v, bits >> 16)
    return m, v


@triton.jit(do_not_specialize=["length"])
def _update_encoder_kernel(
    W, stride_W, M, stride_M, V, stride_V, copy, stride_copy, constants, noise, grad_latent_bias,
    pre_bias_parts, tiles_per_block, source, stride_source, pre_bias, offsets, rows, coefficients, length, piece_rows,
    piece_bias, table, L, D,
    S: tl.constexpr, PIECE: tl.constexpr, SUM: tl.constexpr, ALIGN: tl.constexpr, LATENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, last, stream = column_block(table, tl.program_id(1), ALIGN)
    columns = first + tl.arange(0, BLOCK_D)
    inside = columns < last
    if rows is not None:
        centre = tl.load(pre_bias + columns, mask=inside, other=0).to(SUM)
        coefficients += stream.to(tl.int64) * length
        writes = writers(table, stream, L)
        part = tl.zeros([LATENTS, BLOCK_D], SUM)
    block = tl.program_id(0)
    for i in range(0, tiles_per_block):
        l = (block * tiles_per_block + i) * LATENTS + tl.arange(0, LATENTS)
        mask = (l < L)[:, None] & inside[None, :]
        at = l.to(tl.int64)[:, None]
        # asked for before the sums are, so that they arrive meanwhile; read once, they need not stay in the cache
        w = tl.load(W + at * stride_W + columns[None, :], mask=mask, other=0, eviction_policy="evict_first")
        m = tl.load(M + at * stride_M + columns[None, :], mask=mask, other=0, eviction_policy="evict_first")
        v = tl.load(V + at * stride_V + columns[None, :], mask=mask, other=0, eviction_policy="evict_first")
        if rows is None:
            gradient = tl.load(source + at * stride_source + columns[None, :], mask=mask, other=0)
        else:
            begin, end = segment(offsets, l, L)
            gradient, bias = weighted_rows(
                begin, tl.minimum(begin + PIECE, end), columns, inside, source, stride_source, centre, rows,
                coefficients, length, 1, ROWS, SUM,
            )  # fmt: skip
            gradient = add_pieces(gradient, begin, end, piece_rows, D, columns, inside, PIECE)
            bias = add_bias_pieces(bias, begin, end, piece_bias, stream, S, PIECE)
            tl.store(grad_latent_bias + stream.to(tl.int64) * L + l, bias, mask=l < writes)
            part -= bias[:, None] * w.to(SUM)
        w, m, v = adam(w, gradient.to(w.dtype), m, v, constants)
        m, v = rounded_moments(m, v, noise, 0, 0, l, columns)
        tl.store(W + at * stride_W + columns[None, :], w, mask=mask, eviction_policy="evict_first")
        tl.store(M + at * stride_M + columns[None, :], m, mask=mask, eviction_policy="evict_first")
        tl.store(V + at * stride_V + columns[None, :], v, mask=mask, eviction_policy="evict_first")
        store_copy(copy, at * stride_copy + columns[None, :], w, mask)
    if rows is not None:
        tl.store(pre_bias_parts + block.to(tl.int64) * D + columns, tl.sum(part, 0), mask=inside)


@triton.jit
def entries_of(offsets, l, L, rows):
    """`segment`. Without terms to sum, offsets are 1 for latents that are used: one entry, which nobody reads."""
    if rows is None:
        begin, end = tl.zeros_like(l).to(tl.int64), tl.load(offsets + l, mask=l < L, other=0).to(tl.int64)
    else:
        begin, end = segment(offsets, l, L)
    return begin, end


@triton.jit
def decoder_gradient(
    l, begin, end, columns, inside, source, stride_source, rows, coefficients, length, piece_rows, L, D,
    SOURCES: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """[LATENTS, BLOCK_D], summed over entries begin : end, or read."""
    if rows is None:
        at = source + l.to(tl.int64)[:, None] * stride_source + columns[None, :]
        gradient = tl.load(at, mask=(l < L)[:, None] & inside[None, :], other=0)
    else:
        gradient, _ = weighted_rows(
            begin, tl.minimum(begin + PIECE, end), columns, inside, source, stride_source, None, rows, coefficients,
            length, SOURCES, ROWS, SUM,
        )  # fmt: skip
        gradient = add_pieces(gradient, begin, end, piece_rows, D, columns, inside, PIECE)
    return gradient


@triton.jit
def latents_to_update(l, begin, end, L, first, step, last_step):
    """Which latents' decoder rows take this step; notes it in last_step, if there is one."""
    updated = l < L
    if last_step is not None:
        updated &= begin < end
        # the program of the first stream writes for all
        noted = updated & (first + tl.zeros_like(l) == 0)
        tl.store(last_step + l, tl.load(step).to(tl.int64), mask=noted)
    return updated


@triton.jit
def added(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["length", "many", "summing"])
def _update_decoder_kernel(
    W, stride_W, M, stride_M, V, stride_V, copy, stride_copy, constants, noise, step, last_step, source,
    stride_source, offsets, rows, coefficients, length, piece_rows, table, L, D, total, parts, many, summing,
    SOURCES: tl.constexpr, PIECE: tl.constexpr, SUM: tl.constexpr, GRAIN: tl.constexpr, ALIGN: tl.constexpr,
    SUMMED_ROWS: tl.constexpr, SUMMED_COLUMNS: tl.constexpr, LATENTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    if parts is not None and tl.program_id(0) < summing:
        block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        sum_rows(total, parts, many, D, block, SUMMED_ROWS, SUMMED_COLUMNS)
        return
    first, last, _ = column_block(table, tl.program_id(1), ALIGN)
    columns = first + tl.arange(0, BLOCK_D)
    inside = columns < last
    l = (tl.program_id(0) - summing) * LATENTS + tl.arange(0, LATENTS)
    begin, end = entries_of(offsets, l, L, rows)
    mask = latents_to_update(l, begin, end, L, first, step, last_step)[:, None] & inside[None, :]
    at = l.to(tl.int64)[:, None]
    w = tl.load(W + at * stride_W + columns[None, :], mask=mask, other=0, eviction_policy="evict_first")
    m = tl.load(M + at * stride_M + columns[None, :], mask=mask, other=0, eviction_policy="evict_first")
    v = tl.load(V + at * stride_V + columns[None, :], mask=mask, other=0, eviction_policy="evict_first")
    gradient = decoder_gradient(
        l, begin, end, columns, inside, source, stride_source, rows, coefficients, length, piece_rows, L, D,
        SOURCES, PIECE, ROWS, SUM,
    ).to(w.dtype)  # fmt: skip
    gw, ww = tl.reduce((gradient * w, w * w), 1, added)
    gradient -= (gw / not_zero(ww, w.dtype))[:, None] * w
    w, m, v = adam(w, gradient, m, v, constants)
    m, v = rounded_moments(m, v, noise, 0, 1, l, columns)
    w = unit_norm(tl.where(mask, w, 0.0), GRAIN)
    tl.store(W + at * stride_W + columns[None, :], w, mask=mask, eviction_policy="evict_first")
    tl.store(M + at * stride_M + columns[None, :], m, mask=mask, eviction_policy="evict_first")
    tl.store(V + at * stride_V + columns[None, :], v, mask=mask, eviction_policy="evict_first")
    store_copy(copy, at * stride_copy + columns[None, :], w, mask)


@triton.jit
def wide_norm(W, at, stride_W, largest, updated, first, last, GRAIN: tl.constexpr, BLOCK_D: tl.constexpr):
    """inverse_norm of rows in memory, of which `largest` is the largest square."""
    total = tl.zeros_like(largest)
    for column in range(first, last, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        mask = updated[:, None] & (columns < last)[None, :]
        w = tl.load(W + at * stride_W + columns[None, :], mask=mask, other=0)
        total += sum_of_squares(squares_of(w), largest * GRAIN, W.dtype.element_ty)
    return inverse_norm(total, W.dtype.element_ty)


@triton.jit
def scale_wide_rows(W, at, stride_W, copy, stride_copy, factor, updated, first, last, BLOCK_D: tl.constexpr):
    for column in range(first, last, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        mask = updated[:, None] & (columns < last)[None, :]
        w = tl.load(W + at * stride_W + columns[None, :], mask=mask, other=0) * factor[:, None]
        tl.store(W + at * stride_W + columns[None, :], w, mask=mask)
        store_copy(copy, at * stride_copy + columns[None, :], w, mask)


@triton.jit(do_not_specialize=["length", "many", "summing"])
def _update_wide_decoder_kernel(
    W, stride_W, M, stride_M, V, stride_V, copy, stride_copy, constants, noise, step, last_step, source,
    stride_source, offsets, rows, coefficients, length, piece_rows, table, L, D, total, parts, many, summing,
    SOURCES: tl.constexpr, PIECE: tl.constexpr, SUM: tl.constexpr, GRAIN: tl.constexpr, ALIGN: tl.constexpr,
    SUMMED_ROWS: tl.constexpr, SUMMED_COLUMNS: tl.constexpr, LATENTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    if parts is not None and tl.program_id(0) < summing:
        block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        sum_rows(total, parts, many, D, block, SUMMED_ROWS, SUMMED_COLUMNS)
        return
    first, last, _ = column_block(table, tl.program_id(1), ALIGN)
    l = (tl.program_id(0) - summing) * LATENTS + tl.arange(0, LATENTS)
    begin, end = entries_of(offsets, l, L, rows)
    updated = latents_to_update(l, begin, end, L, first, step, last_step)
    at = l.to(tl.int64)[:, None]
    gw = tl.zeros([LATENTS], W.dtype.element_ty)
    ww = tl.zeros([LATENTS], W.dtype.element_ty)
    for column in range(first, last, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside = columns < last
        mask = updated[:, None] & inside[None, :]
        w = tl.load(W + at * stride_W + columns[None, :], mask=mask, other=0)
        gradient = decoder_gradient(
            l, begin, end, columns, inside, source, stride_source, rows, coefficients, length, piece_rows, L, D,
            SOURCES, PIECE, ROWS, SUM,
        ).to(w.dtype)  # fmt: skip
        gw += tl.sum(gradient * w, 1)
        ww += tl.sum(w * w, 1)
    along = gw / not_zero(ww, W.dtype.element_ty)
    largest = tl.zeros([LATENTS], tl.float64)
    for column in range(first, last, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside = columns < last
        mask = updated[:, None] & inside[None, :]
        w = tl.load(W + at * stride_W + columns[None, :], mask=mask, other=0)
        m = tl.load(M + at * stride_M + columns[None, :], mask=mask, other=0)
        v = tl.load(V + at * stride_V + columns[None, :], mask=mask, other=0)
        gradient = decoder_gradient(
            l, begin, end, columns, inside, source, stride_source, rows, coefficients, length, piece_rows, L, D,
            SOURCES, PIECE, ROWS, SUM,
        ).to(w.dtype)  # fmt: skip
        gradient -= along[:, None] * w
        w, m, v = adam(w, gradient, m, v, constants)
        m, v = rounded_moments(m, v, noise, 0, 1, l, columns)
        largest = tl.maximum(largest, tl.max(squares_of(tl.where(mask, w, 0.0)), 1))
        tl.store(W + at * stride_W + columns[None, :], w, mask=mask)
        tl.store(M + at * stride_M + columns[None, :], m, mask=mask)
        tl.store(V + at * stride_V + columns[None, :], v, mask=mask)
    tl.debug_barrier()  # what one thread stored, another loads
    factor = wide_norm(W, at, stride_W, largest, updated, first, last, GRAIN, BLOCK_D)
    tl.debug_barrier()
    scale_wide_rows(W, at, stride_W, copy, stride_copy, factor, updated, first, last, BLOCK_D)
