"""What a latent stands for: its best concept word, and the samples that fire it most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .agreement import firing_agreement
from .codes import Codes, check_codes, check_labels, firing_counts, firings, label_counts

__all__ = ["LatentNames", "TopSamples", "name_latents", "top_samples"]

Z = 1.96  # normal quantile of the 95 % interval


@dataclass(frozen=True, eq=False)
class LatentNames:
    """The concept that describes each latent best, judged on all streams together.

    names[l] is "" and concept[l] is -1 where no concept is more likely among the samples that fire the latent
    than among all samples. precision: fraction of firing samples that carry the concept; recall: fraction of
    its samples that fire the latent; both pooled over streams [L] and per stream [S, L], 0 without a concept.
    score [L]: see `name_latents`. agreement [L]: see `firing_agreement`.
    """

    streams: tuple[str, ...]
    names: tuple[str, ...]
    concept: Tensor
    score: Tensor
    precision: Tensor
    recall: Tensor
    stream_precision: Tensor
    stream_recall: Tensor
    agreement: Tensor


def name_latents(codes: Codes, labels: Tensor, concepts: Sequence[str], n_latents: int) -> LatentNames:
    """Name each latent by the concept y of largest score, labels [N, C] having one column per concept.

        score = lower 95 % Wilson bound of P(y | latent fires) - P(y),   in (-1, 1)

    the rise in probability that the firings vouch for at least. F1 and lift both prefer a rare word that met
    the latent once to a broad word that is always right; this does neither: the bound discounts small counts,
    the base rate P(y) discounts words that are common anyway. P pools the streams, and the bound counts
    firings per stream, for one sample seen in S streams is not S samples. Ties go to the first concept.
    """
    n_samples = check_codes(codes, n_latents)
    check_labels(labels, n_samples)
    if len(concepts) != labels.shape[1]:
        raise ValueError(f"concepts must be one per column of labels ({labels.shape[1]}), got {len(concepts)}")
    fired = torch.stack([firing_counts(code, n_latents) for code in codes.values()]).float()
    per_concept = labels.sum(dim=0).float()
    best = fired.new_zeros(n_latents)
    concept = torch.full((n_latents,), -1, dtype=torch.int64, device=labels.device)
    hits = torch.zeros_like(fired)
    pooled = fired.sum(dim=0)
    for start, counts in label_counts(codes, labels, n_latents):
        precision = counts.sum(dim=0) / pooled.clamp_min(1)[:, None]
        base = per_concept[start : start + counts.shape[2]] / max(n_samples, 1)
        score, choice = (_wilson_lower(precision, pooled[:, None] / len(codes)) - base).max(dim=1)
        better = score > best
        best = torch.where(better, score, best)
        concept = torch.where(better, start + choice, concept)
        chosen = counts.gather(2, choice.expand(len(codes), -1)[..., None])[..., 0]
        hits = torch.where(better, chosen, hits)
    carried = per_concept[concept] if len(concepts) else pooled  # where there is no concept, hits are 0
    return LatentNames(
        streams=tuple(codes),
        names=tuple(concepts[c] if c >= 0 else "" for c in concept.tolist()),
        concept=concept,
        score=best,
        precision=hits.sum(dim=0) / pooled.clamp_min(1),
        recall=hits.sum(dim=0) / (len(codes) * carried).clamp_min(1),
        stream_precision=hits / fired.clamp_min(1),
        stream_recall=hits / carried.clamp_min(1),
        agreement=firing_agreement(codes, n_latents),
    )


def _wilson_lower(p: Tensor, n: Tensor) -> Tensor:
    """Lower end of the Wilson interval of a fraction p of n trials; 0 when p or n is 0."""
    return (p * n + Z**2 / 2 - Z * (p * (1 - p) * n + Z**2 / 4).sqrt()) / (n + Z**2)


@dataclass(frozen=True, eq=False)
class TopSamples:
    """samples, values [S, M, n] for M latents: strongest first; sample -1 and value 0 where fewer fire."""

    streams: tuple[str, ...]
    latents: Tensor
    samples: Tensor
    values: Tensor


def top_samples(codes: Codes, n_latents: int, n: int, latents: Tensor | None = None) -> TopSamples:
    """The n samples with the largest activation of each latent in each stream (ties: lower sample first).

    For all latents, or for the distinct ones given. Memory is O(N k + S M n).
    """
    check_codes(codes, n_latents)
    device = next(iter(codes.values()))[0].device
    latents = torch.arange(n_latents, device=device) if latents is None else latents.to(device).long()
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if latents.dim() != 1 or len(torch.unique(latents)) != len(latents):
        raise ValueError(f"latents must be distinct latents [M], got {latents.tolist()}")
    if len(latents) and (latents.min() < 0 or latents.max() >= n_latents):
        raise ValueError(f"latents must be in [0, n_latents={n_latents}), got {latents.tolist()}")
    row = torch.full((n_latents,), -1, dtype=torch.int64, device=device)
    row[latents] = torch.arange(len(latents), device=device)
    samples = torch.full((len(codes), len(latents), n), -1, dtype=torch.int64, device=device)
    values = torch.zeros(samples.shape, dtype=torch.float32, device=device)
    for s, code in enumerate(codes.values()):
        fired, latent, value = firings(code)
        wanted = row[latent] >= 0
        fired, rows, value = fired[wanted], row[latent[wanted]], value[wanted].float()
        order = value.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        fired, rows, value = fired[order], rows[order], value[order]
        first = torch.searchsorted(rows, rows)  # where each latent's run begins
        place = torch.arange(len(rows), device=device) - first
        keep = place < n
        samples[s, rows[keep], place[keep]] = fired[keep]
        values[s, rows[keep], place[keep]] = value[keep]
    return TopSamples(tuple(codes), latents, samples, values)
