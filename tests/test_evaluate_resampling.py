"""The bootstrap: resampled scores are those of the drawn samples, and models on the same samples share their draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import data_of, model_of

from sparc_fast.evaluate import METRICS, Retrieval, evaluate
from sparc_fast.evaluate.resampling import Resampling

SAME_CANDIDATES = {"r1", "r5", "r10", "median_rank", "mrr"}  # queries alone are drawn
SHUFFLED = {"alignment", "jaccard_chance"}  # by an order of the samples


@pytest.mark.parametrize("selection", ["global", "local"])
@pytest.mark.parametrize("memory", ["4GiB", "least"])
def test_a_resampled_score_is_that_of_the_drawn_samples(
    selection: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, B = 40, 6
    model, (inputs, labels) = model_of(selection=selection), data_of(N)
    if memory == "least":
        monkeypatch.setattr("sparc_fast.evaluate.passing.CHUNK_BYTES", 600)
        monkeypatch.setattr("sparc_fast.evaluate.passing.LEAST_CHUNK", 1)
    found = evaluate(model, inputs, labels, resamples=B, batch_size=7)
    drawn = Resampling(N, B).weights(slice(None)).long()
    assert drawn.sum(0).tolist() == [N] * B
    assert set(found.resampled) == set(found.scores())
    for b in range(B):
        rows = torch.repeat_interleave(torch.arange(N), drawn[:, b])
        of_drawn = evaluate(model, {name: x[rows] for name, x in inputs.items()}, labels[rows], resamples=0).scores()
        for key, value in of_drawn.items():
            if key not in SAME_CANDIDATES | SHUFFLED:
                assert float(found.resampled[key][b]) == pytest.approx(value, rel=1e-5), key
        of_pairs = [
            Retrieval.from_ranks(torch.repeat_interleave(one.ranks, drawn[:, b]))  # type: ignore[arg-type]
            for one in found.retrieval.values()
        ]
        for key in SAME_CANDIDATES:
            expected = sum(getattr(one, key) for one in of_pairs) / len(of_pairs)
            assert float(found.resampled[key][b]) == pytest.approx(expected), key


def test_chance_is_resampled_with_its_shuffle() -> None:
    from sparc_fast.evaluate.jaccard import _shuffles, mean_jaccard

    N, B = 40, 5
    model, (inputs, labels) = model_of(), data_of(N)
    found = evaluate(model, inputs, labels, resamples=B)
    drawn = Resampling(N, B).weights(slice(None)).long()
    orders = _shuffles(3, N)
    shuffled = {name: (v[o], i[o]) for o, (name, (v, i)) in zip(orders, found.single_codes.items(), strict=True)}
    for b in range(B):
        rows = torch.repeat_interleave(torch.arange(N), drawn[:, b])
        of_rows = {name: (v[rows], i[rows]) for name, (v, i) in shuffled.items()}
        chance = float(mean_jaccard(of_rows, labels[rows], 20).mean())
        assert float(found.resampled["jaccard_chance"][b]) == pytest.approx(chance, rel=1e-5)
        jaccard = float(found.resampled["jaccard_single"][b])
        assert float(found.resampled["alignment"][b]) == pytest.approx((jaccard - chance) / (1 - chance), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 30), groups=st.integers(1, 5), seed=st.integers(0, 2**31), B=st.integers(2, 9))
def test_groups_are_drawn_whole_and_draws_depend_on_nothing_but_them_and_the_seed(
    n: int, groups: int, seed: int, B: int
) -> None:
    of = torch.arange(n) % groups
    one, again, small = (Resampling(n, B, of, seed, chunk_bytes=c) for c in (2**20, 2**20, 1))
    weights = one.weights(slice(None))
    assert torch.equal(weights, again.weights(slice(None)))
    assert torch.equal(weights, small.weights(slice(None)))
    assert torch.equal(weights, torch.cat([piece for _, piece in small.pieces()], dim=1))
    for g in range(min(groups, n)):
        assert bool((weights[of == g] == weights[g]).all())
    assert bool((weights[: min(groups, n)].sum(0) == min(groups, n)).all())
    kept = torch.arange(n) % 3 > 0
    assert torch.equal(one[kept].weights(slice(None)), weights[kept])
    assert torch.equal(one[kept].weights(torch.arange(int(kept.sum())).flip(0)), weights[kept].flip(0))


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    torch.manual_seed(0)
    values = torch.rand(2000)
    drawn = Resampling(2000, 2000).means(values)
    assert float(drawn.std()) == pytest.approx(float(values.std()) / math.sqrt(2000), rel=0.06)
    twice = Resampling(2000, 2000, torch.arange(2000) // 2).means(values[torch.arange(2000) // 2 * 2])
    assert float(twice.std()) == pytest.approx(float(values.std()) / math.sqrt(1000), rel=0.06)


def test_intervals_are_of_every_score_and_shrink_with_samples() -> None:
    model = model_of()
    few, many = (evaluate(model, *data_of(N)).intervals() for N in (40, 640))
    assert set(few) == {score.key for metric in METRICS if metric.default for score in metric.scores}
    for key in ("agreement", "r5", "nmse_self", "r2_cross"):
        assert 0 < many[key] < few[key]  # type: ignore[operator]
    inputs, labels = data_of(40)
    without = evaluate(model, inputs, labels, resamples=0)
    assert without.resampled == {}
    assert set(without.intervals().values()) == {None}
    assert "intervals" not in without.to_dict()
    with pytest.raises(ValueError, match="resamples must be at least 2, or 0 for no intervals, got 1"):
        evaluate(model, inputs, labels, resamples=1)


def test_samples_that_are_left_out_take_their_draws_with_them() -> None:
    model, (inputs, labels) = model_of(), data_of(40)
    gone = torch.arange(40) % 5 == 2
    inputs["text"][gone] = 0
    found = evaluate(model, inputs, labels, zero_rows="absent", resamples=4, batch_size=6)
    drawn = Resampling(40, 4).weights(~gone).long()
    rows = (~gone).nonzero()[:, 0]
    for b in range(4):
        some = torch.repeat_interleave(rows, drawn[:, b])
        expected = evaluate(model, {name: x[some] for name, x in inputs.items()}, labels[some], resamples=0).scores()
        for key in ("agreement", "jaccard_joint", "nmse_cross", "r2_self", "active"):
            assert float(found.resampled[key][b]) == pytest.approx(expected[key], rel=1e-5)
