"""The loss and what it is told by, from nmse [S, S] and the energies of samples: one program.

All results lie in one piece of memory, so that they are copied at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from sparc_fast.kernels.decode_loss import weights_on
from sparc_fast.kernels.launching import launch, next_power_of_2
from sparc_fast.kernels.sample_scale import LEAST
from sparc_fast.ops.reference import has_cross


@jit
def summarize(zero_rows, told, nmse, auxk, energy, weights, N, S: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr):
    """told: total, self, cross, AuxK, nmse [S, S]. Behind the weights is AuxK's coefficient."""
    s, t = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    inside = (s < S) & (t < S)
    pair = tl.load(nmse + s * S + t, mask=inside, other=0).to(tl.float64)
    weight = tl.load(weights + s * S + t, mask=inside, other=0)
    total = tl.sum(tl.sum(tl.where(weight != 0, pair * weight, 0.0), 1), 0)
    if auxk is not None:
        part = tl.load(auxk).to(tl.float64)
        total += part
        tl.store(told + 3, part / tl.load(weights + S * S))
    tl.store(told, total)
    tl.store(told + 1, tl.sum(tl.sum(tl.where(s == t, pair, 0.0), 1), 0) / S)
    tl.store(told + 2, tl.sum(tl.sum(tl.where(s == t, 0.0, pair), 1), 0) / max(S * (S - 1), 1))
    tl.store(told + 4 + s * S + t, pair, mask=inside)
    stream = tl.arange(0, P)[None, :]
    rows = tl.zeros([P], tl.int64)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        number = tl.load(energy + n.to(tl.int64) * S + stream, mask=(n < N) & (stream < S), other=1.0)
        rows += tl.sum((number < LEAST).to(tl.int64), 0)
    tl.store(zero_rows + tl.arange(0, P), rows, mask=tl.arange(0, P) < S)


@jit(do_not_specialize=["N"])
def _loss_summary_kernel(
    zero_rows, told, nmse, auxk, energy, weights, N, S: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr
):
    summarize(zero_rows, told, nmse, auxk, energy, weights, N, S, P, BLOCK_N)


def choice(S: int) -> dict[str, int]:
    # estimated, not measured: one program, whose loads are what it waits for
    block = next_power_of_2(S)
    return {"P": block, "BLOCK_N": max(2048 // block, 16), "num_warps": 8}


Summary = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]


def summary_of(
    nmse: Tensor, auxk: Tensor | None, energy: Tensor, weights: Sequence[float], auxk_coef: float
) -> tuple[tuple[Tensor | int | None, ...], Summary]:
    """(what `summarize` takes, whose results are these)"""
    S, device = len(nmse), nmse.device
    coef = 1.0 if auxk is None else float(auxk_coef)
    memory = torch.empty(8 * S + (4 + S * S) * nmse.itemsize, dtype=torch.uint8, device=device)
    zero_rows, told = memory[: 8 * S].view(torch.int64), memory[8 * S :].view(nmse.dtype)
    on_device = weights_on((*weights, coef), device)
    operands = zero_rows, told, nmse.contiguous(), auxk, energy.contiguous(), on_device, len(energy)
    cross = told[2] if has_cross(weights, S) else None
    return operands, (told[0], told[1], cross, None if auxk is None else told[3], told[4:].view(S, S), zero_rows)


def loss_summary(
    nmse: Tensor, auxk: Tensor | None, energy: Tensor, weights: Sequence[float], auxk_coef: float
) -> Summary:
    operands, summary = summary_of(nmse, auxk, energy, weights, auxk_coef)
    launch(_loss_summary_kernel, (1,), *operands, S=len(nmse), **choice(len(nmse)))
    return summary
