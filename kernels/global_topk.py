"""indices[n] = the k latents l of largest h[n, l] = sum_d (x - pre_bias)[n, d] W_enc[l, d] + sum_s latent_bias[s, l].

h is summed in float64 and rounded once to float32; ties go to the lower latent, NaN ranks with +inf. Almost all latents
are excluded without that sum, by a GEMM in the tensor cores, chunk by chunk of latents, never [N, L].

Let h = x.w + b exactly, x centred, and a the product of X and W, rounded copies of x and w. Then
    |a + b - h| <= E = p ||w|| + q ||w - W|| + c |a| + s,   p = ||x - X|| + gamma ||X||,   q = (1 + gamma) ||X||:
  x.w - X.W = (x - X).w + X.(w - W)           by Cauchy-Schwarz, at most ||x - X|| ||w|| + ||X|| ||w - W||;
  the GEMM sums D products in any order       gamma ||X|| ||W||,  gamma = D u / (1 - D u),  u = 2^-22: four times the
                                              unit roundoff, as tensor cores align the 16 products of an instruction
                                              and the sum so far to the largest and cut them to no fewer than 24 bits:
                                              at most 17 * 2^-23 of sum_d |X_d W_d| an instruction;  ||W|| <= ||w|| +
                                              ||w - W||; this is also far above what the float64 sum adds;
  a + b, b and E are rounded to float32       c = 2^-22,  s = 2^-22 |b|,  p and q grow by 2^-20;
  products, inputs may flush to zero          s += 4 (D + 8) 2^-126, and 2^-63 sqrt(D) on every norm.
Norms are measured, and rounded up. A row of x or w that is all zero makes a = 0 and E = 0. A norm above 10^18 counts as
infinite: no sum that is bounded can overflow. An infinite or NaN E makes the interval [-inf, inf]. float16 copies are
of rows times a power of two, which brings their largest number to [1, 2): no number is out of range, and what becomes
too small is in ||x - X||. Rounding is monotone, so [a + b - E, a + b + E] also holds the rounded score.

Samples and weights that are both bfloat16 need not be copies of what is centred: screened_operands.py says which x and
b these are then, and what more p holds.

The filter (topk_rows.py says how) keeps, sample by sample, what may be among the k largest. In the end those whose
lower end is above all but k upper ends are in the support; of the others, the ambiguous, those around the k-th get a
sum in float32, whose sums are short: ||x|| ||w|| (D / BLOCK_D + 64) 2^-23 is its E. What is still ambiguous gets the
score of the specification, which makes its interval a point. Samples whose candidates do not fit, whose norm is not
finite, and all of float64, are scored in full: by programs that each stream a part of W, or end if there are none.
A score is summed in an order that depends on D alone: no result depends on the batch, the chunks or these choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.gather import widened
from sparc_fast.kernels.launching import launch, next_power_of_2
from sparc_fast.kernels.screened_operands import LARGEST_NORM, fits, norm_above, prepare
from sparc_fast.kernels.topk_rows import (
    REGISTERS,
    TOP,
    candidate_room,
    choose,
    kth_largest,
    merge_parts,
    number_of,
    sortable,
    take,
)
from sparc_fast.ops.gpu_scratch import CANDIDATES, ROOM, ROWS, SPARE
from sparc_fast.ops.layout import wide_type

SCORES = 0.64  # of the L2 cache may be scores of one GEMM: they are still there when the filter reads them


def measure_choice(D: int) -> dict[str, int]:
    # estimated, not measured: 16 numbers a thread, loaded 16 bytes at a time; short rows by many at once
    block = min(512, max(16, next_power_of_2(D)))
    return {"ROWS": 4 if block == 512 else 64, "BLOCK_D": block, "num_warps": 4}


def filter_choice(chunk: int, capacity: int, rows: int) -> dict[str, int]:
    # estimated, not measured: 16 scores a thread, 4 where they are taken in. A sample's warp alone needs no barrier;
    # where there are not samples for all warps, a sample has four
    warps = 1 if rows >= 2048 else 4
    fours = 1 << capacity.bit_length() - 1  # as many may pass at once as there is room for their places
    columns = max(min(512 * warps, next_power_of_2(chunk), 4 * fours), 16)
    block = min(columns, 128 * warps)
    return {"COLUMNS": columns, "BLOCK": block, "num_warps": max(block // 128, 1), "maxnreg": REGISTERS}


def settle_choice(D: int, capacity: int, item_size: int) -> dict[str, int]:
    # estimated, not measured: 8 KB of W in flight for each of four samples a multiprocessor. BLOCK_D: see full_choice
    block_d = min(256, max(16, next_power_of_2(D)))
    block = min(512, max(16, next_power_of_2(capacity)))
    return {
        "R": rows_at_once(D, block_d, item_size),
        "EXACT_R": 2,
        "BLOCK_D": block_d,
        "BLOCK": block,
        "num_warps": 4,
    }


def full_choice(D: int, item_size: int) -> dict[str, int]:
    # estimated, not measured: the reductions of a step are short beside its 8 KB of W. BLOCK_D is the order of a
    # score's sum: the same here and in settle_choice
    block_d = min(256, max(16, next_power_of_2(D)))
    rows = rows_at_once(D, block_d, item_size)
    registers = REGISTERS if D % 16 == 0 else 255  # addresses of single numbers do not fit beside a second program
    return {"R": rows, "BLOCK_D": block_d, "BLOCK": 512, "num_warps": 8, "maxnreg": registers}


def rows_at_once(D: int, block_d: int, item_size: int) -> int:
    """8 KB of W; half of that where every number's address takes registers, as rows cannot be read 16 bytes at once."""
    return max(min(64, 8192 // item_size // block_d) // (1 if D % 16 == 0 else 2), 1)


@lru_cache(maxsize=256)
def chunk_length(rows: int, L: int, l2_bytes: int, multiprocessors: int) -> int:
    """Latents of one GEMM: scores that stay in L2, and tiles of 128 x 256 that fill whole waves."""
    most = max(256, int(SCORES * l2_bytes) // (4 * rows) // 256 * 256)
    if most >= L:
        return L

    def used(chunk: int) -> float:
        tiles = -(-rows // 128) * (chunk // 256)
        return tiles / (-(-tiles // multiprocessors) * multiprocessors)

    return max(range(max(256, most // 512 * 256), most + 1, 256), key=lambda chunk: (round(used(chunk), 2), chunk))


@lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[int, int]:
    """(bytes of L2 cache, multiprocessors)"""
    if device.type != "cuda":
        return 2**20, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.L2_cache_size, properties.multi_processor_count


@triton.jit
def _sum_biases(
    bias, narrow_bias, counts, latent_bias, stride_s, stride_l, given_up, L, S: tl.constexpr, COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`summed_bias`, the same in float32, and how many samples are given up so far, with no part of them done."""
    l = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for s in range(S):
        sums += tl.load(latent_bias + s * stride_s + l * stride_l, mask=l < L, other=0).to(tl.float64)
    tl.store(bias + l, sums, mask=l < L)
    tl.store(narrow_bias + l, sums.to(tl.float32), mask=l < L)
    if tl.program_id(0) == 0:
        place = tl.arange(0, COUNTS)
        tl.store(counts + place, tl.where(place == 0, given_up, 0))


@triton.jit
def _list_latents(listed, many, among, L, BLOCK: tl.constexpr):
    """The latents that `among` says, ascending, and how many these are: a single program."""
    count = 0
    for start in range(0, L, BLOCK):
        l = start + tl.arange(0, BLOCK)
        here = tl.load(among + l, mask=l < L, other=0).to(tl.int32)
        tl.store(listed + count + tl.cumsum(here, axis=0) - here, l, mask=here > 0)
        count += tl.sum(here, axis=0)
    tl.store(many, count)


@triton.jit(do_not_specialize=["first"])
def _multiply_listed(
    scores, X, W, many, first, N, D, chunk,
    OPERAND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scores[n, j] = X[n] . W[j] for as many of a chunk's rows of W as there are; tiles beyond these end at once."""
    n, j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    here = tl.load(many) - first
    if tl.program_id(0) * BLOCK_L < here:
        of_x, of_w = X + n.to(tl.int64)[:, None] * D, W + j.to(tl.int64)[:, None] * D
        sums = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        for d in range(0, D, BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            inside = (column < D)[None, :]
            x = tl.load(of_x + column[None, :], mask=(n < N)[:, None] & inside, other=0)
            w = tl.load(of_w + column[None, :], mask=(j < here)[:, None] & inside, other=0)
            sums = tl.dot(x.to(OPERAND), tl.trans(w).to(OPERAND), sums, input_precision="ieee")
        to = scores + n.to(tl.int64)[:, None] * chunk + j[None, :]
        tl.store(to, sums, mask=(n < N)[:, None] & (j < chunk)[None, :])


@triton.jit(do_not_specialize=["first", "N", "growth", "flushed"])
def _measure(
    v, stride, pre_bias, copy, norm, residual, inverse_scale, listed, many, first, N, D, growth, flushed,
    CENTRED: tl.constexpr, COPIED: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copies rows of v (minus pre_bias), and bounds their norms and what the copy took from them.

    Where rows are listed, those that are listed from `first` on, of as many as there are.
    """
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, width = at, D
    if listed is not None:
        N = tl.minimum(N, tl.load(many) - first)
        row = tl.load(listed + first + at, mask=at < N, other=0)
        width = tl.where(tl.program_id(0) * ROWS < N, D, 0)
    wanted = at < N
    place, to = row.to(tl.int64)[:, None], at.to(tl.int64)[:, None]
    inverse = tl.full((ROWS,), 1.0, tl.float32)
    scale = inverse
    if SCALED:
        largest = tl.zeros((ROWS,), tl.float32)
        for d in range(0, width, BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            inside = wanted[:, None] & (column < D)[None, :]
            number = tl.load(v + place * stride + column[None, :], mask=inside, other=0).to(tl.float32)
            if CENTRED:
                number -= tl.load(pre_bias + column, mask=column < D, other=0).to(tl.float32)[None, :]
            largest = tl.maximum(largest, tl.max(tl.abs(number), axis=1))
        # 2^60 and its inverse bound the factors: their products stay normal numbers
        exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 127 - 60), 127 + 60)
        inverse = (exponent << 23).to(tl.float32, bitcast=True)
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    squares = tl.zeros((ROWS, BLOCK_D), tl.float32)
    lost = tl.zeros((ROWS, BLOCK_D), tl.float32)
    largest = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for d in range(0, width, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        inside = wanted[:, None] & (column < D)[None, :]
        number = tl.load(v + place * stride + column[None, :], mask=inside, other=0).to(tl.float32)
        if CENTRED:
            number -= tl.load(pre_bias + column, mask=column < D, other=0).to(tl.float32)[None, :]
        largest = tl.maximum(largest, tl.abs(number))
        number = number * scale[:, None]
        squares += number * number
        if COPIED:
            rounded = number.to(copy.dtype.element_ty)
            tl.store(copy + to * D + column[None, :], rounded, mask=inside)
            rest = number - rounded.to(tl.float32)
            lost += rest * rest
    highest = tl.max(largest, axis=1)
    tl.store(norm + row, norm_above(tl.sum(squares, axis=1), growth, flushed, inverse, highest), mask=wanted)
    if COPIED:
        rest = norm_above(tl.sum(lost, axis=1), growth, flushed, inverse, highest)
        tl.store(residual + row, tl.where(rest == rest, rest, float("inf")), mask=wanted)
        tl.store(inverse_scale + row, inverse, mask=wanted)


@triton.jit
def _interval(a, b, bound, slack, zero):
    """Keys of the ends of a + b -+ E, where a is x.w up to `bound`, or 0 where a row is zero."""
    size = tl.abs(b)
    error = bound + (2.0**-22 * tl.abs(a) + slack + 2.0**-22 * tl.where(size < LARGEST_NORM, size, 0))
    error = tl.where(zero, 0, error)
    error = tl.where((size >= LARGEST_NORM) & (size < float("inf")), float("nan"), error)
    lower = a + b - error
    return sortable(tl.where(lower == lower, lower, float("-inf"))), sortable(a + b + error)


@triton.jit
def _of_latents(
    scores, first, lane, valid, bias, w_norm, w_residual, w_inverse, listed, inverse, p, q, flushed,
    COPIED: tl.constexpr,
):  # fmt: skip
    """(latent, a, b, ||w||, p ||w|| + q ||w - W||) at these lanes of a chunk."""
    latent = first + lane
    if listed is not None:
        latent = tl.load(listed + latent, mask=valid, other=0)
    a = tl.load(scores + lane, mask=valid, other=0) * inverse
    b = tl.load(bias + latent, mask=valid, other=0)
    norm = tl.load(w_norm + latent, mask=valid, other=0)
    residual = flushed
    if COPIED:
        a *= tl.load(w_inverse + latent, mask=valid, other=1)
        residual = tl.load(w_residual + latent, mask=valid, other=0)
    return latent, a, b, norm, p * norm + q * residual


@triton.jit
def _take_fours(
    scores, first, here, places, staged, bias, w_norm, w_residual, w_inverse, listed, inverse, p, q, flushed, slack,
    is_zero, count, threshold, lows, highs, latents, k, capacity,
    COPIED: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`take` of the fours of neighbours that are listed."""
    tl.debug_barrier()  # places are read by other threads than wrote them
    for start in range(0, staged, BLOCK // 4):
        at = start + tl.arange(0, BLOCK // 4)
        four = tl.multiple_of(tl.load(places + at, mask=at < staged, other=0), 4)
        lane = four[:, None] + tl.arange(0, 4)[None, :]
        valid = (at < staged)[:, None] & (lane < here)
        latent, a, b, norm, bound = _of_latents(
            scores, first, lane, valid, bias, w_norm, w_residual, w_inverse, listed, inverse, p, q, flushed, COPIED
        )  # fmt: skip
        lower, upper = _interval(a, b, bound, slack, (norm < tl.where(is_zero, float("inf"), 0)) | (norm == 0))
        count, threshold = take(
            lower.reshape(BLOCK), upper.reshape(BLOCK), latent.reshape(BLOCK), valid.reshape(BLOCK), count, threshold,
            lows, highs, latents, k, capacity, False, TOP, BLOCK,
        )  # fmt: skip
    tl.debug_barrier()
    return count, threshold


@triton.jit(do_not_specialize=["k", "capacity", "gamma", "flushed", "slack"])
def _filter(
    scores, first, chunk, bias, w_norm, w_residual, w_inverse, x_norm, x_residual, x_inverse, counts, thresholds,
    lows, highs, latents, places, listed, many, k, capacity, gamma, flushed, slack,
    COPIED: tl.constexpr, TOP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Takes in the scores of latents first ... first + chunk - 1 of one sample, or of those so listed.

    Most have an upper end below the threshold: fours of neighbours that all have are passed over, the others listed.
    """
    row = tl.program_id(0).to(tl.int64)
    rest = tl.load(x_residual + row)
    whole = tl.load(x_norm + row) + rest
    p = (rest + gamma * whole) * (1 + 2.0**-20)
    q = (1 + gamma) * whole * (1 + 2.0**-20)
    inverse = tl.load(x_inverse + row)
    count, threshold = tl.load(counts + row), tl.load(thresholds + row)
    # a count of -1 is a sample given up, -2 one that holds NaN
    start_count = tl.where(whole != whole, -2, tl.where(q < float("inf"), 0, -1))
    count = tl.where(first == 0, start_count, count)
    threshold = tl.where(first == 0, -TOP, threshold)
    scores += row * chunk
    lows += row * capacity
    highs += row * capacity
    latents += row * capacity
    places += row * capacity
    here = chunk
    if listed is not None:
        here = tl.minimum(chunk, tl.load(many) - first)
    here = tl.where(count < 0, 0, here)
    fours = 4 * tl.arange(0, COLUMNS // 4)
    staged, limit = 0, number_of(threshold)
    for start in range(0, here, COLUMNS):
        lane = start + fours[:, None] + tl.arange(0, 4)[None, :]
        valid = lane < here
        _, a, b, _, bound = _of_latents(
            scores, first, lane, valid, bias, w_norm, w_residual, w_inverse, listed, inverse, p, q, flushed, COPIED
        )  # fmt: skip
        # an upper end as of `_interval`, or a higher one
        size = tl.abs(b)
        end = a + b + (bound + (2.0**-22 * tl.abs(a) + slack + 2.0**-22 * tl.minimum(size, LARGEST_NORM)))
        passes = valid & ((size >= LARGEST_NORM) | ~(end <= limit))
        four_passes = tl.max(passes.to(tl.int32), axis=1)
        passing = tl.sum(four_passes, axis=0)
        if passing > 0:
            slot = staged + tl.cumsum(four_passes, axis=0) - 1
            tl.store(places + slot, start + fours, mask=four_passes > 0)
            staged += passing
        if (staged + COLUMNS // 4 > capacity) | (start + COLUMNS >= here):
            count, threshold = _take_fours(
                scores, first, here, places, staged, bias, w_norm, w_residual, w_inverse, listed, inverse, p, q,
                flushed, slack, whole == 0, count, threshold, lows, highs, latents, k, capacity, COPIED, TOP, BLOCK,
            )  # fmt: skip
            staged, limit = 0, tl.where(count < 0, float("inf"), number_of(threshold))
    tl.store(counts + row, count)
    tl.store(thresholds + row, threshold)


@triton.jit
def exact_scores(
    x, pre_bias, W, W_stride, bias, latent, wanted, D, SUM: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The scores of the specification of a sample and R latents. Halving fixes the order of the sum."""
    sums = tl.zeros((R, BLOCK_D), tl.float64)
    for d in range(0, D, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        inside = column < D
        centred = tl.load(x + column, mask=inside, other=0).to(SUM)
        centred -= tl.load(pre_bias + column, mask=inside, other=0).to(SUM)
        place = latent.to(tl.int64)[:, None] * W_stride + column[None, :]
        w = tl.load(W + place, mask=wanted[:, None] & inside[None, :], other=0)
        sums += widened(w, tl.float64) * centred.to(tl.float64)[None, :]
    width: tl.constexpr = BLOCK_D // 16
    # within 16 neighbours, then over these
    parts = tl.reshape(sums, (R, width, 16))
    a, b = tl.split(tl.reshape(parts, (R, width, 8, 2)))
    a, b = tl.split(tl.reshape(a + b, (R, width, 4, 2)))
    a, b = tl.split(tl.reshape(a + b, (R, width, 2, 2)))
    a, b = tl.split(a + b)
    total = tl.reshape(a + b, (R, width))
    if width >= 32:
        a, b = tl.split(tl.reshape(total, (R, width // 2, 2)))
        total = a + b
    if width >= 16:
        a, b = tl.split(tl.reshape(total, (R, total.shape[1] // 2, 2)))
        total = a + b
    if width >= 8:
        a, b = tl.split(tl.reshape(total, (R, total.shape[1] // 2, 2)))
        total = a + b
    if width >= 4:
        a, b = tl.split(tl.reshape(total, (R, total.shape[1] // 2, 2)))
        total = a + b
    if width >= 2:
        a, b = tl.split(tl.reshape(total, (R, total.shape[1] // 2, 2)))
        total = tl.reshape(a + b, (R, 1))
    score = tl.reshape(total, (R,)) + tl.load(bias + latent, mask=wanted, other=0)
    return score.to(SUM)


@triton.jit
def _float32_dots(x, pre_bias, W, W_stride, latent, wanted, D, R: tl.constexpr, BLOCK_D: tl.constexpr):
    """The products of a sample and R latents; no sum is deeper than D / BLOCK_D + 32."""
    sums = tl.zeros((R, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        inside = column < D
        centred = tl.load(x + column, mask=inside, other=0).to(tl.float32)
        centred -= tl.load(pre_bias + column, mask=inside, other=0).to(tl.float32)
        place = latent.to(tl.int64)[:, None] * W_stride + column[None, :]
        w = tl.load(W + place, mask=wanted[:, None] & inside[None, :], other=0)
        sums += widened(w, tl.float32) * centred[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def _mark(above, below, lows, highs, places, count, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Lists the intervals with lower end <= `above` and upper end >= `below` that are not points."""
    marked = 0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        low = tl.load(lows + place, mask=place < count, other=TOP)
        high = tl.load(highs + place, mask=place < count, other=-TOP)
        mark = (low < high) & (low <= above) & (high >= below)
        slot = marked + tl.cumsum(mark.to(tl.int32), axis=0) - 1
        tl.store(places + slot, place, mask=mark)
        marked += tl.sum(mark.to(tl.int32), axis=0)
    tl.debug_barrier()
    return marked


@triton.jit(do_not_specialize=["first_row", "k", "capacity", "rounding", "slack"])
def _settle(
    x, x_stride, pre_bias, W, W_stride, bias, first_row, D, x_norm, w_norm, counts, lows, highs, latents, places, k,
    capacity, rounding, slack, indices, given_up, total, listed, many,
    R: tl.constexpr, EXACT_R: tl.constexpr, BLOCK_D: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The support of one sample from its candidates, or its number among those given up."""
    row = tl.program_id(0).to(tl.int64)
    count, size = tl.load(counts + row), tl.load(x_norm + row)
    lows += row * capacity
    highs += row * capacity
    latents += row * capacity
    places += row * capacity
    row += first_row
    x += row * x_stride
    indices += row * k
    if count == -1:
        tl.store(given_up + tl.atomic_add(total, 1), row.to(tl.int32))
    elif count == -2:  # every score is NaN
        for start in range(0, k, BLOCK):
            lane = start + tl.arange(0, BLOCK)
            if listed is None:
                tl.store(indices + lane, lane, mask=lane < k)
            else:
                inside = lane < tl.minimum(k, tl.load(many))
                tl.store(indices + lane, tl.load(listed + lane, mask=inside, other=0), mask=inside)
    else:
        if count > k:
            # the k-th score is between these: intervals around it become narrow by a sum in float32
            least, rival = kth_largest(lows, count, k, TOP, BLOCK), kth_largest(highs, count, k, TOP, BLOCK)
            kth = (least >> 1) + (rival >> 1)
            marked = _mark(kth, kth, lows, highs, places, count, TOP, BLOCK)
            for start in range(0, marked, R):
                lane = start + tl.arange(0, R)
                wanted = lane < marked
                place = tl.load(places + lane, mask=wanted, other=0)
                latent = tl.load(latents + place, mask=wanted, other=0)
                a = _float32_dots(x, pre_bias, W, W_stride, latent, wanted, D, R, BLOCK_D)
                b = tl.load(bias + latent, mask=wanted, other=0).to(tl.float32)
                norm = tl.load(w_norm + latent, mask=wanted, other=0)
                zero = (norm < tl.where(size == 0, float("inf"), 0)) | (norm == 0)
                lower, upper = _interval(a, b, rounding * size * norm, slack, zero)
                lower = tl.maximum(lower, tl.load(lows + place, mask=wanted, other=0))
                upper = tl.minimum(upper, tl.load(highs + place, mask=wanted, other=0))
                tl.debug_barrier()  # the same number may be held by several threads
                tl.store(lows + place, lower, mask=wanted)
                tl.store(highs + place, upper, mask=wanted)
            tl.debug_barrier()
            # few are left on both sides of these: they get the score of the specification
            least, rival = kth_largest(lows, count, k, TOP, BLOCK), kth_largest(highs, count, k + 1, TOP, BLOCK)
            marked = _mark(rival, least, lows, highs, places, count, TOP, BLOCK)
            for start in range(0, marked, EXACT_R):
                lane = start + tl.arange(0, EXACT_R)
                wanted = lane < marked
                place = tl.load(places + lane, mask=wanted, other=0)
                latent = tl.load(latents + place, mask=wanted, other=0)
                key = sortable(
                    exact_scores(x, pre_bias, W, W_stride, bias, latent, wanted, D, tl.float32, EXACT_R, BLOCK_D)
                )
                tl.store(lows + place, key, mask=wanted)
                tl.store(highs + place, key, mask=wanted)
            tl.debug_barrier()
            for start in range(0, count, BLOCK):
                place = start + tl.arange(0, BLOCK)
                low = tl.load(lows + place, mask=place < count, other=-TOP)
                high = tl.load(highs + place, mask=place < count, other=-TOP)
                key = tl.where(low > rival, TOP - 1, tl.where(high < least, -TOP, low))
                tl.debug_barrier()
                tl.store(lows + place, key, mask=place < count)
        choose(lows, latents, count, k, indices, lows, False, TOP, BLOCK)


@triton.jit(do_not_specialize=["L", "k", "capacity"])
def _score_in_full(
    x, x_stride, pre_bias, W, W_stride, bias, L, D, k, capacity, given_up, rows, keys, latents, part_keys, part_latents,
    part_counts, indices, among,
    SUM: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The k largest exact scores of the samples given up; where these are few, of parts, which the program that is
    last done with a sample's merges."""
    program = tl.program_id(0)
    groups = tl.load(given_up)
    parts = tl.maximum(tl.num_programs(0) // tl.maximum(groups, 1), 1)
    span = tl.cdiv(L, parts)
    keys += program.to(tl.int64) * capacity
    latents += program.to(tl.int64) * capacity
    all_keys, all_latents = part_keys, part_latents
    part_keys += program.to(tl.int64) * k
    part_latents += program.to(tl.int64) * k
    for task in range(program, groups * parts, tl.num_programs(0)):
        row = tl.load(rows + task // parts).to(tl.int64)
        begin = task % parts * span
        end = tl.minimum(begin + span, L)
        count, threshold = tl.full((), 0, tl.int32), tl.full((), -TOP, keys.dtype.element_ty)
        for start in range(begin, end, R):
            latent = start + tl.arange(0, R)
            wanted = latent < end
            if among is not None:
                wanted = wanted & (tl.load(among + latent, mask=wanted, other=0) != 0)
            key = sortable(
                exact_scores(x + row * x_stride, pre_bias, W, W_stride, bias, latent, wanted, D, SUM, R, BLOCK_D)
            )
            count, threshold = take(
                key, key, latent, wanted, count, threshold, keys, keys, latents, k, capacity, True, TOP, BLOCK
            )
        written = choose(keys, latents, count, k, part_latents, part_keys, True, TOP, BLOCK)
        tl.store(part_counts + program, written)
        tl.debug_barrier()
        if parts == 1:
            for start in range(0, k, BLOCK):
                lane = start + tl.arange(0, BLOCK)
                name = tl.load(part_latents + lane, mask=lane < written, other=0)
                tl.store(indices + row * k + lane, name, mask=lane < written)
        elif tl.atomic_add(given_up + 1 + task // parts, 1) == parts - 1:
            merge_parts(
                task // parts, parts, row, all_keys, all_latents, part_counts, k, capacity, keys, latents, indices, TOP,
                BLOCK,
            )  # fmt: skip
        tl.debug_barrier()


def _float32_is_ieee(device: torch.device) -> bool:
    """Whether torch may not multiply float32 matrices in fewer bits, which would have no bound."""
    backends: Any = torch.backends
    matmul = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    return not {matmul.fp32_precision, getattr(backends, "fp32_precision", "none")} & {"tf32", "bf16"}


def operand_dtype(W: Tensor, screening: str) -> torch.dtype:
    """What the GEMM multiplies: W as it is stored where that is narrow, else copies."""
    if screening == "off" and _float32_is_ieee(W.device):
        return torch.float32
    # sums of float16 products in float16 have no bound that is of use
    narrow_sums = torch.backends.cuda.matmul.allow_fp16_accumulation
    return torch.bfloat16 if W.dtype == torch.bfloat16 or screening == "bf16" or narrow_sums else torch.float16


def multiply(X: Tensor, W: Tensor, out: Tensor) -> None:
    """out = X W^T, summed and stored in float32."""
    if not X.is_cuda:
        out.copy_(X.double() @ W.double().T)
    elif X.dtype == torch.float32:
        torch.mm(X, W.T, out=out)
    else:
        torch.mm(X, W.T, out_dtype=torch.float32, out=out)


class Candidates(NamedTuple):
    """What may be among the k largest of some samples; a sample's arrays hold `capacity` each."""

    counts: Tensor
    thresholds: Tensor
    lows: Tensor
    highs: Tensor
    latents: Tensor
    places: Tensor
    capacity: int


Listed = tuple[Tensor | None, Tensor | None]
"""The latents to choose among, int32 [L], and how many of these there are, int32 [1]; or neither."""


class Selection(NamedTuple):
    """How the kernels that select are launched: Triton's here, or another backend's on the same tensors."""

    take_in: Callable[..., None]
    settle: Callable[..., None]
    screen: Callable[..., bool] | None = None
    """Takes in the scores of all latents at once, if it does that for such operands."""


def _take_in(
    product: Tensor, first: int, chunk: int, bias: Tensor, of_w: Tensor, of_x: Tensor, candidates: Candidates, k: int,
    bounds: tuple[float, float, float], listed: Listed = (None, None),
) -> None:  # fmt: skip
    """The scores of latents from `first` on; no product is longer than `chunk`. of_w has one row where W is no copy."""
    counts, thresholds, lows, highs, latents, places, capacity = candidates
    launch(
        _filter, (len(product),), product, first, product.shape[1], bias, *of_w.expand(3, -1), *of_x, counts,
        thresholds, lows, highs, latents, places, *listed, k, capacity, *bounds, COPIED=len(of_w) == 3,
        TOP=TOP[torch.float32], **filter_choice(chunk, capacity, len(product)),
    )  # fmt: skip


def _settle_rows(
    x: Tensor, pre_bias: Tensor, W: Tensor, bias: Tensor, first_row: int, N: int, x_norm: Tensor, w_norm: Tensor,
    candidates: Candidates, k: int, rounding: float, slack: float, indices: Tensor, given_up: Tensor, total: Tensor,
    listed: Listed = (None, None),
) -> None:  # fmt: skip
    """The supports of N samples from first_row on."""
    D, (counts, _, lows, highs, latents, places, capacity) = x.shape[1], candidates
    launch(
        _settle, (N,), x, x.stride(0), pre_bias, W, W.stride(0), bias, first_row, D, x_norm, w_norm, counts, lows,
        highs, latents, places, k, capacity, rounding, slack, indices, given_up, total, *listed,
        TOP=TOP[torch.float32], **settle_choice(D, capacity, W.element_size()),
    )  # fmt: skip


TRITON = Selection(_take_in, _settle_rows)


def dense_rows(tensor: Tensor) -> Tensor:
    """The numbers of a row side by side."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(0) >= tensor.shape[1] else tensor.contiguous()


def global_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    screening: str = "auto",
    among: Tensor | None = None,
) -> Tensor:
    """int32 [N, k], the support of each sample."""
    return select(x, W_enc, pre_bias, latent_bias, k, screening, TRITON, among)


def select(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, screening: str, selection: Selection,
    among: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """global_topk by these kernels.

    Scratch at N = 4096, k = 64: 32 MB of scores, 50 MB of candidates (16 bytes for each of 8 k + 256), the copy of x,
    and the copy of a chunk of W unless W is stored in what the GEMM multiplies.
    """
    x, W = dense_rows(x.detach()), dense_rows(W_enc.detach())
    pre_bias, N = pre_bias.detach().contiguous(), len(x)
    indices = torch.empty(N, k, dtype=torch.int32, device=x.device)
    if among is not None:
        among = among.detach().contiguous().view(torch.uint8)
        indices.fill_(-1)
    if N == 0:
        return indices
    sums = torch.promote_types(wide_type(x.dtype), wide_type(pre_bias.dtype))
    is_exact = torch.float64 in (sums, W.dtype)
    latent_bias, biases = latent_bias.detach(), _biases(len(W), x.device)
    if is_exact:
        rows = torch.arange(N, dtype=torch.int32, device=x.device)
        _sum(latent_bias, biases, N)
    else:
        rows = torch.empty(N, dtype=torch.int32, device=x.device)
        dtype = operand_dtype(W, screening)
        with torch.autocast(x.device.type, enabled=False):
            _screen(x, W, pre_bias, latent_bias, biases, k, dtype, indices, rows, selection, among)
    _in_full(x, W, pre_bias, biases[0], k, sums, indices, rows, biases[2], among)
    return indices


Biases = tuple[Tensor, Tensor, Tensor]
"""Their sums over streams, float64 [L]; what belongs to a product, float32 [L]; how many samples are given up, and
behind that how many parts of each are done, where there are parts."""


def _biases(L: int, device: torch.device) -> Biases:
    bias = torch.empty(L, dtype=torch.float64, device=device)
    counts = bias.new_empty(next_power_of_2(1 + _programs_in_full(device)), dtype=torch.int32)
    return bias, bias.new_empty(L, dtype=torch.float32), counts


def _programs_in_full(device: torch.device) -> int:
    # estimated, not measured: two programs a multiprocessor
    return 2 * _device(device)[1]


def _sum(latent_bias: Tensor, biases: Biases, given_up: int) -> None:
    (S, L), (bias, narrow_bias, counts) = latent_bias.shape, biases
    launch(
        _sum_biases, (triton.cdiv(L, 1024),), bias, narrow_bias, counts, latent_bias, *latent_bias.stride(), given_up,
        L, S=S, COUNTS=len(counts), BLOCK=1024,
    )  # fmt: skip


def _listed(among: Tensor) -> Listed:
    listed = torch.empty(len(among), dtype=torch.int32, device=among.device)
    many = torch.empty(1, dtype=torch.int32, device=among.device)
    launch(_list_latents, (1,), listed, many, among, len(among), BLOCK=4096, num_warps=16)
    return listed, many


def multiply_choice(dtype: torch.dtype) -> dict[str, int]:
    # estimated, not measured: what Triton's own matrix product takes on a Hopper GPU
    block_d = 64 if dtype.itemsize == 2 else 32
    return {"BLOCK_N": 128, "BLOCK_L": 128, "BLOCK_D": block_d, "num_warps": 8, "num_stages": 3}


def _multiply_rows(X: Tensor, W: Tensor, product: Tensor, listed: Listed, first: int) -> None:
    """As `_multiply`, of the rows that are listed: how many there are is on the device."""
    (N, m), chosen = product.shape, multiply_choice(X.dtype)
    wide_operands = not X.is_cuda or X.dtype == torch.float32  # the interpreter cannot multiply bfloat16
    operand = tl.float32 if wide_operands else tl.bfloat16 if X.dtype == torch.bfloat16 else tl.float16
    launch(
        _multiply_listed, (triton.cdiv(m, chosen["BLOCK_L"]), triton.cdiv(N, chosen["BLOCK_N"])), product, X, W,
        listed[1], first, N, X.shape[1], m, OPERAND=operand, **chosen,
    )  # fmt: skip


def _screen(
    x: Tensor, W: Tensor, pre_bias: Tensor, latent_bias: Tensor, biases: Biases, k: int, dtype: torch.dtype,
    indices: Tensor, given_up: Tensor, selection: Selection, among: Tensor | None,
) -> None:  # fmt: skip
    """Writes the supports that the GEMM proves, and the numbers of the other samples into given_up."""
    (N, D), L, device, (bias, narrow_bias, counts_given_up) = x.shape, len(W), x.device, biases
    capacity = min(ROOM * k + SPARE, L)
    blocks = -(-N // max(1, min(ROWS, CANDIDATES // (16 * capacity))))
    rows = -(-N // blocks // 8) * 8
    chunk = chunk_length(rows, L, *_device(device))
    growth, flushed = 1 + math.ldexp(D + 48, -24), math.ldexp(math.sqrt(D), -63)
    Du = math.ldexp(D, -22)
    bounds = Du / (1 - Du) if Du < 1 else math.inf, flushed, math.ldexp(4 * (D + 8), -126)
    rounding = math.ldexp(triton.cdiv(D, settle_choice(D, capacity, W.element_size())["BLOCK_D"]) + 64, -23)
    listed: Listed = (None, None) if among is None else _listed(among)
    copied, scaled = W.dtype != dtype or among is not None, dtype == torch.float16

    def measure(
        v: Tensor, copy: Tensor, numbers: Tensor, centred: bool, copied: bool, rows: int, listed: Listed = (None, None),
        first: int = 0,
    ) -> None:  # fmt: skip
        launched = measure_choice(D)
        launch(
            _measure, (triton.cdiv(rows, launched["ROWS"]),), v, v.stride(0), pre_bias, copy, *numbers, *listed, first,
            rows, D, growth, flushed, CENTRED=centred, COPIED=copied, SCALED=scaled and copied, **launched,
        )  # fmt: skip

    # a number of rows that divides by 8 keeps every pointer below aligned, and kernels are compiled once
    X = torch.empty(rows, D, dtype=dtype, device=device)
    scores = torch.empty(rows * chunk, dtype=torch.float32, device=device)
    # norm, residual norm and inverse scale, and the norm of what is centred
    of_x = torch.empty(4, rows, dtype=torch.float32, device=device)
    together = among is None and fits(x, W, dtype)
    of_product, size = of_x[:3], of_x[3 if together else 0]
    of_w = torch.empty(3 if copied else 1, L, dtype=torch.float32, device=device)
    copy = torch.empty(chunk, D, dtype=dtype, device=device) if copied else W
    counts, thresholds = torch.empty(2, rows, dtype=torch.int32, device=device)
    lows, highs, latents, places = torch.empty(4, rows * capacity, dtype=torch.int32, device=device)
    candidates = Candidates(counts, thresholds, lows, highs, latents, places, capacity)
    if not together:
        _sum(latent_bias, biases, 0)
        if not copied:
            measure(W, W, of_w.expand(3, L), centred=False, copied=False, rows=L)
    for n in range(0, N, rows):
        samples = x[n : n + rows]
        N_here = len(samples)
        if together:
            numbers = growth, flushed, rounding
            prepare(biases, of_w[0], X, of_x, x, W, pre_bias, latent_bias, n, N_here, *numbers)
        else:
            measure(samples, X, of_product, centred=True, copied=True, rows=N_here)
        screen = None if copied else selection.screen
        screened = screen is not None and screen(
            X[:N_here], W, chunk, scores, narrow_bias, of_w, of_product, candidates, k, bounds
        )
        for first in range(0, 0 if screened else L, chunk):
            weights = W[first : first + chunk]
            m = len(weights)
            product = scores[: N_here * m].view(N_here, m)
            if among is not None:
                measure(W, copy, of_w, centred=False, copied=True, rows=m, listed=listed, first=first)
                _multiply_rows(X[:N_here], copy, product, listed, first)
                _take_in(product, first, chunk, narrow_bias, of_w, of_product, candidates, k, bounds, listed)
                continue
            if copied:
                measure(weights, copy, of_w[:, first : first + m], centred=False, copied=True, rows=m)
                weights = copy[:m]
            multiply(X[:N_here], weights, product)
            selection.take_in(product, first, chunk, narrow_bias, of_w, of_product, candidates, k, bounds)
        settle = selection.settle if among is None else partial(_settle_rows, listed=listed)
        settle(
            x, pre_bias, W, bias, n, N_here, size, of_w[0], candidates, k, rounding, bounds[2], indices, given_up,
            counts_given_up[:1],
        )  # fmt: skip


def _in_full(
    x: Tensor, W: Tensor, pre_bias: Tensor, bias: Tensor, k: int, sums: torch.dtype, indices: Tensor, rows: Tensor,
    given_up: Tensor, among: Tensor | None,
) -> None:  # fmt: skip
    """The supports of the samples rows[: given_up[0]]; `given_up` as in `Biases`."""
    D, L, device = x.shape[1], len(W), x.device
    most, capacity = _programs_in_full(device), candidate_room(k, L)
    key_dtype = torch.int64 if sums == torch.float64 else torch.int32
    keys = torch.empty(most, capacity, dtype=key_dtype, device=device)
    latents = torch.empty(most, capacity, dtype=torch.int32, device=device)
    part_keys = torch.empty(most, k, dtype=key_dtype, device=device)
    part_latents = torch.empty(most, k, dtype=torch.int32, device=device)
    part_counts = torch.empty(most, dtype=torch.int32, device=device)
    launched = full_choice(D, W.element_size())
    launch(
        _score_in_full, (most,), x, x.stride(0), pre_bias, W, W.stride(0), bias, L, D, k, capacity, given_up, rows,
        keys, latents, part_keys, part_latents, part_counts, indices, among,
        SUM=tl.float64 if sums == torch.float64 else tl.float32, TOP=TOP[sums],
        # products of float64 are rounded before they are added, those of float32 are exact
        enable_fp_fusion=sums != torch.float64, **launched,
    )  # fmt: skip
