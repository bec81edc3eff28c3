"""Random sparse codes for the tests of the metrics, their dense meaning, and the checks on arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from torch import Tensor

import sparc_fast as sf
from sparc_fast.evaluate import (
    Ablations,
    Codes,
    StreamCode,
    bridge_pairs,
    bridge_score,
    class_purity,
    cofiring_iou,
    concept_jaccard,
    concept_jaccard_by_chance,
    energy_share,
    firing_agreement,
    firing_entropy,
    latent_use,
    linear_probe,
    mlp_probe,
    mono_score,
    name_latents,
    probe_1d,
    retrieval_ranks,
    retrieve,
    top_samples,
)

Case = tuple[dict[str, StreamCode], Tensor, int]
"""Codes, labels, n_latents."""


def code_of(dense: list[list[float]]) -> StreamCode:
    """The code of a small dense matrix [N, L], all L latents selected."""
    values = torch.tensor(dense)
    return values, torch.arange(values.shape[1]).expand(values.shape)


def dense_of(code: StreamCode, n_latents: int) -> Tensor:
    values, indices = code
    return torch.zeros(len(values), n_latents).scatter(1, indices.long(), values.relu())


@st.composite
def cases(draw: st.DrawFn, min_samples: int = 0) -> Case:
    """Codes of 1 to 4 streams, each of its own k, labels, n_latents; values from -2 to 3, so ties, dead latents and zero rows."""
    S, N = draw(st.integers(1, 4)), draw(st.integers(min_samples, 9))
    L, C = draw(st.integers(1, 7)), draw(st.integers(0, 5))
    k = draw(st.integers(1, L))
    generator = seeded(draw(st.integers(0, 2**31)))
    codes = {}
    for s in range(S):
        k = draw(st.integers(1, L))
        indices = torch.rand(N, L, generator=generator).argsort(dim=1)[:, :k].int()
        values = torch.randint(-2, 4, (N, k), generator=generator).float()
        codes[f"stream{s}"] = (values, indices)
    labels = torch.rand(N, C, generator=generator) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    return codes, labels, L


GOOD = code_of([[1.0, 0.0], [0.0, 2.0]])
LABELS = torch.ones(2, 1, dtype=torch.bool)
METRICS = {
    "concept_jaccard": lambda codes: concept_jaccard(codes, LABELS, 2),
    "firing_agreement": lambda codes: firing_agreement(codes, 2),
    "latent_use": lambda codes: latent_use(codes, 2),
    "name_latents": lambda codes: name_latents(codes, LABELS, ["word"], 2),
    "top_samples": lambda codes: top_samples(codes, 2, 1),
}
BAD: dict[str, tuple[Codes, str]] = {
    "no stream": ({}, "codes must hold at least one stream"),
    "shapes": (
        {"a": (GOOD[0], GOOD[1][:, :1])},
        r"codes\['a'\] must have values and indices .* got \(2, 2\) and \(2, 1\)",
    ),
    "index type": (
        {"a": (GOOD[0], GOOD[1].float())},
        r"codes\['a'\] must have int32 or int64 indices, got torch.float32",
    ),
    "index too high": ({"a": (GOOD[0], GOOD[1] + 1)}, r"must have indices in \[0, n_latents=2\), got 1 to 2"),
    "negative index": ({"a": (GOOD[0], GOOD[1] - 1)}, r"must have indices in \[0, n_latents=2\), got -1 to 0"),
    "samples": ({"a": GOOD, "b": (GOOD[0][:1], GOOD[1][:1])}, r"same number of samples .* \{'a': 2, 'b': 1\}"),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", BAD)
def test_every_metric_names_what_is_wrong_with_its_codes(metric: str, case: str) -> None:
    codes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        METRICS[metric](codes)


@pytest.mark.parametrize("labels", [LABELS.float(), LABELS[:1], LABELS[:, 0]], ids=["type", "N", "dims"])
def test_labels_of_the_wrong_type_or_shape_are_refused(labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"labels must be bool \[N=2, C\], got torch"):
        concept_jaccard({"a": GOOD}, labels, 2)
    with pytest.raises(ValueError, match=r"labels must be bool \[N=2, C\], got torch"):
        name_latents({"a": GOOD}, labels, ["word"], 2)


def two_streams() -> dict[str, StreamCode]:
    generator = seeded(0)
    return {
        name: (torch.randn(40, 4, generator=generator), torch.rand(40, 12, generator=generator).argsort(1)[:, :4].int())
        for name in "ab"
    }


def of_two_streams() -> dict[str, Callable[[Codes], Tensor]]:
    """Metrics of codes of 40 samples and 12 latents."""
    generator = seeded(1)
    labels = torch.rand(40, 3, generator=generator) < 0.4
    x = torch.randn(40, 5, generator=generator)
    dictionary = torch.randn(12, 5, generator=generator).double()

    def ablated(code: StreamCode) -> Tensor:
        found = Ablations(dictionary)
        found.add(code, x)
        return found.worse

    return {
        "jaccard": lambda c: concept_jaccard(c, labels, 12),
        "agreement": lambda c: firing_agreement(c, 12),
        "iou": lambda c: cofiring_iou(c, 12),
        "energy": lambda c: energy_share(c, 12),
        "purity": lambda c: class_purity(c, labels, 12, weighted=True).purity,
        "mono": lambda c: mono_score(c, x, 12).score,
        "bridge": lambda c: bridge_score(c["a"], c["b"], dictionary, dictionary).own,
        "pairs": lambda c: torch.tensor(bridge_pairs(c["a"], c["b"], dictionary, dictionary)),
        "ablations": lambda c: ablated(c["a"]),
        "1-D": lambda c: probe_1d(c["a"], labels, 12, fewest=5).log_loss,
        "linear": lambda c: linear_probe(c["a"], labels, 12).average_precision,
        "MLP": lambda c: mlp_probe(c["a"], labels, 12, epochs=1).average_precision,
        "ranks": lambda c: retrieval_ranks(c["a"], c["b"], 12),
        "nearest": lambda c: retrieve(c["a"], c["b"], 12, top=3).cosines,
        "top": lambda c: top_samples(c, 12, 3).values,
    }


def of_latents(streams: Codes, labels: Tensor, x: Tensor, L: int, seed: int = 0) -> dict[str, Tensor]:
    """What metrics say of each latent, [..., L]."""
    weighted = class_purity(streams, labels, L, weighted=True)
    names = name_latents(streams, labels, list("abcdefghijk")[: labels.shape[1]], L, shuffles=0)
    return {
        "jaccard": concept_jaccard(streams, labels, L),
        "chance": concept_jaccard_by_chance(streams, labels, L, seed),
        "agreement": firing_agreement(streams, L),
        "entropy": firing_entropy(streams, L),
        "iou": cofiring_iou(streams, L),
        "energy": energy_share(streams, L),
        "frequency": latent_use(streams, L).frequency,
        "purity": class_purity(streams, labels, L).purity,
        "weighted purity": weighted.purity,
        "concept": weighted.concept,
        "mono": mono_score(streams, x, L).score,
        "name": names.score,
        "recall": names.stream_recall,
    }


@settings(max_examples=60, deadline=None)
@given(case=cases(min_samples=1), seed=st.integers(0, 2**31))
def test_what_is_said_of_a_latent_follows_a_permutation_of_latents_and_ignores_one_of_samples(
    case: Case, seed: int
) -> None:
    streams, labels, L = case
    x = torch.randn(len(labels), 3, generator=seeded(seed))
    order, rows = torch.randperm(L, generator=seeded(seed)), torch.randperm(len(labels), generator=seeded(seed + 1))
    renamed = {name: (values, order[indices.long()]) for name, (values, indices) in streams.items()}
    moved = {name: (values[rows], indices[rows]) for name, (values, indices) in renamed.items()}
    expected, same = of_latents(streams, labels, x, L, seed), of_latents(renamed, labels, x, L, seed)
    for name, found in of_latents(moved, labels[rows], x[rows], L, seed).items():
        torch.testing.assert_close(same[name][..., order], expected[name], equal_nan=True, msg=name)
        if name != "chance":  # which shuffles samples by their numbers
            torch.testing.assert_close(found[..., order], expected[name], equal_nan=True, msg=name)


def test_nothing_depends_on_the_chunks_in_which_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: (torch.randn(40, 6, generator=seeded(s)), torch.rand(40, 9, generator=seeded(s)).argsort(1)[:, :6])
               for s, name in enumerate("abc")}  # fmt: skip
    labels, x = torch.rand(40, 11, generator=seeded(7)) < 0.3, torch.randn(40, 7, generator=seeded(8))
    whole = of_latents(streams, labels, x, 9)
    for n_bytes in (1, 200, 500, 2000, 20000):
        monkeypatch.setattr("sparc_fast.evaluate.codes.CHUNK_BYTES", n_bytes)
        for name, found in of_latents(streams, labels, x, 9).items():
            torch.testing.assert_close(found, whole[name], equal_nan=True, msg=name)


def test_slots_that_hold_no_latent_change_nothing() -> None:
    streams = two_streams()
    padded = {
        name: (torch.cat([values, torch.zeros(40, 2)], 1), torch.cat([indices, torch.full((40, 2), -1).int()], 1))
        for name, (values, indices) in streams.items()
    }
    for name, metric in of_two_streams().items():
        torch.testing.assert_close(metric(padded), metric(streams), equal_nan=True, msg=name)


@pytest.mark.filterwarnings("error")
def test_codes_that_autograd_follows_are_measured_like_others() -> None:
    streams = two_streams()
    followed = {name: (values.clone().requires_grad_(), indices) for name, (values, indices) in streams.items()}
    for name, metric in of_two_streams().items():
        found = metric(followed)
        assert not found.requires_grad, name
        torch.testing.assert_close(found, metric(streams), rtol=0, atol=0, equal_nan=True, msg=name)


def test_what_is_no_code_is_named() -> None:
    code = sf.SPARC({"a": 3}, 4, 2).encode({"a": torch.randn(5, 3)})
    with pytest.raises(ValueError, match=r"codes must map streams to .*code\.stream.*, got SparseLatents"):
        firing_agreement(code, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"codes\['a'\] must be \(values, indices\), .* got Tensor"):
        firing_agreement({"a": code.dense("a")}, 4)  # type: ignore[dict-item]
