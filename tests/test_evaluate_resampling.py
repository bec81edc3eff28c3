"""The bootstrap: resampled scores are those of the drawn samples, and models on the same samples share their draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import data_of, model_of

from sparc_fast.evaluate import (
    METRICS,
    Hierarchy,
    Retrieval,
    class_purity,
    dictionary_of,
    evaluate,
    evaluate_raw,
    linear_probe,
    probe_effects,
)
from sparc_fast.evaluate.jaccard import _shuffles, mean_jaccard
from sparc_fast.evaluate.monosemanticity import drawn_mono_score
from sparc_fast.evaluate.probes import average_precision, drawn_average_precision
from sparc_fast.evaluate.resampling import Resampling

WIDTHS = {"image": 7, "text": 5, "sound": 5}  # two of one width, which a bridge asks for
NAMES = ["c0", "c1", "c2", "c3", "c4", "c4"]  # two columns of one class count twice
TREE = Hierarchy.from_parents(
    {f"c{c}": "even" if c % 2 == 0 else "odd" for c in range(6)} | {"even": "all", "odd": "all"}
)
RANKED = {  # queries alone are drawn
    "retrieval": {key: (key, None) for key in ("r1", "r5", "r10", "median_rank", "mrr")},
    "retrieval_by_reconstruction": {
        "self_recon_r1": ("r1", True), "cross_recon_r1": ("r1", False), "cross_recon_mrr": ("mrr", False),
    },
}  # fmt: skip
SHUFFLED = {"alignment", "jaccard_chance"}  # by an order of the samples
DEFAULT = tuple(metric.key for metric in METRICS if metric.default)


@pytest.fixture(params=["4GiB", "least"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plenty of it, or pieces as small as can be."""
    if request.param == "least":
        monkeypatch.setattr("sparc_fast.evaluate.passing.CHUNK_BYTES", 600)
        monkeypatch.setattr("sparc_fast.evaluate.passing.LEAST_CHUNK", 1)


