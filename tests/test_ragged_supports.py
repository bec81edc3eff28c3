"""Supports of as many latents as a sample has: the batch's largest scores, and those above a threshold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DTYPES, fast_backends, operators_of, seeded
from torch import Tensor

from sparc_fast.ops import reference

Encoder = tuple[Tensor, Tensor, Tensor, Tensor]


def encoder(N: int, D: int, L: int, dtype: torch.dtype, seed: int, spread: float = 3.0) -> Encoder:
    """Samples of unlike norms, so that some have many latents of a batch's and some none; and equal latents."""
    g = seeded(seed)
    x = torch.randn(N, D, generator=g) * torch.rand(N, 1, generator=g) * spread
    W = torch.randn(L, D, generator=g)
    W[L // 2 :: 3] = W[0].clone()
    return x.to(dtype), W.to(dtype), torch.randn(D, generator=g).to(dtype), torch.randn(2, L, generator=g).to(dtype)


def as_sets(support: Tensor) -> list[list[int]]:
    return [[l for l in row if l >= 0] for row in support.tolist()]


def by_sorting(o: Encoder, k: int) -> list[list[int]]:
    """The rule as it is said: all pairs in order of (score, sample, latent)."""
    x, W = o[0], o[1]
    everything = torch.arange(len(W), dtype=torch.int32).expand(len(x), -1)
    scores = reference.support_scores(*o, everything)
    order = (-scores.flatten()).argsort(stable=True)[: k * len(x)].sort().values
    return [(order[order // len(W) == n] % len(W)).tolist() for n in range(len(x))]


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 40),
    D=st.integers(1, 40),
    L=st.integers(1, 120),
    dtype=st.sampled_from(DTYPES),
    screening=st.sampled_from(["auto", "bf16", "off"]),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_the_largest_scores_of_a_batch_fire_whosesoever_they_are(
    N: int, D: int, L: int, dtype: torch.dtype, screening: str, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, L), label="k")
    o = encoder(N, D, L, dtype, seed)
    expected = by_sorting(o, k)
    for backend in fast_backends():
        support = operators_of(backend).batch_topk(*o, k, screening)
        assert support.dtype == torch.int32
        assert as_sets(support) == expected
        assert support.shape == (N, max([1, *map(len, expected)]))


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 40),
    L=st.integers(1, 120),
    threshold=st.sampled_from([-1e30, -1.0, 0.0, 2.0, 1e30]),
    dtype=st.sampled_from(DTYPES),
    screening=st.sampled_from(["auto", "bf16", "off"]),
    k=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_latents_above_a_threshold_are_those_whose_score_is_above_it(
    N: int, L: int, threshold: float, dtype: torch.dtype, screening: str, k: int, seed: int
) -> None:
    o = encoder(N, 12, L, dtype, seed)
    scores = reference.support_scores(*o, torch.arange(L, dtype=torch.int32).expand(N, -1))
    expected = [row.nonzero()[:, 0].tolist() for row in scores > threshold]
    for backend in fast_backends():
        assert as_sets(operators_of(backend).latents_above(*o, threshold, min(k, L), screening)[0]) == expected


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 40),
    L=st.integers(1, 120),
    threshold=st.sampled_from([-1e30, -1.0, 0.0, 2.0]),
    beyond=st.sampled_from([-1.0, 0.0, 0.5, 1e30]),
    dtype=st.sampled_from(DTYPES),
    screening=st.sampled_from(["auto", "bf16", "off"]),
    seed=st.integers(0, 2**31),
)
def test_scores_above_a_threshold_are_exact_as_far_as_somebody_asks(
    N: int, L: int, threshold: float, beyond: float, dtype: torch.dtype, screening: str, seed: int
) -> None:
    o = encoder(N, 12, L, dtype, seed)
    for backend in fast_backends():
        indices, scores = operators_of(backend).latents_above(*o, threshold, 1, screening, threshold + beyond)
        exact = reference.support_scores(*o, indices.clamp(min=0))
        exact[exact > threshold + max(beyond, 0)] = torch.inf
        exact[indices < 0] = -torch.inf
        assert torch.equal(scores, exact)


@pytest.mark.parametrize("screening", ["bf16", "off"])
def test_equal_scores_go_to_the_earlier_sample_then_to_the_lower_latent(backend: str, screening: str) -> None:
    x, W = torch.ones(20, 3), torch.ones(6, 3)
    o = x, W, torch.zeros(3), torch.zeros(1, 6)
    support = operators_of(backend).batch_topk(*o, 2, screening)
    assert as_sets(support) == [[0, 1, 2, 3, 4, 5]] * 6 + [[0, 1, 2, 3]] + [[]] * 13


@pytest.mark.parametrize("screening", ["bf16", "off"])
def test_a_score_of_the_threshold_is_not_above_it(backend: str, screening: str) -> None:
    o = torch.tensor([[1.0], [2.0], [3.0]]).repeat(8, 1), torch.ones(5, 1), torch.zeros(1), torch.zeros(1, 5)
    support, _ = operators_of(backend).latents_above(*o, 2.0, 2, screening)
    assert as_sets(support)[:3] == [[], [], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("screening", ["bf16", "off"])
def test_one_sample_may_take_all_of_a_batchs_latents(backend: str, screening: str) -> None:
    x = torch.full((32, 4), 1e-3)
    x[7] = 1e3
    o = x, torch.rand(100, 4, generator=seeded(0)) + 0.5, torch.zeros(4), torch.zeros(1, 100)
    counts = (operators_of(backend).batch_topk(*o, 3, screening) >= 0).sum(1)
    assert (counts[7], counts.sum()) == (96, 96)


@pytest.mark.parametrize("loud", [slice(0, None, 4), slice(1, None, 4), slice(0, 9)])
def test_it_does_not_matter_which_samples_have_most_of_a_batchs_scores(backend: str, loud: slice) -> None:
    x, W, *biases = encoder(256, 12, 300, torch.float32, seed=0)
    x[loud] *= 100
    o = x, W, *biases
    assert as_sets(operators_of(backend).batch_topk(*o, 6, "bf16")) == by_sorting(o, 6)


@pytest.mark.parametrize("screening", ["bf16", "off"])
def test_nan_ranks_with_infinity(backend: str, screening: str) -> None:
    x = torch.randn(16, 4, generator=seeded(0))
    x[3] = torch.nan
    o = x, torch.randn(10, 4, generator=seeded(1)), torch.zeros(4), torch.zeros(1, 10)
    assert as_sets(operators_of(backend).batch_topk(*o, 1, screening))[3] == list(range(10))
    assert as_sets(operators_of(backend).latents_above(*o, 1e30, 1, screening)[0]) == [
        list(range(10)) if n == 3 else [] for n in range(16)
    ]
