"""Rows of the latents in a sample's support, gathered and multiplied: what decoders and encoders of supports share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.launching import next_power_of_2

L2_BYTES = 40_000_000
"""What random reads find in the L2 cache of a large GPU."""


def gathers_whole_rows(L: int, D: int, item_size: int) -> bool:
    """Whether rows [L, D] are gathered whole as fast as chunk by chunk of columns: where the L2 cache keeps most of
    them, or not even chunks of 128 columns. Estimated, not measured."""
    return 2 * L * D * item_size <= 3 * L2_BYTES or L * 128 * item_size > L2_BYTES


@triton.jit
def widened(numbers, TYPE: tl.constexpr):
    """bfloat16 by its bits, in half the instructions."""
    if numbers.dtype == tl.bfloat16:
        numbers = (numbers.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return numbers.to(TYPE)


@triton.jit
def times(row, stride):
    """row * stride, in 64 bits; that neither has a sign, nor 64 bits, spares three of four multiplications."""
    return row.to(tl.uint32).to(tl.int64) * tl.cast(stride, tl.uint32).to(tl.int64)


@triton.jit
def locate(indices, W_stride, j, limit, L):
    """Where the rows indices[j] of W begin, and which there are: j < limit and a latent 0 .. L - 1."""
    latents = tl.load(indices + j, mask=j < limit, other=-1)
    wanted = (latents >= 0) & (latents < L)
    return times(tl.where(wanted, latents, 0), W_stride), wanted


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
        wide = widened(rows, recons.dtype)
        for i in tl.static_range(SOURCES):
            of_source = tl.sum(tl.where(slots == i, value.to(recons.dtype), 0.0), axis=0)
            recons += tl.where(slots == i, tl.sum(of_source[:, None] * wide, axis=0)[None, :], 0.0)
    return recons


@triton.jit
def dots(products, grad, rows, SOURCES: tl.constexpr, TENSOR_CORES: tl.constexpr, OPERAND: tl.constexpr):
    """products[i, j] += sum_d grad[i, d] rows[j, d], [SLOTS, BLOCK_K]."""
    if TENSOR_CORES:
        products = tl.dot(grad.to(OPERAND), tl.trans(rows).to(OPERAND), products, input_precision="ieee")
    else:
        slots = tl.arange(0, grad.shape[0])[:, None]
        wide = widened(rows, products.dtype)
        for i in tl.static_range(SOURCES):
            of_source = tl.sum(tl.where(slots == i, grad.to(products.dtype), 0.0), axis=0)
            products += tl.where(slots == i, tl.sum(of_source[None, :] * wide, axis=1)[None, :], 0.0)
    return products


@triton.jit
def sum_rows(total, rows, many, D, block, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """total[d] = sum_r rows[r, d] for the columns of a block."""
    cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros([ROWS, BLOCK_D], total.dtype.element_ty)
    for start in range(0, many, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < many) & (cols < D)[None, :]
        sums += tl.load(rows + row * D + cols[None, :], mask=inside, other=0.0).to(sums.dtype)
    tl.store(total + cols, tl.sum(sums, axis=0), mask=cols < D)


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
