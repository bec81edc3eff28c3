"""grad_x[n, d] = sum_j grad_z[n, s(d), j] W_enc[I[n, s(d), j], d],  grad_z = grad_values where values > 0

A program takes a sample and a block of columns of one stream, and adds up the sample's rows ROWS at a time. Rows whose
grad_z is 0 by the ReLU are not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.gather import block_columns, gather, locate, stored, sum_type
from sparc_fast.kernels.launching import column_blocks, dense_rows, launch, next_power_of_2, widths


@triton.jit
def _support_values_grad_x_kernel(
    grad_x, grad_values, values, indices, W_enc, columns, W_stride, S, k, L, D,
    PER_STREAM: tl.constexpr, ALIGNED: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.multiple_of(tl.load(columns + block * 3), ALIGNED)
    end = tl.multiple_of(tl.load(columns + block * 3 + 1), ALIGNED)
    s = tl.load(columns + block * 3 + 2)
    cols = begin + tl.arange(0, BLOCK_D)
    inside = cols < end
    of_source = (n * S + s) * k
    support = indices + (of_source if PER_STREAM else n * k)
    sums = tl.zeros([ROWS, BLOCK_D], SUM)
    for start in range(0, k, ROWS):
        j = start + tl.arange(0, ROWS)
        offsets, wanted = locate(support, W_stride, j, k, L)
        wanted = wanted & (tl.load(values + of_source + j, mask=j < k, other=0.0).to(SUM) > 0)
        grad_z = tl.load(grad_values + of_source + j, mask=wanted, other=0.0).to(SUM)
        sums += grad_z[:, None] * gather(W_enc, offsets, wanted, cols, inside).to(SUM)
    tl.store(grad_x + n * D + cols, tl.sum(sums, axis=0), mask=inside)


def choice(k: int, L: int, width: int, item_size: int) -> dict[str, int]:
    # estimated, not measured: 8 KB of rows in flight a program of few registers, so that many programs run at once
    rows = min(max(next_power_of_2(k), 4), 16)
    block_d = block_columns(L, width, item_size, 512 // item_size)
    return {"ROWS": rows, "BLOCK_D": block_d, "num_warps": 4 if rows * block_d >= 1024 else 1}


def support_values_grad_x(
    grad_values: Tensor, values: Tensor, indices: Tensor, W_enc: Tensor, d_streams: Sequence[int]
) -> Tensor:
    (N, S, k), (L, D) = values.shape, W_enc.shape
    chosen = choice(k, L, max(d_streams), W_enc.element_size())
    columns = column_blocks(widths(d_streams), chosen["BLOCK_D"], values.device)
    grad_x = torch.empty(N, D, dtype=stored(W_enc.dtype, values.device), device=values.device)
    rows = dense_rows(W_enc)
    launch(
        _support_values_grad_x_kernel, (N, len(columns)),
        grad_x, grad_values.contiguous(), values.contiguous(), indices.contiguous(), rows, columns, rows.stride(0),
        S, k, L, D,
        PER_STREAM=indices.ndim == 3, ALIGNED=math.gcd(16, *d_streams), SUM=sum_type(grad_values, values, W_enc),
        **chosen,
    )  # fmt: skip
    return grad_x.to(W_enc.dtype)
