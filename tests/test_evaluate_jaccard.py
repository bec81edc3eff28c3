from __future__ import annotations

from itertools import combinations
from typing import Literal

import torch
from hypothesis import given, settings
from test_evaluate_codes import Case, cases, code_of, dense_of

import sparc_fast as sf
from sparc_fast.evaluate import concept_alignment, concept_jaccard, concept_jaccard_by_chance

SHUFFLES: tuple[Literal["streams", "labels"], ...] = ("streams", "labels")


def jaccard_by_definition(case: Case) -> list[float]:
    streams, labels, L = case
    fires = [(dense_of(code, L) > 0).tolist() for code in streams.values()]
    N, C = labels.shape
    scores = []
    for l in range(L):
        counts = [[sum(f[n][l] and bool(labels[n, y]) for n in range(N)) for y in range(C)] for f in fires]
        active = [c for c in counts if sum(c) > 0]
        pairs = [sum(map(min, a, b)) / sum(map(max, a, b)) for a, b in combinations(active, 2)]
        scores.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return scores


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_jaccard_equals_its_definition(case: Case) -> None:
    expected = torch.tensor(jaccard_by_definition(case), dtype=torch.float64)
    torch.testing.assert_close(concept_jaccard(*case), expected)


def test_shuffling_breaks_an_alignment_by_meaning_but_not_one_by_frequency() -> None:
    torch.manual_seed(0)
    labels = torch.eye(4, dtype=torch.bool).repeat(50, 1)
    meaning = code_of(labels.float().tolist())  # latent y fires for label y alone
    assert concept_jaccard({"a": meaning, "b": meaning}, labels, 4).tolist() == [1, 1, 1, 1]
    by_chance = concept_jaccard_by_chance({"a": meaning, "b": meaning}, labels, 4)
    always = code_of([[1.0]] * 200)
    assert concept_jaccard_by_chance({"a": always, "b": always}, labels, 1).tolist() == [1]
    assert 0.5 < by_chance.min() < by_chance.max() < 0.99
    again = concept_jaccard_by_chance({"a": meaning, "b": meaning}, labels, 4)
    assert torch.equal(by_chance, again)
    other = concept_jaccard_by_chance({"a": meaning, "b": meaning}, labels, 4, seed=1)
    assert not torch.equal(by_chance, other)


def test_an_untrained_model_on_independent_streams_aligns_jointly_by_construction_and_alone_by_chance() -> None:
    torch.manual_seed(0)
    model = sf.SPARC({"a": 48, "b": 32, "c": 32}, n_latents=256, k=8, backend="reference")
    inputs = {name: torch.randn(1500, width) for name, width in model.d_streams.items()}
    labels = torch.rand(1500, 40) < 0.02
    joint_codes = model.encode(inputs)
    joint = {name: joint_codes.stream(name) for name in model.streams}
    single = {name: model.encode({name: x}).stream(name) for name, x in inputs.items()}
    assert concept_jaccard(joint, labels, 256).mean() > 0.8
    alone = concept_jaccard(single, labels, 256).mean()
    assert alone < 0.6
    assert abs(alone - concept_jaccard_by_chance(single, labels, 256).mean()) < 0.02
    above = {
        shuffle: concept_alignment(joint, labels, 256, shuffle=shuffle, shuffles=4).corrected for shuffle in SHUFFLES
    }
    assert abs(above["labels"]) < 0.05
    assert above["streams"] > 0.5, "shuffling each stream by itself does not see that the support is shared"
