"""energy[n, s] = sum_{d in s} x[n, d]^2,  scale[n, s] = 1 / (N energy[n, s]), 0 of a zero row.

A program takes ROWS samples of one stream, a block of columns at a time: a sample's sum is in an order that its stream
alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.gather import sum_type
from sparc_fast.kernels.launching import column_blocks, dense_rows, launch, next_power_of_2, widths
from sparc_fast.ops.layout import wide_type
from sparc_fast.ops.reference import ZERO_ROW

LEAST = tl.constexpr(ZERO_ROW)


@triton.jit(do_not_specialize=["N"])
def _sample_scale_kernel(
    energy, scale, x, stride, streams, N, S, n_samples,
    SUM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n, s = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    first, last = tl.load(streams + 3 * s), tl.load(streams + 3 * s + 1)
    squares = tl.zeros([ROWS, BLOCK_D], SUM)
    for start in range(first, last, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (n < N)[:, None] & (columns < last)[None, :]
        number = tl.load(x + n.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0).to(SUM)
        squares += number * number
    total = tl.sum(squares, 1)
    counted = total >= LEAST
    tl.store(energy + n * S + s, total, mask=n < N)
    inverse = tl.where(counted, 1 / tl.where(counted, total, 1.0) / n_samples.to(SUM), 0.0)
    tl.store(scale + n * S + s, inverse, mask=n < N)


def choice(widest: int) -> dict[str, int]:
    # estimated, not measured: 16 numbers a thread, loaded 16 bytes at a time
    block = min(512, max(16, next_power_of_2(widest)))
    return {"ROWS": 4 if block == 512 else 2048 // block, "BLOCK_D": block, "num_warps": 4}


def sample_scale(x: Tensor, d_streams: Sequence[int], n_samples: int | None = None) -> tuple[Tensor, Tensor]:
    N, S, chosen = len(x), len(d_streams), choice(max(d_streams))
    energy = torch.empty(N, S, dtype=wide_type(x.dtype), device=x.device)
    scale, x = torch.empty_like(energy), dense_rows(x)
    streams = column_blocks(widths(d_streams), max(d_streams), x.device)
    launch(
        _sample_scale_kernel, (triton.cdiv(N, chosen["ROWS"]), S), energy, scale, x, x.stride(0), streams, N, S,
        max(N if n_samples is None else n_samples, 1), SUM=sum_type(x), **chosen,
    )  # fmt: skip
    return energy, scale
