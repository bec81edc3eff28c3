from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate_codes import Case, cases, code_of, dense_of

from sparc_fast.evaluate import Carried, codes, firing_agreement, latent_use, name_latents, top_samples

LATENT_0_ALWAYS = {"a": code_of([[1.0], [1.0]]), "b": code_of([[1.0], [1.0]])}


# --- use ---


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_latent_use_equals_counting_in_the_dense_codes(case: Case) -> None:
    streams, _, L = case
    fires = torch.stack([dense_of(code, L) > 0 for code in streams.values()])  # [S, N, L]
    N = fires.shape[1]
    use = latent_use(streams, L)
    assert use.streams == tuple(streams)
    expected = [[int(fires[s, :, l].sum()) / max(N, 1) for l in range(L)] for s in range(len(fires))]
    assert use.frequency.tolist() == expected
    alive = fires.any(dim=1)
    assert use.n_alive == int(alive.all(dim=0).sum())
    assert use.n_dead == int((~alive).all(dim=0).sum())
    assert use.n_mixed == int((alive.any(dim=0) & ~alive.all(dim=0)).sum())
    assert use.n_alive_in == tuple(int((alive.sum(dim=0) == n).sum()) for n in range(len(fires) + 1))
    assert use.dead == {name: int((~alive[s]).sum()) for s, name in enumerate(streams)}
    assert list(use.active_per_sample.values()) == pytest.approx([float(f.sum()) / max(N, 1) for f in fires])


# --- agreement ---


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_agreement_equals_the_overlap_of_the_sets_of_samples(case: Case) -> None:
    streams, _, L = case
    dense = [dense_of(code, L) for code in streams.values()]
    expected = []
    for l in range(L):
        sets = [set((x[:, l] > 0).nonzero()[:, 0].tolist()) for x in dense]
        pairs = [len(a & b) / len(a | b) if a | b else 0.0 for a, b in combinations(sets, 2)]
        expected.append(sum(pairs) / len(pairs) if pairs else 0.0)
    torch.testing.assert_close(firing_agreement(streams, L), torch.tensor(expected, dtype=torch.float64))


# --- names ---


def wilson_lower(p: float, n: float) -> float:
    z = 1.96
    return (p + z**2 / (2 * n) - z * (p * (1 - p) / n + z**2 / (4 * n * n)) ** 0.5) / (1 + z**2 / n)


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_names_equal_the_definition_of_their_score(case: Case) -> None:
    streams, labels, L = case
    concepts = [f"word{y}" for y in range(labels.shape[1])]
    fires = [dense_of(code, L) > 0 for code in streams.values()]
    S, N = len(fires), len(labels)
    found = name_latents(streams, labels, concepts, L, shuffles=0)
    for l in range(L):
        fired = sum(int(f[:, l].sum()) for f in fires)
        scores = []
        for y in range(len(concepts)):
            hits = sum(int((f[:, l] & labels[:, y]).sum()) for f in fires)
            carriers = int(labels[:, y].sum())
            p, r = (wilson_lower(hits / (S * n), n) if hits else 0.0 for n in (fired / S, carriers))
            scores.append(2 * p * r / (p + r) if p > carriers / max(N, 1) else 0.0)
        best = max(scores, default=0.0)
        assert float(found.score[l]) == pytest.approx(best, abs=1e-5)
        ranked = sorted(scores, reverse=True)[:3]
        several = [scores[concepts.index(name)] for name in found.several[l]]
        assert several == pytest.approx([score for score in ranked if score and score >= best / 2], abs=1e-5)
        y = int(found.concept[l])
        if y < 0:
            assert best < 1e-5
            assert found.names[l] == ""
            assert found.precision[l] == found.recall[l] == 0
            continue
        assert found.names[l] == concepts[y]
        assert scores[y] == pytest.approx(best, abs=1e-5)
        counts = [int((f[:, l] & labels[:, y]).sum()) for f in fires]
        carried = int(labels[:, y].sum())
        assert float(found.precision[l]) == pytest.approx(sum(counts) / fired)
        assert float(found.recall[l]) == pytest.approx(sum(counts) / (S * carried))
        assert found.stream_recall[:, l].tolist() == pytest.approx([c / carried for c in counts])
        assert found.stream_precision[:, l].tolist() == pytest.approx(
            [c / max(int(f[:, l].sum()), 1) for c, f in zip(counts, fires, strict=True)]
        )
    assert torch.equal(found.agreement, firing_agreement(streams, L))


