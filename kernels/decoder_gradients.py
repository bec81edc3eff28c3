"""Gradient of the decoder, written to memory: segment sums over a latent's entries (`segment_sums`).

grad_W_dec[l, d] = sum_s sum_{(n, j): I[n, s, j] = l} values[n, s, j] grad_recons[n, s, d]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.gather import sum_type
from sparc_fast.kernels.launching import dense_rows, launch
from sparc_fast.kernels.segment_sums import (
    Columns,
    Entries,
    add_pieces,
    column_block,
    of_blocks,
    pieces_of,
    segment,
    tile,
    weighted_rows,
)


def choice(D: int, dtype: torch.dtype) -> dict[str, int]:
    # estimated, not measured: 3 blocks of 1024 columns of grad_recons of 4096 samples, 25 MB, stay in a cache of 50 MB
    return tile([D], dtype, widest=1024, rows=4)


def decoder_gradients(values: Tensor, grad_recons: Tensor, offsets: Tensor, entries: Tensor) -> Tensor:
    return decoder_sums_of(grad_recons, Entries.of(values, None, offsets, entries), squares=False)


def decoder_sums_of(grad_recons: Tensor, batch: Entries, *, squares: bool) -> Tensor:
    """The gradient [L, D], or the sums of its squares over blocks of columns, [blocks, L]."""
    assert batch.decoder is not None
    grad_recons, coefficients = dense_rows(grad_recons.detach().flatten(0, 1)), batch.decoder.coefficients
    D, L = grad_recons.shape[1], batch.n_latents
    chosen = choice(D, grad_recons.dtype)
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
    if SQUARES:
        gradient = tl.where(inside[None, :], gradient, 0).to(tl.float64)
        tl.store(grad_W_dec + tl.program_id(1).to(tl.int64) * L + l, tl.sum(gradient * gradient, 1), mask=l < L)
    else:
        at = grad_W_dec + l.to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(at, gradient, mask=(l < L)[:, None] & inside[None, :], eviction_policy="evict_first")
