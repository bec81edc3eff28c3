from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from test_evaluate_codes import dense_of
from torch import Tensor

from sparc_fast.evaluate import StreamCode, probe_1d, split_samples
from sparc_fast.evaluate.probe_1d import _balanced_then_split, _fit

CHANCE = math.log(2)


def random_code(N: int, L: int, k: int, seed: int) -> StreamCode:
    generator = seeded(seed)
    return torch.rand(N, k, generator=generator), torch.rand(N, L, generator=generator).argsort(1)[:, :k].int()


def published(code: StreamCode, labels: Tensor, L: int, samples: Tensor, part: Tensor, concept: int) -> float:
    """What the definition of the published figures says, for one concept and split."""
    x, y = dense_of(code, L).double().numpy(), labels[:, concept].long().numpy()
    train, validation, test = (samples[part == p].numpy() for p in range(3))
    together = ((x > 0) & (y == 1)[:, None]).sum(0)
    active = [l for l in range(L) if x[train, l].sum() > 0]
    candidates = sorted(active, key=lambda l: (-together[l], l))[:20]
    fits = [LogisticRegression(max_iter=200, tol=1e-8).fit(x[train][:, [l]], y[train]) for l in candidates]
    losses = [
        log_loss(y[validation], fit.predict_proba(x[validation][:, [l]])[:, 1], labels=[0, 1])
        for l, fit in zip(candidates, fits, strict=True)
    ]
    best = losses.index(min(losses))
    return float(log_loss(y[test], fits[best].predict_proba(x[test][:, [candidates[best]]])[:, 1], labels=[0, 1]))


def test_the_published_protocol_equals_a_plain_transcription() -> None:
    code = random_code(600, 30, 6, 0)
    labels = torch.rand(600, 3, generator=seeded(1)) < torch.tensor([0.3, 0.15, 0.01])
    labels[:, 1] |= (dense_of(code, 30)[:, 4] > 0.5) & (torch.rand(600, generator=seeded(2)) < 0.7)
    found = probe_1d(code, labels, 30, protocol="sparc_paper", seed=7)
    assert found.concepts.tolist() == [0, 1]
    for place, concept in enumerate((0, 1)):
        generator = torch.Generator().manual_seed(7 * 1_000_003 + concept)
        samples, part = _balanced_then_split(labels[:, concept], generator)
        expected = published(code, labels, 30, samples, part, concept)
        assert float(found.log_loss[place]) == pytest.approx(expected, abs=1e-6)
    assert found.latents[1] == 4


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 1.0, 100.0]))
def test_fits_are_the_best_there_are(seed: int, scale: float) -> None:
    x = scale * torch.randn(2, 40, generator=seeded(seed)).double().relu()
    y = (torch.rand(40, generator=seeded(seed + 1)) < 0.5).double()
    if 0 < y.sum() < 40:
        w, b = _fit(x, y)
        t = w * x + b
        slope = torch.stack([((t.sigmoid() - y) * x).sum(1) + w[:, 0], (t.sigmoid() - y).sum(1)])
        assert slope.abs().max() < 1e-6 * max(1, scale)


def test_a_latent_that_is_the_concept_tells_it_and_noise_tells_nothing() -> None:
    labels = torch.rand(4000, 2, generator=seeded(0)) < 0.3
    values, indices = random_code(4000, 40, 5, 1)
    perfect = torch.cat([values, labels[:, :1].float()], 1), torch.cat([indices, torch.full((4000, 1), 40).int()], 1)
    found = probe_1d(perfect, labels, 41)
    assert found.latents[0] == 40
    assert found.log_loss[0] < 0.02
    assert abs(found.log_loss[1] - CHANCE) < 0.02
    assert found.mean == pytest.approx(float(found.log_loss.mean()))


