"""values[n, s, j] = relu(sum_{d in s} (x - pre_bias)[n, d] W_enc[l, d] + latent_bias[s, l]),  l = I[n, s, j]

A program takes a sample and a chunk of columns of one stream: it gathers ROWS rows at a time, cut to the chunk, against
the centred sample, which is never stored. Columns are the slow axis of the grid and a chunk is as wide as the L2 cache
can keep for all latents. Where that is less than a stream, the chunks' parts, [chunks, N, k], are written out and
summed in order; where it is not, the values are written at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.gather import L2_BYTES, gather, locate, stored, sum_type, widened
from sparc_fast.kernels.launching import column_blocks, dense_rows, launch, next_power_of_2, widths


@triton.jit
def _activate(values, sums, latent_bias, indices, n, s, S, k, j, L, PER_STREAM: tl.constexpr):
    """values[n, s, j] = relu(sums[j] + latent_bias[s, l]); NaN stays."""
    support = indices + ((n * S + s) * k if PER_STREAM else n * k)
    latents = tl.load(support + j, mask=j < k, other=-1).to(tl.int64)
    inside = (latents >= 0) & (latents < L)
    sums += tl.load(latent_bias + s.to(tl.int64) * L + latents, mask=inside, other=0.0).to(sums.dtype)
    tl.store(values + (n * S + s) * k + j, tl.where(sums <= 0, 0.0, sums), mask=j < k)


@triton.jit(do_not_specialize=["N"])
def _support_values_kernel(
    values, parts, x, W_enc, pre_bias, latent_bias, indices, columns, x_stride, W_stride, N, S, k, L,
    PER_STREAM: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.multiple_of(tl.load(columns + chunk * 3), ALIGNED)
    end = tl.multiple_of(tl.load(columns + chunk * 3 + 1), ALIGNED)
    s = tl.load(columns + chunk * 3 + 2)
    support = indices + ((n * S + s) * k if PER_STREAM else n * k)
    x += n * x_stride
    for start_j in range(0, k, ROWS):
        j = start_j + tl.arange(0, ROWS)
        offsets, wanted = locate(support, W_stride, j, k, L)
        products = tl.zeros([ROWS, BLOCK_D], SUM)
        for start in range(begin, end, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            inside = cols < end
            centred = tl.load(x + cols, mask=inside, other=0.0).to(SUM)
            centred -= tl.load(pre_bias + cols, mask=inside, other=0.0).to(SUM)
            rows = gather(W_enc, offsets, wanted, cols, inside)
            products += widened(rows, SUM) * centred[None, :]
        sums = tl.where(wanted, tl.sum(products, axis=1), 0.0)  # where there is no row, whatever the sample is
        if WHOLE:
            _activate(values, sums, latent_bias, indices, n, s, S, k, j, L, PER_STREAM)
        else:
            tl.store(parts + (chunk.to(tl.int64) * N + n) * k + j, sums, mask=j < k)


@triton.jit(do_not_specialize=["N"])
def _sum_chunks_kernel(
    values, parts, latent_bias, indices, columns, N, S, k, L,
    PER_STREAM: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        sums = tl.zeros([BLOCK_K], parts.dtype.element_ty)
        for chunk in range(CHUNKS):
            k_read = tl.where(tl.load(columns + chunk * 3 + 2) == s, k, 0)
            sums += tl.load(parts + (chunk * N + n) * k + j, mask=j < k_read, other=0.0)
        _activate(values, sums, latent_bias, indices, n, s, S, k, j, L, PER_STREAM)


def choice(k: int, L: int, width: int, item_size: int) -> dict[str, int]:
    # estimated, not measured: 8 KB of rows in flight a program of few registers, so that many programs run at once
    chunk = max(next_power_of_2(width), 16)
    while L * chunk * item_size > L2_BYTES >= L * 128 * item_size:
        chunk //= 2
    block_d = min(chunk, 512 // item_size)
    rows = min(max(next_power_of_2(k), 4), 16)
    return {"CHUNK": chunk, "ROWS": rows, "BLOCK_D": block_d, "num_warps": 4 if rows * block_d >= 1024 else 1}


def support_values(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, indices: Tensor, d_streams: Sequence[int]
) -> Tensor:
    N, S, k, L, device = len(x), len(d_streams), indices.shape[-1], len(W_enc), x.device
    sums = sum_type(x, W_enc, pre_bias, latent_bias)
    per_stream = indices.ndim == 3
    chosen = choice(k, L, max(d_streams), W_enc.element_size())
    columns = column_blocks(widths(d_streams), chosen.pop("CHUNK"), device)
    chunks = len(columns)
    whole = chunks == S
    values = torch.empty(N, S, k, dtype=stored(x.dtype, device), device=device)
    stored_sums = torch.float64 if sums == tl.float64 else torch.float32
    parts = values if whole else torch.empty(chunks, N, k, dtype=stored_sums, device=device)
    x, rows, indices, latent_bias = dense_rows(x), dense_rows(W_enc), indices.contiguous(), latent_bias.contiguous()
    launch(
        _support_values_kernel, (N, chunks),
        values, parts, x, rows, pre_bias.contiguous(), latent_bias, indices, columns, x.stride(0), rows.stride(0),
        N, S, k, L,
        PER_STREAM=per_stream, WHOLE=whole, ALIGNED=math.gcd(16, *d_streams), SUM=sums, **chosen,
    )  # fmt: skip
    if not whole:
        launch(
            _sum_chunks_kernel, (N, S), values, parts, latent_bias, indices, columns, N, S, k, L,
            PER_STREAM=per_stream, CHUNKS=chunks, BLOCK_K=min(next_power_of_2(k), 256), num_warps=1,
        )  # fmt: skip
    return values.to(x.dtype)
