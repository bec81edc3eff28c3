"""Agreement: do the streams fire a latent for the same samples? Needs no labels."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from .codes import Codes, StreamCode, check_codes, firing_counts

__all__ = ["firing_agreement"]


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
    support_a = a[1].long().masked_fill(a[0] <= 0, n_latents).sort(dim=1).values
    support_b = b[1].long().masked_fill(b[0] <= 0, n_latents)
    slots = torch.searchsorted(support_a, support_b).clamp_max(support_a.shape[1] - 1)
    both = (support_a.gather(1, slots) == support_b) & (support_b < n_latents)
    return torch.bincount(support_b[both], minlength=n_latents)
