"""Latents of independent SAEs, matched one to one by when they fire on training samples."""

from __future__ import annotations

import sys
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from torch import Tensor

import sparc_fast as sf
from sparc_fast.evaluate import Codes, evaluate, firing_agreement, match_latents, matched, rename_latents
from sparc_fast.planning.process_memory import forget_peak, resident

pytest.importorskip("scipy")


def codes_of(fires: Tensor) -> Codes:
    """Of bool [S, N, L]."""
    k = max(1, int(fires.sum(2).max()))
    codes = {}
    for s, dense in enumerate(fires.float()):
        values, indices = dense.topk(k, dim=1)
        codes[f"s{s}"] = values, indices.int()
    return codes


def phi_of(fires: Tensor) -> np.ndarray[Any, Any]:
    """Correlation of every latent of the first stream with every one of the second, 0 where one never varies."""
    with np.errstate(all="ignore"):
        L = fires.shape[2]
        phi = np.corrcoef(fires[0].T.double().numpy(), fires[1].T.double().numpy())[:L, L:]
    return np.nan_to_num(phi)


@settings(max_examples=60, deadline=None)
@given(N=st.integers(2, 12), L=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_no_other_matching_has_a_larger_total_of_positive_correlations(N: int, L: int, seed: int) -> None:
    fires = torch.rand(2, N, L, generator=seeded(seed)) < 0.4
    match = match_latents(codes_of(fires), L)
    assert match[0].tolist() == list(range(L))
    assert sorted(match[1].tolist()) == list(range(L))
    phi = phi_of(fires).clip(min=0)
    total = phi[np.arange(L), match[1].numpy()].sum()
    assert total == pytest.approx(max(phi[np.arange(L), list(p)].sum() for p in permutations(range(L))), abs=1e-6)


def test_latents_that_are_the_same_but_for_their_order_are_found_in_every_stream() -> None:
    generator = seeded(3)
    fires = torch.rand(400, 50, generator=generator) < 0.1
    orders = [torch.arange(50), torch.randperm(50, generator=generator), torch.randperm(50, generator=generator)]
    codes = codes_of(torch.stack([fires[:, order] for order in orders]))
    match = match_latents(codes, 50)
    for order, found in zip(orders, match, strict=True):
        assert torch.equal(order[found], torch.arange(50))
    assert firing_agreement(codes, 50).mean() < 0.2
    assert bool((firing_agreement(rename_latents(codes, match), 50) == 1).all())


def test_latents_without_a_partner_are_paired_by_how_often_they_fire() -> None:
    fires = torch.zeros(2, 8, 4, dtype=torch.bool)
    fires[0, :4, 0] = fires[1, :4, 2] = True  # the same
    fires[0, 4:6, 1] = fires[1, 6:, 3] = True  # never together
    assert match_latents(codes_of(fires), 4).tolist() == [[0, 1, 2, 3], [2, 3, 0, 1]]


def sae(selection: str = "local") -> sf.SPARC:
    torch.manual_seed(0)
    model = sf.SPARC({"a": 6, "b": 5, "c": 4}, 24, 3, selection=selection, backend="reference")  # type: ignore[arg-type]
    with torch.no_grad():
        model.latent_bias.normal_(0, 0.1)
        model.pre_bias.normal_(0, 0.1)
        if model.latent_threshold is not None:
            model.latent_threshold.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("selection", ["local", "local_jumprelu"])
def test_a_matched_model_has_the_codes_of_the_first_under_new_names_and_its_reconstructions(selection: str) -> None:
    model = sae(selection)
    inputs = {name: torch.randn(200, width) for name, width in model.d_streams.items()}
    model.calibrate(inputs)
    if selection != "local":
        model.learn_thresholds(inputs)
        model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = matched(model, inputs)
    codes = {name: model.encode({name: x}).stream(name) for name, x in inputs.items()}
    match = match_latents(codes, 24)
    assert not torch.equal(match[1], match[0])
    renamed = rename_latents(codes, match)
    for name, x in inputs.items():
        ours = found.encode({name: x})
        assert torch.equal(ours.dense(name), sf.SparseLatents(
            renamed[name][0][:, None], renamed[name][1][:, None], (name,), 24).dense(name))  # fmt: skip
        own = model.decode(model.encode({name: x}), name, name)
        torch.testing.assert_close(found.decode(ours, name, name), own)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    first, second = (evaluate(m, inputs, metrics=("agreement", "reconstruction")) for m in (model, found))
    assert second.scores()["agreement"] > first.scores()["agreement"]
    torch.testing.assert_close(first.nmse.diagonal(), second.nmse.diagonal())


def test_what_cannot_be_matched_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sae("global")
    inputs = {name: torch.randn(5, width) for name, width in model.d_streams.items()}
    with pytest.raises(ValueError, match="model must have selection 'local' or 'local_jumprelu', got 'global'"):
        matched(model, inputs)
    monkeypatch.setattr("sparc_fast.evaluate.matching.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs SciPy: pip install 'sparc_fast\[evaluate\]'"):
        matched(sae(), inputs)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell the peak anew")
def test_nothing_is_as_large_as_all_pairs_of_latents() -> None:
    N, L, k = 600, 20_000, 16
    codes = {name: (torch.ones(N, k), torch.randint(L // k, (N, k)) * k + torch.arange(k)) for name in "ab"}
    forget_peak()
    before = resident("VmRSS")
    match_latents(codes, L)
    assert resident("VmHWM") - before < L**2 / 8  # a bit for each pair would be that much
