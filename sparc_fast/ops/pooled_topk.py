"""Supports of as many latents as a sample has, from each sample's best latents and their scores.

Each sample's `m` best latents are found by `global_topk`, and twice as many again for samples of which all that were
found are in the support, until none might have more. The result is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc_fast.ops.layout import wide_type

Operator = Callable[..., Tensor]
T = TypeVar("T", float, Tensor)


def batch_topk(
    global_topk: Operator, support_scores: Operator, x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor,
    k: int, screening: str = "auto",
) -> Tensor:  # fmt: skip
    """`reference.batch_topk` of a backend's other operators."""
    best = Best(global_topk, support_scores, (W_enc, pre_bias, latent_bias), screening)
    indices, scores, last = best.reaching(x, 2 * k, lambda found: kth_largest(found, k * len(x)))
    return ragged(indices, largest(scores, k * len(x), last))


def latents_above(
    global_topk: Operator, support_scores: Operator, x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor,
    threshold: float, k: int, screening: str = "auto", sure: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.latents_above` of a backend's other operators."""
    best = Best(global_topk, support_scores, (W_enc, pre_bias, latent_bias), screening)
    indices, scores, _ = best.reaching(x, 2 * k, lambda _: threshold)
    chosen = scores > threshold
    indices, scores = ragged(indices, chosen), ragged(scores, chosen, -torch.inf)
    return indices, told(indices, scores, threshold, sure)


def told(indices: Tensor, scores: Tensor, threshold: float, sure: float | None) -> Tensor:
    """Scores as `reference.latents_above` tells them."""
    scores = scores.masked_fill(scores > max(threshold, threshold if sure is None else sure), torch.inf)
    return scores.masked_fill(indices < 0, -torch.inf)


class Best:
    """A sample's best latents and their scores."""

    def __init__(
        self, global_topk: Operator, support_scores: Operator, encoder: tuple[Tensor, Tensor, Tensor], screening: str
    ) -> None:
        self.global_topk, self.support_scores, self.encoder, self.screening = (
            global_topk, support_scores, encoder, screening,
        )  # fmt: skip
        self.L = len(encoder[0])

    def __call__(self, x: Tensor, m: int) -> tuple[Tensor, Tensor]:
        if not self.L:
            return nothing(x)
        indices = self.global_topk(x, *self.encoder, m, self.screening)
        return indices, self.support_scores(x, *self.encoder, indices)

    def reaching(
        self, x: Tensor, m: int, bound: Callable[[Tensor], T], anywhere: Callable[[bool], bool] = bool
    ) -> tuple[Tensor, Tensor, T]:
        """([N, W]: of each sample all latents that reach the bound that the scores found set, and others; the bound).

        -1 of score -inf where a sample has fewer than others. Where processes share the latents, the bound is that of
        all of their scores, and `anywhere` says whether one of them has more to look for.
        """
        m = min(m, self.L)
        indices, scores = self(x, m)
        rows = torch.arange(len(x), device=x.device)
        while True:
            reached = bound(scores)
            smallest = scores[rows].where(indices[rows] >= 0, torch.inf).amin(1)
            rows = rows[smallest >= reached] if m < self.L else rows[:0]  # all that were found reach it, and more may
            if not anywhere(len(rows) > 0):
                return indices, scores, reached
            if not len(rows):
                continue
            wider = min(2 * m, self.L) - indices.shape[1]
            m += wider
            indices, scores = pad(indices, (0, wider), value=-1), pad(scores, (0, wider), value=-torch.inf)
            indices[rows], scores[rows] = self(x[rows], m)


def nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    """Supports of samples where there is no latent, one empty slot wide, and their scores."""
    indices = torch.full((len(x), 1), -1, dtype=torch.int32, device=x.device)
    return indices, torch.full((len(x), 1), -torch.inf, dtype=wide_type(x.dtype), device=x.device)


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """Of all of them, [N, W]; inf of none."""
    if k == 0:
        return scores.new_tensor(torch.inf)
    return scores.flatten().kthvalue(scores.numel() - k + 1).values


def largest(scores: Tensor, count: int, last: Tensor | None = None) -> Tensor:
    """bool [N, W]: so many of the largest, of equal ones those of earlier samples, then of lower latents.

    `last` is the smallest of them, where that is known.
    """
    last = kth_largest(scores, count) if last is None else last
    larger, equal = scores > last, scores == last
    before = equal.flatten().cumsum(0).view_as(equal)
    return larger | (equal & (before <= count - larger.sum()))


def ragged(indices: Tensor, chosen: Tensor, nothing: float = -1) -> Tensor:
    """The support of what was chosen, as wide as the largest, one slot at least: -1 behind latents of others."""
    width = max(1, int(chosen.sum(1).max())) if len(chosen) else 1
    support = indices.new_full((len(indices), width), nothing)
    samples, slots = chosen.nonzero(as_tuple=True)
    support[samples, chosen.cumsum(1)[samples, slots] - 1] = indices[samples, slots]
    return support
