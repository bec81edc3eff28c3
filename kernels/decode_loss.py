"""Decode, squared errors, their gradient, and that gradient back to the values, from one gather of each sample's rows.

E[n, s, d]           = sum_j values[n, s, j] W_dec[I[n, s, j], d] + pre_bias[d] - target[n, d]
nmse[s, t]           = sum_n scale[n, t] sum_{d in t} E[n, s, d]^2
grad_recons[n, s, d] = 2 weights[s, t] scale[n, t] E[n, s, d],  t = s(d)
grad_values[n, s, j] = sum_d grad_recons[n, s, d] W_dec[I[n, s, j], d]
grad_pre_bias[d]     = sum_{n, s} grad_recons[n, s, d]

A program takes a sample and a chunk of columns of one target stream, BLOCK_D at a time. It gathers the sample's rows,
cut to the block, keeps them, and has from them the errors of every source that shares the support, their gradient, and
the block's part of grad_values. Supports too long to be kept are gathered a second time for the last of these. Where
each stream has its own support, the sources of a sample are programs of their own. Columns are the slow axis of the
grid, so that what all samples gather at a time can stay in the L2 cache.

The chunks' parts of nmse, [chunks, S, N], and of grad_values, [chunks, N, S, k], are written out; a second kernel sums
them, and the rows of grad_recons, in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.gather import (
    arithmetic,
    block_columns,
    coefficients,
    combine,
    dots,
    gather,
    locate,
    operand_type,
    stored,
    sum_rows,
    sum_type,
)
from sparc_fast.kernels.launching import column_blocks, dense_rows, launch, next_power_of_2, widths
from sparc_fast.ops.layout import gradient_dtype, wide_type


@triton.jit(do_not_specialize=["N"])
def _decode_loss_kernel(
    nmse_parts, grad_recons, grad_values_parts,
    values, indices, W_dec, pre_bias, target, scale, weights, columns, W_stride, target_stride, N, S, k, L, D,
    PER_STREAM: tl.constexpr, KEPT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, SUM: tl.constexpr,
    OPERAND: tl.constexpr, TENSOR_CORES: tl.constexpr, SOURCES: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n, chunk, first = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * SOURCES
    begin = tl.multiple_of(tl.load(columns + chunk * 3), ALIGNED)
    end = tl.multiple_of(tl.load(columns + chunk * 3 + 1), ALIGNED)
    t = tl.load(columns + chunk * 3 + 2)
    slots = tl.arange(0, SLOTS)
    sources = first + slots
    mine = (slots < SOURCES) & (sources < S)
    weight = tl.load(weights + sources * S + t, mask=mine, other=0.0)
    counts = weight != 0  # decided in float64: what is tiny still counts
    k_read = tl.where(tl.max(counts.to(tl.int32), axis=0) > 0, k, 0)  # no row, where no source counts
    support = indices + ((n * S + first) * k if PER_STREAM else n * k)
    values += n * S * k
    grad_values_parts += (chunk.to(tl.int64) * N + n) * S * k

    sample_scale = tl.load(scale + n * S + t).to(SUM)
    factor = tl.where(counts, 2 * weight.to(SUM) * sample_scale, 0.0)
    j = tl.arange(0, BLOCK_K)
    parts = grad_values_parts + sources[:, None] * k + j[None, :]

    if KEPT:
        offsets, wanted = locate(support, W_stride, j, k_read, L)
        value = coefficients(values, sources, mine, k, j, wanted)
    squares = tl.zeros([SLOTS], SUM)
    products = tl.zeros([SLOTS, BLOCK_K], SUM)
    for start in range(begin, end, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        inside = (cols < end) | EVEN  # where all blocks are whole, the compiler need not look
        error = tl.zeros([SLOTS, BLOCK_D], SUM)
        if KEPT:
            rows = gather(W_dec, offsets, wanted, cols, inside)
            error = combine(error, value, rows, SOURCES, TENSOR_CORES, OPERAND)
        else:
            for start_j in range(0, k, BLOCK_K):
                at = start_j + j
                offsets, wanted = locate(support, W_stride, at, k_read, L)
                rows = gather(W_dec, offsets, wanted, cols, inside)
                value = coefficients(values, sources, mine, k, at, wanted)
                error = combine(error, value, rows, SOURCES, TENSOR_CORES, OPERAND)
        bias = tl.load(pre_bias + cols, mask=inside, other=0.0).to(SUM)
        bias -= tl.load(target + n * target_stride + cols, mask=inside, other=0.0).to(SUM)
        # a pair of weight 0 is not computed: nothing it holds, NaN or not, goes on from here
        error = tl.where(counts[:, None] & inside[None, :], error + bias[None, :], 0.0)
        squares += tl.sum(error * error, axis=1)
        # grad_values comes from the gradient as it is stored
        grad = (factor[:, None] * error).to(grad_recons.dtype.element_ty)
        out = grad_recons + (n * S + sources)[:, None] * D + cols[None, :]
        tl.store(out, grad, mask=mine[:, None] & inside[None, :])
        if KEPT:
            products = dots(products, grad, rows, SOURCES, TENSOR_CORES, OPERAND)
        else:
            for start_j in range(0, k, BLOCK_K):
                at = start_j + j
                offsets, wanted = locate(support, W_stride, at, k_read, L)
                rows = gather(W_dec, offsets, wanted, cols, inside)
                part = dots(tl.zeros([SLOTS, BLOCK_K], SUM), grad, rows, SOURCES, TENSOR_CORES, OPERAND)
                part = tl.where(wanted[None, :], part, 0.0)
                tl.store(parts + start_j, part, mask=mine[:, None] & (at < k)[None, :])
    squares = tl.where(counts, sample_scale * squares, 0.0)
    tl.store(nmse_parts + (chunk.to(tl.int64) * S + sources) * N + n, squares, mask=mine)
    if KEPT:
        products = tl.where(wanted[None, :], products, 0.0)  # where there is no row, whatever the gradient is
        tl.store(parts, products, mask=mine[:, None] & (j < k)[None, :])


@triton.jit
def _sum_samples(nmse, parts, columns, pair, N, S, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """nmse[p, s, t] = the sum of parts[p, c, s, n] over samples and the chunks c of stream t, in float64."""
    p, s, t = pair // (S * S), pair // S % S, pair % S
    parts += (p * CHUNKS * S).to(tl.int64) * N
    sums = tl.zeros([BLOCK], tl.float64)
    for chunk in range(CHUNKS):
        N_read = tl.where(tl.load(columns + chunk * 3 + 2) == t, N, 0)
        part = parts + (chunk * S + s).to(tl.int64) * N
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)
            sums += tl.load(part + n, mask=n < N_read, other=0.0).to(tl.float64)
    tl.store(nmse + pair, tl.sum(sums, axis=0))


@triton.jit
def _sum_chunks(total, parts, size, block, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """total[i] = sum_c parts[c, i] for a block of these."""
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    sums = tl.load(parts + i, mask=inside, other=0.0)
    for _ in range(1, CHUNKS):
        parts += size
        sums += tl.load(parts + i, mask=inside, other=0.0)
    tl.store(total + i, sums, mask=inside)


@triton.jit(do_not_specialize=["N", "size"])
def _finish_kernel(
    nmse, grad_values, grad_pre_bias, nmse_parts, grad_values_parts, grad_recons, columns, N, S, D, size,
    PREFIXES: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What is summed over samples or chunks, each in an order that the shape decides. The longest sums come first."""
    of_bias, of_nmse = tl.cdiv(D, BLOCK_D), PREFIXES * S * S
    program = tl.program_id(0)
    if program < of_bias:
        sum_rows(grad_pre_bias, grad_recons, N * S, D, program, ROWS, BLOCK_D)
    elif program < of_bias + of_nmse:
        _sum_samples(nmse, nmse_parts, columns, program - of_bias, N, S, CHUNKS, BLOCK)
    else:
        _sum_chunks(grad_values, grad_values_parts, size, program - of_bias - of_nmse, CHUNKS, BLOCK)