def test_latents_that_always_fire_crowd_out_the_telling_one_of_the_published_protocol_alone() -> None:
    labels = torch.rand(3000, 1, generator=seeded(0)) < 0.3
    telling = (labels[:, 0] & (torch.rand(3000, generator=seeded(1)) < 0.8)).float()
    values = torch.cat([torch.rand(3000, 20, generator=seeded(2)) + 0.1, telling[:, None]], dim=1)
    code = values, torch.arange(21).expand(3000, 21)
    published_, held_out = probe_1d(code, labels, 21, protocol="sparc_paper"), probe_1d(code, labels, 21)
    assert published_.latents[0] != 20
    assert abs(published_.mean - CHANCE) < 0.03
    assert held_out.latents[0] == 20
    assert held_out.mean < 0.4


def test_a_latent_that_tells_the_test_part_alone_earns_nothing() -> None:
    labels = torch.rand(3000, 1, generator=seeded(0)) < 0.4
    part = split_samples(3000, (0.7, 0.15, 0.15), seed=3)
    spy = (labels[:, 0] & (part == 2)).float()
    noise = torch.rand(3000, 1, generator=seeded(1))
    code = torch.cat([noise, spy[:, None]], dim=1), torch.arange(2).expand(3000, 2)
    assert probe_1d(code, labels, 2, seed=3).mean > CHANCE - 0.02


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_score_follows_a_permutation_of_latents_and_no_scale(seed: int) -> None:
    values, indices = random_code(400, 12, 4, seed)
    labels = torch.rand(400, 2, generator=seeded(seed + 1)) < 0.4
    labels[:, 0] = dense_of((values, indices), 12)[:, 3] > 0.3
    order = torch.randperm(12, generator=seeded(seed))
    found = probe_1d((values, indices), labels, 12)
    again = probe_1d((64 * values, order[indices.long()]), labels, 12)
    torch.testing.assert_close(again.log_loss[0], found.log_loss[0])
    assert int(again.latents[0]) == int(order[int(found.latents[0])])


def test_concepts_that_are_rare_are_left_out_and_dead_codes_tell_nothing() -> None:
    labels = torch.zeros(200, 3, dtype=torch.bool)
    labels[:50, 0], labels[:51, 1] = True, True
    dead = torch.zeros(200, 2), torch.arange(2).expand(200, 2)
    found = probe_1d(dead, labels, 5)
    assert (found.concepts.tolist(), found.latents.tolist()) == ([1], [-1])
    assert found.mean == pytest.approx(CHANCE)
    for n, c in ((0, 2), (1, 0), (1, 2)):
        none = probe_1d((torch.ones(n, 1), torch.zeros(n, 1).int()), torch.ones(n, c, dtype=torch.bool), 1)
        assert (len(none.concepts), math.isnan(none.mean)) == (0, True)


def test_a_group_is_in_one_part_and_parts_have_their_shares() -> None:
    groups = torch.arange(1000) // 5 * 3
    part = split_samples(1000, (0.7, 0.15, 0.15), groups, seed=2)
    assert part.bincount().tolist() == [700, 150, 150]
    assert (part.view(-1, 5) == part.view(-1, 5)[:, :1]).all()
    assert torch.equal(part, split_samples(1000, (0.7, 0.15, 0.15), groups, seed=2))
    assert not torch.equal(part, split_samples(1000, (0.7, 0.15, 0.15), groups, seed=3))


def test_wrong_arguments_of_a_probe_are_named() -> None:
    code, labels = random_code(10, 4, 2, 0), torch.ones(10, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match='protocol must be "held_out" or "sparc_paper", got \'paper\''):
        probe_1d(code, labels, 4, protocol="paper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fewest and n_candidates must be at least 1, got 0 and 20"):
        probe_1d(code, labels, 4, fewest=0)
    with pytest.raises(ValueError, match=r"groups must be integers \[N=10\], got torch.int64 \[3\]"):
        probe_1d(code, labels, 4, groups=torch.arange(3))
    with pytest.raises(ValueError, match=r"shares must be > 0 and add up to 1, got \(0.5, 0.6\)"):
        split_samples(3, (0.5, 0.6))
