from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from test_evaluate_codes import Case, cases, code_of, dense_of
from torch import Tensor

from sparc_fast.evaluate import StreamCode, codes, mono_score


def by_pairs(code: StreamCode, embeddings: Tensor, L: int) -> list[float]:
    z = dense_of(code, L).double()
    unit = embeddings.double()
    unit = unit / torch.where(unit.norm(dim=1) > 0, unit.norm(dim=1), 1)[:, None]
    scores = []
    for l in range(L):
        low, high = (float(z[:, l].min()), float(z[:, l].max())) if len(z) else (0.0, 0.0)
        a = [(float(v) - low) / (high - low) if high > low else 0.0 for v in z[:, l]]
        over = under = 0.0
        for n in range(len(a)):
            for m in range(n):
                over += a[n] * a[m] * float(unit[n] @ unit[m])
                under += a[n] * a[m]
        scores.append(over / under if under > 0 else math.nan)
    return scores


@settings(max_examples=80, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**31), D=st.integers(1, 5))
def test_the_linear_score_equals_that_over_all_pairs(case: Case, seed: int, D: int) -> None:
    streams, labels, L = case
    embeddings = torch.randint(-2, 3, (len(labels), D), generator=seeded(seed)).float()
    found = mono_score(streams, embeddings, L)
    for s, code in enumerate(streams.values()):
        assert found.score[s].tolist() == pytest.approx(by_pairs(code, embeddings, L), abs=1e-12, nan_ok=True)
    everything = torch.ones(len(labels), 1), torch.zeros(len(labels), 1, dtype=torch.int32)
    always = by_pairs((torch.cat([everything[0], 1 - everything[0]]), torch.zeros(2 * len(labels), 1).int()),
                      torch.cat([embeddings, torch.zeros_like(embeddings)]), 1)[0]  # fmt: skip
    assert found.chance == pytest.approx(always, abs=1e-12, nan_ok=True)
    of_array = mono_score(streams, embeddings.numpy(), L)
    assert torch.equal(of_array.score.nan_to_num(9), found.score.nan_to_num(9))


def test_alike_samples_score_one_opposite_ones_minus_one_and_any_at_random_chance() -> None:
    torch.manual_seed(0)
    two = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(2000, 1)
    alike = (two[:, :1] > 0).float()
    noise = (torch.rand(4000, 1) < 0.3).float()
    pair = torch.zeros(4000, 1)
    pair[:2] = 1
    code = torch.cat([alike, pair, noise, torch.zeros(4000, 1)], dim=1), torch.arange(4).expand(4000, 4)
    found = mono_score({"a": code}, two + torch.tensor([0.0, 2.0]), 4)
    assert found.score[0, 0] == pytest.approx(1)
    assert found.score[0, 1] == pytest.approx((4 - 1) / 5)
    assert found.score[0, 2] == pytest.approx(found.chance, abs=0.01)
    assert found.chance == pytest.approx((1 + 3 / 5) / 2, abs=1e-3)
    assert found.score[0, 3].isnan()
    assert mono_score({"a": code}, two, 4).score[0, 1] == pytest.approx(-1)


@settings(max_examples=100, deadline=None)
@given(case=cases(), chunk=st.sampled_from([1, 300, 2**26]))
def test_a_code_by_latent_holds_its_active_entries(case: Case, chunk: int) -> None:
    streams, _, L = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "CHUNK_BYTES", chunk)
        for code in streams.values():
            entries, dense = codes.by_latent(code, L), dense_of(code, L)
            for l in range(L):
                of_latent = slice(int(entries.offsets[l]), int(entries.offsets[l + 1]))
                samples = dense[:, l].nonzero()[:, 0]
                assert entries.samples[of_latent].tolist() == samples.tolist()
                assert torch.equal(entries.values[of_latent], dense[samples, l])
            latents, places = 0, 0
            for some, of_entries in entries.blocks(64):
                assert (some.start, of_entries.start) == (latents, places)
                assert of_entries.stop == entries.offsets[some.stop]
                latents, places = some.stop, of_entries.stop
            assert (latents, places) == (L, len(entries.samples))


def test_embeddings_of_the_wrong_shape_or_not_finite_are_refused() -> None:
    code = {"a": code_of([[1.0], [2.0]])}
    with pytest.raises(ValueError, match=r"embeddings must be \[N=2, D\], got torch.float32 \[3, 4\]"):
        mono_score(code, torch.zeros(3, 4), 1)
    with pytest.raises(ValueError, match="embeddings must be finite, got NaN or inf"):
        mono_score(code, torch.full((2, 2), math.nan), 1)
