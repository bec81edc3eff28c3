from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from torch import Tensor

import sparc_fast as sf
from sparc_fast.evaluate import (
    METRICS,
    Evaluation,
    Retrieval,
    comparison,
    concept_jaccard,
    concept_jaccard_by_chance,
    difference,
    evaluate,
    firing_agreement,
    latent_use,
    nmse_from_errors,
    r2_from_errors,
    retrieval_ranks,
    retrieval_scores,
    squared_error,
    table,
)
from sparc_fast.evaluate.agreement import Agreement
from sparc_fast.evaluate.jaccard import Concepts
from sparc_fast.evaluate.reconstruction import Reconstructed

DEFAULT = tuple(metric for metric in METRICS if metric.default)
WIDTHS = {"image": 7, "text": 5, "sound": 3}


def model_of(widths: dict[str, int] = WIDTHS, selection: str = "global") -> sf.SPARC:
    torch.manual_seed(0)
    return sf.SPARC(widths, n_latents=20, k=4, selection=selection, backend="reference")  # type: ignore[arg-type]


def data_of(N: int, widths: dict[str, int] = WIDTHS) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(N, width) for name, width in widths.items()}, torch.rand(N, 6) < 0.3


# --- reconstruction ---


@settings(max_examples=60, deadline=None)
@given(N=st.integers(2, 9), D=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_nmse_and_r2_equal_their_definitions(N: int, D: int, seed: int) -> None:
    generator = seeded(seed)
    x, x_hat = (torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    error = squared_error(x, x_hat)
    ratios = [float(((a - b) ** 2).sum() / (a**2).sum()) for a, b in zip(x, x_hat, strict=True)]
    assert float(nmse_from_errors(error, x)) == pytest.approx(sum(ratios) / N)
    r2 = 1 - float(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
    assert float(r2_from_errors(error, x)) == pytest.approx(r2)
    both = torch.stack([error, 2 * error])
    assert torch.equal(nmse_from_errors(both, x)[0], nmse_from_errors(error, x))
    assert torch.equal(r2_from_errors(both, x)[1], r2_from_errors(2 * error, x))


def test_anchors_of_nmse_and_r2() -> None:
    x = torch.randn(10, 4) + 5
    mean = x.mean(0).expand(10, 4)
    assert nmse_from_errors(squared_error(x, x), x) == 0
    assert r2_from_errors(squared_error(x, x), x) == 1
    assert float(nmse_from_errors(squared_error(x, torch.zeros(10, 4)), x)) == pytest.approx(1)
    assert float(r2_from_errors(squared_error(x, mean), x)) == pytest.approx(0, abs=1e-6)


def test_a_zero_row_adds_nothing_to_nmse_and_is_counted() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert float(nmse_from_errors(squared_error(x, torch.ones(2, 2)), x)) == 0.5


def test_a_nearly_constant_dimension_does_not_rule_r2() -> None:
    x = torch.tensor([[0.0, 1.0], [10.0, 1.0001]])
    x_hat = torch.tensor([[0.0, 1.0], [10.0, 1.1]])
    assert float(r2_from_errors(squared_error(x, x_hat), x)) > 0.999


@pytest.mark.parametrize("N", [0, 1, 3, 5000])
def test_r2_is_undefined_where_nothing_varies(N: int) -> None:
    x = torch.full((N, 2), 0.1)
    assert math.isnan(r2_from_errors(squared_error(x, x + 1), x))


def test_r2_of_many_rows_is_that_of_all_together() -> None:
    x = torch.randn(9000, 2, dtype=torch.float64) * torch.arange(9000)[:, None]
    expected = 1 - 9000 * 2 / (x - x.mean(0)).square().sum()
    assert float(r2_from_errors(squared_error(x, x + 1), x)) == pytest.approx(float(expected))
    assert float(nmse_from_errors(squared_error(x, 3 * x), x)) == pytest.approx(4 * 8999 / 9000)


def test_shapes_that_do_not_match_are_named() -> None:
    with pytest.raises(ValueError, match=r"x and x_hat must be of one shape .* got \(2, 3\) and \(2, 1\)"):
        squared_error(torch.ones(2, 3), torch.ones(2, 1))
    for score in (nmse_from_errors, r2_from_errors):
        with pytest.raises(ValueError, match=r"error and x must be .* got \(2,\) and \(3, 1\)"):
            score(torch.ones(2), torch.ones(3, 1))


# --- evaluate ---


@pytest.mark.parametrize("selection", ["global", "local"])
@pytest.mark.parametrize("batch_size", [7, 30, 1000])
def test_evaluate_equals_each_metric_on_the_whole_batch(selection: str, batch_size: int) -> None:
    model, (inputs, labels) = model_of(selection=selection), data_of(30)
    found = evaluate(model, inputs, labels, batch_size=batch_size)
    together = model.encode(inputs)
    joint = {name: together.stream(name) for name in model.streams}
    alone = {name: model.encode({name: x}) for name, x in inputs.items()}
    single = {name: codes.stream(name) for name, codes in alone.items()}
    L = model.n_latents
    assert found.jaccard_single is not None
    assert found.jaccard_chance is not None
    assert found.jaccard_joint is not None
    torch.testing.assert_close(found.jaccard_single, concept_jaccard(single, labels, L).cpu())
    torch.testing.assert_close(found.jaccard_chance, concept_jaccard_by_chance(single, labels, L).cpu())
    torch.testing.assert_close(found.jaccard_joint, concept_jaccard(joint, labels, L).cpu())
    torch.testing.assert_close(found.agreement, firing_agreement(single, L).cpu())
    torch.testing.assert_close(found.frequency, latent_use(single, L).frequency.cpu())
    assert list(found.retrieval) == list(permutations(WIDTHS, 2))
    for (a, b), scores in found.retrieval.items():
        assert scores == Retrieval.from_ranks(retrieval_ranks(single[a], single[b], L))
    for s, source in enumerate(WIDTHS):
        for t, target in enumerate(WIDTHS):
            error = squared_error(inputs[target], model.decode(alone[source], source, target).detach())
            torch.testing.assert_close(found.nmse[s, t], nmse_from_errors(error, inputs[target]).cpu())
            torch.testing.assert_close(found.r2[s, t], r2_from_errors(error, inputs[target]).cpu())
    for name, (values, indices) in found.single_codes.items():
        torch.testing.assert_close(values, single[name][0].detach().cpu())
        assert torch.equal(indices, single[name][1].cpu())


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_the_model_as_it_was(training: bool) -> None:
    model, (inputs, labels) = model_of().train(training), data_of(9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, inputs, labels)
    assert model.training is training
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_model_runs_in_eval_mode_and_returns_to_training_after_an_error() -> None:
    class Failing(sf.SPARC):
        def encode(self, inputs: object) -> sf.SparseLatents:
            raise RuntimeError(f"training={self.training}")

    model = Failing(WIDTHS, n_latents=20, k=4, backend="reference")
    with pytest.raises(RuntimeError, match="training=False"):
        evaluate(model, data_of(3)[0])
    assert model.training


def test_results_cannot_be_reassigned_and_carry_no_gradients() -> None:
    found = evaluate(model_of(), *data_of(9))
    with pytest.raises(FrozenInstanceError):
        found.n_samples = 3  # type: ignore[misc]
    assert not found.nmse.requires_grad
    assert not any(values.requires_grad for values, _ in found.single_codes.values())


def test_without_labels_only_the_jaccard_scores_are_missing() -> None:
    inputs, _ = data_of(9)
    found = evaluate(model_of(), inputs)
    assert found.jaccard_single is found.jaccard_joint is found.jaccard_chance is None
    missing = {key for key, value in found.scores().items() if value is None}
    assert missing == {score.key for metric in DEFAULT if "labels" in metric.needs for score in metric.scores}


def test_one_stream_has_no_cross_scores() -> None:
    widths = {"image": 7}
    scores = evaluate(model_of(widths), *data_of(9, widths)).scores()
    undefined = {key for key, value in scores.items() if value is None}
    compared = {score.key for metric in DEFAULT if "pairs" in metric.needs for score in metric.scores}
    assert {"agreement", "jaccard_single", "jaccard_joint", "r1", "mrr"} <= compared
    assert undefined == {"nmse_cross", "r2_cross"} | compared


def test_no_samples_give_undefined_scores_and_dead_latents() -> None:
    scores = evaluate(model_of(), *data_of(0)).scores()
    assert scores["dead"] == 1
    assert scores["jaccard_single"] == scores["alive"] == scores["active"] == 0
    assert scores["r1"] is scores["nmse_self"] is scores["r2_cross"] is scores["agreement"] is None


def test_a_lone_sample_is_retrieved_first_and_has_no_variance() -> None:
    scores = evaluate(model_of(), *data_of(1)).scores()
    assert scores["r1"] == scores["median_rank"] == 1
    assert scores["r2_self"] is None


def test_streams_may_come_in_any_order() -> None:
    model, (inputs, labels) = model_of(), data_of(9)
    backwards = dict(reversed(list(inputs.items())))
    assert evaluate(model, backwards, labels).to_dict() == evaluate(model, inputs, labels).to_dict()


def test_classes_are_evaluated_as_their_truth_values() -> None:
    model, (inputs, _) = model_of(), data_of(9)
    classes = torch.arange(9) % 3
    expected = evaluate(model, inputs, classes[:, None] == torch.arange(3)).to_dict()
    assert evaluate(model, inputs, classes).to_dict() == expected
    assert evaluate(model, inputs, [f"class {c}" for c in classes]).to_dict() == expected


def test_tokens_are_samples_with_the_labels_and_groups_of_theirs() -> None:
    model, (inputs, labels) = model_of(), data_of(12)
    tokens = {name: x.reshape(4, 3, -1) for name, x in inputs.items()}
    of_tokens = labels[:4].repeat_interleave(3, 0)
    expected = evaluate(model, inputs, of_tokens, groups=torch.arange(12) // 3)
    assert evaluate(model, tokens, labels[:4], groups=[3, 1, 2, 0]).to_dict() == expected.to_dict()
    assert evaluate(model, tokens, of_tokens.reshape(4, 3, -1), groups=torch.arange(12) // 3).n_samples == 12
    assert evaluate(model, tokens, of_tokens).retrieval == evaluate(model, inputs).retrieval


def test_groups_change_retrieval_and_intervals_and_nothing_else() -> None:
    model, (inputs, labels) = model_of(), data_of(20)
    alone, grouped = evaluate(model, inputs, labels), evaluate(model, inputs, labels, groups=torch.arange(20) // 4)
    single = alone.single_codes
    for (a, b), scores in grouped.retrieval.items():
        expected = retrieval_scores(single[a], single[b], model.n_latents, torch.arange(20) // 4)
        assert scores == expected != alone.retrieval[a, b]
    without = [{**found.to_dict(), **dict.fromkeys(("retrieval", "scores", "intervals"))} for found in (alone, grouped)]
    assert without[0] == without[1]
    assert evaluate(model, inputs, labels, groups=range(20)).to_dict() == alone.to_dict()


def files_of(folder: Path, inputs: dict[str, Tensor], dtype: Any = np.float32) -> dict[str, Path]:
    for name, x in inputs.items():
        np.save(folder / f"{name}.npy", x.numpy().astype(dtype))
    return {name: folder / f"{name}.npy" for name in inputs}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_files_are_evaluated_as_the_numbers_in_them(dtype: Any, tmp_path: Path) -> None:
    model, (inputs, labels) = model_of(), data_of(100)
    inputs = {name: torch.from_numpy(x.numpy().astype(dtype)).float() for name, x in inputs.items()}
    with sf.data.open(files_of(tmp_path, dict(reversed(inputs.items())), dtype)) as files:
        for batch_size in (7, 1024):
            expected = evaluate(model, inputs, labels, batch_size=batch_size).to_dict()
            assert evaluate(model, files, labels, batch_size=batch_size).to_dict() == expected


def test_little_memory_makes_small_batches_and_changes_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, (inputs, labels) = sf.SPARC(WIDTHS, n_latents=20, k=4), data_of(1500)
    much = evaluate(model, inputs, labels)
    with pytest.raises(
        ValueError, match=r"memory must be at least \d+ bytes for 1500 samples here, got 1MiB"
    ) as refused:
        evaluate(model, inputs, labels, memory="1MiB")
    least = int(str(refused.value).split()[5])
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda x: (encoded.append(len(next(iter(x.values())))), encode(x))[1])
    little = evaluate(model, inputs, labels, memory=least, batch_size=1500)
    assert 1 < max(encoded) < 1500
    assert little.to_dict()["retrieval"] == much.to_dict()["retrieval"]
    assert little.scores() == pytest.approx(much.scores())
    for one, other in zip(little.single_codes.values(), much.single_codes.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match=f"memory must be at least {least} bytes"):
        evaluate(model, inputs, labels, memory=least - 1)
    with pytest.raises(ValueError, match='memory must be an integer >= 1, in bytes, or a size such as "4GiB"'):
        evaluate(model, inputs, labels, memory="a lot")


PEAK = """
import sys
import numpy as np, torch
import sparc_fast as sf
from sparc_fast.evaluate import evaluate
from sparc_fast.planning.process_memory import forget_peak, resident
torch.set_num_threads(1)
model = sf.SPARC({"a": 2048, "b": 1024}, n_latents=256, k=8)
evaluate(model, {name: torch.randn(300, width) for name, width in model.d_streams.items()}, retrieval=False)
with sf.data.open({name: f"{name}.npy" for name in model.streams}) as files:
    forget_peak()
    base = resident("VmRSS")
    evaluate(model, files, np.arange(files.n_rows) % 20, memory=int(sys.argv[1]))
    print(resident("VmHWM") - base)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak anew")
def test_files_larger_than_memory_are_evaluated_within_it(tmp_path: Path) -> None:
    memory, N = 55 * 2**20, 10_000
    block = np.random.default_rng(0).standard_normal((1000, 2048)).astype(np.float16)
    for name, width in (("a", 2048), ("b", 1024)):
        np.save(tmp_path / f"{name}.npy", np.tile(block[:, :width], (N // 1000, 1)))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > memory
    command = [sys.executable, "-c", PEAK, str(memory)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < memory


def test_samples_of_files_that_lack_a_stream_are_left_out_with_what_is_known_of_them(tmp_path: Path) -> None:
    model, (inputs, labels) = model_of(), data_of(40)
    groups = torch.arange(40) // 3
    inputs["text"][[13, 11]] = 0
    ids = {"image": np.arange(40), "text": np.arange(40), "sound": np.arange(40)[::-1][:30]}
    sources = {**inputs, "sound": inputs["sound"].flip(0)[:30]}
    some = torch.ones(40, dtype=torch.bool)
    some[[13, 11, *range(10)]] = False
    whole = {name: x[some] for name, x in inputs.items()}
    expected = evaluate(model, whole, labels[some], groups=groups[some])
    with sf.data.open(sources, ids=ids, join="outer") as files:
        for batch_size in (2, 8, 100):  # of two samples, some batches are left without any
            found = evaluate(model, files, labels, groups=groups, zero_rows="absent", batch_size=batch_size)
            assert found.n_samples == 28
            assert found.scores() == pytest.approx(expected.scores())
        assert evaluate(model, files, labels).n_samples == 30
        nothing = evaluate(model, sf.data.open({name: 0 * x for name, x in inputs.items()}), zero_rows="absent")
        assert nothing.n_samples == 0
        with pytest.raises(ValueError, match='zero_rows must be "keep" or "absent", got \'drop\''):
            evaluate(model, files, zero_rows="drop")  # type: ignore[arg-type]


def test_rows_of_one_id_are_a_group(tmp_path: Path) -> None:
    model, (inputs, _) = model_of(), data_of(30)
    images = {"image": inputs["image"][:10]}
    of_image = np.arange(30) // 3
    ids = {"image": np.arange(10), "text": of_image, "sound": of_image}
    with sf.data.open({**inputs, **images}, ids=ids, join="inner", repeated="all") as files:
        found = evaluate(model, files)
    expanded = {**inputs, "image": inputs["image"][of_image]}
    assert found.retrieval == evaluate(model, expanded, groups=of_image).retrieval
    assert found.retrieval["image", "text"].n == found.retrieval["text", "image"].n_candidates == 10
    assert found.retrieval["text", "image"].n == found.retrieval["image", "text"].n_candidates == 30


def test_retrieval_may_be_left_out_and_says_beforehand_when_it_will_be_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, (inputs, labels) = model_of(), data_of(30)
    whole, without = evaluate(model, inputs, labels), evaluate(model, inputs, labels, retrieval=False)
    assert without.retrieval == {}
    assert whole.scores().keys() - without.scores().keys() == {"r1", "r5", "r10", "median_rank", "mrr"}
    assert all(whole.scores()[key] == value for key, value in without.scores().items())
    assert len(comparison({"whole": whole, "again": whole})) > len(comparison({"without": without})) > 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.modules["sparc_fast.evaluate.retrieval"], "LONG", 0)
    said: list[str] = []
    evaluate(model, inputs, say=said.append)
    assert said == ["retrieval compares 30 codes with as many, 6 times: about 0 seconds"]
    evaluate(model, inputs)
    assert capsys.readouterr().err == said[0] + "\n"


def test_wrong_inputs_are_named() -> None:
    model, (inputs, labels) = model_of(), data_of(4)
    with pytest.raises(ValueError, match=r"inputs must hold the streams \['image', 'text', 'sound'\], got"):
        evaluate(model, {"image": inputs["image"]}, labels)
    with pytest.raises(ValueError, match=r"inputs\['text'\] must be \[N=4, D=5\], got \[3, 5\]"):
        evaluate(model, {**inputs, "text": inputs["text"][:3]}, labels)
    with pytest.raises(ValueError, match=r"labels must be bool \[N=4, C\]"):
        evaluate(model, inputs, labels[:3])
    tokens = {name: x.reshape(2, 2, -1) for name, x in inputs.items()}
    with pytest.raises(ValueError, match=r"inputs\['sound'\] must be \[N=2, 2, D=3\], got \[4, 3\]"):
        evaluate(model, {**tokens, "sound": inputs["sound"]})
    for scalar in ({name: torch.tensor(1.0) for name in inputs}, {name: x[0] for name, x in inputs.items()}):
        with pytest.raises(ValueError, match=r"inputs\['image'\] must be \[N, D=7\], got \[7?\]"):
            evaluate(model, scalar)
    with pytest.raises(ValueError, match=r"inputs\['text'\] must be a tensor \[N, D=5\], got list"):
        evaluate(model, {**inputs, "text": inputs["text"].tolist()})
    with pytest.raises(ValueError, match=r"groups must be ids \[N=4\], integers or text, got float32 \[4\]"):
        evaluate(model, inputs, groups=torch.ones(4))
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        evaluate(model, inputs, labels, batch_size=0)


# --- scores and table ---


def evaluation_of(**changes: object) -> Evaluation:
    """Two streams, two latents; latent 0 is aligned, latent 1 is dead."""
    code = torch.tensor([[1.0], [1.0]]), torch.tensor([[0], [0]])
    alive, half = torch.tensor([True, False]), torch.tensor([1.0, 0.0])
    results: dict[str, object] = {
        "concepts": Concepts(0.6 * half, 0.2 * half, alive),
        "concepts_joint": Concepts(half, 0 * half, alive),
        "agreement": Agreement(half, alive),
        "latents": latent_use({"a": code, "b": code}, 2),
        "retrieval": {
            ("a", "b"): Retrieval(2, 0.5, 1.0, 1.0, 1500.0, 0.75, 2),
            ("b", "a"): Retrieval(2, 0.0, 1.0, 1.0, 500.0, 0.25, 2),
        },
        "reconstruction": Reconstructed(
            ("a", "b"), torch.tensor([[0.1, 0.5], [0.7, 0.3]]), torch.tensor([[0.9, 0.5], [0.3, 0.7]])
        ),
    }
    return Evaluation(("a", "b"), 2, 2, DEFAULT, {**results, **changes}, {"a": code, "b": code})


def test_scores_average_over_latents_streams_and_pairs() -> None:
    expected = {
        "alignment": 0.4 / 1.8,
        "jaccard_single": 0.3,
        "jaccard_single_alive": 0.6,
        "jaccard_chance": 0.1,
        "jaccard_joint": 0.5,
        "jaccard_joint_alive": 1.0,
        "agreement": 1.0,
        "r1": 0.25,
        "r5": 1.0,
        "r10": 1.0,
        "median_rank": 1000.0,
        "mrr": 0.5,
        "nmse_self": 0.2,
        "nmse_cross": 0.6,
        "r2_self": 0.8,
        "r2_cross": 0.4,
        "alive": 0.5,
        "mixed": 0.0,
        "dead": 0.5,
        "active": 1.0,
    }
    assert evaluation_of().scores() == pytest.approx(expected)


def test_what_no_model_has_a_result_of_has_no_row() -> None:
    x = {"image": torch.randn(40, 7)}
    rows = table({"one stream": evaluate(model_of({"image": 7}), x, torch.rand(40, 3) < 0.4, resamples=0)})
    assert {row.key for row in rows} == {
        score.key for metric in METRICS if metric.key in ("reconstruction", "latents") for score in metric.scores
    }


def test_the_table_compares_models_by_column_and_dashes_what_is_missing() -> None:
    rows = table({"SPARC": evaluation_of(), "no labels": evaluation_of(concepts=None)})
    assert [row.key for row in rows] == [score.key for metric in DEFAULT for score in metric.scores]
    by_key = {row.key: row for row in rows}
    assert by_key["jaccard_single"].cells == {"SPARC": "0.300", "no labels": "–"}
    assert by_key["jaccard_single"].values["no labels"] is None
    assert by_key["median_rank"].cells["SPARC"] == "1,000.0"
    assert by_key["dead"].cells["SPARC"] == "50.0%"
    assert by_key["nmse_self"].better == "lower"
    assert by_key["jaccard_joint"].better == "neither"
    assert all(row.meaning.endswith(".") for row in rows)


def test_differences_are_resampled_on_the_same_samples_and_those_within_noise_are_said() -> None:
    drawn = torch.linspace(-1, 1, 50, dtype=torch.float64)
    spread = float(drawn.std())

    def found(r1: float, shared: float, own: float, mrr: float = 0.5) -> Evaluation:
        one = replace(evaluation_of().retrieval["a", "b"], r1=r1, mrr=mrr)
        resampled = {"r1": r1 + shared * drawn + own * drawn.flip(0), "mrr": mrr + 0 * drawn}
        return replace(evaluation_of(retrieval={("a", "b"): one}), resampled=resampled)

    ours, theirs = found(0.50, 0.2, 0.0), found(0.45, 0.2, 0.01, mrr=0.6)
    above, width = difference(ours, theirs, "r1")  # type: ignore[misc]
    assert above == pytest.approx(0.05)
    assert width == pytest.approx(1.96 * 0.01 * spread), "what both share does not count"
    rows = table({"ours": ours, "theirs": theirs, "alike": found(0.49, 0.2, 0.05)})
    by_key = {row.key: row for row in rows}
    assert by_key["r1"].cells["ours"] == f"0.500 ±{1.96 * 0.2 * spread:.3f}"
    assert by_key["agreement"].cells["ours"] == "1.000", "it was not resampled"
    assert rows.notes == [
        "± 95 % interval over samples, of one seed",
        "ours against theirs: better in 1 of 2 scores, worse in Retrieval MRR",
        "ours against alike: within noise in Retrieval R@1; Retrieval MRR",
    ]
    assert difference(ours, theirs, "agreement") is None
    assert "better in 1 of 2 scores" in rows._repr_html_()


def test_several_seeds_are_a_column_of_their_mean_and_widen_its_interval() -> None:
    drawn = torch.linspace(-0.01, 0.01, 50, dtype=torch.float64)
    runs = []
    for r1 in (0.4, 0.5, 0.6):
        one = replace(evaluation_of().retrieval["a", "b"], r1=r1)
        runs.append(replace(evaluation_of(retrieval={("a", "b"): one}), resampled={"r1": r1 + drawn}))
    rows = comparison({"three": runs, "one": runs[0]})
    row = next(row for row in rows if row.key == "r1")
    samples, seeds = 1.96 * float(drawn.std()), 4.303 * 0.1 / math.sqrt(3)
    assert row.values == pytest.approx({"three": 0.5, "one": 0.4})
    assert row.intervals == pytest.approx({"three": math.hypot(samples, seeds), "one": samples})
    assert rows.notes[:2] == [
        "mean ± 95 % interval over samples and up to 3 seeds",
        "rows without ± are of the first seed",
    ]
    assert "within noise in" in rows.notes[2]
    assert table({"three": runs}).notes == ["mean ± 95 % interval over samples and 3 seeds"]
    alone = [replace(one, resampled={}) for one in runs]
    assert table({"three": alone}).notes == ["mean ± 95 % interval over 3 seeds"]
    assert rows[-1].section == "Reconstruction: NMSE / R²"


def test_the_table_of_no_models_has_no_columns() -> None:
    assert all(row.cells == {} for row in table({}))


def test_the_summary_is_strict_json_even_where_scores_are_undefined() -> None:
    nothing_found = {("a", "b"): Retrieval(2, 0.0, 0.0, 0.0, math.inf, 0.0, 2)}
    reconstructed = replace(evaluation_of()["reconstruction"], r2=torch.full((2, 2), math.nan))
    summary = evaluation_of(retrieval=nothing_found, reconstruction=reconstructed).to_dict()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["retrieval"]["a -> b"]["median_rank"] is None
    assert summary["r2"] == dict.fromkeys(["a -> a", "a -> b", "b -> a", "b -> b"])
    assert summary["nmse"]["a -> b"] == pytest.approx(0.5)
    assert summary["dead_latents"] == {"a": 1, "b": 1}
    assert summary["active_per_sample"] == {"a": 1.0, "b": 1.0}


def test_an_evaluation_prints_its_scores_a_line_each_and_nothing_that_is_undefined() -> None:
    x, _ = data_of(60)
    found = evaluate(model_of(), x, resamples=0)
    first, *lines = repr(found).splitlines()
    assert first == "Evaluation of 20 latents on 60 samples of image, text, sound"
    assert f"  Firing agreement: {found.scores()['agreement']:.3f}" in lines
    assert len(lines) == sum(value is not None for value in found.scores().values()) < len(found.scores())


def test_numpy_arrays_are_evaluated_as_the_tensors_they_are() -> None:
    (x, labels), model = data_of(60), model_of()
    arrays = {name: part.numpy(force=True) for name, part in x.items()}
    found, expected = (evaluate(model, given, labels, train=given, train_labels=labels) for given in (arrays, x))
    assert found.scores() == expected.scores()


def test_a_model_that_normalizes_is_measured_against_unit_rows() -> None:
    torch.manual_seed(0)
    model = sf.SPARC({"a": 6, "b": 4}, 16, 3, normalize="l2")
    x = {name: 5 * torch.randn(40, width) for name, width in model.d_streams.items()}
    ours, units = (evaluate(model, given, retrieval=False) for given in (x, model.normalized(x)))
    torch.testing.assert_close(ours.nmse, units.nmse)
    torch.testing.assert_close(ours.r2, units.r2)
