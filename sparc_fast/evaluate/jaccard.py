"""Concept alignment: does one latent stand for the same labels in every stream?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from .codes import Codes, check_codes, check_labels, label_counts

__all__ = ["concept_jaccard", "concept_jaccard_by_chance"]


def concept_jaccard(codes: Codes, labels: Tensor, n_latents: int) -> Tensor:
    """Generalised Jaccard index of each latent's label counts between streams, float64 [L], in [0, 1].

    With c_s[y] the number of samples of label y that fire the latent in stream s,

        J(s, t) = sum_y min(c_s[y], c_t[y]) / sum_y max(c_s[y], c_t[y]),

    averaged over the pairs of streams in which the latent is active (fires for a labelled sample); 0 where
    fewer than two streams are. `.mean()` over all latents, dead ones too, is the SPARC paper's score.

    What it means depends on the codes. On *joint* codes it is high by construction: the streams share one
    support, so a latent is active for the same samples in all of them, but for the few that a stream's ReLU
    sets to 0. An untrained global model on statistically independent streams scores about 0.95. On *single*
    codes it measures alignment. Even there, latents that fire often meet the labels' base rates in every
    stream, and so agree a little without a common meaning: compare with `concept_jaccard_by_chance`.
    """
    return _jaccard(codes, labels, n_latents)


def concept_jaccard_by_chance(codes: Codes, labels: Tensor, n_latents: int, seed: int = 0) -> Tensor:
    """`concept_jaccard` after each stream's samples are shuffled on their own, [L].

    The shuffle keeps how often each latent fires and breaks what it fires for, so this is the score that
    frequency alone earns. Alignment is what `concept_jaccard` scores above it.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    orders = [torch.randperm(len(v), generator=generator, device="cpu").to(v.device) for v, _ in codes.values()]
    return _jaccard(codes, labels, n_latents, orders)


def _jaccard(codes: Codes, labels: Tensor, n_latents: int, orders: Sequence[Tensor] | None = None) -> Tensor:
    check_labels(labels, check_codes(codes, n_latents))
    pairs = list(combinations(range(len(codes)), 2))
    shape = (len(pairs), n_latents)
    shared = torch.zeros(shape, dtype=torch.float64, device=labels.device)
    union = torch.zeros_like(shared)
    active = torch.zeros(len(codes), n_latents, dtype=torch.bool, device=labels.device)
    for _, counts in label_counts(codes, labels, n_latents, orders):
        active |= (counts > 0).any(dim=2)
        for p, (s, t) in enumerate(pairs):
            shared[p] += torch.minimum(counts[s], counts[t]).sum(dim=1, dtype=torch.float64)
            union[p] += torch.maximum(counts[s], counts[t]).sum(dim=1, dtype=torch.float64)
    total = torch.zeros(n_latents, dtype=torch.float64, device=labels.device)
    n_pairs = torch.zeros_like(total)
    for p, (s, t) in enumerate(pairs):
        both = active[s] & active[t]
        total += torch.where(both, shared[p] / union[p].clamp_min(1), 0)
        n_pairs += both
    return total / n_pairs.clamp_min(1)
