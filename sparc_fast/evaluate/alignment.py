"""Concept alignment above chance, and by depth of a hierarchy of concepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .codes import Codes, check_codes, check_labels, firing_counts
from .hierarchy import Hierarchy
from .jaccard import Concepts, concept_jaccard, concept_jaccard_by_chance, mean_jaccard

__all__ = ["alignment_by_depth", "concept_alignment", "sparc_paper_alignment_by_depth"]


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


def alignment_by_depth(
    codes: Codes,
    labels: Tensor,
    concepts: Sequence[str],
    hierarchy: Hierarchy,
    n_latents: int,
    *,
    shuffle: Literal["streams", "labels"] = "streams",
    shuffles: int = 1,
    seed: int = 0,
) -> tuple[Concepts, ...]:
    """`concept_alignment` with labels bool [N, C] lifted to depth 0, 1, ... of the hierarchy: see `Hierarchy.at_depth`.

    A sample of two mammals is one mammal. At the greatest depth labels are as given.
    """
    check_labels(labels, check_codes(codes, n_latents))
    return tuple(
        concept_alignment(
            codes,
            hierarchy.at_depth(labels, concepts, depth)[0],
            n_latents,
            shuffle=shuffle,
            shuffles=shuffles,
            seed=seed,
        )
        for depth in range(hierarchy.max_depth + 1)
    )


def sparc_paper_alignment_by_depth(
    codes: Codes, labels: Tensor, concepts: Sequence[str], hierarchy: Hierarchy, n_latents: int
) -> Tensor:
    """The SPARC paper's Jaccard (arXiv 2507.06265) at every depth of the hierarchy, float64 [depths, L].

    As in its published code, and for comparison with its figures alone: of *joint* codes; a sample of two mammals
    counts as two; a latent is active in a stream if it fires for any sample given, carrying a label or not, so give the
    annotated samples alone. Its mean over all latents is the paper's score, 0.80 for SPARC at the greatest depth; an
    untrained model scores some 0.95. (The published figures at depths between the first and last lift labels by the
    wrong ancestors; concepts by name, as here, cannot be mistaken.)
    """
    check_labels(labels, check_codes(codes, n_latents))
    columns = hierarchy.nodes(concepts)
    active = torch.stack([firing_counts(code, n_latents) > 0 for code in codes.values()])
    found = []
    for depth in range(hierarchy.max_depth + 1):
        lifted = [hierarchy.lifted(node, depth) for node in columns] if depth else [-1] * len(columns)
        place = {node: column for column, node in enumerate(sorted(set(lifted)))}
        times = torch.zeros(len(labels), len(place), dtype=torch.int32, device=labels.device)
        for column, node in enumerate(lifted):
            times[:, place[node]] += labels[:, column]
        found.append(mean_jaccard(codes, times, n_latents, active=active))
    return torch.stack(found)
