"""What `global_topk` multiplies and bounds, of samples and weights that are both bfloat16, in one launch.

Such a sample need not be rounded: x is multiplied as it is, and x.w - pre_bias.w, with the second product taken off the
biases, is the score. (x - pre_bias) would be rounded to bfloat16, by more than half of the bound as a rule. Where the
samples are much longer than what is left of them without pre_bias, rounding is the lesser loss, and they are centred.
Some samples of the batch decide for all; every program looks at the same. No support depends on it.

How far X.W + b is from the scores then: pre_bias.w is summed in float32, no deeper than in D / 256 + 64 steps; and the
scores are of x - pre_bias rounded to float32, 2^-24 of it in each column. By Cauchy-Schwarz, at most
    (rounding ||pre_bias|| + 2^-23 ||x - pre_bias||) ||w||
apart: a part of ||x - X|| in the bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.launching import launch, next_power_of_2

LARGEST_NORM = tl.constexpr(1e18)
CENTRED_BEYOND = tl.constexpr(8.0)  # ||x||^2 / ||x - pre_bias||^2; counted at shape A, bounds are equal at 8


@triton.jit
def norm_above(squares, growth, flushed, inverse, largest):
    """At least the root of a sum of squares taken in float32; 0 only of a row that is all zero; NaN stays."""
    norm = growth * (tl.sqrt(squares) * growth + flushed) * inverse
    norm = tl.where(norm >= LARGEST_NORM, float("inf"), norm)
    return tl.where((largest == 0) & (norm < LARGEST_NORM), 0.0, norm)


@triton.jit
def _are_multiplied_as_they_are(x, stride, pre_bias, N, D, LOOKED_AT: tl.constexpr, BLOCK_D: tl.constexpr):
    n = (tl.arange(0, LOOKED_AT).to(tl.int64) * N // LOOKED_AT)[:, None]
    whole = tl.zeros((LOOKED_AT, BLOCK_D), tl.float32)
    centred = tl.zeros((LOOKED_AT, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        inside = (column < D)[None, :]
        number = tl.load(x + n * stride + column[None, :], mask=inside, other=0).to(tl.float32)
        whole += number * number
        number -= tl.load(pre_bias + column, mask=column < D, other=0).to(tl.float32)[None, :]
        centred += number * number
    return tl.sum(tl.sum(whole, 1), 0) < CENTRED_BEYOND * tl.sum(tl.sum(centred, 1), 0)


@triton.jit(do_not_specialize=["first", "here", "N", "growth", "flushed", "rounding"])
def _prepare(
    bias, narrow_bias, counts, w_norm, X, norm, residual, inverse, size, x, stride, W, W_stride, pre_bias,
    latent_bias, stride_s, stride_l, first, here, N, L, D, growth, flushed, rounding,
    COUNTS: tl.constexpr, S: tl.constexpr, LOOKED_AT: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    SAMPLES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of L latents, TILES times ROWS a program; then of SAMPLES a program, those from `first` to first + here."""
    program, of_latents = tl.program_id(0), tl.cdiv(L, TILES * ROWS)
    as_they_are = _are_multiplied_as_they_are(x, stride, pre_bias, N, D, LOOKED_AT, BLOCK_D)
    if program < of_latents:
        if program == 0:
            tl.store(counts + tl.arange(0, COUNTS), 0)
        for tile in range(TILES):
            l = (program * TILES + tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
            squares = tl.zeros((ROWS, BLOCK_D), tl.float32)
            products = tl.zeros((ROWS, BLOCK_D), tl.float32)
            largest = tl.zeros((ROWS, BLOCK_D), tl.float32)
            for d in range(0, D, BLOCK_D):
                column = d + tl.arange(0, BLOCK_D)
                inside = (l < L)[:, None] & (column < D)[None, :]
                w = tl.load(W + l[:, None] * W_stride + column[None, :], mask=inside, other=0).to(tl.float32)
                centre = tl.load(pre_bias + column, mask=column < D, other=0).to(tl.float32)
                largest = tl.maximum(largest, tl.abs(w))
                squares += w * w
                products += w * centre[None, :]
            sums = tl.zeros((ROWS,), tl.float64)
            for s in range(S):
                sums += tl.load(latent_bias + s * stride_s + l * stride_l, mask=l < L, other=0).to(tl.float64)
            of_centre = tl.where(as_they_are, tl.sum(products, axis=1), 0.0).to(tl.float64)
            highest = tl.max(largest, axis=1)
            tl.store(bias + l, sums, mask=l < L)
            tl.store(narrow_bias + l, (sums - of_centre).to(tl.float32), mask=l < L)
            tl.store(w_norm + l, norm_above(tl.sum(squares, axis=1), growth, flushed, 1.0, highest), mask=l < L)
    else:
        n = (program - of_latents) * SAMPLES + tl.arange(0, SAMPLES)
        place = (first + n).to(tl.int64)[:, None] * stride
        squares = tl.zeros((SAMPLES, BLOCK_D), tl.float32)
        centred_squares = tl.zeros((SAMPLES, BLOCK_D), tl.float32)
        lost = tl.zeros((SAMPLES, BLOCK_D), tl.float32)
        largest = tl.zeros((SAMPLES, BLOCK_D), tl.float32)
        largest_centred = tl.zeros((SAMPLES, BLOCK_D), tl.float32)
        centre_squares = tl.zeros((BLOCK_D,), tl.float32)
        largest_centre = tl.zeros((BLOCK_D,), tl.float32)
        for d in range(0, D, BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            inside = (n < here)[:, None] & (column < D)[None, :]
            number = tl.load(x + place + column[None, :], mask=inside, other=0).to(tl.float32)
            centre = tl.load(pre_bias + column, mask=column < D, other=0).to(tl.float32)
            centre_squares += centre * centre
            largest_centre = tl.maximum(largest_centre, tl.abs(centre))
            centred = tl.where(inside, number - centre[None, :], 0.0)
            centred_squares += centred * centred
            largest_centred = tl.maximum(largest_centred, tl.abs(centred))
            number = tl.where(as_they_are, number, centred)
            squares += number * number
            largest = tl.maximum(largest, tl.abs(number))
            rounded = number.to(X.dtype.element_ty)
            tl.store(X + n.to(tl.int64)[:, None] * D + column[None, :], rounded, mask=inside)
            rest = number - rounded.to(tl.float32)
            lost += rest * rest
        highest, highest_centre = tl.max(largest, axis=1), tl.max(largest_centre, axis=0)
        of_centre = norm_above(tl.sum(centre_squares, axis=0), growth, flushed, 1.0, highest_centre)
        of_centred = norm_above(tl.sum(centred_squares, axis=1), growth, flushed, 1.0, tl.max(largest_centred, axis=1))
        rest = norm_above(tl.sum(lost, axis=1), growth, flushed, 1.0, highest)
        rest = tl.where(as_they_are, growth * (rounding * of_centre + 2.0**-23 * of_centred), rest)
        tl.store(norm + n, norm_above(tl.sum(squares, axis=1), growth, flushed, 1.0, highest), mask=n < here)
        tl.store(residual + n, tl.where(rest == rest, rest, float("inf")), mask=n < here)
        tl.store(inverse + n, tl.full((SAMPLES,), 1.0, tl.float32), mask=n < here)
        tl.store(size + n, of_centred, mask=n < here)


def choice(D: int) -> dict[str, int]:
    # estimated, not measured: 32 bytes of W in flight a thread, in rows of a warp; what all look at is an eighth of a
    # program
    block = min(256, max(16, next_power_of_2(D)))
    rows = min(2048 // block, 64)
    sizes = {"ROWS": rows, "SAMPLES": max(rows // 2, 1), "BLOCK_D": block}
    return {"LOOKED_AT": 4, "TILES": 8, **sizes, "num_warps": 4, "maxnreg": 96}


def fits(x: Tensor, W: Tensor, dtype: torch.dtype) -> bool:
    """Whether the product of what is stored in `dtype` is one of these operands."""
    return x.dtype == W.dtype == dtype == torch.bfloat16


def prepare(
    biases: tuple[Tensor, Tensor, Tensor], w_norm: Tensor, X: Tensor, of_x: Tensor, x: Tensor, W: Tensor,
    pre_bias: Tensor, latent_bias: Tensor, first: int, here: int, growth: float, flushed: float, rounding: float,
) -> None:  # fmt: skip
    """Of the samples from `first` on, X [here, D] and of_x [4, here]: bounds of ||X||, of what X is away from them, 1,
    and a bound of ||x - pre_bias||; with first == 0 also what is the latents'.

    ``biases`` are their sums in float64, those that belong to X in float32, and how many samples are given up, and
    how many parts of each are done: none.
    """
    (N, D), L, chosen = x.shape, 0 if first else len(W), choice(x.shape[1])
    programs = triton.cdiv(L, chosen["TILES"] * chosen["ROWS"]) + triton.cdiv(here, chosen["SAMPLES"])
    launch(
        _prepare, (programs,), *biases, w_norm, X, *of_x, x, x.stride(0), W, W.stride(0), pre_bias, latent_bias,
        *latent_bias.stride(), first, here, N, L, D, growth, flushed, rounding, COUNTS=len(biases[2]),
        S=len(latent_bias), **chosen,
    )  # fmt: skip
