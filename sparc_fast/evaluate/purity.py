"""Class purity: how much of what fires a latent is of one concept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .codes import CHUNK_BYTES, Codes, check_codes, check_labels, label_counts
from .concepts import Carried
from .registry import Given, Metric, Score, Sizes
from .resampling import Bags, drawn_sums, firing_entries, latent_blocks

__all__ = ["PURITY", "Purity", "class_purity"]


@dataclass(frozen=True, eq=False)
class Purity:
    """Purity of each latent in each stream, by its dominant concept; nan and -1 where no labelled sample fires it.

    purity: float64 [S, L], in (0, 1]. concept: int64 [S, L], the column of labels. base: float64 [S, L], how many of
    all labelled samples carry that concept, which is what a latent that fires at random would score.
    """

    streams: tuple[str, ...]
    purity: Tensor
    concept: Tensor
    base: Tensor

    @property
    def consistent(self) -> Tensor:
        """Bool [L]: one concept dominates in all streams."""
        return (self.concept == self.concept[:1]).all(dim=0) & (self.concept[0] >= 0)


def class_purity(codes: Codes, labels: Tensor, n_latents: int, *, weighted: bool = False) -> Purity:
    """Of the labelled samples that fire a latent, the fraction that carry its dominant concept (ties: the first).

    weighted: each sample counts by its activation. Both as in MonoLoss (arXiv 2602.12403). A latent that fires once is
    pure, whatever it means, and one that fires always has its most frequent concept's base rate: read it beside how
    often latents fire, and `base`.
    """
    check_labels(labels, check_codes(codes, n_latents))
    labelled = labels.any(dim=1)
    best = torch.zeros(len(codes), n_latents, dtype=torch.float64, device=labels.device)
    concept = torch.full(best.shape, -1, dtype=torch.int64, device=labels.device)
    for first, counts in label_counts(codes, labels, n_latents, weighted=weighted):
        highest, place = counts.max(dim=2)
        better = highest > best
        best, concept = torch.where(better, highest.double(), best), torch.where(better, first + place, concept)
    total = torch.zeros_like(best)
    for _, counts in label_counts(codes, labelled[:, None], n_latents, weighted=weighted):
        total += counts[:, :, 0]
    rate = labels.sum(dim=0, dtype=torch.float64) / labelled.sum().clamp_min(1)
    base = torch.where(concept >= 0, rate[concept.clamp_min(0)] if len(rate) else 0, torch.nan)
    return Purity(tuple(codes), torch.where(total > 0, best / total.where(total > 0, 1), torch.nan), concept, base)


def _compute(given: Given) -> tuple[Purity, Purity]:
    """Plain, and weighted by activation."""
    plain, weighted = (class_purity(given.single, given.concepts, given.n_latents, weighted=w) for w in (False, True))
    return plain, weighted


def _consistent(found: tuple[Purity, Purity]) -> float:
    everywhere = (found[0].concept >= 0).all(dim=0)
    return float(found[0].consistent[everywhere].double().mean())


def _resample(given: Given, found: tuple[Purity, Purity]) -> Mapping[str, Tensor]:
    """Counts of labels are of the drawn samples, and so are dominant concepts."""
    resampling, labels, codes = given.draws, given.concepts, list(given.single.values())
    (N, C), S = labels.shape, len(codes)
    carried = Carried.from_labels(labels)
    degree = carried.offsets.diff()
    purity, heavy, base, fired, same, everywhere = (resampling.zeros() for _ in range(6))
    for latents in latent_blocks(codes, given.n_latents, resampling, int(degree.max()) if N else 0):
        l = latents.stop - latents.start
        cells, holders, labelled, activations = [], [], [], []
        for code in codes:
            keys, (each,) = firing_entries(code, latents, resampling.chunk_bytes, code[0])
            kept = degree[keys % max(N, 1)] > 0
            keys, each = keys[kept], each[kept]
            labelled.append(keys)
            sample = keys % max(N, 1)
            of_key, concept = carried.of(sample)
            cell, place = ((keys // max(N, 1))[of_key] * C + concept).sort(stable=True)
            cells.append(cell)
            holders.append(sample[of_key][place])
            activations.append((each[of_key][place], each))
        known = [torch.unique_consecutive(cell) for cell in cells]
        for some, weights in resampling.pieces(32 * sum(map(len, known)) + 56 * S * l):
            concepts, fires = [], []
            rates = labels.T.float() @ weights / weights[degree > 0].sum(dim=0).clamp_min(1)
            for cell, holder, mine, keys, active in zip(cells, holders, known, labelled, activations, strict=True):
                of_cells = holder, torch.searchsorted(cell, mine), weights
                of_latents = Bags.of(keys, latents, N)
                counts, total = drawn_sums(*of_cells), of_latents.drawn(weights)
                latent = (mine // max(C, 1))[:, None].expand(counts.shape)
                most = torch.zeros_like(total).scatter_reduce(0, latent, counts, "amax")
                column = torch.where(counts == most.gather(0, latent), (mine % max(C, 1))[:, None], C)
                concept = torch.full(total.shape, C, dtype=torch.int64, device="cpu")
                concept = concept.scatter_reduce(0, latent, column, "amin").where(total > 0, C)
                purity[some] += (most / total.clamp_min(1)).sum(dim=0, dtype=torch.float64)
                weighed, in_all = drawn_sums(*of_cells, active[0]), of_latents.drawn(weights, active[1])
                heaviest = torch.zeros_like(in_all).scatter_reduce(0, latent, weighed, "amax")
                heavy[some] += (heaviest / in_all.where(in_all > 0, 1)).sum(dim=0, dtype=torch.float64)
                padded = torch.cat([rates, rates.new_zeros(1, rates.shape[1])])
                base[some] += padded.gather(0, concept).sum(dim=0, dtype=torch.float64)
                fired[some] += (total > 0).sum(dim=0)
                concepts.append(concept)
                fires.append(total > 0)
            alive = torch.stack(fires).all(dim=0)
            everywhere[some] += alive.sum(dim=0)
            same[some] += (alive & (torch.stack(concepts) == concepts[0]).all(dim=0)).sum(dim=0)
    return {
        "purity": purity / fired,
        "purity_weighted": heavy / fired,
        "purity_base": base / fired,
        "purity_consistent": same / everywhere,
    }


def _work(sizes: Sizes) -> int:
    """The counts of some labels, and the largest of them."""
    return 3 * min(8 * sizes.S * sizes.L * max(sizes.C, 1), CHUNK_BYTES) + 64 * sizes.S * sizes.L


PURITY = Metric(
    "purity",
    "Class purity: how much of what fires a latent, in each stream encoded alone, is of its dominant concept.",
    _compute,
    (
        Score(
            "purity",
            "Class purity",
            "Of the labelled samples that fire a latent, the fraction that carry its dominant concept, over latents "
            "and streams.",
            value=lambda found: float(found[0].purity.nanmean()),
        ),
        Score(
            "purity_weighted",
            "Class purity, weighted",
            "The same, each sample counting by its activation.",
            value=lambda found: float(found[1].purity.nanmean()),
        ),
        Score(
            "purity_base",
            "Class purity by chance",
            "How many of all labelled samples carry the dominant concept: what firing at random scores.",
            better="neither",
            value=lambda found: float(found[0].base.nanmean()),
        ),
        Score(
            "purity_consistent",
            "Latents of one concept in all streams",
            "Of the latents that labelled samples fire in every stream, the fraction whose dominant concept is one in "
            "all.",
            format=".1%",
            value=_consistent,
        ),
    ),
    needs=frozenset({"single", "labels"}),
    resample=_resample,
    work=_work,
)
