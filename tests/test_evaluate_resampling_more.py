"""Resampled scores of the metrics that are computed when asked for are those of the drawn samples."""

from __future__ import annotations

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
    linear_probe,
    probe_effects,
)
from sparc_fast.evaluate.jaccard import _shuffles, mean_jaccard
from sparc_fast.evaluate.monosemanticity import drawn_mono_score
from sparc_fast.evaluate.probes import average_precision, drawn_average_precision
from sparc_fast.evaluate.resampling import Resampling


@pytest.mark.parametrize("memory", ["4GiB", "least"])
def test_firings_concepts_and_ranks_are_those_of_the_drawn_samples(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, B, metrics = 40, 5, ("cofiring", "purity", "retrieval_by_reconstruction")
    model, (inputs, labels) = model_of(), data_of(N)
    if memory == "least":
        monkeypatch.setattr("sparc_fast.evaluate.passing.CHUNK_BYTES", 600)
        monkeypatch.setattr("sparc_fast.evaluate.passing.LEAST_CHUNK", 1)
    found = evaluate(model, inputs, labels, metrics=metrics, resamples=B, batch_size=7)
    drawn = Resampling(N, B).weights(slice(None)).long()
    for b in range(B):
        rows = torch.repeat_interleave(torch.arange(N), drawn[:, b])
        of_drawn = evaluate(
            model, {name: x[rows] for name, x in inputs.items()}, labels[rows], resamples=0, metrics=metrics[:2]
        ).scores()
        sums = ("cofiring_iou", "firing_entropy", "largest_energy_share")
        for key in (*sums, "purity", "purity_weighted", "purity_base", "purity_consistent"):
            assert float(found.resampled[key][b]) == pytest.approx(of_drawn[key], rel=1e-5), key
        ranks = {
            pair: Retrieval.from_ranks(torch.repeat_interleave(one.ranks, drawn[:, b]))
            for pair, one in found["retrieval_by_reconstruction"].items()
        }
        own = [one.r1 for (s, t), one in ranks.items() if s == t]
        cross = [one.mrr for (s, t), one in ranks.items() if s != t]
        assert float(found.resampled["self_recon_r1"][b]) == pytest.approx(sum(own) / len(own))
        assert float(found.resampled["cross_recon_mrr"][b]) == pytest.approx(sum(cross) / len(cross))


def test_alignment_by_depth_is_resampled_with_its_shuffle() -> None:
    N, B = 40, 4
    model, (inputs, labels) = model_of(), data_of(N)
    names = [f"c{c}" for c in range(labels.shape[1])]
    tree = Hierarchy.from_parents(
        {name: "even" if c % 2 == 0 else "odd" for c, name in enumerate(names)} | {"even": "all", "odd": "all"}
    )
    found = evaluate(model, inputs, labels, hierarchy=(tree, names), metrics=("concepts_by_depth",), resamples=B)
    codes, orders = found.single_codes, _shuffles(3, N)
    shuffled = {name: (v[o], i[o]) for o, (name, (v, i)) in zip(orders, codes.items(), strict=True)}
    drawn = Resampling(N, B).weights(slice(None)).long()
    for b in range(B):
        rows = torch.repeat_interleave(torch.arange(N), drawn[:, b])
        expected = []
        for depth in range(1, tree.max_depth + 1):
            lifted = tree.at_depth(labels, names, depth)[0]
            j, chance = (
                float(mean_jaccard({name: (v[rows], i[rows]) for name, (v, i) in of.items()}, lifted[rows], 20).mean())
                for of in (codes, shuffled)
            )
            expected.append((j - chance) / (1 - chance))
        assert float(found.resampled["alignment_by_depth"][b]) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


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


def mono_of_pairs(a: torch.Tensor, weights: torch.Tensor, embeddings: torch.Tensor) -> float:
    """Over pairs of different samples n < m, each w_n w_m times. a [n] and weights [n]: 0 where a latent is silent."""
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    if bool((a[weights > 0] > 0).all()):
        a = a - a[weights > 0].min()
    n, m = torch.triu_indices(len(a), len(a), 1)
    times = weights[n] * weights[m] * a[n] * a[m]
    return float((times * (unit[n] * unit[m]).sum(dim=1)).sum() / times.sum())


@pytest.mark.parametrize("memory", ["4GiB", "least"])
def test_mono_scores_are_of_pairs_of_different_samples_that_are_drawn(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, B = 40, 3
    model, (inputs, labels) = model_of(), data_of(N)
    if memory == "least":
        monkeypatch.setattr("sparc_fast.evaluate.passing.CHUNK_BYTES", 600)
        monkeypatch.setattr("sparc_fast.evaluate.passing.LEAST_CHUNK", 1)
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
            n, m = torch.triu_indices(N, N, 1)
            unit = torch.nn.functional.normalize(truth[judge].double(), dim=1)
            times = drawn[n, b] * drawn[m, b]
            chance.append(float((times * (unit[n] * unit[m]).sum(dim=1)).sum() / times.sum()))
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


@pytest.mark.parametrize("memory", ["4GiB", "least"])
@pytest.mark.parametrize("selection", ["global", "local"])
def test_ablations_are_those_of_the_drawn_samples(selection: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    N, B = 40, 4
    model, (inputs, labels) = model_of(selection=selection), data_of(N)
    if memory == "least":
        monkeypatch.setattr("sparc_fast.evaluate.passing.CHUNK_BYTES", 600)
        monkeypatch.setattr("sparc_fast.evaluate.passing.LEAST_CHUNK", 1)
    found = evaluate(model, inputs, labels, metrics=("ablations",), resamples=B, batch_size=7)
    drawn = Resampling(N, B).weights(slice(None)).long()
    for b in range(B):
        rows = torch.repeat_interleave(torch.arange(N), drawn[:, b])
        of_drawn = evaluate(
            model, {name: x[rows] for name, x in inputs.items()}, metrics=("ablations",), resamples=0
        ).scores()
        assert {key: float(values[b]) for key, values in found.resampled.items()} == pytest.approx(of_drawn, rel=1e-4)


def test_effects_on_a_probe_are_of_the_drawn_samples_the_probe_and_concepts_being_those_of_all() -> None:
    N, B = 40, 4
    model, (inputs, labels) = model_of(), data_of(N)
    found = evaluate(model, inputs, labels, metrics=("probe_ablations",), resamples=B)
    codes, truth = found.single_codes, model.normalized(inputs)
    concepts = dict(zip(codes, class_purity(codes, labels, 20).concept, strict=True))
    drawn = Resampling(N, B).weights(slice(None)).long()
    for b in range(B):
        rows = torch.repeat_interleave(torch.arange(N), drawn[:, b])
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
        every = torch.cat(falls)
        expected = float((every[~every.isnan()] > 0).double().mean())
        assert float(found.resampled["probe_ablation_own"][b]) == pytest.approx(expected)


def test_bridges_are_of_the_drawn_samples() -> None:
    N, B, widths = 40, 4, {"image": 5, "text": 5, "sound": 5}
    model, (inputs, _) = model_of(widths), data_of(N, widths)
    found = evaluate(model, inputs, metrics=("bridge",), resamples=B)
    drawn = Resampling(N, B).weights(slice(None)).long()
    for b in range(B):
        rows = torch.repeat_interleave(torch.arange(N), drawn[:, b])
        of_drawn = evaluate(
            model, {name: x[rows] for name, x in inputs.items()}, metrics=("bridge",), resamples=0
        ).scores()
        assert float(found.resampled["bridge_shared"][b]) == pytest.approx(of_drawn["bridge_shared"], rel=1e-5)


def test_the_papers_alignment_is_of_the_labelled_samples_that_are_drawn() -> None:
    N, B = 60, 4
    model, (inputs, labels) = model_of(), data_of(N)
    names = ["c0", "c1", "c2", "c3", "c4", "c4"]  # two columns of one class count twice
    parents = {f"c{c}": "even" if c % 2 == 0 else "odd" for c in range(5)}
    tree = Hierarchy.from_parents(parents | {"even": "all", "odd": "all"})
    metrics = ("concepts_by_depth_sparc_paper",)
    found = evaluate(model, inputs, labels, hierarchy=(tree, names), metrics=metrics, resamples=B)
    drawn = Resampling(N, B).weights(slice(None)).long()
    assert not labels.any(1).all()
    for b in range(B):
        rows = torch.repeat_interleave(torch.arange(N), drawn[:, b])
        of_drawn = evaluate(
            model, {name: x[rows] for name, x in inputs.items()}, labels[rows], hierarchy=(tree, names),
            metrics=metrics, resamples=0,
        ).scores()  # fmt: skip
        expected = of_drawn["jaccard_sparc_paper"]
        assert float(found.resampled["jaccard_sparc_paper"][b]) == pytest.approx(expected, rel=1e-5)


def test_every_score_of_every_metric_has_an_interval() -> None:
    N, widths = 600, {"image": 5, "text": 5}
    model, (inputs, labels) = model_of(widths), data_of(N, widths)
    names = [f"c{c}" for c in range(labels.shape[1])]
    tree = Hierarchy.from_parents(dict.fromkeys(names, "all"))
    found = evaluate(model, inputs, labels, hierarchy=(tree, names), metrics="all", resamples=4)
    assert set(found.intervals()) == {score.key for metric in METRICS for score in metric.scores}
    assert {key for key, width in found.intervals().items() if width is None} == set()
