"""Rows that are hard to select from: scores that tie or are no numbers, and vectors whose products round badly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from operands import normal, seeded
from torch import Tensor

from sparc_fast.ops import reference

inf, nan = torch.inf, torch.nan

# L scores
SCORES: dict[str, Callable[[int], Tensor]] = {
    "all equal": lambda L: torch.full((L,), 3.0),
    "all zero": lambda L: torch.zeros(L),
    "two values": lambda L: (normal(L) > 0).float(),
    "plateau at the k-th": lambda L: torch.cat(
        [torch.arange(1.0 * L - 10, 1.0 * L), torch.full((3 * L // 5,), 7.0), torch.zeros(L - 10 - 3 * L // 5)]
    ),
    "zeros of either sign": lambda L: torch.zeros(L).copysign(normal(L)),
    "few above zero": lambda L: torch.relu(normal(L) - 2.5),
    "nothing but -inf": lambda L: torch.full((L,), -inf),
    "few above -inf": lambda L: torch.where(normal(L) > 2, normal(L), -inf),
    "infinities": lambda L: torch.where(normal(L) > 1, inf, normal(L)),
    "NaN of either sign": lambda L: torch.where(
        normal(L) > 2, torch.tensor(nan).copysign(normal(L, seed=1)), normal(L)
    ),
    "NaN beside inf": lambda L: torch.where(normal(L) > 0, nan, inf),
    "denormal": lambda L: normal(L) * 1e-40,
    "ascending": lambda L: torch.arange(L).float(),
    "descending": lambda L: -torch.arange(L).float(),
    "one giant": lambda L: torch.cat([normal(L - 1), torch.tensor([1e30])]),
    "narrow at an offset": lambda L: 1e4 + 1e-3 * normal(L),
    "one unit apart": lambda L: 1 + 2.0**-23 * torch.randint(50, (L,), generator=seeded(0)),
    "negative": lambda L: -normal(L).abs() - 1,
}

VECTORS = [
    "normal", "outlier dimensions", "wide range of norms", "wide range of numbers", "cancelling", "denormal",
    "near the limits", "a few rows over and over", "one unit apart", "halfway between bfloat16", "all rounded up",
    "some zero",
]  # fmt: skip


def vectors(kind: str, N: int, D: int, generator: torch.Generator) -> Tensor:
    """N rows of D numbers of a kind in `VECTORS`."""
    w = torch.randn(N, D, generator=generator)
    signs = torch.randint(0, 2, (N, D), generator=generator) * 2 - 1
    if kind == "outlier dimensions":
        w[:, 0] *= 1e4
    elif kind == "wide range of norms":
        w *= 10 ** torch.randint(-30, 30, (N, 1), generator=generator)
    elif kind == "wide range of numbers":
        w *= 10 ** torch.randint(-9, 1, (N, D), generator=generator)
    elif kind == "cancelling":
        w[:, D // 2 :] = (signs * 1e4)[:, D // 2 :] + w[:, D // 2 :]
    elif kind == "denormal":
        w *= 1e-41
    elif kind == "near the limits":
        w = signs * torch.tensor([3e38, 1e19, 1e-19, 1e-38])[torch.randint(0, 4, (N, D), generator=generator)]
    elif kind == "a few rows over and over":
        w = w[torch.randint(0, min(N, 3), (N,), generator=generator)]
    elif kind == "one unit apart":
        w = w[:1].expand(N, D) * (1 + 2.0**-23 * torch.randint(-3, 4, (N, D), generator=generator))
    elif kind == "halfway between bfloat16":
        w = signs * (1 + 2.0**-8 + 2.0**-7 * torch.randint(0, 100, (N, D), generator=generator))
    elif kind == "all rounded up":
        w = signs * (1 + 2.0**-8 + 2.0**-16 * torch.rand(N, D, generator=generator))
    elif kind == "some zero":
        w[::2] = 0
    return w


def encoder(x: Tensor, W_enc: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples, weights, a pre-bias of zeros, and the latents' biases, zeros unless they are given."""
    return x, W_enc, x.new_zeros(x.shape[1]), W_enc.new_zeros(1, len(W_enc)) if bias is None else bias


def expected(x: Tensor, W_enc: Tensor, k: int, bias: Tensor | None = None) -> Tensor:
    return reference.global_topk(*encoder(x, W_enc, bias), k)
