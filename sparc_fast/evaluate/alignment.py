"""Concept alignment by depth of a hierarchy of concepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .codes import CHUNK_BYTES, Codes, check_codes, check_labels, firing_counts
from .hierarchy import Hierarchy
from .jaccard import Concepts, concept_alignment, drawn_jaccard, mean_jaccard
from .registry import Given, Metric, Row, Score, Sizes

__all__ = ["CONCEPTS_BY_DEPTH", "CONCEPTS_BY_DEPTH_SPARC_PAPER", "alignment_by_depth", "sparc_paper_alignment_by_depth"]


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
    lifted = (_times(labels, columns, hierarchy, depth) for depth in range(hierarchy.max_depth + 1))
    return torch.stack([mean_jaccard(codes, times, n_latents, active=active) for times in lifted])


def _times(labels: Tensor, columns: Sequence[int], hierarchy: Hierarchy, depth: int) -> Tensor:
    """How often each sample carries each label at a depth, int32 [N, labels of that depth]."""
    lifted = [hierarchy.lifted(node, depth) for node in columns] if depth else [-1] * len(columns)
    place = {node: column for column, node in enumerate(sorted(set(lifted)))}
    times = torch.zeros(len(labels), len(place), dtype=torch.int32, device=labels.device)
    for column, node in enumerate(lifted):
        times[:, place[node]] += labels[:, column]
    return times


def _hierarchy(given: Given) -> tuple[Hierarchy, Sequence[str]]:
    """It, and the name of each column of labels."""
    found = given.hierarchy
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Hierarchy)):
        expected = "(Hierarchy, the name of each column of labels)"
        raise ValueError(f"hierarchy must be {expected}, got {type(found).__name__}")
    return found[0], list(found[1])


def _compute(given: Given) -> tuple[Concepts, ...]:
    hierarchy, concepts = _hierarchy(given)
    return alignment_by_depth(given.single, given.concepts, concepts, hierarchy, given.n_latents)


def _resample(given: Given, found: tuple[Concepts, ...]) -> Mapping[str, Tensor]:
    hierarchy, concepts = _hierarchy(given)
    total, L = given.draws.zeros(), given.n_latents
    for depth in range(1, len(found)):
        lifted = hierarchy.at_depth(given.concepts, concepts, depth)[0]
        jaccard, chance = (
            drawn_jaccard(given.single, lifted, L, given.draws, shuffled=shuffled) for shuffled in (False, True)
        )
        total += (jaccard - chance) / (L - chance)
    return {"alignment_by_depth": total / (len(found) - 1)} if len(found) > 1 else {}


def _details(found: tuple[Concepts, ...]) -> Mapping[str, Any]:
    return {
        "alignment_by_depth": {
            str(depth): {
                "alignment": one.corrected,
                "jaccard": float(one.jaccard.mean()),
                "chance": float(one.chance.mean()),
            }
            for depth, one in enumerate(found)
        }
    }


def _rows(models: Mapping[str, tuple[Concepts, ...]]) -> Iterator[Row]:
    for depth in range(len(next(iter(models.values())))):
        values: dict[str, float | None] = {name: found[depth].corrected for name, found in models.items()}
        cells = {
            name: f"{found[depth].corrected:.3f} ({found[depth].jaccard.mean():.3f})" for name, found in models.items()
        }
        meaning = f"Concept alignment above chance, and as it is, of labels lifted to depth {depth} of their hierarchy."
        section = "Concept alignment by depth: above chance (as it is)"
        yield Row(f"Depth {depth}", meaning, "higher", cells, section, values=values)


def _labelled(given: Given) -> tuple[Tensor, Codes, Tensor]:
    """The samples that carry a label, their codes and their labels."""
    some = given.concepts.any(dim=1)
    codes = {name: (values[some], indices[some]) for name, (values, indices) in given.joint.items()}
    return some, codes, given.concepts[some]


def _compute_sparc_paper(given: Given) -> Tensor:
    hierarchy, concepts = _hierarchy(given)
    _, codes, labels = _labelled(given)
    return sparc_paper_alignment_by_depth(codes, labels, concepts, hierarchy, given.n_latents)


def _resample_sparc_paper(given: Given, found: Tensor) -> Mapping[str, Tensor]:
    hierarchy, concepts = _hierarchy(given)
    some, codes, labels = _labelled(given)
    times = _times(labels, hierarchy.nodes(concepts), hierarchy, hierarchy.max_depth)
    total = drawn_jaccard(codes, times, given.n_latents, given.draws[some])
    return {"jaccard_sparc_paper": total / given.n_latents}


def _rows_sparc_paper(models: Mapping[str, Tensor]) -> Iterator[Row]:
    for depth in range(len(next(iter(models.values())))):
        values: dict[str, float | None] = {name: float(found[depth].mean()) for name, found in models.items()}
        cells = {name: f"{value:.3f}" for name, value in values.items()}
        meaning = f"The SPARC paper's Jaccard of labels lifted to depth {depth}, all streams encoded together."
        yield Row(f"Depth {depth}", meaning, "neither", cells, "The SPARC paper's Jaccard by depth", values=values)


def _work(sizes: Sizes) -> int:
    """Labels that are lifted, and the counts of all, with those of a pair."""
    return 5 * sizes.N * sizes.C + 3 * min(4 * sizes.S * sizes.L * sizes.C, CHUNK_BYTES)


CONCEPTS_BY_DEPTH = Metric(
    "concepts_by_depth",
    "Concept alignment above chance with labels lifted to each depth of their hierarchy, each stream encoded alone.",
    _compute,
    (
        Score(
            "alignment_by_depth",
            "Concept alignment above chance, over depths",
            "Concept alignment above chance, each stream encoded alone, over all depths of the hierarchy but its root.",
            value=lambda found: sum(one.corrected for one in found[1:]) / (len(found) - 1) if len(found) > 1 else None,
        ),
    ),
    needs=frozenset({"single", "pairs", "labels", "hierarchy"}),
    of_shared=True,
    resample=_resample,
    details=_details,
    rows=_rows,
    work=_work,
)

CONCEPTS_BY_DEPTH_SPARC_PAPER = Metric(
    "concepts_by_depth_sparc_paper",
    "The SPARC paper's own Jaccard by depth, of labelled samples with all streams encoded together.",
    _compute_sparc_paper,
    (
        Score(
            "jaccard_sparc_paper",
            "Concept alignment as in the SPARC paper",
            "Its published figure, at the greatest depth of the hierarchy: of labelled samples, all streams encoded "
            "together, which makes it high by construction.",
            better="neither",
            value=lambda found: float(found[-1].mean()),
        ),
    ),
    needs=frozenset({"joint", "pairs", "labels", "hierarchy"}),
    of_shared=True,
    resample=_resample_sparc_paper,
    details=lambda found: {"jaccard_by_depth_sparc_paper": [float(one.mean()) for one in found]},
    rows=_rows_sparc_paper,
    work=_work,
)
