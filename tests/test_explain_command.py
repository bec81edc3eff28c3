"""`sparc-fast explain`: from a folder of features and runs to a page."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extraction import write_features
from reports import pieces

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

from PIL import Image

from sparc_fast import SPARC, cli, data
from sparc_fast.data import FeatureFolder
from sparc_fast.explain import choose_latents, items_of, report_of

N, KINDS = 60, ["kitten", "rocket", "boat"]
EVIL = '</script><img src=x onerror="alert(1)">'


def write_folder(folder: Path, **changed: Any) -> Path:
    """60 items of three kinds, two streams of pictures and texts; every third item has its picture in a file."""
    (folder / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(0)
    kinds = np.arange(N) % 3
    seen = (("eye", "picture", 6), ("ear", "caption", 5))
    streams = {name: (column, np.eye(D)[kinds] * 3 + rng.normal(0, 0.3, (N, D))) for name, column, D in seen}
    rows = []
    for i in range(N):
        picture = Image.new("RGB", (20, 10), ("red", "green", "blue")[kinds[i]])
        file = io.BytesIO()
        picture.save(file, "JPEG")
        if i % 3 == 0:
            picture.save(folder / "pictures" / f"{i}.png")
        rows.append({
            "id": f"item {i}", "picture": f"{i}.png" if i % 3 == 0 else None,
            "thumbnail": file.getvalue() if i % 3 == 1 else None,
            "caption": f"a {KINDS[kinds[i]]} {EVIL if i == 7 else ''} 猫{i}", "more": None if i % 2 else "and more",
            "label": [KINDS[kinds[i]]], "group": f"g{i}", "split": "held_out" if i % 5 == 0 else "train",
        } | {key: value(i) for key, value in changed.items()})  # fmt: skip
    about = {"pictures": "pictures", "attribution": "Pictures by nobody"}
    return write_features(folder, streams, rows, ("caption", "more"), **about)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("features") / "features")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run with records, and a model file."""
    base = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    shared = SPARC({"eye": 6, "ear": 5}, n_latents=24, k=4)
    shared.save(base / "shared" / "model.safetensors")
    records = [{"step": step, "train": {"loss": 1 / step, "self": 0.5, "cross": None}} for step in (1, 2, 3)]
    (base / "shared" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    SPARC({"eye": 6, "ear": 5}, n_latents=24, k=4, selection="local").save(base / "own.safetensors")
    return {"shared": base / "shared", "own": base / "own.safetensors"}


def explain(model: Path, folder: Path, page: Path, *more: object) -> int:
    return cli.main(["explain", *map(str, (model, "--data", folder, "--out", page, *more))])


def start(page: Path) -> dict[str, Any]:
    return pieces(page / "index.html", "start")


def test_a_run_and_one_before_it_become_a_page(folder, runs, tmp_path, capsys):
    page, atlas = tmp_path / "page", tmp_path / "atlas.parquet"
    assert explain(runs["shared"], folder, page, "--before", f"alone={runs['own']}", "--atlas", atlas) == 0
    assert f"{page.resolve() / 'index.html'}: 60 samples" in capsys.readouterr().out
    found = start(page)
    assert [model["name"] for model in found["models"]] == ["alone", "shared"]
    assert dict(found["models"][1]["curves"])["loss"] == [1.0, 0.5, 0.3333, 0.3333]
    assert found["models"][0]["curves"] == []
    assert [(s["name"], s["text"], s["picture"]) for s in found["streams"]] == [("eye", -1, 0), ("ear", 0, 0)]
    text = (page / "index.html").read_text("utf-8")
    assert "Pictures by nobody" in text
    assert "untrained" in text
    assert "Before and after" in text
    assert EVIL not in text
    assert atlas.is_file()


def test_one_model_and_the_held_out_samples_alone(folder, runs, tmp_path):
    assert explain(runs["shared"], folder, tmp_path, "--split", "held_out") == 0
    found = start(tmp_path)
    assert (found["samples"], found["heldOut"], len(found["models"])) == (12, False, 1)
    assert "Before" not in (tmp_path / "index.html").read_text("utf-8")


def test_latents_are_named_by_words_though_there_are_labels_where_that_is_asked_for(runs, tmp_path):
    folder = write_folder(tmp_path / "features", label=lambda i: [f"class {i % 2}"])
    assert items_of(FeatureFolder(folder)).concepts == ["class 0", "class 1"]
    assert set(items_of(FeatureFolder(folder), labels=False).concepts) == set(KINDS)
    assert explain(runs["shared"], folder, tmp_path, "--no-labels", "--show", "rocket") == 0
    assert "--show rocket --no-labels" in (tmp_path / "index.html").read_text("utf-8")


def test_words_are_searched_by_their_own_codes_where_their_model_is_named(folder, runs, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef kinds(texts):\n"
        "    return torch.tensor([[float(w in t) for w in ('kitten', 'rocket', 'boat', 'x', 'y')] for t in texts])\n"
    )
    settings = tmp_path / "extract.toml"
    settings.write_text('[source]\ncsv = "none.csv"\n[streams.ear]\nmodel = "mine:kinds"\nmodality = "text"\n')
    assert explain(runs["shared"], folder, tmp_path / "page", "--words", settings) == 0
    known = pieces(tmp_path / "page" / "index.html", "words")
    model = SPARC.load(runs["shared"] / "model.safetensors").eval()
    rocket = model.encode({"ear": torch.tensor([[0.0, 1, 0, 0, 0]])}).stream("ear")
    told = known["latents"][known["words"].index("rocket")]
    assert {l for l, _ in told} <= set(rocket[1][0].tolist())
    settings.write_text('[source]\ncsv = "none.csv"\n[streams.eye]\nmodel = "mine:kinds"\n')
    assert explain(runs["shared"], folder, tmp_path / "page", "--words", settings) == 1


def test_of_patch_tokens_a_sample_fires_what_any_of_its_tokens_fires_most(runs, tmp_path):
    folder = write_folder(tmp_path / "features")
    manifest = json.loads((folder / "manifest.json").read_text())
    T, rng = 5, np.random.default_rng(1)
    tokens = rng.normal(0, 1, (N, T, 6)).astype(np.float32)
    np.save(folder / "eye" / "00000.npy", tokens.reshape(-1, 6))
    manifest["streams"]["eye"]["tokens"] = T
    (folder / "manifest.json").write_text(json.dumps(manifest))
    model = SPARC.load(runs["shared"] / "model.safetensors").eval()
    report = report_of({"shared": model}, folder)
    values, indices = report.after.codes["eye"]
    found = torch.zeros(N, model.n_latents).scatter_(1, indices.long(), values)
    v, i = model.encode({"eye": torch.from_numpy(tokens)}).stream("eye")
    every = torch.zeros(N, T, model.n_latents).scatter_(2, i.long(), v.detach().clamp_min(0))
    torch.testing.assert_close(found, every.amax(1))
    assert report.after.codes["ear"][0].shape == (N, model.k)
    assert explain(runs["shared"], folder, tmp_path / "page") == 0
    assert start(tmp_path / "page")["samples"] == N


def test_items_are_what_the_folder_says(folder):
    items = items_of(FeatureFolder(folder))
    assert items.ids[:2] == ["item 0", "item 1"]
    assert list(items.texts) == ["caption"]
    assert items.about["more"][:2] == ["and more", ""]
    assert items.about["label"][1] == "rocket"
    assert sorted(items.concepts) == sorted(KINDS)
    assert items.held_out.tolist() == [i % 5 == 0 for i in range(N)]
    assert items.groups is None  # each item is one
    there = [items.pictures["picture"].draw(row) is not None for row in range(N)]
    assert there == [i % 3 < 2 for i in range(N)]
    red = np.asarray(items.pictures["picture"].draw(0))[48, 48]
    assert red.tolist() == [255, 0, 0, 255]


def test_without_labels_latents_are_named_by_words_of_the_texts(tmp_path):
    folder = write_folder(tmp_path / "features", label=lambda _: [])
    items = items_of(FeatureFolder(folder))
    assert {"kitten", "rocket", "boat"} <= set(items.concepts)
    kitten = items.concepts.index("kitten")
    carried = [kitten in items.carried.concepts[a:b].tolist() for a, b in zip(items.carried.offsets, items.carried.offsets[1:], strict=False)]  # fmt: skip
    assert carried == [i % 3 == 0 for i in range(N)]


def test_a_stream_of_pictures_may_have_a_column_of_its_own(tmp_path):
    folder, file = tmp_path / "features", io.BytesIO()
    Image.new("RGB", (4, 4), "blue").save(file, "PNG")
    rows = [{"id": f"{i}", "picture": None, "close": file.getvalue(), "text": "a", "label": [], "group": f"{i}", "split": "train"} for i in range(2)]  # fmt: skip
    write_features(folder, {"eye": ("close", np.ones((2, 6)))}, rows, ("text",), contents=("close",))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["streams"]["eye"]["modality"] = "image"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    items = items_of(FeatureFolder(folder))
    assert list(items.pictures) == ["close"]
    assert np.asarray(items.pictures["close"].draw(1))[48, 48].tolist() == [0, 0, 255, 255]
    assert list(items.texts) == ["text"]


def test_a_broken_picture_is_missing_and_no_error(tmp_path):
    folder = write_folder(tmp_path / "features", thumbnail=lambda i: b"no picture" if i == 1 else None)
    (folder / "pictures" / "3.png").write_bytes(b"\x89PNG broken")
    (folder / "pictures" / "6.png").unlink()
    pictures = items_of(FeatureFolder(folder)).pictures["picture"]
    assert [pictures.draw(row) is None for row in (0, 1, 3, 6)] == [False, True, True, True]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "link.png"])
