"""Concept alignment: does one latent stand for the same labels in every stream?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from .codes import CHUNK_BYTES, Codes, check_codes, check_labels, firing_counts, label_counts
from .concepts import Carried
from .registry import Given, Metric, Score, Sizes
from .resampling import Resampling, drawn_firings, drawn_sums, firing_entries, latent_blocks

__all__ = [
    "CONCEPTS",
    "CONCEPTS_JOINT",
    "Concepts",
    "above_chance",
    "concept_alignment",
    "concept_jaccard",
    "concept_jaccard_by_chance",
]


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
    orders = _shuffles(len(codes) if shuffle == "streams" else 1, len(labels), seed)
    orders = [order.to(labels.device) for order in orders]
    return mean_jaccard(codes, labels, n_latents, orders * (len(codes) // len(orders)))


def _shuffles(S: int, N: int, seed: int = 0) -> list[Tensor]:
    """For each stream the row that counts as each sample's."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return [torch.randperm(N, generator=generator, device="cpu") for _ in range(S)]


def mean_jaccard(
    codes: Codes, labels: Tensor, n_latents: int, orders: Sequence[Tensor] | None = None, active: Tensor | None = None
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


def above_chance(score: Tensor, chance: Tensor) -> Tensor:
    """(score - chance) / (1 - chance), nan where chance is 1: the form of Cohen's kappa (1960).

    1 is perfect, 0 is what chance earns, and below 0 is worse than that.
    """
    return torch.where(chance < 1, (score - chance) / (1 - chance).where(chance < 1, 1), torch.nan)


@dataclass(frozen=True, eq=False)
class Concepts:
    """`concept_jaccard` of each latent, [L], that of shuffled samples, and which fire in any stream, bool [L]."""

    jaccard: Tensor
    chance: Tensor
    alive: Tensor

    @property
    def of_latents(self) -> Tensor:
        """Corrected for chance, [L]: see `above_chance`."""
        return above_chance(self.jaccard, self.chance)

    @property
    def corrected(self) -> float:
        """The same of the means over all latents, dead ones too, whose J and chance are 0."""
        return float(above_chance(self.jaccard.mean(), self.chance.mean()))


def concept_alignment(
    codes: Codes,
    labels: Tensor,
    n_latents: int,
    *,
    shuffle: Literal["streams", "labels"] = "streams",
    shuffles: int = 1,
    seed: int = 0,
) -> Concepts:
    """`concept_jaccard`, and its mean over `shuffles` shuffles by `concept_jaccard_by_chance`.

    Of *single* codes shuffle "streams": all that streams agree on beyond how often a latent fires is alignment. Of
    *joint* codes shuffle "labels": their streams agree by construction, so only what is beyond that speaks of labels.
    A rare latent's chance is noisy: shuffle several times to rank latents.
    """
    if shuffles < 1:
        raise ValueError(f"shuffles must be at least 1, got {shuffles}")
    found = concept_jaccard(codes, labels, n_latents)
    chance = torch.zeros_like(found)
    for turn in range(shuffles):
        chance += concept_jaccard_by_chance(codes, labels, n_latents, seed + turn, shuffle)
    fired = torch.stack([firing_counts(code, n_latents) for code in codes.values()])
    return Concepts(found, chance / shuffles, (fired > 0).any(dim=0))


def _compute(given: Given) -> Concepts:
    return concept_alignment(given.single, given.concepts, given.n_latents)


def _compute_joint(given: Given) -> Concepts:
    jaccard = concept_jaccard(given.joint, given.concepts, given.n_latents)
    fired = torch.stack([firing_counts(code, given.n_latents) for code in given.joint.values()])
    return Concepts(jaccard, torch.zeros_like(jaccard), (fired > 0).any(dim=0))


def drawn_jaccard(
    codes: Codes, labels: Tensor, n_latents: int, resampling: Resampling, shuffled: bool = False
) -> Tensor:
    """The sum over latents of `concept_jaccard` in each resampling, [B]: counts of labels are of the drawn samples.

    labels are bool [N, C], or integers: how often a sample counts as one of the label.
    """
    of_streams = list(codes.values())
    S, (N, C) = len(of_streams), labels.shape
    pairs = list(combinations(range(S), 2))
    orders = [order.argsort() for order in _shuffles(S, N)] if shuffled else [None] * S
    total = resampling.zeros()
    carried = Carried.from_labels(labels)
    most = int(carried.offsets.diff().max()) if N else 0
    for latents in latent_blocks(of_streams, n_latents, resampling, most):
        l = latents.stop - latents.start
        cells, samples = [], []
        for code, order in zip(of_streams, orders, strict=True):
            keys, _ = firing_entries(code, latents, resampling.chunk_bytes, order=order)
            sample = keys % max(N, 1)
            of_key, concept = carried.of(sample)
            cell, place = ((keys // max(N, 1))[of_key] * C + concept).sort(stable=True)
            cells.append(cell)
            samples.append(sample[of_key][place])
        known = torch.unique(torch.cat(cells))
        offsets = [torch.searchsorted(cell, known) for cell in cells]
        latent = known // max(C, 1)
        for some, weights in resampling.pieces(4 * (S + 2) * len(known)):
            counts = [drawn_sums(x, o, weights) for x, o in zip(samples, offsets, strict=True)]
            like = weights.new_zeros(l, weights.shape[1])
            sums = [like.index_add(0, latent, c) for c in counts]
            jaccard, n_pairs = torch.zeros_like(like), torch.zeros_like(like)
            for s, t in pairs:
                shared = like.index_add(0, latent, torch.minimum(counts[s], counts[t]))
                both = (sums[s] > 0) & (sums[t] > 0)
                jaccard += torch.where(both, shared / (sums[s] + sums[t] - shared).clamp_min(1), 0)
                n_pairs += both
            total[some] += (jaccard / n_pairs.clamp_min(1)).sum(dim=0, dtype=torch.float64)
    return total


def _alive(codes: Codes, n_latents: int, resampling: Resampling) -> Tensor:
    """Latents that fire in any stream, in each resampling, [B]."""
    alive = resampling.zeros()
    for some, counts in drawn_firings(list(codes.values()), n_latents, resampling):
        alive[some] += (counts > 0).any(dim=0).sum(dim=0)
    return alive


def _resample(given: Given, found: Concepts) -> Mapping[str, Tensor]:
    L, arguments = given.n_latents, (given.single, given.concepts, given.n_latents, given.draws)
    total, chance = drawn_jaccard(*arguments), drawn_jaccard(*arguments, shuffled=True)
    return {
        "alignment": (total - chance) / (L - chance),
        "jaccard_single": total / L,
        "jaccard_single_alive": total / _alive(given.single, L, given.draws),
        "jaccard_chance": chance / L,
    }


def _resample_joint(given: Given, found: Concepts) -> Mapping[str, Tensor]:
    total = drawn_jaccard(given.joint, given.concepts, given.n_latents, given.draws)
    return {
        "jaccard_joint": total / given.n_latents,
        "jaccard_joint_alive": total / _alive(given.joint, given.n_latents, given.draws),
    }


def _work(sizes: Sizes) -> int:
    """The counts of all labels, with those of a pair."""
    return 3 * min(4 * sizes.S * sizes.L * sizes.C, CHUNK_BYTES)


CONCEPTS = Metric(
    "concepts",
    "Concept alignment: does a latent fire for the same labels in every stream, each encoded alone?",
    _compute,
    (
        Score(
            "alignment",
            "Concept alignment above chance",
            "How alike the labels are that a latent fires for in two streams, each encoded alone, above what shuffled "
            "samples score: (J - chance) / (1 - chance), 1 is perfect and 0 is chance, over all latents.",
            value=lambda found: found.corrected,
            highlight=True,
        ),
        Score(
            "jaccard_single",
            "Concept alignment (Jaccard)",
            "How alike the labels are that a latent fires for in two streams, each encoded alone (Jaccard, 0 to "
            "1, over all latents, a dead one counting 0).",
            value=lambda found: float(found.jaccard.mean()),
        ),
        Score(
            "jaccard_single_alive",
            "Concept alignment, alive latents",
            "The same over the latents that fire in at least one stream.",
            value=lambda found: float(found.jaccard[found.alive].mean()),
        ),
        Score(
            "jaccard_chance",
            "Concept alignment by chance",
            "The same after each stream's samples are shuffled: what firing often earns without any meaning.",
            better="neither",
            value=lambda found: float(found.chance.mean()),
        ),
    ),
    needs=frozenset({"single", "pairs", "labels"}),
    of_shared=True,
    default=True,
    resample=_resample,
    work=_work,
)

CONCEPTS_JOINT = Metric(
    "concepts_joint",
    "Concept alignment with all streams encoded together, as the SPARC paper has it.",
    _compute_joint,
    (
        Score(
            "jaccard_joint",
            "Concept alignment, encoded jointly",
            "The same with all streams encoded together: a shared support makes it high by construction, even "
            "untrained.",
            better="neither",
            value=lambda found: float(found.jaccard.mean()),
        ),
        Score(
            "jaccard_joint_alive",
            "Concept alignment, encoded jointly, alive latents",
            "The same over the latents that fire in at least one stream.",
            better="neither",
            value=lambda found: float(found.jaccard[found.alive].mean()),
        ),
    ),
    needs=frozenset({"joint", "pairs", "labels"}),
    of_shared=True,
    default=True,
    resample=_resample_joint,
    work=_work,
)
