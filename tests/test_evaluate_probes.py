from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from test_evaluate_codes import dense_of
from test_evaluate_probe_1d import random_code
from torch import Tensor

from sparc_fast.evaluate import average_precision, codes, linear_probe, mlp_probe, split_samples


def told_by_a_direction(N: int, D: int, C: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, D, generator=seeded(seed))
    direction = torch.randn(D, C, generator=seeded(seed + 1))
    return x, x @ direction / D**0.5 + noise * torch.randn(N, C, generator=seeded(seed + 2)) > 0.5


@settings(max_examples=150, deadline=None)
@given(n=st.integers(0, 12), c=st.integers(0, 4), seed=st.integers(0, 2**31), levels=st.sampled_from([1, 3, 1000]))
def test_average_precision_equals_that_of_scikit_learn_ties_included(n: int, c: int, seed: int, levels: int) -> None:
    scores = torch.randint(0, levels, (n, c), generator=seeded(seed)).float()
    truth = torch.rand(n, c, generator=seeded(seed + 1)) < 0.4
    found = average_precision(scores, truth)
    for column in range(c):
        if truth[:, column].any():
            expected = average_precision_score(truth[:, column].numpy(), scores[:, column].numpy())
            assert float(found[column]) == pytest.approx(expected)
        else:
            assert found[column].isnan()


@pytest.mark.parametrize("sparse", [False, True])
def test_the_linear_probe_is_the_logistic_regression_of_scikit_learn(sparse: bool) -> None:
    if sparse:
        code = random_code(500, 20, 5, 0)
        x = dense_of(code, 20)
        _, labels = x, x @ torch.randn(20, 3, generator=seeded(3)) > 0.3
        found = linear_probe(code, labels, 20, steps=500, seed=1)
    else:
        x, labels = told_by_a_direction(500, 12, 3, 0.5, 0)
        found = linear_probe(x, labels, steps=500, seed=1)
    part = split_samples(500, (0.8, 0.2), seed=1)
    train, test = x[part == 0].double(), x[part == 1].double()
    mean = torch.zeros(1) if sparse else train.mean(0)
    on = train > 0 if sparse else torch.ones_like(train, dtype=torch.bool)
    scale = (train - mean)[on].square().mean().sqrt()
    for c in range(3):
        fit = LogisticRegression(tol=1e-10, max_iter=10_000).fit((train - mean) / scale, labels[part == 0, c])
        expected = torch.from_numpy(fit.decision_function(((test - mean) / scale).numpy()))
        given_ = (code[0][part == 1], code[1][part == 1]) if sparse else x[part == 1]
        torch.testing.assert_close(found.classify(given_)[:, c].double(), expected, atol=2e-3, rtol=1e-3)
        ap = average_precision_score(labels[part == 1, c].numpy(), expected.numpy())
        assert float(found.average_precision[c]) == pytest.approx(ap, abs=0.01)


def test_f1_is_that_at_the_threshold_that_is_best_in_training() -> None:
    x, labels = told_by_a_direction(150, 5, 2, 1.0, 4)
    found = linear_probe(x, labels, seed=2)
    part = split_samples(150, (0.8, 0.2), seed=2)
    logits = found.classify(x).numpy()
    chosen = []
    for c in range(2):
        train, truth = logits[part == 0, c], labels[part == 0, c].numpy()
        threshold = max(sorted(train, reverse=True), key=lambda t: f1_score(truth, train >= t))
        chosen.append(logits[part == 1, c] >= threshold)
        assert float(found.f1[c]) == pytest.approx(f1_score(labels[part == 1, c].numpy(), chosen[-1]))
    both = torch.stack([torch.from_numpy(one) for one in chosen], dim=1)
    assert found.f1_micro == pytest.approx(f1_score(labels[part == 1].flatten(), both.flatten()))


@pytest.mark.parametrize("probe", [linear_probe, mlp_probe])
def test_concepts_that_are_there_are_found_and_those_that_are_not_score_their_base_rate(probe) -> None:
    x, labels = told_by_a_direction(3000, 8, 3, 0.0, 7)
    labels[:, 2] = torch.rand(3000, generator=seeded(1)) < 0.3
    found = probe(x, labels)
    assert found.average_precision[:2].min() > 0.95
    assert found.average_precision[2] < found.base[2] + 0.08
    assert found.mean_average_precision == pytest.approx(float(found.average_precision.mean()))
    assert found.f1_macro == pytest.approx(float(found.f1.mean()))


