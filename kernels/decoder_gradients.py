"""Gradient of the decoder, written to memory: segment sums over a latent's entries (`segment_sums`).

grad_W_dec[l, d] = sum_s sum_{(n, j): I[n, s, j] = l} values[n, s, j] grad_recons[n, s, d]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.launching import dense_rows, launch
from sparc_fast.kernels.segment_sums import (
    Columns,
    Entries,
    add_pieces,
    column_block,
    decoder_pieces,
    decoder_sums,
    segment,
    tile,
)
from sparc_fast.ops.layout import wide


def choice(D: int, dtype: torch.dtype) -> dict[str, int]:
    # estimated, not measured: 3 blocks of 1024 columns of grad_recons of 4096 samples, 25 MB, stay in a cache of 50 MB
    return tile([D], dtype, widest=1024, rows=8)


def decoder_gradients(values: Tensor, grad_recons: Tensor, offsets: Tensor, entries: Tensor) -> Tensor:
    grad_recons = dense_rows(grad_recons.detach().flatten(0, 1))
    batch = Entries.of(values, None, offsets, entries)
    D, L = grad_recons.shape[1], batch.n_latents
    chosen = choice(D, grad_recons.dtype)
    columns = Columns.of([D], chosen["BLOCK_D"], values.device)
    pieces = decoder_pieces(grad_recons, batch, columns, chosen)
    grad_W_dec = wide(values.new_empty(0)).new_empty(L, D)
    launch(
        _decoder_gradients_kernel, (triton.cdiv(L, chosen["LATENTS"]), len(columns.table)), grad_W_dec, grad_recons,
        grad_recons.stride(0), batch.values, batch.offsets, batch.entries, pieces.rows, columns.table, L, D,
        ALIGN=columns.ALIGN, **batch.constants, **chosen,
    )  # fmt: skip
    return grad_W_dec


@triton.jit
def _decoder_gradients_kernel(
    grad_W_dec, grad_recons, stride_recons, values, offsets, entries, piece_rows, table, L, D,
    S: tl.constexpr, K: tl.constexpr, PER_STREAM: tl.constexpr, PIECE: tl.constexpr, POSITION: tl.constexpr,
    SUM: tl.constexpr, ALIGN: tl.constexpr, LATENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, last, _ = column_block(table, tl.program_id(1), ALIGN)
    columns = first + tl.arange(0, BLOCK_D)
    inside = columns < last
    l = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    begin, end = segment(offsets, l, L)
    gradient = decoder_sums(
        begin, tl.minimum(begin + PIECE, end), columns, inside, grad_recons, stride_recons, values, entries,
        S, K, PER_STREAM, ROWS, POSITION, SUM,
    )  # fmt: skip
    gradient = add_pieces(gradient, begin, end, piece_rows, D, columns, inside, PIECE)
    at = grad_W_dec + l.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(at, gradient, mask=(l < L)[:, None] & inside[None, :], eviction_policy="evict_first")
