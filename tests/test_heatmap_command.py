"""`sparc-fast explain --heatmap`: from a folder of features to a page of where latents look."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from extraction import write_csv, write_pictures
from tiny_encoders import library, saved

pytest.importorskip("jinja2")
pytest.importorskip("pyarrow")

from PIL import Image

from sparc_fast import SPARC, cli
from sparc_fast.attribution import encoders_of, word_scores
from sparc_fast.data import FeatureFolder
from sparc_fast.extract import extract, read_extraction

EVIL = "</script><img src=x onerror=alert(1)>"
SETTINGS = """\
[source]
csv = "pictures.csv"
[streams.eye]
model = "hf:vit"
pooling = "mean"
[streams.colours]
model = "extraction:colours"
[streams.letters]
model = "extraction:letters"
modality = "text"
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """extract.toml, features of 12 pictures with captions, and a model of them."""
    library("transformers")
    folder = tmp_path_factory.mktemp("work")
    saved(folder / "vit", "vit")
    rows = write_pictures(folder, 12)
    rows[5]["text"] = f"a kitten {EVIL}"
    write_csv(folder / "pictures.csv", rows)
    (folder / "extract.toml").write_text(SETTINGS)
    extract(read_extraction(folder / "extract.toml"), folder / "features")
    torch.manual_seed(0)
    SPARC({"eye": 32, "colours": 6, "letters": 26}, n_latents=16, k=4).save(folder / "model.safetensors")
    return folder


def look(work: Path, out: Path, *more: str, models: bool = True) -> int:
    told = ["--models", str(work / "extract.toml")] if models else []
    command = ["explain", str(work / "model.safetensors"), "--data", str(work / "features"), "--out", str(out)]
    return cli.main([*command, *told, *more])


def test_a_page_shows_samples_and_pictures_of_ones_own_where_their_strongest_latents_are(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = work / "pictures" / "003.png"
    assert look(work, tmp_path, "--heatmap", "p5", str(own)) == 0
    printed = capsys.readouterr().out
    assert "colours: a function has no positions to look into" in printed
    assert printed.endswith("heatmaps.html: 2 samples, 3 streams\n")
    page = (tmp_path / "heatmaps.html").read_text("utf-8")
    shown = re.findall(r'<img src="(heatmaps/\d+\.png)"', page)
    assert len(shown) == 2 + 2 * 4  # each sample, and its four latents seen by the one model that has positions
    for name in shown:
        with Image.open(tmp_path / name) as picture:
            assert max(picture.size) == 320
    assert len({(tmp_path / name).read_bytes() for name in shown}) > 5
    assert "default-src 'none'; style-src 'self'; img-src 'self'" in page
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
    assert not re.search(r'(?:src|href)="(?!heatmaps/|data:,)', page)
    assert (tmp_path / "heatmaps" / "heatmaps.css").is_file()
    with Image.open(own) as picture:
        picture.resize((4000, 3000)).save(tmp_path / "photo.png")
    assert look(work, tmp_path / "large", "--heatmap", str(tmp_path / "photo.png"), "--latent", "3") == 0
    for name in (tmp_path / "large" / "heatmaps").glob("*.png"):
        with Image.open(name) as picture:
            assert picture.size == (1280, 960)
    assert look(work, tmp_path, "--heatmap", "p1", "--latent", "3", "12") == 0
    page = (tmp_path / "heatmaps.html").read_text("utf-8")
    assert re.findall(r"<h3>latent (\d+)", page) == ["3", "12"]
    assert len(list((tmp_path / "heatmaps").glob("*.png"))) == 3, "what an earlier page needed is gone"


def test_what_one_stream_says_is_looked_for_in_the_others(work: Path, tmp_path: Path) -> None:
    assert look(work, tmp_path, "--heatmap", "p2", "--from", "letters", "--method", "attention") == 0
    page = (tmp_path / "heatmaps.html").read_text("utf-8")
    assert re.findall(r"<h3>(.*)</h3>", page) == ["what letters says"]
    model, folder = SPARC.load(work / "model.safetensors"), FeatureFolder(work / "features")
    made = encoders_of(folder, ["letters"], settings=work / "extract.toml")["letters"]
    text = folder.column("text")[2]
    with torch.no_grad():
        target = model.encode({"letters": made.encode([text])}).stream("letters")
        (words,) = word_scores(model, made, [text], stream="letters", latents=target)
    assert f"{words.whole:+.2f}" in page
    assert abs(words.whole - float((target[0] ** 2).sum())) < 1e-4


def test_a_function_runs_only_from_settings_that_are_named(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)  # where hf:vit is
    assert look(work, tmp_path, "--heatmap", "p2", models=False) == 1
    said = capsys.readouterr().err
    assert (
        "settings (--models) must be given, the file that names extraction:colours: a folder runs no function" in said
    )


def test_another_model_than_that_of_the_features_is_refused(work: Path, tmp_path: Path) -> None:
    other = tmp_path / "features"
    other.mkdir()
    manifest = json.loads((work / "features" / "manifest.json").read_text())
    manifest["streams"]["eye"]["weights_sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"the model of stream 'eye' must be that of .*whose weights_sha256 is 000"):
        encoders_of(other, ["eye"], settings=work / "extract.toml")


def test_what_is_not_there_is_named(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--heatmap", "p55"], "--heatmap must be the id of a sample or the file of a picture, got 'p55'; near it: p5"),
        (
            ["--heatmap", "p5", "--latent", "gorilla"],
            "--latent must be a number below 16 or a latent's name, got 'gorilla'",
        ),
        (["--heatmap", "p5", "--from", "nose"], "--from must be one of eye, colours, letters, got nose"),
        (["--latent", "3"], "--heatmap must say in which samples"),
        (["--heatmap", "p5", "--enlarge", "2"], "enlarge must be 1 with hf:vit"),
    ):
        assert look(work, tmp_path / "page", *options) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "page" / "heatmaps.html").exists()
