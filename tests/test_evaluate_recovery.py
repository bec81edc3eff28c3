from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from test_evaluate_codes import dense_of

from sparc_fast.evaluate import concept_jaccard, feature_recovery, synthetic_streams

WIDTHS = {"a": 40, "b": 24}


@settings(max_examples=50, deadline=None)
@given(L=st.integers(0, 6), G=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_matching_equals_the_best_of_all_assignments(L: int, G: int, seed: int) -> None:
    dictionaries = {s: torch.randn(L, d, generator=seeded(seed + d)) for s, d in (("a", 3), ("b", 5))}
    features = {s: torch.randn(G, d, generator=seeded(seed + 9 * d)) for s, d in (("a", 3), ("b", 5))}
    cosines = {
        s: torch.nn.functional.normalize(features[s].double(), dim=1)
        @ torch.nn.functional.normalize(dictionaries[s].double(), dim=1).T
        for s in "ab"
    }

    def best(of: torch.Tensor) -> float:
        rows, columns = (range(G), range(L)) if G <= L else (range(L), range(G))
        table = of if G <= L else of.T
        return max(
            sum(float(table[r, c]) for r, c in zip(rows, p, strict=True)) for p in permutations(columns, len(rows))
        )

    found = feature_recovery(dictionaries, features)
    for s in "ab":
        assert float(found.matched[s].sum()) == pytest.approx(best(cosines[s]), abs=1e-9)
        if L:
            torch.testing.assert_close(found.best[s], cosines[s].amax(1))
    assert float(found.joint.sum()) == pytest.approx(best(cosines["a"] + cosines["b"]), abs=1e-9)
    taken = found.latents[found.latents >= 0].tolist()
    assert len(set(taken)) == len(taken) == min(G, L)


def test_the_true_dictionary_is_recovered_in_any_order_and_scale_beside_other_latents() -> None:
    data = synthetic_streams(WIDTHS, 10, 12, 3)
    order = torch.randperm(20, generator=seeded(0))
    mine = {
        s: torch.cat([3 * f, torch.randn(8, f.shape[1], generator=seeded(1))])[order] for s, f in data.features.items()
    }
    found = feature_recovery(mine, data.features)
    assert found.mean_max == pytest.approx(1)
    assert found.mean_matched == pytest.approx(1)
    assert found.mean_joint == pytest.approx(1)
    assert found.recovered() == 1
    assert order[found.latents].tolist() == list(range(12))


def test_streams_that_find_features_at_other_latents_recover_them_alone_but_not_jointly() -> None:
    data = synthetic_streams(WIDTHS, 10, 12, 3)
    mine = {"a": data.features["a"], "b": data.features["b"].roll(1, 0)}
    found = feature_recovery(mine, data.features)
    assert found.mean_matched == pytest.approx(1)
    assert found.mean_joint < 0.75
    assert found.recovered() < 0.2


def test_random_latents_recover_what_chance_allows() -> None:
    data = synthetic_streams({"a": 64, "b": 64}, 5, 30, 2)
    mine = {s: torch.randn(200, 64, generator=seeded(i)) for i, s in enumerate("ab")}
    found = feature_recovery(mine, data.features)
    assert 0.25 < found.mean_max < 0.45
    assert found.mean_joint < found.mean_matched
    assert found.recovered() == 0


def test_inputs_are_the_sums_of_what_codes_say_and_noise_is_as_loud_as_asked() -> None:
    data = synthetic_streams(WIDTHS, 3000, 30, 4, seed=2)
    for name, x in data.inputs.items():
        exact = dense_of(data.codes[name], 30) @ data.features[name]
        torch.testing.assert_close(x, exact, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(data.features[name].norm(dim=1), torch.ones(30))
        noisy = synthetic_streams(WIDTHS, 3000, 30, 4, seed=2, noise=0.5)
    power = {
        s: float((noisy.inputs[s] - dense_of(noisy.codes[s], 30) @ noisy.features[s]).square().mean()) for s in WIDTHS
    }
    for name in WIDTHS:
        assert power[name] == pytest.approx(0.25 * float(data.inputs[name].square().mean()), rel=0.15)
    assert torch.equal(data.labels, dense_of(data.codes["a"], 30) > 0)
    assert concept_jaccard(data.codes, data.labels, 30).min() == 1


def test_features_are_drawn_as_often_as_their_weights_say() -> None:
    even = synthetic_streams({"a": 2}, 20_000, 10, 1).labels.double().mean(0)
    torch.testing.assert_close(even, torch.full((10,), 0.1).double(), atol=0.01, rtol=0)
    zipf = synthetic_streams({"a": 2}, 20_000, 10, 1, skew=1.0).labels.double().mean(0)
    expected = 1 / torch.arange(1, 11).double()
    torch.testing.assert_close(zipf, expected / expected.sum(), atol=0.015, rtol=0)


def test_data_depend_on_the_seed_alone_and_may_be_empty() -> None:
    first, again, other = (synthetic_streams(WIDTHS, 20, 6, 2, noise=0.1, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(first.inputs[s], again.inputs[s]) for s in WIDTHS)
    assert not torch.equal(first.inputs["a"], other.inputs["a"])
    for n in (0, 1):
        assert synthetic_streams(WIDTHS, n, 6, 2).inputs["b"].shape == (n, 24)


def test_what_is_wrong_with_features_is_named() -> None:
    with pytest.raises(ValueError, match="k must be between 1 and n_features=3, got 4"):
        synthetic_streams(WIDTHS, 5, 3, 4)
    with pytest.raises(ValueError, match=r"d_streams must hold widths >= 1, got \{\}"):
        synthetic_streams({}, 5, 3, 1)
    with pytest.raises(ValueError, match="skew and noise must be at least 0, got -1 and 0"):
        synthetic_streams(WIDTHS, 5, 3, 1, skew=-1)
    with pytest.raises(ValueError, match=r"dictionaries must hold the streams \['a'\], got \['b'\]"):
        feature_recovery({"b": torch.ones(1, 1)}, {"a": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"dictionaries and features must be \[L, D\] and \[G, D\]"):
        feature_recovery({"a": torch.ones(1, 2)}, {"a": torch.ones(1, 3)})
