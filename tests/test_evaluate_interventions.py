from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from test_evaluate_codes import Case, cases, code_of, dense_of
from torch import Tensor

import sparc_fast as sf
from sparc_fast.evaluate import (
    Ablations,
    StreamCode,
    class_purity,
    codes,
    dictionary_of,
    intervene,
    linear_probe,
    probe_effects,
)


def a_model(calibrated: bool = False) -> sf.SPARC:
    torch.manual_seed(0)
    model = sf.SPARC({"a": 6, "b": 5}, n_latents=12, k=3, backend="reference")
    with torch.no_grad():
        model.pre_bias.normal_()
    inputs = {name: torch.randn(50, width) * 3 + 1 for name, width in model.d_streams.items()}
    if calibrated:
        model.calibrate(inputs)
    return model


@settings(max_examples=80, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**31), chunk=st.sampled_from([1, 2**26]))
def test_all_ablations_at_once_equal_one_after_another(case: Case, seed: int, chunk: int) -> None:
    streams, _, L = case
    code = next(iter(streams.values()))
    z = dense_of(code, L).double()
    dictionary = torch.randn(L, 4, generator=seeded(seed)).double()
    x = torch.randn(len(z), 4, generator=seeded(seed + 1)).double()
    residual = x - z @ dictionary
    found = Ablations(dictionary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "CHUNK_BYTES", chunk)
        half = len(z) // 2
        for rows in (slice(0, half), slice(half, None)):
            found.add((code[0][rows], code[1][rows]), residual[rows])
    n = max(len(z), 1)
    for l in range(L):
        without = z.clone()
        without[:, l] = 0
        errors = [(x - y @ dictionary).square().sum() / n for y in (z, without)]
        assert float(found.worse[l]) == pytest.approx(float(errors[1] - errors[0]), abs=1e-9)
        moved = ((z - without) @ dictionary).square().sum() / n
        assert float(found.moved[l]) == pytest.approx(float(moved), abs=1e-12)
        assert int(found.fired[l]) == int((z[:, l] > 0).sum())


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_dictionary_is_what_latents_add_and_ablations_are_interventions(calibrated: bool) -> None:
    model = a_model(calibrated)
    inputs = {name: torch.randn(40, width) for name, width in model.d_streams.items()}
    alone = model.encode({"a": inputs["a"]})
    dictionary = dictionary_of(model, "b")
    decoded = model.decode(alone, "a", "b")
    found = Ablations(dictionary)
    found.add(alone.stream("a"), inputs["b"] - decoded)
    for latent in range(12):
        one = intervene(model, alone, latent, 0.0, "a", "b", truth=inputs["b"].numpy())
        assert one.error_before is not None
        assert one.error_after is not None
        assert float(found.moved[latent]) == pytest.approx(float(one.moved.mean()), rel=1e-4, abs=1e-6)
        worse = float((one.error_after - one.error_before).mean())
        assert float(found.worse[latent]) == pytest.approx(worse, rel=1e-3, abs=1e-4)


def test_a_latent_that_is_set_moves_the_other_stream_along_its_direction_and_its_concept() -> None:
    model = a_model()
    alone = model.encode({"a": torch.randn(20, 6)})
    direction = dictionary_of(model, "b")[7].double()
    weight = torch.stack([direction, -direction], dim=1).float()
    found = intervene(model, alone.set(7, 0.0), 7, 2.0, "a", "b", probe=lambda x: x @ weight)
    torch.testing.assert_close(found.moved, 4 * direction.square().sum().expand(20), atol=1e-5, rtol=1e-5)
    assert found.logits_before is not None
    assert found.logits_after is not None
    gained = (found.logits_after - found.logits_before).mean(0)
    torch.testing.assert_close(
        gained, 2 * direction.square().sum() * torch.tensor([1.0, -1.0]).double(), atol=1e-4, rtol=1e-4
    )
    assert found.error_before is None


