"""What a latent stands for: the concepts that describe it best, and the samples that fire it most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import codes as chunks
from .agreement import firing_agreement
from .codes import ByLatent, Codes, by_latent, check_codes, check_labels, firings
from .resampling import Z

__all__ = ["Carried", "LatentNames", "TopSamples", "latents_of_one_concept", "name_latents", "top_samples"]

ALIKE = 64  # latents of about one frequency that share a threshold of chance
CHANCE = 0.95  # quantile of what shuffled samples score


@dataclass(frozen=True, eq=False)
class Carried:
    """Which of `n_concepts` concepts each of N samples carries, as lists.

    Those of sample n are concepts[offsets[n] : offsets[n + 1]], int64, each once; offsets int64 [N + 1].
    """

    offsets: Tensor
    concepts: Tensor
    n_concepts: int

    @classmethod
    def from_labels(cls, labels: Tensor) -> Carried:
        """Of truth values, bool [N, C], or of how often a sample counts as one of each, whose list has it so often."""
        offsets = pad(labels.sum(dim=1).cumsum(0), (1, 0))
        samples, concepts = labels.nonzero(as_tuple=True)
        if labels.dtype != torch.bool:
            concepts = concepts.repeat_interleave(labels[samples, concepts].long())
        return cls(offsets, concepts, labels.shape[1])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def counts(self) -> Tensor:
        """Samples that carry each concept, int64 [C]."""
        return torch.bincount(self.concepts, minlength=self.n_concepts)

    def of(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in `samples` and concepts of all that these samples carry."""
        first = self.offsets[samples]
        degree = self.offsets[samples + 1] - first
        positions = torch.repeat_interleave(degree)
        ends = degree.cumsum(0)
        within = torch.arange(len(positions), device=degree.device) - (ends - degree)[positions]
        return positions, self.concepts[first[positions] + within]


@dataclass(frozen=True, eq=False)
class LatentNames:
    """The concepts that describe each latent best, judged on all streams together.

    names[l] is "" and concept[l] is -1 where none beats chance; several[l] has up to three names, the best first.
    precision: fraction of firing samples that carry the concept; recall: fraction of its samples that fire the latent;
    both pooled over streams [L] and per stream [S, L], 0 without a concept. score [L]: see `name_latents`.
    agreement [L]: see `firing_agreement`.
    """

    streams: tuple[str, ...]
    names: tuple[str, ...]
    several: tuple[tuple[str, ...], ...]
    concept: Tensor
    score: Tensor
    precision: Tensor
    recall: Tensor
    stream_precision: Tensor
    stream_recall: Tensor
    agreement: Tensor


