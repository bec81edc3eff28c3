"""Metrics are chosen by name, and cost nothing where they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_evaluation import data_of, model_of

from sparc_fast.evaluate import METRICS, Batch, Given, Metric, Score, above_chance, comparison, evaluate, table
from sparc_fast.evaluate.agreement import AGREEMENT


def test_metrics_have_names_scores_and_sentences_of_their_own() -> None:
    keys = [metric.key for metric in METRICS]
    scores = [score for metric in METRICS for score in metric.scores]
    assert len(set(keys)) == len(keys)
    assert len({score.key for score in scores}) == len({score.name for score in scores}) == len(scores)
    assert all(words.meaning[-1] in ".?" for words in (*METRICS, *scores))
    assert all(metric.scores for metric in METRICS)


@pytest.mark.parametrize("metric", [m for m in METRICS if m.default], ids=lambda metric: metric.key)
def test_each_default_metric_alone_finds_what_all_together_find(metric: Metric) -> None:
    model, (inputs, labels) = model_of(), data_of(30)
    together, alone = (evaluate(model, inputs, labels, metrics=m) for m in (None, (metric.key,)))
    assert alone.scores() == {score.key: together.scores()[score.key] for score in metric.scores}
    assert list(alone.results) == [metric.key]
    assert {row.section for row in comparison({"one": alone})} <= {row.section for row in comparison({"all": together})}
    with pytest.raises(KeyError, match=f"'nothing' was not evaluated, only {metric.key}"):
        alone["nothing"]


def test_what_no_metric_needs_is_neither_encoded_nor_decoded_nor_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, labels) = model_of(), data_of(30)
    calls: list[int] = []
    encode, decode = model.encode, model.decode
    monkeypatch.setattr(model, "encode", lambda x: (calls.append(len(x)), encode(x))[1])
    monkeypatch.setattr(model, "decode", lambda *a, **named: (calls.append(0), decode(*a, **named))[1])

    def of(*metrics: Any) -> list[int]:
        calls.clear()
        evaluate(model, inputs, labels, metrics=metrics)
        return calls

    assert of() == []
    assert of("agreement", "latents") == [1, 1, 1]
    assert of("concepts_joint") == [3]
    assert sorted(of("reconstruction")) == [0] * 9 + [1] * 3
    assert evaluate(model, inputs, metrics=("reconstruction",)).single_codes == {}


def test_an_unknown_name_says_which_are_near_and_a_text_is_no_list_of_names() -> None:
    model, (inputs, _) = model_of(), data_of(4)
    for asked, words in (
        (("retreival",), r"metrics must be of concepts, .*, got 'retreival' \(near: .*retrieval"),
        (("xxxx",), r"got 'xxxx'$"),
        ("agreement", r"metrics must be a sequence of names, such as \('agreement',\), got the text 'agreement'"),
        (("agreement", "concepts"), "metric 'concepts' must be given labels, got none"),
        ((replace(AGREEMENT), "agreement"), "metrics must have keys of their own, got two of 'agreement'"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(model, inputs, metrics=asked)


def test_all_metrics_are_those_whose_needs_are_there() -> None:
    found = evaluate(model_of(), data_of(60)[0], metrics="all", resamples=0)
    expected = [m.key for m in METRICS if not m.needs & {"labels", "hierarchy", "train"}]
    assert list(found.results) == expected
    assert all(key in found.scores() for key in ("agreement", "cofiring_iou", "r1"))


def test_a_metric_of_ones_own_sees_samples_once_or_again_and_the_training_split() -> None:
    class Sum:
        def __init__(self, given: Given) -> None:
            self.total = 0.0

        def see(self, batch: Batch) -> None:
            self.total += float(batch.truth["image"].sum())

    def compute(given: Given) -> dict[str, float]:
        again = sum(float(batch.inputs["image"].sum()) for batch in given.batches())
        assert given.train is not None
        assert given.train.labels is not None
        assert given.train.single["text"][0].shape == (20, 4)
        return {"once": given.watched["mine"].total, "again": again, "labels": float(given.train.labels.sum())}

    scores = (Score("mine", "Mine", "A sum.", "higher", ".2f", lambda found: found["once"]),)
    mine = Metric("mine", "A sum.", compute, scores, frozenset({"single", "inputs", "train", "labels"}), watch=Sum)
    model, (inputs, labels) = model_of(), data_of(30)
    train = {name: x[:20] for name, x in inputs.items()}
    with pytest.raises(ValueError, match="train_labels must be given for mine, got None"):
        evaluate(model, inputs, labels, metrics=(mine,), train=train)
    with pytest.raises(ValueError, match="metric 'mine' must be given training samples, got none"):
        evaluate(model, inputs, labels, metrics=(mine,))
    with pytest.raises(ValueError, match=r"train_labels must be bool \[N=20, C\]"):
        evaluate(model, inputs, labels, metrics=(mine,), train=train, train_labels=labels)
    found = evaluate(
        model, inputs, labels, metrics=("latents", mine), train=train, train_labels=labels[:20], batch_size=7
    )
    total = float(inputs["image"].sum())
    assert found["mine"] == pytest.approx({"once": total, "again": total, "labels": float(labels[:20].sum())}, rel=1e-4)
    assert [row.key for row in table({"model": found})] == ["alive", "mixed", "dead", "active", "mine"]
    other = evaluate(model, inputs, metrics=("latents",))
    assert table({"model": found, "other": other})[-1].cells["other"] == "–"


def test_alignment_is_what_is_left_above_chance() -> None:
    jaccard, chance = torch.tensor([1.0, 0.4, 0.4, 0.0, 0.0, 1.0]), torch.tensor([0.4, 0.4, 0.2, 0.5, 0.0, 1.0])
    assert above_chance(jaccard, chance).tolist() == pytest.approx([1, 0, 0.25, -1, 0, torch.nan], nan_ok=True)


def test_a_comparison_is_shown_in_a_line() -> None:
    model, (inputs, _) = model_of(), data_of(5)
    found = evaluate(model, inputs, metrics=("latents",))
    assert repr(comparison({"SPARC": found, "untrained": found})) == "Comparison(4 rows of SPARC, untrained)"