def finish_choice() -> dict[str, int]:
    # estimated, not measured: 32 KB of rows in flight a program, in lines of 32 bytes, so that there is a program for
    # every multiprocessor
    return {"BLOCK": 1024, "ROWS": 1024, "BLOCK_D": 16, "num_warps": 8}


def finish(
    nmse_parts: Tensor, grad_values_parts: Tensor, grad_recons: Tensor, columns: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(nmse [P, S, S], grad_values [N, S, k], grad_pre_bias [D]) from parts [P, chunks, S, N] and [chunks, N, S, k] and
    the rows of the first [N, S, D] in grad_recons."""
    (P, chunks, S, N), D, device = nmse_parts.shape, grad_recons.shape[-1], nmse_parts.device
    grad_values = torch.empty(grad_values_parts.shape[1:], dtype=stored(dtype, device), device=device)
    nmse = torch.empty(P, S, S, dtype=nmse_parts.dtype, device=device)
    grad_pre_bias = torch.empty(D, dtype=wide_type(dtype), device=device)
    size, chosen = grad_values.numel(), finish_choice()
    programs = triton.cdiv(D, chosen["BLOCK_D"]) + P * S * S + triton.cdiv(size, chosen["BLOCK"])
    launch(
        _finish_kernel, (programs,), nmse, grad_values, grad_pre_bias, nmse_parts, grad_values_parts, grad_recons,
        columns, N, S, D, size, PREFIXES=P, CHUNKS=chunks, **chosen,
    )  # fmt: skip
    return nmse, grad_values.to(dtype), grad_pre_bias


def choice(
    S: int, k: int, L: int, width: int, values: torch.dtype, rows: torch.dtype, aligned: bool
) -> dict[str, int]:  # fmt: skip
    """`aligned`: the columns of a stream can be read 16 bytes at once."""
    # estimated, not measured: 16 KB of rows a block, so that the next block is fetched meanwhile; 512 columns a chunk.
    # A thread holds 128 bytes, or 16 numbers where it also holds the address of each
    kept = k <= 256
    block_k = max(next_power_of_2(k), 16) if kept else 64
    numbers, narrowest = (16384 // rows.itemsize, 128 // rows.itemsize) if aligned else (2048, 16)
    chosen = arithmetic(S, values, rows)
    widest = 128 if chosen["TENSOR_CORES"] else 512  # sums of 16 slots
    block_d = min(max(next_power_of_2(width), 16), max(numbers // block_k, narrowest), widest)
    warps = min(max(block_k * block_d * 4 // numbers, 1), 8)
    return {
        "CHUNK": max(block_columns(L, width, rows.itemsize, 512), block_d) if kept else block_d,
        "KEPT": kept,
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
        "num_warps": warps,
        "num_stages": 3,
        # left alone, the compiler spills a register or two to fit one more program
        "maxnreg": 168 if warps <= 4 else 255,
        **chosen,
    }


def decode_loss(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    pre_bias: Tensor,
    target: Tensor,
    scale: Tensor,
    weights: Sequence[float],
    d_streams: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = values, indices, W_dec, pre_bias, target, scale, weights, d_streams
    nmse, grad_recons, grad_values, grad_pre_bias = losses(_decode_loss_kernel, choice, *operands, 1)
    return nmse[0], grad_recons[0], grad_values, grad_pre_bias


def losses(
    kernel: Any, choice: Callable[..., dict[str, int]], values: Tensor, indices: Tensor, W_dec: Tensor,
    pre_bias: Tensor, target: Tensor, scale: Tensor, weights: Sequence[float], d_streams: Sequence[int], P: int,
    sizes: Sequence[Tensor] = (), **constants: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """nmse [P, S, S], grad_recons [P, N, S, D], grad_values and grad_pre_bias of P dictionaries, by a kernel that takes
    their sizes, if any, and these constants."""
    (N, S, k), (L, D), device = values.shape, W_dec.shape, values.device
    sums, dtype = sum_type(values, W_dec, pre_bias, target), gradient_dtype(values)
    stored_sums = torch.float64 if sums == tl.float64 else torch.float32
    per_stream = indices.ndim == 3
    aligned = all(d % 16 == 0 for d in d_streams)
    chosen = choice(1 if per_stream else S, k, L, max(d_streams), values.dtype, W_dec.dtype, aligned)
    columns = column_blocks(widths(d_streams), chosen.pop("CHUNK"), device)
    chunks = len(columns)

    nmse_parts = torch.empty(P, chunks, S, N, dtype=stored_sums, device=device)
    grad_values_parts = torch.empty(chunks, N, S, k, dtype=stored_sums, device=device)
    grad_recons = torch.empty(P, N, S, D, dtype=stored(dtype, device), device=device)
    rows, target = dense_rows(W_dec), dense_rows(target)
    whole = all(d % chosen["BLOCK_D"] == 0 for d in d_streams)  # no stream ends in the middle of a block of columns
    launch(
        kernel, (N, chunks, triton.cdiv(S, chosen["SOURCES"])), nmse_parts, grad_recons, grad_values_parts,
        values.contiguous(), indices.contiguous(), rows, pre_bias.contiguous(), target, scale.contiguous(),
        weights_on(tuple(weights), device), *sizes, columns, rows.stride(0), target.stride(0), N, S, k, L, D,
        PER_STREAM=per_stream, ALIGNED=math.gcd(16, *d_streams), EVEN=whole, SUM=sums, OPERAND=operand_type(values),
        **constants, **chosen,
    )  # fmt: skip
    nmse, grad_values, grad_pre_bias = finish(nmse_parts, grad_values_parts, grad_recons, columns, dtype)
    return nmse, grad_recons.to(dtype), grad_values, grad_pre_bias


@cache
def weights_on(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept for good, as a captured CUDA graph goes on reading it: 512 bytes of the device for all ever used."""
    return torch.tensor(weights, dtype=torch.float64, device=device)
