"""recons[n, s, d] = sum_j values[n, s, j] W_dec[I[n, s, j], d] + pre_bias[d]

A program takes a sample and a block of columns: it gathers BLOCK_K of the sample's rows at a time, cut to the columns,
and adds them up for every source that shares the support. Where each stream has its own support, the sources of a
sample are programs of their own. The columns are the slow axis of the grid: what all samples gather at a time is
L * BLOCK_D elements, which the L2 cache can keep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.gather import (
    arithmetic,
    block_columns,
    coefficients,
    combine,
    gather,
    locate,
    operand_type,
    stored,
    sum_type,
)
from sparc_fast.kernels.launching import dense_rows, launch, next_power_of_2


@triton.jit
def _sparse_decode_kernel(
    recons, values, indices, W_dec, pre_bias, W_stride, S, k, L, D,
    PER_STREAM: tl.constexpr, SUM: tl.constexpr, OPERAND: tl.constexpr, TENSOR_CORES: tl.constexpr,
    SOURCES: tl.constexpr, SLOTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n, first = tl.program_id(0).to(tl.int64), tl.program_id(2) * SOURCES
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    support = indices + ((n * S + first) * k if PER_STREAM else n * k)
    slots = tl.arange(0, SLOTS)
    sources = first + slots
    mine = (slots < SOURCES) & (sources < S)
    sums = tl.zeros([SLOTS, BLOCK_D], SUM)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        offsets, wanted = locate(support, W_stride, j, k, L)
        rows = gather(W_dec, offsets, wanted, cols, inside)
        value = coefficients(values + n * S * k, sources, mine, k, j, wanted)
        sums = combine(sums, value, rows, SOURCES, TENSOR_CORES, OPERAND)
    sums += tl.load(pre_bias + cols, mask=inside, other=0.0).to(SUM)[None, :]
    out = recons + (n * S + sources)[:, None] * D + cols[None, :]
    tl.store(out, sums, mask=mine[:, None] & inside[None, :])


def choice(S: int, k: int, L: int, width: int, values: torch.dtype, rows: torch.dtype) -> dict[str, int]:
    # estimated, not measured: 32 KB of rows in flight a program, 32 to 64 numbers a thread
    block_k = min(max(next_power_of_2(k), 16), 64)
    block_d = block_columns(L, width, rows.itemsize, min(256, 32768 // (block_k * rows.itemsize)))
    warps = min(max(block_k * block_d * rows.itemsize // 4096, 1), 8)
    return {"BLOCK_K": block_k, "BLOCK_D": block_d, "num_warps": warps, **arithmetic(S, values, rows)}


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, pre_bias: Tensor) -> Tensor:
    (N, S, k), (L, D) = values.shape, W_dec.shape
    per_stream = indices.ndim == 3
    recons = torch.empty(N, S, D, dtype=stored(values.dtype, values.device), device=values.device)
    chosen = choice(1 if per_stream else S, k, L, D, values.dtype, W_dec.dtype)
    grid = N, triton.cdiv(D, chosen["BLOCK_D"]), triton.cdiv(S, chosen["SOURCES"])
    rows = dense_rows(W_dec)
    launch(
        _sparse_decode_kernel, grid,
        recons, values.contiguous(), indices.contiguous(), rows, pre_bias.contiguous(), rows.stride(0), S, k, L, D,
        PER_STREAM=per_stream, SUM=sum_type(values, W_dec, pre_bias), OPERAND=operand_type(values), **chosen,
    )  # fmt: skip
    return recons.to(values.dtype)
