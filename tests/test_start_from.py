"""Training goes on from a model: with other data or settings, with a part frozen, with a stream more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_runs import D, config, files, rows, trained

import sparc_fast as sf
from sparc_fast import data
from sparc_fast.cli import main
from sparc_fast.training import Trainer, load_model, read_config

WIDTHS = {"a": 8, "b": 6}


def three(n: int = 2000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    two = rows(n)
    return {"c": two["a"][:, :40] + 0.1 * torch.randn(n, 40, generator=generator), **two}


def make(**options: object) -> sf.SPARC:
    torch.manual_seed(0)
    return sf.SPARC(WIDTHS, 32, 4, **options)


def inputs(n: int = 60) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    z = torch.randn(n, 5)
    return {name: 2 + z @ torch.randn(5, width) for name, width in {**WIDTHS, "new": 7}.items()}


@pytest.mark.parametrize("whiten", ["none", "diag"])
@pytest.mark.parametrize("normalize", ["l2", "none"])
def test_a_model_with_a_stream_more_is_what_it_was_in_the_others(normalize: str, whiten: str) -> None:
    x = inputs()
    model = make(normalize={"b": "l2"}, loss="fvu", selection="local")
    model.calibrate({name: x[name] for name in WIDTHS}, whiten=whiten)
    sf.SparcAdam(model, lr=1e-2).step({name: x[name] for name in WIDTHS})
    wider = model.with_stream("new", 7, normalize=normalize)
    assert wider.streams == ("a", "b", "new")
    assert wider.normalize == {"b": "l2"} | ({"new": "l2"} if normalize == "l2" else {})
    assert {k: v for k, v in wider.config().items() if k not in ("d_streams", "normalize")} == {
        k: v for k, v in model.config().items() if k not in ("d_streams", "normalize")
    }
    for name in WIDTHS:
        ours, theirs = (m.encode({name: x[name]}) for m in (wider, model))
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.indices, theirs.indices)
    old = {name: x[name] for name in WIDTHS}
    assert torch.equal(wider.translate(old, "a", "b"), model.translate(old, "a", "b"))
    assert torch.equal(wider.silence, model.silence)
    torch.testing.assert_close(wider.W_dec[:, 14:].norm(dim=1), torch.ones(32))
    wider.calibrate(x, streams=["new"])
    assert torch.equal(wider.translate(old, "a", "b"), model.translate(old, "a", "b"))
    assert wider._batch(x).x[:, 14:].square().sum(1).mean().item() == pytest.approx(1, rel=1e-4)
    with pytest.raises(ValueError, match=r"name must be of a stream that is new beside \('a', 'b'\), got 'a'"):
        model.with_stream("a", 3)


@pytest.mark.parametrize("support_from", [None, ["a", "b"]], ids=str)
def test_a_new_stream_trains_alone_and_learns_while_the_others_stay_bit_for_bit(support_from: object) -> None:
    x = inputs(400)
    model = make()
    model.calibrate({name: x[name] for name in WIDTHS})
    optimizer = sf.SparcAdam(model, lr=1e-2)
    for _ in range(40):
        optimizer.step({name: x[name] for name in WIDTHS})
    wider = model.with_stream("new", 7)
    wider.calibrate(x, streams=["new"])
    before = wider.loss(x).nmse
    optimizer = sf.SparcAdam(wider, lr=1e-2, freeze=WIDTHS)
    for _ in range(60):
        loss = optimizer.step(x, support_from=support_from)
    assert (loss.nmse[2] < 0.7 * before[2]).all()
    assert (loss.nmse[:, 2] < 0.7 * before[:, 2]).all()
    assert torch.equal(wider.W_enc[:, :14], model.W_enc)
    assert torch.equal(wider.W_dec[:, :14], model.W_dec)
    assert torch.equal(wider.latent_bias[:2], model.latent_bias)
    assert torch.equal(wider.pre_bias[:14], model.pre_bias)
    assert torch.equal(wider.input_mean[:14], model.input_mean)
    assert torch.equal(wider.input_rms[:2], model.input_rms)


def test_a_run_starts_from_a_run_a_model_or_a_checkpoint(tmp_path: Path) -> None:
    first = trained(tmp_path / "first")
    places = (tmp_path / "first", tmp_path / "first" / "model.safetensors", first.folder.checkpoint(40))
    models = []
    for i, place in enumerate(places):
        models.append(trained(tmp_path / str(i), start_from=str(place), cross_loss_coef=3.0, steps=6).model)
        assert not torch.equal(models[-1].W_dec, first.model.W_dec)
        assert torch.equal(models[-1].input_mean, first.model.input_mean), "weights keep the units of their training"
        assert torch.equal(models[-1].W_dec, models[0].W_dec)
    given = trained(tmp_path / "given", model=load_model(tmp_path / "first"), cross_loss_coef=3.0, steps=6)
    assert torch.equal(given.model.W_dec, models[0].W_dec)
    settings = config(start_from=str(places[0]), cross_loss_coef=3.0, steps=6)
    with Trainer(settings, tmp_path / "0", files=files()) as again:
        assert again.step == 6, "a run that went on does not start again"


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_run_leaves_what_is_frozen(part: str, tmp_path: Path) -> None:
    first = trained(tmp_path / "first").model
    second = trained(tmp_path / "second", start_from=str(tmp_path / "first"), freeze=[part], steps=6).model
    assert torch.equal(second.W_enc, first.W_enc) == (part == "encoder")
    assert torch.equal(second.W_dec, first.W_dec) == (part == "decoder")
    assert torch.equal(second.pre_bias, first.pre_bias)
    again = config(start_from=str(tmp_path / "first"), freeze=part, steps=6)
    assert again.freeze == [part]
    Trainer(again, tmp_path / "second", files=files()).close()


def test_a_run_adds_the_streams_that_data_have_beyond_the_model_in_any_order(tmp_path: Path) -> None:
    first = trained(tmp_path / "first").model
    settings = {"start_from": str(tmp_path / "first"), "freeze": list(D), "steps": 200, "batch_size": 128}
    trained(tmp_path / "second", data.open(three()), **settings)
    model = sf.SPARC.load(tmp_path / "second" / "model.safetensors")
    assert model.streams == ("c", "a", "b")
    x = {name: part[:50] for name, part in three().items()}
    old = {name: x[name] for name in D}
    assert torch.equal(model.translate(old, "a", "b"), first.translate(old, "a", "b"))
    assert torch.equal(model.W_enc[:, 40:], first.W_enc)
    assert torch.equal(model.input_mean[40:], first.input_mean)
    assert model.input_mean[:40].abs().max() > 0, "the new one is calibrated"
    beginning = first.with_stream("c", 40)
    beginning.calibrate(three(), streams=["c"])
    found, before = (float(sf.fvu(m.translate(x, "a", "c"), x["c"]).detach()) for m in (model, beginning))
    assert found < 0.9 * before


def test_settings_that_do_not_fit_the_model_are_named(tmp_path: Path) -> None:
    trained(tmp_path / "first", steps=2)
    place = str(tmp_path / "first")
    with pytest.raises(ValueError, match="n_latents must be that of start_from, 64, got 32"):
        trained(tmp_path / "second", start_from=place, n_latents=32)
    with pytest.raises(ValueError, match="normalize must be that of start_from, 'none' for 'a', got 'l2'"):
        trained(tmp_path / "second", start_from=place, normalize="l2")
    with pytest.raises(ValueError, match="data must have the streams of start_from"):
        trained(tmp_path / "second", data.open({"a": rows()["a"]}), start_from=place)
    with pytest.raises(FileNotFoundError, match="no file"):
        trained(tmp_path / "second", start_from=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="freeze must be a list of names, got 3"):
        config(freeze=3)
    with pytest.raises(ValueError, match=r"freeze must be of \('encoder', 'decoder', 'a', 'b'\), got 'x'"):
        trained(tmp_path / "second", freeze=["x"])


def test_flags_start_from_a_model_and_freeze(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, x in rows(300).items():
        torch.save(x, tmp_path / f"{name}.pt")
    sources = [f"{name}={tmp_path / name}.pt" for name in D]
    common = ["--n-latents", "32", "--k", "4", "--batch-size", "64", "--progress", "none", "--data", *sources]
    assert main(["train", "--out", str(tmp_path / "first"), "--steps", "2", *common]) == 0
    more = ["--start-from", str(tmp_path / "first"), "--freeze", "decoder", "b", "--steps", "3"]
    assert main(["train", "--out", str(tmp_path / "second"), *more, *common]) == 0, capsys.readouterr().err
    kept = read_config(tmp_path / "second" / "config.json")
    assert (kept.start_from, kept.freeze) == (str(tmp_path / "first"), ["decoder", "b"])
    models = [load_model(tmp_path / run) for run in ("first", "second")]
    assert torch.equal(models[0].W_dec, models[1].W_dec)
    assert torch.equal(models[0].W_enc[:, 300:], models[1].W_enc[:, 300:])
    assert not torch.equal(models[0].W_enc, models[1].W_enc)
