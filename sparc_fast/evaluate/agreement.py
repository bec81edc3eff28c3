"""Agreement: do the streams fire a latent for the same samples? Needs no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from .codes import Codes, StreamCode, check_codes, firing_counts, parts
from .registry import Given, Metric, Score
from .resampling import drawn_firings

__all__ = ["AGREEMENT", "Agreement", "firing_agreement"]


def firing_agreement(codes: Codes, n_latents: int) -> Tensor:
    """Overlap of the sets of samples that fire each latent in two streams, float64 [L], in [0, 1].

    With A_s the samples that fire the latent in stream s: the mean over all pairs of streams of
    |A_s & A_t| / |A_s | A_t|, a pair with an empty union counting 0. To be read on single codes: there two
    unrelated latents of frequency f score about f / 2, and so does an untrained model. Joint codes share
    their support, and score near 1 whatever was learnt.
    """
    check_codes(codes, n_latents)
    counts = {name: firing_counts(code, n_latents) for name, code in codes.items()}
    pairs = list(combinations(codes, 2))
    total = torch.zeros_like(next(iter(counts.values())), dtype=torch.float64)
    for s, t in pairs:
        both = _common_firings(codes[s], codes[t], n_latents)
        total += both / (counts[s] + counts[t] - both).clamp_min(1)
    return total / max(len(pairs), 1)


def _common_firings(a: StreamCode, b: StreamCode, n_latents: int) -> Tensor:
    """Number of samples that fire each latent in both codes, [L]."""
    both = torch.zeros(n_latents, dtype=torch.int64, device=a[0].device)
    for rows in parts(len(a[0]), 96 * max(a[0].shape[1], b[0].shape[1])):
        support_a, support_b = (
            indices[rows].long().masked_fill(values[rows] <= 0, n_latents) for values, indices in (a, b)
        )
        support_a = support_a.sort(dim=1).values
        slots = torch.searchsorted(support_a, support_b).clamp_max(support_a.shape[1] - 1)
        shared = (support_a.gather(1, slots) == support_b) & (support_b < n_latents)
        both += torch.bincount(support_b[shared], minlength=n_latents)
    return both


@dataclass(frozen=True, eq=False)
class Agreement:
    """`firing_agreement` of each latent, [L], and which latents fire in any stream, bool [L]."""

    of_latents: Tensor
    alive: Tensor

    @property
    def mean(self) -> float:
        """Over alive latents."""
        return float(self.of_latents[self.alive].mean())


def _compute(given: Given) -> Agreement:
    return Agreement(firing_agreement(given.single, given.n_latents), given.alive)


def _resample(given: Given, found: Agreement) -> Mapping[str, Tensor]:
    """Firings, alone and common, summed anew in each resampling; which latents are alive too."""
    resampling, codes = given.draws, list(given.single.values())
    pairs = list(combinations(range(len(codes)), 2))
    total, alive = resampling.zeros(), resampling.zeros()
    for some, sums in drawn_firings(codes, given.n_latents, resampling, pairs):
        of_latents = torch.zeros_like(sums[0])
        for (s, t), both in zip(pairs, sums[len(codes) :], strict=True):
            of_latents += both / (sums[s] + sums[t] - both).clamp_min(1)
        total[some] += of_latents.sum(dim=0, dtype=torch.float64) / max(len(pairs), 1)
        alive[some] += (sums[: len(codes)] > 0).any(dim=0).sum(dim=0)
    return {"agreement": total / alive}


AGREEMENT = Metric(
    "agreement",
    "Firing agreement: do the streams, each encoded alone, fire a latent for the same samples?",
    _compute,
    (
        Score(
            "agreement",
            "Firing agreement",
            "Of the samples that fire a latent in either of two streams, the fraction that fire it in both, each "
            "encoded alone, over alive latents.",
            value=lambda found: found.mean,
            highlight=True,
        ),
    ),
    needs=frozenset({"single", "pairs"}),
    of_shared=True,
    default=True,
    resample=_resample,
)
