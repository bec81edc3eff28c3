"""Gradients of both weight matrices, or the squares of their rows' norms, written to memory: sums over the
entries of a latent (`segment_sums`).

grad_W_enc[l, d]       = sum_{(n, j): I[n, s(d), j] = l} grad_z[n, s(d), j] (x - pre_bias)[n, d]
grad_latent_bias[s, l] = sum_{(n, j): I[n, s, j] = l} grad_z[n, s, j],     grad_z = grad_values where values > 0, else 0
grad_W_dec[l, d]       = sum_s sum_{(n, j): I[n, s, j] = l} values[n, s, j] grad_recons[n, s, d]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.gather import sum_type
from sparc_fast.kernels.launching import dense_rows, launch
from sparc_fast.kernels.segment_sums import (
    Columns,
    Entries,
    add_bias_pieces,
    add_pieces,
    column_block,
    of_blocks,
    pieces_of,
    segment,
    tile,
    weighted_rows,
    writers,
)
from sparc_fast.ops.layout import wide
from sparc_fast.ops.row_step import Samples


def weight_gradients(
    x: Tensor,
    pre_bias: Tensor,
    values: Tensor,
    grad_values: Tensor,
    grad_recons: Tensor,
    offsets: Tensor,
    entries: Tensor,
    d_streams: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_W_enc, grad_latent_bias = encoder_gradients(x, pre_bias, values, grad_values, offsets, entries, d_streams)
    return grad_W_enc, decoder_gradients(values, grad_recons, offsets, entries), grad_latent_bias


def gradient_squares(
    samples: Samples, d_streams: Sequence[int], encoder: bool = True, decoder: bool = True
) -> tuple[Tensor, Tensor]:
    x, pre_bias, values, grad_values, grad_recons, offsets, entries = samples
    batch = Entries.of(values, grad_values if encoder else None, offsets, entries, decoder)
    squares = torch.zeros(batch.n_latents, dtype=torch.float64, device=values.device)
    grad_latent_bias = values.new_empty(0)
    if encoder:
        of_columns, grad_latent_bias = _encoder_sums(x, pre_bias, batch, d_streams, squares=True)
        squares += of_columns.sum(0)
    if decoder:
        squares += _decoder_sums(grad_recons, batch, squares=True).sum(0)
    return squares, grad_latent_bias


def encoder_choice(d_streams: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
    # estimated, not measured: 8 bfloat16 a thread are one 16-byte load
    return tile(d_streams, dtype, widest=1024, rows=4)


def encoder_gradients(
    x: Tensor,
    pre_bias: Tensor,
    values: Tensor,
    grad_values: Tensor,
    offsets: Tensor,
    entries: Tensor,
    d_streams: Sequence[int],
) -> tuple[Tensor, Tensor]:
    batch = Entries.of(values, grad_values, offsets, entries, decoder=False)
    return _encoder_sums(x, pre_bias, batch, d_streams, squares=False)


def _encoder_sums(
    x: Tensor, pre_bias: Tensor, batch: Entries, d_streams: Sequence[int], *, squares: bool
) -> tuple[Tensor, Tensor]:
    """The gradient [L, D], or the sums of its squares over blocks of columns, [blocks, L]; and grad_latent_bias."""
    x, pre_bias = dense_rows(x), pre_bias.detach().contiguous()
    D, L, S = x.shape[1], batch.n_latents, len(d_streams)
    chosen = encoder_choice(d_streams, x.dtype)
    columns = Columns.of(d_streams, chosen["BLOCK_D"], x.device)
    pieces, _ = pieces_of(batch, d_streams, x, pre_bias)
    grad_latent_bias = wide(x.new_empty(0)).new_empty(S, L)
    found = grad_latent_bias.new_empty(L, D) if not squares else of_blocks(columns, L)
    grid = (triton.cdiv(L, chosen["LATENTS"]), len(columns.table))
    assert batch.encoder is not None
    launch(
        _encoder_gradients_kernel, grid, found, grad_latent_bias, x, x.stride(0), pre_bias, batch.offsets,
        *batch.encoder, batch.length, *pieces, columns.table, L, D, S=S, PIECE=batch.PIECE, SUM=sum_type(x),
        SQUARES=squares, ALIGN=columns.ALIGN, **chosen,
    )  # fmt: skip
    return found, grad_latent_bias


@triton.jit(do_not_specialize=["length"])
def _encoder_gradients_kernel(
    grad_W_enc, grad_latent_bias, x, stride_x, pre_bias, offsets, rows, coefficients, length, piece_rows, piece_bias,
    table, L, D,
    S: tl.constexpr, PIECE: tl.constexpr, SUM: tl.constexpr, SQUARES: tl.constexpr, ALIGN: tl.constexpr,
    LATENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, last, stream = column_block(table, tl.program_id(1), ALIGN)
    columns = first + tl.arange(0, BLOCK_D)
    inside = columns < last
    l = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    begin, end = segment(offsets, l, L)
    centre = tl.load(pre_bias + columns, mask=inside, other=0).to(SUM)
    gradient, bias = weighted_rows(
        begin, tl.minimum(begin + PIECE, end), columns, inside, x, stride_x, centre, rows,
        coefficients + stream.to(tl.int64) * length, length, 1, ROWS, SUM,
    )  # fmt: skip
    gradient = add_pieces(gradient, begin, end, piece_rows, D, columns, inside, PIECE)
    bias = add_bias_pieces(bias, begin, end, piece_bias, stream, S, PIECE)
    store_gradient(grad_W_enc, gradient, l, L, D, columns, inside, SQUARES)
    # every block of columns of a stream has the same bias gradient: the first writes it
    tl.store(grad_latent_bias + stream.to(tl.int64) * L + l, bias, mask=l < writers(table, stream, L))


def decoder_choice(D: int, dtype: torch.dtype) -> dict[str, int]:
    # estimated, not measured: 3 blocks of 1024 columns of grad_recons of 4096 samples, 25 MB, stay in a cache of 50 MB
    return tile([D], dtype, widest=1024, rows=4)


def decoder_gradients(values: Tensor, grad_recons: Tensor, offsets: Tensor, entries: Tensor) -> Tensor:
    return _decoder_sums(grad_recons, Entries.of(values, None, offsets, entries), squares=False)


def _decoder_sums(grad_recons: Tensor, batch: Entries, *, squares: bool) -> Tensor:
    """The gradient [L, D], or the sums of its squares over blocks of columns, [blocks, L]."""
    assert batch.decoder is not None
    grad_recons, coefficients = dense_rows(grad_recons.detach().flatten(0, 1)), batch.decoder.coefficients
    D, L = grad_recons.shape[1], batch.n_latents
    chosen = decoder_choice(D, grad_recons.dtype)
    columns = Columns.of([D], chosen["BLOCK_D"], grad_recons.device)
    _, pieces = pieces_of(batch, [D], grad_recons=grad_recons)
    found = of_blocks(columns, L) if squares else coefficients.new_empty(L, D)
    launch(
        _decoder_gradients_kernel, (triton.cdiv(L, chosen["LATENTS"]), len(columns.table)), found, grad_recons,
        grad_recons.stride(0), batch.offsets, *batch.decoder, batch.length, pieces.rows, columns.table, L, D,
        SOURCES=len(coefficients), PIECE=batch.PIECE, SUM=sum_type(coefficients), SQUARES=squares,
        ALIGN=columns.ALIGN, **chosen,
    )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["length"])
def _decoder_gradients_kernel(
    grad_W_dec, grad_recons, stride_recons, offsets, rows, coefficients, length, piece_rows, table, L, D,
    SOURCES: tl.constexpr, PIECE: tl.constexpr, SUM: tl.constexpr, SQUARES: tl.constexpr, ALIGN: tl.constexpr,
    LATENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, last, _ = column_block(table, tl.program_id(1), ALIGN)
    columns = first + tl.arange(0, BLOCK_D)
    inside = columns < last
    l = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    begin, end = segment(offsets, l, L)
    gradient, _ = weighted_rows(
        begin, tl.minimum(begin + PIECE, end), columns, inside, grad_recons, stride_recons, None, rows, coefficients,
        length, SOURCES, ROWS, SUM,
    )  # fmt: skip
    gradient = add_pieces(gradient, begin, end, piece_rows, D, columns, inside, PIECE)
    store_gradient(grad_W_dec, gradient, l, L, D, columns, inside, SQUARES)


@triton.jit
def store_gradient(found, gradient, l, L, D, columns, inside, SQUARES: tl.constexpr):
    """Of latents l and a block of columns; or the sums of its squares."""
    if SQUARES:
        gradient = tl.where(inside[None, :], gradient, 0).to(tl.float64)
        tl.store(found + tl.program_id(1).to(tl.int64) * L + l, tl.sum(gradient * gradient, 1), mask=l < L)
    else:
        at = found + l.to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(at, gradient, mask=(l < L)[:, None] & inside[None, :], eviction_policy="evict_first")
