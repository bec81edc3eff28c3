from __future__ import annotations

import pytest
import torch
from operands import seeded
from torch import Tensor

import sparc_fast as sf
from sparc_fast.evaluate import codes, evaluate, retrieval, retrieval_ranks
from sparc_fast.evaluate.reconstruction_retrieval import Decoded

WIDTHS = {"a": 12, "b": 8}


def a_model_that_knows() -> tuple[sf.SPARC, dict[str, Tensor]]:
    """A model of tied orthogonal features, the same in both streams, and samples that it reconstructs exactly."""
    model = sf.SPARC(WIDTHS, n_latents=8, k=3, backend="reference")
    features = [torch.linalg.qr(torch.randn(width, 8, generator=seeded(width))).Q.T for width in WIDTHS.values()]
    with torch.no_grad():
        model.W_enc.copy_(torch.cat(features, dim=1))
        model.W_dec.copy_(torch.cat(features, dim=1))
        model.pre_bias.zero_()
        model.latent_bias.zero_()
    z = torch.rand(60, 8, generator=seeded(0)) + 0.1
    z = z * (torch.rand(60, 8, generator=seeded(1)).argsort(1) < 3)
    return model, {name: z @ of for name, of in zip(WIDTHS, features, strict=True)}


def test_a_model_that_reconstructs_exactly_finds_all_and_one_of_other_latents_finds_none() -> None:
    model, inputs = a_model_that_knows()
    found = evaluate(model, inputs, metrics=("retrieval_by_reconstruction",))
    assert found.scores() == {"self_recon_r1": 1, "cross_recon_r1": 1, "cross_recon_mrr": 1}
    with torch.no_grad():
        for weight in (model.W_enc, model.W_dec):
            weight[:, 12:] = weight[:, 12:].roll(1, 0).clone()
    found = evaluate(model, inputs, metrics=("retrieval_by_reconstruction",))
    scores = found.scores()
    assert scores["self_recon_r1"] == 1
    assert scores["cross_recon_r1"] < 0.2


@pytest.mark.parametrize("in_groups", [False, True])
def test_it_equals_retrieval_by_reconstructions_that_are_all_there(
    in_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = sf.SPARC(WIDTHS, n_latents=30, k=4, normalize={"a": "l2"}, backend="reference")
    inputs = {name: torch.randn(70, width) for name, width in WIDTHS.items()}
    inputs["b"][1] = inputs["b"][0]
    groups = torch.arange(70) // 2 if in_groups else None
    monkeypatch.setattr(retrieval, "BLOCK", 16)
    monkeypatch.setattr(retrieval, "QUERIES", 9)
    monkeypatch.setattr(codes, "CHUNK_BYTES", 3000)
    found = evaluate(model, inputs, groups=groups, metrics=("retrieval_by_reconstruction",))[
        "retrieval_by_reconstruction"
    ]
    monkeypatch.undo()
    truth = model.normalized(inputs)
    for (source, target), one in found.items():
        alone = model.encode({source: inputs[source]})
        decoded = model.decode(alone, source, target).detach()
        lazily = Decoded(model, alone.stream(source), source, target)
        assert torch.equal(lazily[torch.tensor([3, 1])], decoded[[3, 1]])
        ranks = retrieval_ranks(decoded, truth[target], groups=groups)
        assert torch.equal(retrieval_ranks(lazily, truth[target], groups=groups), ranks)
        cosines = torch.nn.functional.cosine_similarity(decoded[:, None].double(), truth[target].double(), dim=2)
        if not in_groups:
            nearer = (cosines > cosines.diagonal()[:, None] + 1e-6).sum(1)
            assert (nearer < ranks).all()
            assert (ranks <= nearer + 1.5).all()
            assert one.r1 == float((ranks <= 1).double().mean())


def test_one_sample_is_found_and_no_samples_are_nothing() -> None:
    model, inputs = a_model_that_knows()
    one = evaluate(model, {name: x[:1] for name, x in inputs.items()}, metrics=("retrieval_by_reconstruction",))
    assert one.scores()["cross_recon_r1"] == 1
    none = evaluate(model, {name: x[:0] for name, x in inputs.items()}, metrics=("retrieval_by_reconstruction",))
    assert none.scores()["cross_recon_r1"] is None


def test_it_says_beforehand_when_it_will_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = a_model_that_knows()
    monkeypatch.setattr(retrieval, "COUNTED", 1.0)
    said: list[str] = []
    evaluate(model, inputs, metrics=("retrieval_by_reconstruction",), say=said.append)
    assert said[0].startswith("retrieval by reconstruction compares 60 rows with as many, 4 times: about ")
