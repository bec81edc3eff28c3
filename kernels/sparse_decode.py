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

from sparc_fast.kernels.launching import launch, next_power_of_2

L2_BYTES = 40_000_000
"""What random reads find in the L2 cache of a large GPU."""


@triton.jit
def locate(indices, W_stride, j, limit, L):
    """Where the rows indices[j] of W begin, and which there are: j < limit and a latent 0 .. L - 1."""
    latents = tl.load(indices + j, mask=j < limit, other=-1).to(tl.int64)
    wanted = (latents >= 0) & (latents < L)
    return tl.where(wanted, latents, 0) * W_stride, wanted


@triton.jit
def gather(W, offsets, wanted, cols, inside):
    """rows[j, d] = W[l, cols[d]], l the latent that `locate` found, [BLOCK_K, BLOCK_D]; 0 where there is none."""
    return tl.load(W + offsets[:, None] + cols[None, :], mask=wanted[:, None] & inside[None, :], other=0.0)


@triton.jit
def coefficients(values, sources, mine, k, j, wanted):
    """values[sources, j], [SLOTS, BLOCK_K]; 0 where there is no such source or no row."""
    return tl.load(values + sources[:, None] * k + j[None, :], mask=mine[:, None] & wanted[None, :], other=0.0)


@triton.jit
def combine(recons, value, rows, SOURCES: tl.constexpr, TENSOR_CORES: tl.constexpr, OPERAND: tl.constexpr):
    """recons[i, d] += sum_j value[i, j] rows[j, d], [SLOTS, BLOCK_D]."""
    if TENSOR_CORES:
        recons = tl.dot(value.to(OPERAND), rows.to(OPERAND), recons, input_precision="ieee")
    else:
        slots = tl.arange(0, value.shape[0])[:, None]
        wide = rows.to(recons.dtype)
        for i in tl.static_range(SOURCES):
            of_source = tl.sum(tl.where(slots == i, value.to(recons.dtype), 0.0), axis=0)
            recons += tl.where(slots == i, tl.sum(of_source[:, None] * wide, axis=0)[None, :], 0.0)
    return recons


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
    # estimated, not measured: 32 KB of rows in flight a program, 64 registers a thread to hold them
    block_k = min(max(next_power_of_2(k), 16), 64)
    block_d = block_columns(L, width, rows.itemsize, min(256, 32768 // (block_k * rows.itemsize)))
    warps = min(max(block_k * block_d * rows.itemsize // 8192, 1), 8)
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


def block_columns(L: int, width: int, item_size: int, most: int) -> int:
    """Columns of a block, a power of two: few enough that they stay in the L2 cache for all latents, if 128 are."""
    block = min(most, max(next_power_of_2(width), 16))
    while L * block * item_size > L2_BYTES >= L * 128 * item_size:
        block //= 2
    return block


def arithmetic(S: int, values: torch.dtype, rows: torch.dtype) -> dict[str, int]:
    """How `combine` multiplies: for a source or two, multiply-adds are less work than tensor cores with 16 slots.

    bfloat16 products are exact in float32, so tensor cores lose nothing.
    """
    tensor_cores = S > 2 and values == rows == torch.bfloat16
    sources = min(S, 16 if tensor_cores else 4)
    return {
        "TENSOR_CORES": tensor_cores,
        "SOURCES": sources,
        "SLOTS": 16 if tensor_cores else next_power_of_2(sources),
    }


def operand_type(values: Tensor) -> tl.dtype:
    """What tensor cores multiply; Triton's interpreter cannot multiply matrices of bfloat16."""
    return tl.bfloat16 if values.is_cuda else tl.float32


def stored(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a kernel writes: Triton's interpreter cuts off to bfloat16 where a GPU rounds, so there PyTorch rounds."""
    return torch.float32 if dtype == torch.bfloat16 and device.type == "cpu" else dtype


def sum_type(*tensors: Tensor) -> tl.dtype:
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32


def dense_rows(tensor: Tensor) -> Tensor:
    """Rows may lie apart, the numbers in a row may not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