@pytest.mark.parametrize("probe", [linear_probe, mlp_probe])
def test_concepts_of_latents_are_found_in_sparse_codes(probe) -> None:
    code = random_code(1000, 5000, 6, 0)
    code[1][:, 0] = torch.arange(1000).int() % 7  # seven latents that fire often
    code = (code[0] + 0.2, code[1])
    labels = torch.stack([(code[1][:, 0] == 3), torch.rand(1000, generator=seeded(1)) < 0.5], dim=1)
    found = probe(code, labels, 5000)
    assert found.average_precision[0] > 0.95
    assert found.average_precision[1] < 0.62


def test_only_an_mlp_finds_what_no_direction_tells() -> None:
    x = torch.randn(4000, 2, generator=seeded(0))
    labels = (x[:, :1] * x[:, 1:]) > 0
    assert linear_probe(x, labels).mean_average_precision < 0.6
    assert mlp_probe(x[:2000], labels[:2000]).mean_average_precision > 0.95


@pytest.mark.parametrize("probe", [linear_probe, mlp_probe])
def test_a_probe_depends_on_its_seed_alone(probe) -> None:
    x, labels = told_by_a_direction(300, 6, 2, 0.5, 0)
    state = torch.get_rng_state()
    first, again, other = probe(x, labels), probe(x, labels), probe(x, labels, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.classify(x), again.classify(x))
    assert torch.equal(first.average_precision, again.average_precision)
    assert not torch.equal(first.classify(x), other.classify(x))


@pytest.mark.parametrize("probe", [linear_probe, mlp_probe])
def test_arrays_of_numpy_are_probed_as_tensors_are(probe) -> None:
    x, labels = told_by_a_direction(300, 6, 2, 0.5, 0)
    assert torch.equal(probe(x.numpy(), labels.numpy()).average_precision, probe(x, labels).average_precision)


def test_a_linear_probe_is_the_same_in_any_rotation_shift_and_scale() -> None:
    x, labels = told_by_a_direction(400, 6, 2, 0.5, 0)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=seeded(5))).Q
    found, again = linear_probe(x, labels, steps=500), linear_probe(7 * x @ turn + 3, labels, steps=500)
    torch.testing.assert_close(again.average_precision, found.average_precision, atol=1e-2, rtol=0)


def test_a_linear_probe_does_not_depend_on_how_many_concepts_are_fitted_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, labels = told_by_a_direction(200, 4, 5, 0.5, 0)
    whole = linear_probe(x, labels, steps=500).classify(x)
    monkeypatch.setattr(codes, "CHUNK_BYTES", 1)
    torch.testing.assert_close(linear_probe(x, labels, steps=500).classify(x), whole, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("probe", [linear_probe, mlp_probe])
def test_no_samples_no_labels_and_dead_codes_are_told_of(probe) -> None:
    for n, c in ((0, 2), (1, 2), (6, 0)):
        found = probe(torch.ones(n, 3), torch.zeros(n, c, dtype=torch.bool))
        assert math.isnan(found.mean_average_precision)
        assert math.isnan(found.f1_micro)
    labels = torch.rand(50, 1, generator=seeded(0)) < 0.5
    dead = probe((torch.zeros(50, 2), torch.zeros(50, 2).int() + torch.arange(2).int()), labels, 4)
    assert dead.mean_average_precision == pytest.approx(float(dead.base))
    unlabelled = probe(torch.randn(20, 3, generator=seeded(0)), torch.zeros(20, 1, dtype=torch.bool))
    assert unlabelled.average_precision.isnan().all()


def test_wrong_arguments_of_probes_are_named() -> None:
    x, labels = torch.ones(4, 2), torch.ones(4, 1, dtype=torch.bool)
    for features, options, message in (
        (x[0], {}, r"features must be \[N, D\], got torch.float32 \[2\]"),
        (x, {"test_share": 1}, "test_share must be between 0 and 1, got 1"),
        ((x, x.int()), {}, "n_latents must be given where features are a sparse code, got None"),
        (x * math.nan, {}, "features must be finite, got NaN or inf"),
        (x, {"steps": 0}, "strength must be > 0 and steps at least 1, got 1.0 and 0"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_probe(features, labels, **options)
    with pytest.raises(ValueError, match="epochs and batch_size must be at least 1, got 0 and 64"):
        mlp_probe(x, labels, epochs=0)
    with pytest.raises(ValueError, match="features must be dense or sparse as those that the probe was fitted on"):
        linear_probe(x, labels).classify((x, x.int()))