def name_latents(
    codes: Codes,
    labels: Tensor | Carried,
    concepts: Sequence[str],
    n_latents: int,
    *,
    n_names: int = 3,
    shuffles: int = 4,
    seed: int = 0,
) -> LatentNames:
    """Name each latent by the concepts y of largest score, labels [N, C] having one column per concept.

        score = 2 p r / (p + r),   p, r = lower 95 % Wilson bounds of P(y | latent fires) and P(latent fires | y)

    and 0 where p is at most P(y): the F1 that the firings vouch for at least. Precision alone prefers "animal" to "cat"
    in a latent of cats, as every cat is one; that a latent covers few of the animals speaks against it. The bounds
    discount small counts, so that a rare word that met the latent once does not name it. P pools the streams, and the
    bounds count per stream, for one sample seen in S streams is not S samples. Ties go to the first concept.

    A name must also beat chance: with samples shuffled `shuffles` times (or oftener where there are few latents), the
    best concept's score in 95 % of latents of about the same frequency. With 0 nothing is shuffled. Further names score
    at least half of the first.
    """
    n_samples = check_codes(codes, n_latents)
    if isinstance(labels, Tensor):
        check_labels(labels, n_samples)
        labels = Carried.from_labels(labels)
    elif len(labels) != n_samples:
        raise ValueError(f"labels must be of N={n_samples} samples, got {len(labels)}")
    if len(concepts) != labels.n_concepts:
        raise ValueError(f"concepts must be one per column of labels ({labels.n_concepts}), got {len(concepts)}")
    postings = [by_latent(code, n_latents) for code in codes.values()]
    fired = torch.stack([entries.offsets.diff() for entries in postings]).float()
    base = labels.counts().float()
    kept = min(n_names, labels.n_concepts)
    scores = fired.new_zeros(n_latents, kept)
    best = torch.full((n_latents, kept), -1, dtype=torch.int64, device=fired.device)
    hits = torch.zeros_like(fired)
    for some, counts in _counts(postings, labels, n_latents):
        scores[some], best[some] = _largest(_scores(counts, fired[:, some], base, n_samples), kept)
        if kept:
            hits[:, some] = counts.gather(2, best[some, 0].expand(len(codes), -1)[..., None])[..., 0]
    if shuffles and kept:
        chance = _chance(postings, labels, fired, base, max(shuffles, -(-4 * ALIKE // n_latents)), seed)
        scores[scores[:, 0] <= chance] = 0
    scores[scores < scores[:, :1] / 2] = 0
    best[scores <= 0] = -1
    named = best[:, 0] >= 0 if kept else torch.zeros(n_latents, dtype=torch.bool, device=fired.device)
    hits, pooled = hits * named, fired.sum(dim=0)
    carried = base[best[:, 0]] if kept else pooled  # where there is no concept, hits are 0
    several = tuple(tuple(concepts[y] for y in row if y >= 0) for row in best.tolist())
    return LatentNames(
        streams=tuple(codes),
        names=tuple(row[0] if row else "" for row in several),
        several=several,
        concept=best[:, 0] if kept else torch.full((n_latents,), -1, dtype=torch.int64, device=fired.device),
        score=scores[:, 0] if kept else torch.zeros_like(pooled),
        precision=hits.sum(dim=0) / pooled.clamp_min(1),
        recall=hits.sum(dim=0) / (len(codes) * carried).clamp_min(1),
        stream_precision=hits / fired.clamp_min(1),
        stream_recall=hits / carried.clamp_min(1),
        agreement=firing_agreement(codes, n_latents),
    )


def _counts(
    postings: Sequence[ByLatent], carried: Carried, n_latents: int, order: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (some latents, c float [S, l, C]), c[s, l, y] = samples of concept y that fire l in s; exact up to 2^24.

    `order`, where given: the sample whose concepts count as each sample's.
    """
    C = carried.n_concepts
    step = max(1, min(4096, chunks.CHUNK_BYTES // (4 * len(postings) * C + 1)))
    for start in range(0, n_latents, step):
        stop = min(start + step, n_latents)
        counts = []
        for offsets, samples, _ in postings:
            some = samples[offsets[start] : offsets[stop]]
            latent = torch.repeat_interleave(offsets[start + 1 : stop + 1] - offsets[start:stop])
            position, concept = carried.of(some if order is None else order[some])
            cells = torch.bincount(latent[position] * C + concept, minlength=(stop - start) * C)
            counts.append(cells.view(stop - start, C).float())
        yield slice(start, stop), torch.stack(counts)


def _scores(counts: Tensor, fired: Tensor, base: Tensor, n_samples: int) -> Tensor:
    """Of some latents for every concept, [l, C]."""
    S, pooled = len(counts), fired.sum(dim=0)[:, None]
    hits = counts.sum(dim=0)
    precision = _wilson_lower(hits / pooled.clamp_min(1), pooled / S)
    recall = _wilson_lower(hits / (S * base).clamp_min(1), base)
    scores = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return scores.masked_fill(precision <= base / max(n_samples, 1), 0)


def _largest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row of scores >= 0, and where; of equal ones the first, which topk does not promise."""
    left, values, places = scores.clone(), scores.new_zeros(len(scores), n), []
    for i in range(n):
        values[:, i], place = left.max(dim=1)
        left.scatter_(1, place[:, None], -1)
        places.append(place)
    return values, torch.stack(places, dim=1) if places else values.long()


def _chance(
    postings: Sequence[ByLatent], carried: Carried, fired: Tensor, base: Tensor, shuffles: int, seed: int
) -> Tensor:
    """What the best concept of a latent scores on shuffled samples, at the quantile `CHANCE`, [L]."""
    L, N = fired.shape[1], len(carried)
    generator = torch.Generator("cpu").manual_seed(seed)
    found = fired.new_zeros(shuffles, L)
    for r in range(shuffles):
        order = torch.randperm(N, generator=generator, device="cpu").to(fired.device)
        for some, counts in _counts(postings, carried, L, order):
            found[r, some] = _scores(counts, fired[:, some], base, N).amax(dim=1)
    chance = torch.zeros_like(found[0])
    for alike in torch.split(fired.sum(dim=0).argsort(stable=True), ALIKE):
        chance[alike] = found[:, alike].flatten().quantile(CHANCE)
    return chance


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


@torch.no_grad()
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


def latents_of_one_concept(codes: Codes, carried: Carried, n_latents: int, *, n: int = 5, share: float = 0.6) -> Tensor:
    """Latents of which one concept is carried by a share of the n strongest samples of every stream, bool [L].

    Where a latent fires for fewer, the share is still of n: one that is silent in a stream is of no concept.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be > 0 and at most 1, got {share}")
    tops, concepts = top_samples(codes, n_latents, n), max(carried.n_concepts, 1)
    everywhere: Tensor | None = None
    for rows in tops.samples.cpu():  # [L, n] of one stream
        there = rows >= 0
        positions, found = carried.of(rows[there].to(carried.offsets.device))
        latents = there.nonzero()[:, 0][positions.cpu()]
        pairs, counts = (latents * concepts + found.cpu()).unique(return_counts=True)
        common = pairs[counts >= share * n]
        everywhere = common if everywhere is None else common[torch.isin(common, everywhere)]
    of_one = torch.zeros(n_latents, dtype=torch.bool, device="cpu")
    if everywhere is not None:
        of_one[everywhere // concepts] = True
    return of_one