def test_a_picture_outside_the_folder_is_refused_by_name(tmp_path, runs, capsys, path):
    folder = write_folder(tmp_path / "features", picture=lambda i: path if i == 0 else None)
    Image.new("RGB", (4, 4)).save(folder / "secret.png")
    (folder / "pictures" / "link.png").symlink_to(folder / "secret.png")
    assert explain(runs["shared"], folder, tmp_path / "page") == 1
    error = capsys.readouterr().err
    assert re.search(rf"picture must stay below .*, got '{re.escape(path)}'", error)
    assert not (tmp_path / "page" / "index.html").exists()


@pytest.mark.parametrize("selection", ["batch", "local_jumprelu"])
def test_a_model_of_thresholds_is_explained(selection, folder, tmp_path):
    model = SPARC({"eye": 6, "ear": 5}, n_latents=24, k=4, selection=selection)
    with data.open(folder) as files:
        model.learn_thresholds(files.rows(0, N))
    model.save(tmp_path / "model.safetensors")
    assert explain(tmp_path / "model.safetensors", folder, tmp_path / "page") == 0
    assert start(tmp_path / "page")["alive"] > 0


def test_a_model_of_one_stream_has_latents_to_show_and_no_agreement(tmp_path):
    features = write_folder(tmp_path / "features")
    model = SPARC({"eye": 6}, n_latents=24, k=4)
    report = report_of({"one": model}, features)
    assert np.isnan(report.after.agreement).all()
    assert report.after.jaccard is None
    assert choose_latents(report)


def test_what_does_not_fit_is_one_clear_error(folder, runs, tmp_path, capsys):
    model = SPARC({"eye": 6, "nose": 5}, n_latents=24, k=4)
    model.save(tmp_path / "other.safetensors")
    shared = runs["shared"]

    def error(model: Path, folder: Path, *more: object) -> str:
        assert explain(model, folder, tmp_path / "page", *more) == 1
        return capsys.readouterr().err

    assert "--data must be a folder that sparc-fast extract wrote, got" in error(shared, tmp_path)
    assert "must have the streams {'eye': 6, 'nose': 5} of other" in error(tmp_path / "other.safetensors", folder)
    assert "names of their own, got two called shared" in error(shared, folder, "--before", shared)
    assert "--atlas must be a file that ends in .parquet" in error(shared, folder, "--atlas", "a.csv")
    with pytest.raises(ValueError, match="models must be one, or two to compare, got 0"):
        report_of({}, folder)
