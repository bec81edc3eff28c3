"""Private latents: part of the dictionary is one stream's alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import training_runs as runs
from operands import seeded
from torch import Tensor
from torch_adam import WIDTHS

import sparc_fast as sf
from sparc_fast.attribution.target import Target
from sparc_fast.cli import train
from sparc_fast.evaluate import concept_jaccard, evaluate, firing_agreement, matched
from sparc_fast.explain import Items, ModelReport
from sparc_fast.interop.research_files import to_upstream
from sparc_fast.interop.saelens import to_saelens
from sparc_fast.training import Config, read_config

PRIVATE = {"a": 9, "c": 6}
PRIVATE_K = {"a": 3, "c": 2}
RULES = ["global", "local", "batch"]


def make(selection: str = "global", dtype: torch.dtype = torch.float64, **arguments: object) -> sf.SPARC:
    torch.manual_seed(0)
    of_each = {"private": PRIVATE, "private_k": PRIVATE_K, "auxk": 6, "dead_after": 40, **arguments}
    return sf.SPARC(WIDTHS, 48, 4, selection=selection, dtype=dtype, **of_each)


def samples(n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Streams that see the same few concepts, and each some of its own."""
    g, of_concepts = seeded(seed), seeded(0)
    seen = torch.randn(n, 6, generator=g, dtype=torch.float64)
    inputs = {}
    for name, width in WIDTHS.items():
        own = torch.randn(n, 3, generator=g, dtype=torch.float64)
        both, alone = (torch.randn(m, width, generator=of_concepts, dtype=torch.float64) for m in (6, 3))
        inputs[name] = (seen @ both + own @ alone).to(dtype)
    return inputs


def assert_nothing_elsewhere(model: sf.SPARC) -> None:
    for name, some in model.private_latents.items():
        for s, (other, cols) in enumerate(zip(model.streams, model._columns(), strict=True)):
            if other != name:
                assert (model.W_enc[some, cols] == 0).all()
                assert (model.W_dec[some, cols] == 0).all()
                assert (model.latent_bias[s, some] == 0).all()


def trained(model: sf.SPARC, steps: int = 12, **options: object) -> sf.SPARC:
    optimizer = sf.SparcAdam(model, lr=1e-2, **options)
    for step in range(steps):
        optimizer.step(samples(16, step))
    optimizer.catch_up()
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_trains_and_keeps_the_zeros(dtype: torch.dtype, backend: str) -> None:
    model = make("global", dtype, backend=backend)
    optimizer = sf.SparcAdam(model, lr=1e-2)
    inputs = samples(64, dtype=dtype)
    losses = [float(optimizer.step(inputs).total) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]
    assert_nothing_elsewhere(model)
    assert_nothing_elsewhere(model.float())


def test_streams_left_out_of_the_choice_still_choose_their_own() -> None:
    model = make()
    private = model.encode(samples(9)).indices[:, 4:]
    (part,) = model._objective(1.0, support_from=["a"]).choose(model._batch(samples(9)))
    assert torch.equal(part.supports.indices[:, 4:], private)
    shared = model.encode({"a": samples(9)["a"]}).indices[:, :4]
    assert torch.equal(part.supports.indices[:, :4], shared)


@pytest.mark.parametrize("selection", RULES)
def test_codes_have_the_best_private_latents_of_each_stream_for_it_alone(selection: str, backend: str) -> None:
    model = trained(make(selection, backend=backend), 3).eval()
    inputs = samples(20)
    codes = model.encode(inputs)
    h = {
        name: (x - model.pre_bias[cols]) @ model.W_enc[:, cols].T + model.latent_bias[s]
        for s, ((name, x), cols) in enumerate(zip(inputs.items(), model._columns(), strict=True))
    }
    for name in WIDTHS:
        dense = codes.dense(name)
        for owner, some in model.private_latents.items():
            if owner != name:
                assert (dense[:, some] == 0).all()
                continue
            best = h[name][:, some].topk(PRIVATE_K[name]).indices
            expected = torch.zeros_like(dense[:, some]).scatter(1, best, h[name][:, some].gather(1, best).relu())
            torch.testing.assert_close(dense[:, some], expected)
        alone = model.encode({name: inputs[name]})
        if name in PRIVATE:
            own = model.private_latents[name]
            torch.testing.assert_close(alone.dense(name)[:, own], dense[:, own])


