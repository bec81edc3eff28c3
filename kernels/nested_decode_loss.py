"""`decode_loss` of nested dictionaries at once, from one gather of each sample's rows.

E[p, n, s, d]           = sum_{j: I[n, s, j] < m_p} values[n, s, j] W_dec[I[n, s, j], d] + pre_bias[d] - target[n, d]
nmse[p, s, t]           = sum_n scale[n, t] sum_{d in t} E[p, n, s, d]^2
grad_recons[g, n, s, d] = 2 / P weights[s, t] scale[n, t] sum_{p >= g} E[p, n, s, d],  t = s(d)
grad_values[n, s, j]    = sum_d grad_recons[g(l), n, s, d] W_dec[l, d],  l = I[n, s, j],  m_{g(l) - 1} <= l < m_{g(l)}
grad_pre_bias[d]        = sum_{n, s} grad_recons[0, n, s, d]

A program does what one of `decode_loss` does, for the last dictionary first: while the rows of a block of columns are
kept, the errors of every dictionary come from them, and gradients are added up on the way to the first, each going back
through the rows of its own group. Supports too long to be kept are gathered again for every dictionary, of each as much
as it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.decode_loss import choice as of_one_dictionary
from sparc_fast.kernels.decode_loss import losses
from sparc_fast.kernels.gather import coefficients, combine, dots, gather, locate
from sparc_fast.kernels.launching import next_power_of_2


@triton.jit(do_not_specialize=["N"])
def _nested_decode_loss_kernel(
    nmse_parts, grad_recons, grad_values_parts,
    values, indices, W_dec, pre_bias, target, scale, weights, sizes, columns, W_stride, target_stride, N, S, k, L, D,
    PER_STREAM: tl.constexpr, KEPT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, SUM: tl.constexpr,
    OPERAND: tl.constexpr, TENSOR_CORES: tl.constexpr, SOURCES: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PREFIXES: tl.constexpr, BLOCK_P: tl.constexpr,
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
    factor = tl.where(counts, (2 * weight / PREFIXES).to(SUM) * sample_scale, 0.0)
    j = tl.arange(0, BLOCK_K)
    prefixes = tl.arange(0, BLOCK_P)
    parts = grad_values_parts + sources[:, None] * k + j[None, :]

    if KEPT:
        latents = tl.load(support + j, mask=j < k_read, other=-1)
        offsets, wanted = locate(support, W_stride, j, k_read, L)
        value = coefficients(values, sources, mine, k, j, wanted)
    squares = tl.zeros([SLOTS, BLOCK_P], SUM)
    products = tl.zeros([SLOTS, BLOCK_K], SUM)
    for start in range(begin, end, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        inside = (cols < end) | EVEN  # where all blocks are whole, the compiler need not look
        if KEPT:
            rows = gather(W_dec, offsets, wanted, cols, inside)
        bias = tl.load(pre_bias + cols, mask=inside, other=0.0).to(SUM)
        bias -= tl.load(target + n * target_stride + cols, mask=inside, other=0.0).to(SUM)
        total = tl.zeros([SLOTS, BLOCK_D], SUM)  # of the gradients of this prefix and those after it
        for back in range(PREFIXES):
            p = PREFIXES - 1 - back
            size = tl.load(sizes + p)
            below = tl.load(sizes + p - 1, mask=p > 0, other=0)
            error = tl.zeros([SLOTS, BLOCK_D], SUM)
            if KEPT:
                of_prefix = tl.where((latents < size)[None, :], value, 0.0)
                error = combine(error, of_prefix, rows, SOURCES, TENSOR_CORES, OPERAND)
            else:
                for start_j in range(0, k, BLOCK_K):
                    at = start_j + j
                    here = tl.load(support + at, mask=at < k_read, other=-1)
                    its_offsets, its_wanted = locate(support, W_stride, at, k_read, L)
                    its_wanted &= here < size
                    its_rows = gather(W_dec, its_offsets, its_wanted, cols, inside)
                    its_value = coefficients(values, sources, mine, k, at, its_wanted)
                    error = combine(error, its_value, its_rows, SOURCES, TENSOR_CORES, OPERAND)
            # a pair of weight 0 is not computed: nothing it holds, NaN or not, goes on from here
            error = tl.where(counts[:, None] & inside[None, :], error + bias[None, :], 0.0)
            squares += tl.where((prefixes == p)[None, :], tl.sum(error * error, axis=1)[:, None], 0.0)
            total += factor[:, None] * error
            grad = total.to(grad_recons.dtype.element_ty)  # grad_values comes from the gradient as it is stored
            out = grad_recons + ((p * N + n) * S + sources)[:, None] * D + cols[None, :]
            tl.store(out, grad, mask=mine[:, None] & inside[None, :])
            if KEPT:
                part = dots(tl.zeros([SLOTS, BLOCK_K], SUM), grad, rows, SOURCES, TENSOR_CORES, OPERAND)
                products += tl.where(((latents >= below) & (latents < size))[None, :], part, 0.0)
            else:
                for start_j in range(0, k, BLOCK_K):
                    at = start_j + j
                    here = tl.load(support + at, mask=at < k_read, other=-1)
                    its_offsets, its_wanted = locate(support, W_stride, at, k_read, L)
                    is_last = tl.zeros_like(at) + p == PREFIXES - 1
                    nothing = is_last & ~its_wanted  # slots of no group are written with the last one's
                    its_wanted &= (here >= below) & (here < size)
                    its_rows = gather(W_dec, its_offsets, its_wanted, cols, inside)
                    part = dots(tl.zeros([SLOTS, BLOCK_K], SUM), grad, its_rows, SOURCES, TENSOR_CORES, OPERAND)
                    part = tl.where(its_wanted[None, :], part, 0.0)
                    written = (at < k) & (its_wanted | nothing)
                    tl.store(parts + start_j, part, mask=mine[:, None] & written[None, :])
    squares = tl.where(counts[:, None], sample_scale * squares, 0.0)
    chunks = tl.num_programs(1)
    at_part = (prefixes[None, :] * chunks + chunk).to(tl.int64) * S + sources[:, None]
    tl.store(nmse_parts + at_part * N + n, squares, mask=mine[:, None] & (prefixes < PREFIXES)[None, :])
    if KEPT:
        products = tl.where(wanted[None, :], products, 0.0)  # where there is no row, whatever the gradient is
        tl.store(parts, products, mask=mine[:, None] & (j < k)[None, :])


def choice(
    S: int, k: int, L: int, width: int, values: torch.dtype, rows: torch.dtype, aligned: bool
) -> dict[str, int]:  # fmt: skip
    # estimated, not measured: as for one dictionary, whose rows are read in the same order
    chosen = of_one_dictionary(S, k, L, width, values, rows, aligned)
    if chosen["TENSOR_CORES"] or chosen["BLOCK_K"] > 64:  # the gradients that are added up take registers besides
        chosen["maxnreg"] = 255
    return chosen


def nested_decode_loss(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    pre_bias: Tensor,
    target: Tensor,
    scale: Tensor,
    weights: Sequence[float],
    d_streams: Sequence[int],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = values, indices, W_dec, pre_bias, target, scale, weights, d_streams
    P, ends = len(sizes), _sizes(tuple(sizes), values.device)
    constants = {"PREFIXES": P, "BLOCK_P": next_power_of_2(P)}
    return losses(_nested_decode_loss_kernel, choice, *operands, P, [ends], **constants)


@cache
def _sizes(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept for good, as a captured CUDA graph goes on reading it."""
    return torch.tensor(sizes, dtype=torch.int64, device=device)
