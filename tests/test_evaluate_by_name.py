"""Every metric by its name, on models of which the truth is known."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from operands import seeded
from torch import Tensor

import sparc_fast as sf
from sparc_fast.evaluate import METRICS, Evaluation, Hierarchy, comparison, evaluate, synthetic_streams

WIDTHS = {"a": 40, "b": 32, "c": 32}
G = 12
NAMES = [f"concept{g}" for g in range(G)]
TREE = Hierarchy.from_parents(
    {name: f"kind{g // 4}" for g, name in enumerate(NAMES)} | dict.fromkeys(f"kind{i}" for i in range(3))
)
ADDED = [
    "concepts_by_depth", "concepts_by_depth_sparc_paper", "cofiring", "purity", "monosemanticity", "probe_1d",
    "probe_1d_sparc_paper", "linear_probes", "mlp_probes", "retrieval_by_reconstruction", "ablations", "probe_ablations",
    "bridge",
]  # fmt: skip


@dataclass
class Case:
    model: sf.SPARC
    inputs: dict[str, Tensor]
    labels: Tensor

    def evaluated(self, *metrics: str, n: int | None = None, resamples: int = 0) -> Evaluation:
        inputs, labels = {name: x[:n] for name, x in self.inputs.items()}, self.labels[:n]
        return evaluate(self.model, inputs, labels, hierarchy=(TREE, NAMES), metrics=metrics, resamples=resamples)


def planted(known: bool) -> Case:
    """Streams of a shared dictionary, and a model that knows it, or knows it with each stream's latents in another order."""
    data = synthetic_streams(WIDTHS, 400, G, 2, noise=0.02, seed=3)
    model = sf.SPARC(WIDTHS, n_latents=G, k=2, backend="reference")
    features = [data.features[name] for name in WIDTHS]
    if not known:
        features = [of.roll(4 * s, 0) for s, of in enumerate(features)]
    with torch.no_grad():
        model.W_dec.copy_(torch.cat(features, dim=1))
        inverse = [torch.linalg.pinv(of).T for of in features]
        model.W_enc.copy_(torch.cat(inverse, dim=1))
        model.pre_bias.zero_()
        model.latent_bias.zero_()
    return Case(model, data.inputs, data.labels)


@pytest.fixture(scope="module")
def aligned() -> Case:
    return planted(True)


@pytest.fixture(scope="module")
def evaluated(aligned: Case) -> dict[str, Evaluation]:
    linear = (metric for metric in ADDED if metric != "mlp_probes")  # which say the same of both
    return {"aligned": aligned.evaluated(*ADDED), "crossed": planted(False).evaluated(*linear)}


SCORES = {  # least and greatest, of a model that knows the dictionary, and of one whose streams know it in other orders
    "alignment_by_depth": ((0.99, 1), (-3, 0)),
    "jaccard_sparc_paper": ((0.99, 1), (0.5, 0.8)),
    "cofiring_iou": ((0.99, 1), (0, 0.05)),
    "firing_entropy": ((0.99, 1), (0.98, 1)),
    "largest_energy_share": ((1 / 3, 0.37), (1 / 3, 0.4)),
    "purity": ((0.99, 1), (0.99, 1)),
    "purity_weighted": ((0.99, 1), (0.99, 1)),
    "purity_base": ((0.15, 0.18), (0.15, 0.18)),
    "purity_consistent": ((1, 1), (0, 0)),
    "mono_above_chance": ((0.35, 0.5), (0.35, 0.5)),
    "mono_chance": ((0.1, 0.3), (0.1, 0.3)),
    "probe_1d": ((0, 0.15), (0, 0.15)),
    "probe_1d_sparc_paper": ((0, 0.2), (0, 0.2)),
    "linear_probe_latents": ((0.99, 1), (0.99, 1)),
    "linear_probe_raw": ((0.99, 1), (0.99, 1)),
    "linear_probe_recon": ((0.99, 1), (0.99, 1)),
    "linear_probe_cross_recon": ((0.99, 1), (0.99, 1)),
    "mlp_probe_latents": ((0.97, 1), (0.97, 1)),
    "mlp_probe_cross_recon": ((0.97, 1), (0.97, 1)),
    "self_recon_r1": ((0.8, 1), (0.8, 1)),  # some samples have the same two concepts
    "cross_recon_r1": ((0.08, 0.4), (0, 0.02)),
    "ablation_helpful": ((1, 1), (0, 0)),
    "ablation_faithful": ((0.7, 1), (-1.2, -0.5)),
    "ablation_helpful_own": ((1, 1), (1, 1)),
    "probe_ablation_own": ((1, 1), (0, 0.2)),
    "probe_ablation_fall": ((5, 20), (-5, 0)),
}