def test_a_stream_is_decoded_from_another_by_shared_latents_alone(backend: str) -> None:
    model = trained(make(backend=backend)).eval()
    inputs = samples(10)
    codes, n = model.encode(inputs), model.n_shared
    for source in WIDTHS:
        for target, columns in zip(WIDTHS, model._columns(), strict=True):
            expected = codes.dense(source)[:, :n] @ model.W_dec[:n, columns] + model.pre_bias[columns]
            if source == target and source in PRIVATE:
                own = model.private_latents[source]
                expected = expected + codes.dense(source)[:, own] @ model.W_dec[own, columns]
            torch.testing.assert_close(model.decode(codes, source, target), expected)
    out = model(inputs)
    torch.testing.assert_close(out.recons["a", "b"], model.decode(codes, "a", "b"))
    torch.testing.assert_close(out.loss.nmse, model.loss(inputs).nmse)


def test_steering_a_private_latent_moves_its_stream_and_no_other() -> None:
    model = trained(make()).eval()
    codes = model.encode(samples(5))
    latent = model.private_latents["a"].start
    steered = codes.set(latent, 7.0)
    assert not torch.allclose(model.decode(steered, "a", "a"), model.decode(codes.set(latent, 0.0), "a", "a"))
    for source, target in (("a", "b"), ("b", "a"), ("c", "c"), ("b", "b"), ("a", "c")):
        torch.testing.assert_close(model.decode(steered, source, target), model.decode(codes, source, target))


def test_whatever_is_written_elsewhere_is_nothing_once_it_is_loaded(tmp_path: Path) -> None:
    model = make()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert_nothing_elsewhere(model)
    other = trained(make(), 2)
    other.save(tmp_path / "model.safetensors")
    read = sf.SPARC.load(tmp_path / "model.safetensors")
    assert read.config() == other.config()
    assert torch.equal(read.encode(samples(7)).values, other.encode(samples(7)).values)


def test_a_model_without_private_latents_has_the_file_that_it_had() -> None:
    model = sf.SPARC(WIDTHS, 48, 4)
    assert not {"private", "private_k"} & set(model.config())
    assert (model.n_shared, model.private_latents) == (48, {})


def test_a_stream_more_keeps_the_codes_of_the_others() -> None:
    model = trained(make()).eval()
    wider = model.with_stream("d", 3)
    assert wider.private_latents == model.private_latents
    assert torch.equal(wider.encode(samples(9)).values, model.encode(samples(9)).values)
    assert_nothing_elsewhere(wider)
    with torch.no_grad():
        d = torch.randn(9, 3, dtype=torch.float64)
        assert torch.isfinite(wider.train().loss({**samples(9), "d": d}).total)