NAMED = {  # which samples fire, which carry each concept, and the names given
    "a broad word always right, not a rare one met once": (10, {"RARE": 1, "BROAD": 300}, ("BROAD", "RARE")),
    "of two words always right the more specific": (10, {"LETTER": 500, "GREEK": 50}, ("GREEK",)),
    "cat, and not animal": (16, {"animal": 200, "cat": 20}, ("cat",)),  # F1 0.15 and 0.86
    "three that describe it about as well": (20, {"a": 20, "b": 22, "c": 25, "d": 30, "e": 500}, ("a", "b", "c")),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_latent_is_called_by_what_its_firings_vouch_for(case: str) -> None:
    n_firing, concepts, names = NAMED[case]
    n = torch.arange(1000)
    fires = (n < n_firing) | ((n == 500) & ("cat" in concepts))
    labels = torch.stack([n < of_concept for of_concept in concepts.values()], dim=1)
    found = name_latents({"a": code_of(fires[:, None].float().tolist())}, labels, list(concepts), 1)
    assert found.several == (names,)
    assert found.names == names[:1]


def test_what_shuffled_samples_score_as_well_is_no_name() -> None:
    torch.manual_seed(0)
    N, L, C = 400, 64, 300
    chance = torch.rand(N, C) < 0.02
    streams = {name: code_of((torch.rand(N, L) < 0.03).float().tolist()) for name in "ab"}
    concepts = [f"word{y}" for y in range(C)]
    unchecked, found = (name_latents(streams, chance, concepts, L, shuffles=n) for n in (0, 4))
    assert sum(map(bool, unchecked.names)) > 0.9 * L
    assert sum(map(bool, found.names)) < 0.15 * L
    meant = torch.cat([chance, dense_of(streams["a"], L)[:, :1] > 0], 1)
    assert name_latents(streams, meant, [*concepts, "meant"], L).names[0] == "meant"


def test_a_word_that_no_sample_carries_names_nothing_however_many_samples_fire() -> None:
    fires = torch.arange(300)[:, None] <= torch.arange(300)  # latent l fires for l + 1 samples
    codes_of_a = {"a": code_of(fires.float().tolist())}
    found = name_latents(codes_of_a, torch.zeros(300, 1, dtype=torch.bool), ["NEVER"], 300)
    assert not any(found.names)
    assert found.score.tolist() == [0] * 300


def test_equal_words_give_the_first_and_chunks_of_labels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    words = torch.rand(60, 6) < 0.2
    labels = words.repeat(1, 2)
    streams = {name: code_of((words[:, 1:] & (torch.rand(60, 5) < 0.9)).float().tolist()) for name in "ab"}
    concepts = list("abcdefABCDEF")
    whole = name_latents(streams, labels, concepts, 5)
    assert torch.equal(name_latents(streams, Carried.from_labels(labels), concepts, 5).score, whole.score)
    assert whole.names == tuple("bcdef")
    monkeypatch.setattr(codes, "CHUNK_BYTES", 1)
    parts = name_latents(streams, labels, concepts, 5)
    assert parts.names == whole.names
    assert torch.equal(parts.stream_precision, whole.stream_precision)
    assert torch.equal(parts.stream_recall, whole.stream_recall)


def test_a_word_per_label_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"concepts must be one per column of labels \(1\), got 2"):
        name_latents(LATENT_0_ALWAYS, torch.ones(2, 1, dtype=torch.bool), ["a", "b"], 1)


# --- top samples ---


@settings(max_examples=150, deadline=None)
@given(case=cases(), n=st.integers(1, 11), data=st.data())
def test_top_samples_equal_sorting_each_column_of_the_dense_codes(case: Case, n: int, data: st.DataObject) -> None:
    streams, _, L = case
    latents = data.draw(st.none() | st.lists(st.integers(0, L - 1), unique=True))
    found = top_samples(streams, L, n, None if latents is None else torch.tensor(latents, dtype=torch.int64))
    chosen = list(range(L)) if latents is None else latents
    assert found.latents.tolist() == chosen
    assert found.streams == tuple(streams)
    for s, code in enumerate(streams.values()):
        dense = dense_of(code, L).tolist()
        for m, l in enumerate(chosen):
            fired = [(-row[l], i) for i, row in enumerate(dense) if row[l] > 0]
            top = sorted(fired)[:n] + [(0.0, -1)] * max(0, n - len(fired))
            assert found.samples[s, m].tolist() == [i for _, i in top]
            assert found.values[s, m].tolist() == [-v for v, _ in top]


@pytest.mark.parametrize(
    ("n", "latents", "message"),
    [
        (0, None, "n must be at least 1, got 0"),
        (1, [0, 0], r"latents must be distinct latents \[M\], got \[0, 0\]"),
        (1, [1], r"latents must be in \[0, n_latents=1\), got \[1\]"),
        (1, [-1], r"latents must be in \[0, n_latents=1\), got \[-1\]"),
    ],
)
def test_top_samples_names_what_is_wrong(n: int, latents: list[int] | None, message: str) -> None:
    chosen = None if latents is None else torch.tensor(latents)
    with pytest.raises(ValueError, match=message):
        top_samples(LATENT_0_ALWAYS, 1, n, chosen)
