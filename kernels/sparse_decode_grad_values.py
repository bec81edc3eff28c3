"""grad_values[n, s, j] = sum_d grad_recons[n, s, d] W_dec[I[n, s, j], d]

A program takes BLOCK_K rows of a sample's support and goes along all their columns, for every source that shares the
support. Where each stream has its own support, the sources of a sample are programs of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.gather import arithmetic, dots, gather, locate, operand_type, stored, sum_type
from sparc_fast.kernels.launching import dense_rows, launch, next_power_of_2


@triton.jit
def _sparse_decode_grad_values_kernel(
    grad_values, grad_recons, indices, W_dec, grad_stride_n, grad_stride_s, W_stride, S, k, L, D,
    PER_STREAM: tl.constexpr, SUM: tl.constexpr, OPERAND: tl.constexpr, TENSOR_CORES: tl.constexpr,
    SOURCES: tl.constexpr, SLOTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n, first = tl.program_id(0).to(tl.int64), tl.program_id(2) * SOURCES
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    slots = tl.arange(0, SLOTS)
    sources = first + slots
    mine = (slots < SOURCES) & (sources < S)
    support = indices + ((n * S + first) * k if PER_STREAM else n * k)
    grads = grad_recons + n * grad_stride_n + sources.to(tl.int64)[:, None] * grad_stride_s
    offsets, wanted = locate(support, W_stride, j, k, L)
    sums = tl.zeros([SLOTS, BLOCK_K], SUM)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        inside = cols < D
        rows = gather(W_dec, offsets, wanted, cols, inside)
        grad = tl.load(grads + cols[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
        sums = dots(sums, grad, rows, SOURCES, TENSOR_CORES, OPERAND)
    out = grad_values + (n * S + sources)[:, None] * k + j[None, :]
    # where there is no row, 0 whatever the gradient is
    tl.store(out, tl.where(wanted[None, :], sums, 0.0), mask=mine[:, None] & (j < k)[None, :])


def choice(S: int, k: int, D: int, grad_recons: torch.dtype, rows: torch.dtype) -> dict[str, int]:
    # estimated, not measured: 16 KB of rows in flight a program
    block_k = min(max(next_power_of_2(k), 16), 32)
    block_d = min(max(next_power_of_2(D), 16), 512 // rows.itemsize)
    warps = min(max(block_k * block_d * rows.itemsize // 4096, 1), 4)
    return {"BLOCK_K": block_k, "BLOCK_D": block_d, "num_warps": warps, **arithmetic(S, grad_recons, rows)}


def sparse_decode_grad_values(grad_recons: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    (N, S, _), k, (L, D) = grad_recons.shape, indices.shape[-1], W_dec.shape
    per_stream = indices.ndim == 3
    dtype, device = grad_recons.dtype, grad_recons.device
    grad_values = torch.empty(N, S, k, dtype=stored(dtype, device), device=device)
    chosen = choice(1 if per_stream else S, k, D, dtype, W_dec.dtype)
    grid = N, triton.cdiv(k, chosen["BLOCK_K"]), triton.cdiv(S, chosen["SOURCES"])
    grad, rows = dense_rows(grad_recons), dense_rows(W_dec)
    launch(
        _sparse_decode_grad_values_kernel, grid, grad_values, grad, indices.contiguous(), rows,
        grad.stride(0), grad.stride(1), rows.stride(0), S, k, L, D,
        PER_STREAM=per_stream, SUM=sum_type(grad_recons, W_dec), OPERAND=operand_type(grad_recons), **chosen,
    )  # fmt: skip
    return grad_values.to(dtype)
