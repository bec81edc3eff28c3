"""Concept alignment: does one latent stand for the same labels in every stream?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

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
    check_labels(labels, check_codes(codes, n_latents))
    return mean_jaccard(codes, labels, n_latents)


def concept_jaccard_by_chance(
    codes: Codes, labels: Tensor, n_latents: int, seed: int = 0, shuffle: Literal["streams", "labels"] = "streams"
) -> Tensor:
    """`concept_jaccard` after each stream's samples are shuffled on their own, [L].

    The shuffle keeps how often each latent fires and breaks what it fires for, so this is the score that
    frequency alone earns. Alignment is what `concept_jaccard` scores above it.

    With shuffle="labels" the labels move among samples, the same way for all streams. That keeps too which samples fire
    a latent in both of two streams, and is what *joint* codes earn by their shared support without any meaning.
    """
    check_labels(labels, check_codes(codes, n_latents))
    if shuffle not in ("streams", "labels"):
        raise ValueError(f'shuffle must be "streams" or "labels", got {shuffle!r}')
    generator = torch.Generator(device="cpu").manual_seed(seed)
    orders = [
        torch.randperm(len(labels), generator=generator, device="cpu").to(labels.device)
        for _ in (codes if shuffle == "streams" else range(1))
    ]
    return mean_jaccard(codes, labels, n_latents, orders * (len(codes) // len(orders)))


def mean_jaccard(
    codes: Codes,
    labels: Tensor,
    n_latents: int,
    orders: Sequence[Tensor] | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """`concept_jaccard` of labels and orders as `label_counts` takes them, by default active where a label fires."""
    given, found = active, torch.zeros(len(codes), n_latents, dtype=torch.bool, device=labels.device)
    pairs = list(combinations(range(len(codes)), 2))
    shape = (len(pairs), n_latents)
    shared = torch.zeros(shape, dtype=torch.float64, device=labels.device)
    union = torch.zeros_like(shared)
    for _, counts in label_counts(codes, labels, n_latents, orders):
        found |= (counts > 0).any(dim=2)
        for p, (s, t) in enumerate(pairs):
            shared[p] += torch.minimum(counts[s], counts[t]).sum(dim=1, dtype=torch.float64)
            union[p] += torch.maximum(counts[s], counts[t]).sum(dim=1, dtype=torch.float64)
    active = found if given is None else given
    total = torch.zeros(n_latents, dtype=torch.float64, device=labels.device)
    n_pairs = torch.zeros_like(total)
    for p, (s, t) in enumerate(pairs):
        both = active[s] & active[t]
        total += torch.where(both, shared[p] / union[p].clamp_min(1), 0)
        n_pairs += both
    return total / n_pairs.clamp_min(1)