def test_scores_of_planted_models_are_what_is_known_of_them(evaluated: dict[str, Evaluation]) -> None:
    for which, found in enumerate(evaluated.values()):
        scores = found.scores()
        for key, bounds in SCORES.items():
            if key.startswith("mlp") and which == 1:
                continue
            value, (least, greatest) = scores[key], bounds[which]
            assert value is not None, key
            assert least - 1e-9 <= value <= greatest + 1e-9, (key, value)
        assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_every_metric_has_its_rows_in_a_table_of_two_models(evaluated: dict[str, Evaluation]) -> None:
    rows = comparison(evaluated)
    sections = {row.section for row in rows}
    for section in (
        "Concept alignment by depth: above chance (as it is)", "The SPARC paper's Jaccard by depth",
        "Linear probes: mAP · macro / micro F1", "MLP probes: mAP · macro / micro F1",
        "Retrieval of inputs: R@1 / R@5 / R@10 · median rank · MRR", "Latents taken out: worse without / right",
    ):  # fmt: skip
        assert section in sections
    assert all(set(row.cells) == {"aligned", "crossed"} for row in rows)


def test_alignment_by_depth_finds_the_kinds_that_streams_agree_on(aligned: Case) -> None:
    model = planted(True).model
    with torch.no_grad():  # concepts of one kind change places
        for weight in (model.W_enc, model.W_dec):
            weight[:, 40:72] = weight[:, 40:72].view(3, 4, 32).roll(1, 1).reshape(G, 32).clone()
    found = Case(model, aligned.inputs, aligned.labels).evaluated("concepts_by_depth")["concepts_by_depth"]
    kinds, concepts = found
    assert kinds.jaccard.mean() > concepts.jaccard.mean() + 0.2


@pytest.mark.parametrize("metric", ADDED)
@pytest.mark.parametrize("n", [0, 1])
def test_no_samples_and_one_sample_have_every_metric(metric: str, n: int, aligned: Case) -> None:
    found = aligned.evaluated(metric, n=n, resamples=20)
    assert set(found.scores()) == {score.key for m in METRICS if m.key == metric for score in m.scores}
    json.dumps(found.to_dict(), allow_nan=False)
    assert comparison({"one": found}) is not None


def test_a_model_of_one_stream_has_every_metric_that_does_not_compare_streams() -> None:
    torch.manual_seed(0)
    model = sf.SPARC({"a": 6}, n_latents=10, k=2, backend="reference")
    labels = torch.rand(200, G, generator=seeded(0)) < 0.3
    found = evaluate(model, {"a": torch.randn(200, 6)}, labels, hierarchy=(TREE, NAMES), metrics=ADDED)
    undefined = {key for key, result in found.results.items() if result is None}
    assert undefined == {metric.key for metric in METRICS if metric.key in ADDED and "pairs" in metric.needs}
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_hierarchy_without_the_names_of_labels_is_refused(aligned: Case) -> None:
    with pytest.raises(
        ValueError, match=r"hierarchy must be \(Hierarchy, the name of each column of labels\), got Hierarchy"
    ):
        evaluate(aligned.model, aligned.inputs, aligned.labels, hierarchy=TREE, metrics=("concepts_by_depth",))
