"""What a model does to rows before it sees them: unit norm, and a scale a dimension; kept with it, undone in its units."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pytest
import torch
from training_runs import config, files, rows, trained

import sparc_fast as sf
from sparc_fast import data
from sparc_fast.cli.train import add_settings, settings_of
from sparc_fast.training import Trainer, load_model, read_config
from sparc_fast.training.trainer import calibrate

WIDTHS = {"a": 6, "b": 4}


def make(dtype: torch.dtype = torch.float32, **options: object) -> sf.SPARC:
    torch.manual_seed(0)
    return sf.SPARC(WIDTHS, 24, 4, dtype=dtype, **options)


def inputs(n: int = 50, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: (3 * torch.randn(n, width, dtype=dtype) + 1) for name, width in WIDTHS.items()}


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x.double(), dim=-1).to(x.dtype)


def assert_same_in_all_it_does(model: sf.SPARC, x: dict[str, torch.Tensor], bare: sf.SPARC, seen: object) -> None:
    """`model` on x is `bare` on `seen`."""
    for streams in (("a", "b"), ("b",)):
        codes, expected = (m.encode({s: given[s] for s in streams}) for m, given in ((model, x), (bare, seen)))
        assert torch.equal(codes.indices, expected.indices)
        torch.testing.assert_close(codes.values, expected.values)
    torch.testing.assert_close(model.translate(x, "a", "b"), bare.translate(seen, "a", "b"))
    torch.testing.assert_close(model(x).recons["b", "a"], bare(seen).recons["b", "a"])
    torch.testing.assert_close(model.loss(x).total, bare.loss(seen).total)
    present = torch.rand(len(x["a"]), 2) < 0.7
    present[:, 0] |= ~present.any(1)
    losses = [m.loss(given, present=present).total for m, given in ((model, x), (bare, seen))]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("normalize", ["l2", {"a": "l2"}, {"b": "l2", "a": "none"}], ids=str)
def test_a_model_that_normalizes_is_one_without_on_rows_of_unit_norm(normalize: object) -> None:
    model, bare, x = make(normalize=normalize), make(), inputs()
    which = WIDTHS if normalize == "l2" else {name for name, how in normalize.items() if how == "l2"}
    seen = {name: unit(part) if name in which else part for name, part in x.items()}
    assert_same_in_all_it_does(model, x, bare, seen)
    for name, part in model.normalized(x).items():
        torch.testing.assert_close(part, seen[name])
    model.calibrate(x)
    bare.calibrate(seen)
    torch.testing.assert_close(model.input_mean, bare.input_mean)
    torch.testing.assert_close(model.input_rms, bare.input_rms)
    assert_same_in_all_it_does(model, x, bare, seen)


def test_training_on_rows_of_any_length_is_training_on_unit_rows() -> None:
    ours, bare, x = make(torch.float64, normalize="l2"), make(torch.float64), inputs(64, torch.float64)
    optimizers = [sf.SparcAdam(model, lr=1e-2) for model in (ours, bare)]
    for step in range(1, 6):
        optimizers[0].step({name: step * part for name, part in x.items()})
        optimizers[1].step({name: unit(part) for name, part in x.items()})
    torch.testing.assert_close(ours.W_dec, bare.W_dec)


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-19, 1e19, 1e37])
def test_rows_of_any_size_get_unit_norm_and_zero_rows_stay(size: float) -> None:
    x = torch.tensor([[3.0, 4.0, 0, 0, 0, 0], [0] * 6, [-1, 0, 0, 0, 0, 0]]) * size
    found = make(normalize="l2").normalized({"a": x})["a"]
    norm = x.double().norm(dim=1, keepdim=True)
    expected = (x.double() / norm.where(norm > 0, 1)).float()
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)


def test_narrow_and_integer_rows_are_normalized_in_float32() -> None:
    x = torch.randint(-9, 9, (30, 6)).float()
    expected = make(normalize="l2").normalized({"a": x})["a"]
    for dtype in (torch.bfloat16, torch.float16, torch.int16):
        assert torch.equal(make(normalize="l2").normalized({"a": x.to(dtype)})["a"], expected)


def test_a_row_that_is_not_finite_is_still_refused() -> None:
    x = inputs()
    x["b"][7, 1] = torch.inf
    for use in (make(normalize="l2").encode, make(normalize="l2").loss, make(normalize="l2").calibrate):
        with pytest.raises(ValueError, match=r"inputs\['b'\] must be finite .* in row 7"):
            use(x)


def test_how_rows_are_scaled_is_saved_with_the_model_and_other_files_stay_what_they_were(tmp_path: Path) -> None:
    x = inputs()
    assert "normalize" not in make().config()
    for normalize, whiten in (("l2", "none"), ({"b": "l2"}, "diag"), ("none", "diag")):
        model = make(normalize=normalize)
        model.calibrate(x, whiten=whiten)
        model.save(tmp_path / "model.safetensors")
        loaded = sf.SPARC.load(tmp_path / "model.safetensors")
        for other in (loaded, copy.deepcopy(model)):
            assert other.config() == model.config()
            assert torch.equal(other.translate(x, "a", "b"), model.translate(x, "a", "b"))
        again = make(normalize=normalize)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.translate(x, "a", "b"), model.translate(x, "a", "b"))


def test_a_wrong_normalization_is_named() -> None:
    with pytest.raises(
        ValueError, match="normalize must be \"l2\" or \"none\", or a table of streams, got 'L2' for 'a'"
    ):
        make(normalize="L2")
    with pytest.raises(ValueError, match=r"normalize must be one of the streams \('a', 'b'\), got 'c'"):
        make(normalize={"c": "l2"})
    with pytest.raises(
        ValueError, match="normalize must be none or l2, or a table of streams, each none or l2, got 'l1'"
    ):
        config(normalize="l1")


@pytest.mark.parametrize(
    "settings", [{"normalize": {"a": "l2"}}, {"normalize": "l2", "calibrate": False}, {"whiten": "diag"}], ids=str
)
def test_a_run_trains_and_keeps_the_model_its_settings_say(settings: dict, tmp_path: Path) -> None:
    trainer = trained(tmp_path, **settings)
    model = sf.SPARC.load(tmp_path / "model.safetensors")
    assert model.config() == trainer.model.config()
    assert bool(model.normalize) == ("normalize" in settings)
    assert len(model.input_rms) == (500 if "whiten" in settings else 2)
    x = rows(20)
    last = load_model(trainer.folder.checkpoint(40))
    for other in (trainer.model, last):
        assert torch.equal(model.translate(x, "a", "b"), other.translate(x, "a", "b"))
    assert read_config(tmp_path / "config.json") == trainer.config
    with Trainer(trainer.config, tmp_path, files=files()) as again:
        assert again.step == 40


def test_whitening_gives_all_dimensions_of_a_stream_the_same_variance_and_is_undone_in_reconstructions() -> None:
    x = inputs(400, torch.float64)
    x["a"][:, 2] *= 1000
    model, bare = make(torch.float64), make(torch.float64)
    model.calibrate(x, whiten="diag")
    assert model.is_calibrated
    seen = model._batch(x).x
    torch.testing.assert_close(seen.var(0, correction=0), torch.tensor([1 / 6] * 6 + [1 / 4] * 4).double())
    torch.testing.assert_close(seen.mean(0), torch.zeros(10).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.loss(x).total, bare.loss(seen).total)
    expected = bare.translate(seen, "b", "a") * model.input_rms[:6] + model.input_mean[:6]
    torch.testing.assert_close(model.translate(x, "b", "a"), expected)
    model.calibrate(x)
    bare.calibrate(x)
    assert torch.equal(model.input_rms, bare.input_rms), "a calibration is as whoever makes it last says"


def test_a_dimension_or_stream_that_is_constant_stays_small_when_it_is_whitened() -> None:
    x = inputs(100)
    x["a"][:, 3] = 0.1
    x["b"][:] = 7.3
    model = make()
    model.calibrate(x, whiten="diag")
    seen = model._batch(x).x
    torch.testing.assert_close(seen[:, 3], torch.zeros(100), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[:, 6:], torch.zeros(100, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[:, :3].square().mean(0), torch.full((3,), 1 / 6))


@pytest.mark.parametrize("whiten", ["none", "diag"])
def test_rows_measured_batch_by_batch_are_measured_as_in_one_piece(whiten: str) -> None:
    with data.Loader(files(1000), 128, seed=1) as loader:
        x = torch.cat(list(loader))
        streamed, whole = (sf.SPARC(loader.files.d_streams, 8, 2, normalize={"b": "l2"}) for _ in range(2))
        calibrate(streamed, loader, 1000, whiten=whiten)
    whole.calibrate(x, whiten)
    torch.testing.assert_close(streamed.input_mean, whole.input_mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(streamed.input_rms, whole.input_rms, rtol=1e-5, atol=0)


def test_a_massive_dimension_hides_the_others_unless_they_are_whitened() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1500, 12, generator=generator)
    a, b = (z @ torch.randn(12, width, generator=generator) for width in (32, 24))
    a[:, 5] += 300 * torch.randn(1500, generator=generator)
    rest = [d for d in range(32) if d != 5]
    unexplained = {}
    for whiten in ("none", "diag"):
        torch.manual_seed(0)
        model = sf.SPARC({"a": 32, "b": 24}, 128, 8)
        model.calibrate({"a": a[:1000], "b": b[:1000]}, whiten=whiten)
        optimizer = sf.SparcAdam(model, lr=5e-3)
        for step in range(60):
            n = torch.randperm(1000, generator=torch.Generator().manual_seed(step))[:200]
            optimizer.step({"a": a[n], "b": b[n]})
        model.eval()
        unexplained[whiten] = sf.fvu(model.translate({"b": b[1000:]}, "b", "a")[:, rest], a[1000:, rest])
    assert unexplained["diag"] < 0.5 * unexplained["none"]


def test_whitening_that_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match='whiten must be "none" or "diag", got \'zca\''):
        make().calibrate(inputs(), whiten="zca")
    with pytest.raises(ValueError, match="calibrate must be true with whiten='diag', got false"):
        config(whiten="diag", calibrate=False)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--normalize", "l2"], "l2"),
        (["--normalize", "a=l2", "--normalize", "b=none"], {"a": "l2", "b": "none"}),
        (["--normalize", "a=l2", "a=none"], r"--normalize must be one word, or stream=word once for each"),
    ],
    ids=str,
)
def test_a_flag_normalizes_all_streams_or_some(flags: list[str], expected: object) -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    arguments = parser.parse_args(flags)
    if isinstance(expected, str) and expected != "l2":
        with pytest.raises(ValueError, match=expected):
            settings_of(arguments)
    else:
        assert settings_of(arguments) == {"normalize": expected}
