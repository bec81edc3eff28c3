from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from test_evaluate_codes import Case, cases, code_of, dense_of
from test_evaluate_hierarchy import ANIMALS, forests

from sparc_fast.evaluate import (
    Hierarchy,
    alignment_by_depth,
    concept_alignment,
    concept_jaccard_by_chance,
    sparc_paper_alignment_by_depth,
)

PETS = ["cat", "dog", "bird", "car"]
TREE = Hierarchy.from_parents(ANIMALS)


def one_root(tree: Hierarchy) -> Hierarchy:
    """The same below one root, as Open Images' hierarchy is."""
    return Hierarchy((*tree.names, "entity"), (*(len(tree) if p < 0 else p for p in tree.parents), -1))


def published(case: Case, concepts: list[str], tree: Hierarchy, depth: int) -> list[float]:
    """Sample by sample, what the definitions of the published figures say."""
    codes, labels, L = case
    fires = [(dense_of(code, L) > 0).tolist() for code in codes.values()]

    def bucket(name: str) -> str:
        path = [name]
        while tree.parents[tree.names.index(path[-1])] >= 0:
            path.append(tree.names[tree.parents[tree.names.index(path[-1])]])
        path.reverse()
        return path[min(depth, len(path) - 1)]

    buckets = sorted({bucket(c) for c in concepts})
    scores = []
    for l in range(L):
        counts, active = [], []
        for s, rows in enumerate(fires):
            of_stream = dict.fromkeys(buckets, 0)
            for n, row in enumerate(rows):
                for c, concept in enumerate(concepts):
                    of_stream[bucket(concept)] += int(row[l] and bool(labels[n, c]))
            counts.append(of_stream)
            if any(row[l] for row in rows):
                active.append(s)
        total, pairs = 0.0, list(combinations(active, 2))
        for a, b in pairs:
            low = sum(min(counts[a][y], counts[b][y]) for y in buckets)
            high = sum(max(counts[a][y], counts[b][y]) for y in buckets)
            total += low / high if high > 0 else 0.0
        scores.append(total / len(pairs) if pairs else 0.0)
    return scores


@settings(max_examples=60, deadline=None)
@given(case=cases(), forest=forests(), data=st.data())
def test_the_published_jaccard_by_depth_equals_a_plain_transcription(
    case: Case, forest: Hierarchy, data: st.DataObject
) -> None:
    tree = one_root(forest)
    C = min(case[1].shape[1], len(tree))
    concepts = list(data.draw(st.permutations(tree.names)))[:C]
    codes, labels, L = case
    found = sparc_paper_alignment_by_depth(codes, labels[:, :C], concepts, tree, L)
    assert len(found) == tree.max_depth + 1
    for depth, of_depth in enumerate(found.tolist()):
        assert of_depth == pytest.approx(published((codes, labels[:, :C], L), concepts, tree, depth), abs=1e-12)


def test_two_mammals_of_one_sample_are_two_as_published_and_one_in_truth() -> None:
    both, cat = [True, True, False, False], [True, False, False, False]
    labels = torch.tensor([both, cat, cat])
    codes = {"a": code_of([[1.0], [1.0], [0.0]]), "b": code_of([[0.0], [1.0], [1.0]])}  # mammals: a 2 + 1, b 1 + 1
    assert sparc_paper_alignment_by_depth(codes, labels, PETS, TREE, 1)[1].tolist() == [2 / 3]
    assert alignment_by_depth(codes, labels, PETS, TREE, 1)[1].jaccard.tolist() == [1.0]


def test_streams_that_confuse_cats_with_dogs_agree_on_mammals() -> None:
    labels = torch.eye(4, dtype=torch.bool).repeat(30, 1)
    mine = labels.float()
    swapped = mine[:, [1, 0, 2, 3]]
    codes = {"a": code_of(mine.tolist()), "b": code_of(swapped.tolist())}
    root, mammals, species = alignment_by_depth(codes, labels, PETS, TREE, 4, shuffles=3)
    assert species.jaccard.tolist() == [0, 0, 1, 1]
    assert mammals.jaccard.tolist() == root.jaccard.tolist() == [1, 1, 1, 1]
    assert species.of_latents[:2].max() < 0
    torch.testing.assert_close(mammals.of_latents, torch.ones(4, dtype=torch.float64))
    assert mammals.corrected == pytest.approx(1)


def test_perfect_streams_score_one_and_independent_ones_nothing_above_chance() -> None:
    labels = torch.eye(8, dtype=torch.bool).repeat(100, 1)
    noise, other = ((torch.rand(800, 200, generator=seeded(s)) < 0.3).float() for s in (0, 1))
    meaning = labels.float()
    perfect = concept_alignment({"a": code_of(meaning.tolist()), "b": code_of(meaning.tolist())}, labels, 8)
    assert perfect.corrected == pytest.approx(1)
    chance = concept_alignment({"a": code_of(noise.tolist()), "b": code_of(other.tolist())}, labels, 200, shuffles=4)
    assert chance.jaccard.mean() > 0.7
    assert abs(chance.corrected) < 0.05


def test_dead_latents_count_as_zero_and_one_that_always_fires_is_undefined() -> None:
    labels = torch.ones(4, 1, dtype=torch.bool)
    code = code_of([[1.0, 0.0]] * 4)
    found = concept_alignment({"a": code, "b": code}, labels, 2)
    assert found.of_latents.isnan().tolist() == [True, False]
    assert found.of_latents[1] == 0


def test_no_samples_and_no_labels_align_nothing() -> None:
    for n, c in ((0, 3), (1, 0), (5, 0)):
        codes = {
            name: (torch.ones(n, 2), torch.zeros(n, 2, dtype=torch.int32) + torch.arange(2).int()) for name in "ab"
        }
        found = concept_alignment(codes, torch.zeros(n, c, dtype=torch.bool), 4)
        assert found.jaccard.tolist() == found.of_latents.tolist() == [0.0] * 4
        assert found.corrected == 0


def test_what_is_wrong_with_a_shuffle_is_named() -> None:
    codes = {"a": code_of([[1.0]])}
    labels = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="shuffles must be at least 1, got 0"):
        concept_alignment(codes, labels, 1, shuffles=0)
    with pytest.raises(ValueError, match='shuffle must be "streams" or "labels", got \'rows\''):
        concept_jaccard_by_chance(codes, labels, 1, shuffle="rows")  # type: ignore[arg-type]