def planted(matched: bool) -> tuple[StreamCode, Tensor, Tensor]:
    """A code, the target's inputs that it explains, and a dictionary that knows the latents or mixes them up."""
    z = torch.rand(500, 8, generator=seeded(0)) * (torch.rand(500, 8, generator=seeded(1)) < 0.2)
    features = torch.linalg.qr(torch.randn(16, 16, generator=seeded(2))).Q[:8]
    x = z @ features
    dictionary = features if matched else features.roll(1, 0)
    return (z, torch.arange(8).int().expand(500, 8)), x, dictionary


def test_a_matched_latent_helps_the_other_stream_and_one_that_means_something_else_there_does_not() -> None:
    for matched, least, most in ((True, 1 - 1e-4, 1 + 1e-4), (False, -math.inf, -0.5 + 1e-5)):
        code, x, dictionary = planted(matched)
        found = Ablations(dictionary)
        found.add(code, x - dense_of(code, 8) @ dictionary)
        assert found.helpful == matched
        assert least <= found.faithful.min()
        assert found.faithful.max() <= most


def test_latents_that_do_not_fire_are_not_faithful_nor_the_opposite() -> None:
    found = Ablations(torch.eye(3))
    assert math.isnan(found.helpful)
    found.add(code_of([[1.0, 0.0, 0.0]]), torch.zeros(1, 3))
    assert found.faithful.isnan().tolist() == [False, True, True]
    assert found.helpful == 1
    found.add((torch.zeros(0, 2), torch.zeros(0, 2).int()), torch.zeros(0, 3))
    assert found.n == 1


def test_taking_out_a_matched_latent_lowers_its_own_concept_alone() -> None:
    code, x, dictionary = planted(True)
    labels = dense_of(code, 8) > 0.3
    probe = linear_probe(x, labels)
    assert probe.weight is not None
    concepts = class_purity({"a": code}, labels, 8).concept[0]
    assert concepts.tolist() == list(range(8))
    own, others = probe_effects(code, dictionary, probe.weight, concepts)
    assert own.min() > 5 * others.abs().max()
    for latent in (0, 5):
        fires = dense_of(code, 8)[:, latent] > 0
        without = dense_of(code, 8)
        without[:, latent] = 0
        falls = probe.classify(x[fires]) - probe.classify((without @ dictionary)[fires])
        assert float(own[latent]) == pytest.approx(float(falls[:, latent].mean()), rel=1e-3)
        rest = [c for c in range(8) if c != latent]
        assert float(others[latent]) == pytest.approx(float(falls[:, rest].mean()), rel=1e-2, abs=1e-3)
    mixed, _ = probe_effects(code, dictionary.roll(1, 0), probe.weight, concepts)
    assert mixed.max() < own.min() / 5
    dead, _ = probe_effects((code[0] * 0, code[1]), dictionary, probe.weight, concepts)
    assert dead.isnan().all()


def test_wrong_arguments_of_interventions_are_named() -> None:
    model = a_model()
    alone = model.encode({"a": torch.randn(4, 6)})
    with pytest.raises(ValueError, match=r"truth must be \[N=4, D=5\], got \[4, 6\]"):
        intervene(model, alone, 0, 0.0, "a", "b", truth=torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"codes must be of N samples, got \[2, 2\]"):
        intervene(model, alone.reshape(2, 2), 0, 0.0, "a", "b")
    with pytest.raises(ValueError, match=r"residual must be \[N=1, D=3\], got \[1, 4\]"):
        Ablations(torch.eye(3)).add(code_of([[1.0, 0.0, 0.0]]), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"dictionary must be \[L, D\], got \[3\]"):
        Ablations(torch.ones(3))
    with pytest.raises(ValueError, match=r"weight and concepts must be \[D=1, C\] and \[L=1\], got \[2, 2\] and \[1\]"):
        probe_effects(code_of([[1.0]]), torch.eye(1), torch.ones(2, 2), torch.zeros(1).long())
