"""Gradients of the encoder, written to memory: segment sums over a latent's entries (`segment_sums`).

grad_W_enc[l, d]       = sum_{(n, j): I[n, s(d), j] = l} grad_z[n, s(d), j] (x - pre_bias)[n, d]
grad_latent_bias[s, l] = sum_{(n, j): I[n, s, j] = l} grad_z[n, s, j],     grad_z = grad_values where values > 0, else 0
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


def choice(d_streams: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
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
    return encoder_sums_of(x, pre_bias, batch, d_streams, squares=False)


def encoder_sums_of(
    x: Tensor, pre_bias: Tensor, batch: Entries, d_streams: Sequence[int], *, squares: bool
) -> tuple[Tensor, Tensor]:
    """The gradient [L, D], or the sums of its squares over blocks of columns, [blocks, L]; and grad_latent_bias."""
    x, pre_bias = dense_rows(x), pre_bias.detach().contiguous()
    D, L, S = x.shape[1], batch.n_latents, len(d_streams)
    chosen = choice(d_streams, x.dtype)
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
    if SQUARES:
        gradient = tl.where(inside[None, :], gradient, 0).to(tl.float64)
        tl.store(grad_W_enc + tl.program_id(1).to(tl.int64) * L + l, tl.sum(gradient * gradient, 1), mask=l < L)
    else:
        at = grad_W_enc + l.to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(at, gradient, mask=(l < L)[:, None] & inside[None, :], eviction_policy="evict_first")
    # every block of columns of a stream has the same bias gradient: the first writes it
    tl.store(grad_latent_bias + stream.to(tl.int64) * L + l, bias, mask=l < writers(table, stream, L))