def test_private_latents_take_what_streams_do_not_share() -> None:
    plain = sf.SPARC(WIDTHS, 48, 6, auxk=6, dead_after=400, dtype=torch.float64)
    model = make(dead_after=400)
    found = {}
    for name, one in (("plain", plain), ("private", model)):
        optimizer = sf.SparcAdam(one, lr=1e-2)
        for step in range(150):
            optimizer.step(samples(64, step))
        found[name] = one.eval().loss(samples(500, 999))
    assert found["private"].self < found["plain"].self


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"private": {"d": 3}}, r"private must name streams of \('a', 'b', 'c'\), got 'd'"),
        ({"private": {"a": 0}}, "private must map streams to numbers of latents >= 1, got {'a': 0}"),
        ({"private": {"a": 2.5}}, "private must map streams to numbers"),
        ({"private": [3]}, "private must map streams to numbers"),
        ({"private": {"a": 3}, "private_k": None}, "private_k must be between 1 and .*=3, got None"),
        ({"private": {"a": 3}, "private_k": 4}, r"private_k must be between 1 and private\['a'\]=3, got 4"),
        ({"private": {"a": 3}, "private_k": {"b": 1}}, r"private_k must be one number, or one of each of \('a',\)"),
        ({"private": {"a": 45}, "private_k": 1}, "private must leave at least k=4 of n_latents=48"),
        ({"private": None, "private_k": 2}, "private_k must be left out without private latents, got 2"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sf.SPARC(WIDTHS, 48, 4, **{"private_k": 1, **arguments})


def test_settings_are_tables_in_files_and_stream_and_number_in_flags(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text("n_latents = 48\nk = 4\nsteps = 2\nprivate = {a = 9, c = 6}\nprivate_k = 2\n")
    assert read_config(path).private == {"a": 9, "c": 6}
    parser = argparse.ArgumentParser()
    train.add_settings(parser)
    given = parser.parse_args([str(path), "--private", "a=5", "c=4", "--private-k", "a=2", "c=1"])
    config = Config.of(train.settings_of(given))
    assert (config.private, config.private_k) == ({"a": 5, "c": 4}, {"a": 2, "c": 1})
    assert Config.of(json.loads(json.dumps(config.as_dict()))) == config
    assert Config.of(train.settings_of(parser.parse_args([str(path), "--private-k", "3"]))).private_k == 3
    for flags in (["--private", "a"], ["--private", "a=x"], ["--private", "a=1", "a=2"], ["--private-k", "2", "3"]):
        with pytest.raises(ValueError, match=f"{flags[0]} must be a number, or stream=number once"):
            train.settings_of(parser.parse_args([str(path), *flags]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"private": {"a": 0}}, "private must be a table of streams, each an integer >= 1, got"),
        ({"private": 8}, "private must be a table of streams"),
        ({"private_k": -1}, "private_k must be an integer >= 0, or a table"),
        ({"private_k": 0}, "private and private_k must be given together, got {'a': 9} and 0"),
        ({"private": {}}, "private and private_k must be given together, got {} and 2"),
        ({"private": {"a": 45}}, "private must leave at least k=4 of n_latents=48, got {'a': 45}"),
        ({"k_start": 40, "k_ramp": 0.5}, "private must leave at least k=40"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**{"n_latents": 48, "k": 4, "steps": 1, "private": {"a": 9}, "private_k": 2, **changes})


def test_a_run_starts_from_a_model_of_the_same_private_latents_alone(tmp_path: Path) -> None:
    private = {"private": {"a": 12, "b": 9}, "private_k": 2, "steps": 4, "validation_rows": 0}
    runs.trained(tmp_path / "first", **private)
    there = str(tmp_path / "first")
    second = runs.trained(tmp_path / "second", **private, start_from=there).model
    assert second.private_latents == {"a": slice(43, 55), "b": slice(55, 64)}
    with pytest.raises(ValueError, match=r"private must be that of start_from, {'a': 12, 'b': 9}, got {}"):
        runs.trained(tmp_path / "third", steps=4, validation_rows=0, start_from=there)


def test_whether_streams_agree_is_asked_of_shared_latents() -> None:
    model = trained(make(), 40).eval()
    inputs = samples(300, 77)
    labels = torch.stack([inputs["a"][:, 0] > 0, inputs["b"][:, 1] > 0.5], dim=1)
    names = ("agreement", "cofiring", "concepts", "concepts_joint", "latents")
    found = evaluate(model, inputs, labels, metrics=names, resamples=20)
    n = model.n_shared
    for result in (found.agreement, found.alignment, found.jaccard_joint, found["cofiring"].iou):
        assert len(result) == n
    codes = {
        name: (torch.where(indices < n, values, 0), torch.where(indices < n, indices, -1))
        for name, x in inputs.items()
        for values, indices in [model.encode({name: x}).stream(name)]
    }
    agreement = firing_agreement(codes, n)
    torch.testing.assert_close(found.agreement, agreement.cpu())
    alive = (found.frequency[:, :n] > 0).any(0)
    assert found.scores()["agreement"] == pytest.approx(float(agreement[alive].mean()))
    torch.testing.assert_close(found.jaccard_single, concept_jaccard(codes, labels, n).cpu())
    for key, value in found.scores().items():
        low, high = found.resampled[key].min(), found.resampled[key].max()
        assert low - 0.15 * abs(low) <= value <= high + 0.15 * abs(high), key
    assert found.frequency.shape == (3, 48)
    for owner, some in model.private_latents.items():
        for s, name in enumerate(WIDTHS):
            assert bool((found.frequency[s, some] > 0).any()) == (name == owner)


def test_a_page_says_whose_a_private_latent_is() -> None:
    model = trained(make(), 20).eval()
    codes = {name: model.encode({name: x}).to("cpu").stream(name) for name, x in samples(30).items()}
    private = model.private_latents
    report = ModelReport.of("SPARC", codes, 48, Items([str(n) for n in range(30)]), private=private)
    for latent, several in enumerate(report.names):
        owner = [name for name, some in private.items() if some.start <= latent < some.stop]
        assert [word for word in several if word.startswith("private")] == [f"private to {name}" for name in owner]


def test_what_has_no_place_for_private_latents_refuses_them(tmp_path: Path) -> None:
    model = make("local", torch.float32)
    with pytest.raises(ValueError, match="no private latents: a SAE of SAELens chooses among all"):
        to_saelens(model, "a", tmp_path / "sae")
    with pytest.raises(ValueError, match=r"no private latents for the research code, got {'a': 9, 'c': 6}"):
        to_upstream(model, tmp_path / "msae_checkpoint.pth")
    with pytest.raises(ValueError, match="no private latents to be put in another order"):
        matched(model, samples(9, dtype=torch.float32))


def test_attribution_asks_a_stream_of_its_own_latents_alone() -> None:
    model = trained(make()).eval()
    x = samples(4)
    latent = model.private_latents["a"].start
    of_a, of_b = (Target.of(model, name, latent, 4).score(x[name]) for name in ("a", "b"))
    z = (x["a"] - model.pre_bias[:12]) @ model.W_enc[latent, :12] + model.latent_bias[0, latent]
    torch.testing.assert_close(of_a, z.detach())
    assert (of_b == 0).all()