def draws(N: int, B: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(which resampling, its samples, each as often as drawn)."""
    drawn = Resampling(N, B).weights(slice(None)).long()
    assert drawn.sum(0).tolist() == [N] * B
    for b in range(B):
        yield b, torch.repeat_interleave(torch.arange(N), drawn[:, b])


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("selection", "metrics"),
    [
        ("global", DEFAULT),
        ("local", DEFAULT),
        ("global", ("ablations",)),
        ("local", ("ablations",)),
        ("global", ("cofiring", "purity", "bridge", "concepts_by_depth_sparc_paper", "retrieval_by_reconstruction")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_resampled_score_is_that_of_the_drawn_samples(selection: str, metrics: tuple[str, ...]) -> None:
    N, B = 40, 4
    model, (inputs, labels) = model_of(WIDTHS, selection), data_of(N, WIDTHS)
    assert not labels.any(1).all()
    found = evaluate(model, inputs, labels, metrics=metrics, hierarchy=(TREE, NAMES), resamples=B, batch_size=7)
    assert set(found.resampled) == set(found.scores())
    ranked = {key: of for metric in metrics for key, of in RANKED.get(metric, {}).items()}
    near = 1e-4 if metrics == ("ablations",) else 1e-5
    for b, rows in draws(N, B):
        of_rows = {name: x[rows] for name, x in inputs.items()}
        of_drawn = evaluate(
            model, of_rows, labels[rows], metrics=metrics, hierarchy=(TREE, NAMES), resamples=0
        ).scores()
        for key, value in of_drawn.items():
            if key not in SHUFFLED | set(ranked):
                assert float(found.resampled[key][b]) == pytest.approx(value, rel=near), key
        for metric in RANKED.keys() & set(metrics):
            of_pairs = {pair: Retrieval.from_ranks(one.ranks[rows]) for pair, one in found[metric].items()}
            for key, (field, own) in RANKED[metric].items():
                some = [getattr(one, field) for (s, t), one in of_pairs.items() if own in (None, s == t)]
                assert float(found.resampled[key][b]) == pytest.approx(sum(some) / len(some)), key


@pytest.mark.parametrize("metric", ["concepts", "concepts_by_depth"])
def test_chance_is_resampled_with_its_shuffle(metric: str) -> None:
    N, B = 40, 5
    model, (inputs, labels) = model_of(), data_of(N)
    names = [f"c{c}" for c in range(6)]
    found = evaluate(model, inputs, labels, hierarchy=(TREE, names), metrics=(metric,), resamples=B)
    codes, orders = found.single_codes, _shuffles(3, N)
    shuffled = {name: (v[o], i[o]) for o, (name, (v, i)) in zip(orders, codes.items(), strict=True)}
    lifted = [labels]
    if metric == "concepts_by_depth":
        lifted = [TREE.at_depth(labels, names, depth)[0] for depth in range(1, TREE.max_depth + 1)]
    for b, rows in draws(N, B):
        above = []
        for truth in lifted:
            jaccard, chance = (
                float(mean_jaccard({name: (v[rows], i[rows]) for name, (v, i) in of.items()}, truth[rows], 20).mean())
                for of in (codes, shuffled)
            )
            above.append((jaccard - chance) / (1 - chance))
        if metric == "concepts":
            assert float(found.resampled["jaccard_single"][b]) == pytest.approx(jaccard, rel=1e-5)
            assert float(found.resampled["jaccard_chance"][b]) == pytest.approx(chance, rel=1e-5)
        key = "alignment" if metric == "concepts" else "alignment_by_depth"
        assert float(found.resampled[key][b]) == pytest.approx(sum(above) / len(above), rel=1e-4)


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


def test_of_a_single_sample_or_group_there_is_no_interval() -> None:
    for n, groups in ((1, None), (20, torch.zeros(20, dtype=torch.int64))):
        inputs, labels = data_of(n)
        assert "intervals" not in evaluate(model_of(), inputs, labels, groups=groups, resamples=20).to_dict()
        inputs = {"image": inputs["image"][:, :9], "text": inputs["image"][:, :9]}
        assert not evaluate_raw(inputs, groups=groups, resamples=20).resampled


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


def test_held_out_losses_of_1d_probes_are_drawn() -> None:
    N, B = 600, 4
    model, (inputs, labels) = model_of(), data_of(N)
    found = evaluate(model, inputs, labels, metrics=("probe_1d",), resamples=B)
    drawn = Resampling(N, B).weights(slice(None)).double()
    probes = found["probe_1d"]
    assert all(len(one.concepts) for one in probes.values())
    for one in probes.values():
        for (samples, each), loss in zip(one.held_out, one.log_loss, strict=True):
            assert float(each.mean()) == pytest.approx(float(loss))
            assert len(samples.unique()) == len(samples)
    for b in range(B):
        of_streams = []
        for one in probes.values():
            losses = [(each * drawn[samples, b]).sum() / drawn[samples, b].sum() for samples, each in one.held_out]
            of_streams.append(torch.stack(losses).nanmean())
        assert float(found.resampled["probe_1d"][b]) == pytest.approx(float(torch.stack(of_streams).mean()), rel=1e-5)


def test_probes_rank_the_held_out_samples_that_are_drawn() -> None:
    N, B = 60, 4
    model, (inputs, labels) = model_of(), data_of(N)
    found = evaluate(model, inputs, labels, metrics=("linear_probes", "mlp_probes"), resamples=B)
    truth = model.normalized(inputs)
    codes = {name: model.encode({name: x}) for name, x in inputs.items()}
    drawn = Resampling(N, B).weights(slice(None)).long()
    for key in ("linear_probe", "mlp_probe"):
        means: dict[str, list[torch.Tensor]] = {"latents": [], "raw": [], "recon": [], "cross_recon": []}
        for (what, source, target), probe in found[f"{key}s"].items():
            held_out, code = probe.held_out, codes[source]
            features = {"raw": truth[target], "latents": code.stream(source)}.get(what)
            features = model.decode(code, source, target) if features is None else features
            logits = probe.classify(features)[held_out]
            of_draws = []
            for b in range(B):
                rows = torch.repeat_interleave(torch.arange(len(held_out)), drawn[held_out, b])
                of_draws.append(average_precision(logits[rows], labels[held_out][rows]).nanmean())
            means[what if source == target else f"cross_{what}"].append(torch.stack(of_draws))
        for suffix, of_probes in means.items():
            expected = torch.stack(of_probes).mean(dim=0).tolist()
            assert found.resampled[f"{key}_{suffix}"].tolist() == pytest.approx(expected, rel=1e-4), (key, suffix)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 30), levels=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_drawn_average_precision_is_that_of_repeated_rows_ties_and_none_drawn_too(
    n: int, levels: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (n,), generator=generator).float()
    truth = torch.rand(n, generator=generator) < share
    weights = torch.randint(4, (n, 5), generator=generator)
    found = drawn_average_precision(scores, truth, weights.float())
    for b in range(5):
        rows = torch.repeat_interleave(torch.arange(n), weights[:, b])
        expected = float(average_precision(scores[rows, None], truth[rows, None])[0])
        assert float(found[b]) == pytest.approx(expected, rel=1e-5, nan_ok=True)


def mono_of_pairs(a: torch.Tensor, weights: torch.Tensor, embeddings: torch.Tensor, from_least: bool = True) -> float:
    """Over pairs of different samples n < m, each w_n w_m times. a [n] and weights [n]: 0 where a latent is silent."""
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    if from_least and bool((a[weights > 0] > 0).all()):
        a = a - a[weights > 0].min()
    n, m = torch.triu_indices(len(a), len(a), 1)
    times = weights[n] * weights[m] * a[n] * a[m]
    return float((times * (unit[n] * unit[m]).sum(dim=1)).sum() / times.sum())


@pytest.mark.usefixtures("memory")
def test_mono_scores_are_of_pairs_of_different_samples_that_are_drawn() -> None:
    N, B = 40, 3
    model, (inputs, labels) = model_of(), data_of(N)
    found = evaluate(model, inputs, labels, metrics=("monosemanticity",), resamples=B)
    truth = model.normalized(inputs)
    drawn = Resampling(N, B).weights(slice(None)).double()
    dense = {}
    for name, (values, indices) in found.single_codes.items():
        dense[name] = torch.zeros(N, 20, dtype=torch.float64).scatter_(1, indices.long(), values.double().relu())
    for b in range(B):
        score, chance, above = [], [], []
        for name, judge in permutations(inputs, 2):
            of_latents = [mono_of_pairs(dense[name][:, l], drawn[:, b], truth[judge]) for l in range(20)]
            score.append(float(torch.tensor(of_latents).nanmean()))
            chance.append(mono_of_pairs(torch.ones(N), drawn[:, b], truth[judge], from_least=False))
            above.append((score[-1] - chance[-1]) / (1 - chance[-1]))
        for key, values in (("mono", score), ("mono_chance", chance), ("mono_above_chance", above)):
            assert float(found.resampled[key][b]) == pytest.approx(sum(values) / len(values), rel=1e-5), key


@pytest.mark.parametrize("chunk_bytes", [1, 2**20])  # summed sample after sample, and by pairs at once
@pytest.mark.parametrize("silent", [0, 1, 5])
def test_a_latent_that_all_drawn_samples_fire_counts_from_the_least_of_them(silent: int, chunk_bytes: int) -> None:
    N, B = 6, 40
    torch.manual_seed(0)
    a, embeddings = 0.5 + torch.rand(N), torch.randn(N, 64)
    a[:silent] = 0
    embeddings[4] = 0
    resampling = Resampling(N, B, chunk_bytes=chunk_bytes)
    drawn, samples = resampling.weights(slice(None)).double(), torch.arange(silent, N)
    norms = embeddings.double().norm(dim=1)
    found = drawn_mono_score(samples, a[samples], embeddings, norms, resampling, drawn.sum(0))
    expected = [mono_of_pairs(a.double(), drawn[:, b], embeddings) for b in range(B)]
    assert found.tolist() == pytest.approx(expected, nan_ok=True)
    assert bool(found.isfinite().any()) is (silent < 5)


def test_effects_on_a_probe_are_of_the_drawn_samples_the_probe_and_concepts_being_those_of_all() -> None:
    N, B = 40, 4
    model, (inputs, labels) = model_of(), data_of(N)
    found = evaluate(model, inputs, labels, metrics=("probe_ablations",), resamples=B)
    codes, truth = found.single_codes, model.normalized(inputs)
    concepts = dict(zip(codes, class_purity(codes, labels, 20).concept, strict=True))
    for b, rows in draws(N, B):
        falls = []
        for source, target in permutations(inputs, 2):
            values, indices = codes[source]
            weight = linear_probe(truth[target], labels).weight
            assert weight is not None
            dictionary = dictionary_of(model, target)
            own, others = probe_effects((values[rows], indices[rows]), dictionary, weight, concepts[source])
            falls.append(own - others)
        expected = float(torch.stack([fall.nanmean() for fall in falls]).mean())
        assert float(found.resampled["probe_ablation_fall"][b]) == pytest.approx(expected, rel=1e-4)


def test_every_score_has_an_interval_but_the_one_that_a_fixed_probe_settles() -> None:
    N, widths = 300, {"image": 5, "text": 5}
    model, (inputs, labels) = model_of(widths), data_of(N, widths)
    found = evaluate(model, inputs, labels, hierarchy=(TREE, NAMES), metrics="all", resamples=4)
    assert set(found.intervals()) == {score.key for metric in METRICS for score in metric.scores}
    assert {key for key, width in found.intervals().items() if width is None} == {"probe_ablation_own"}
