"""The demo on emoji: on a small folder of features, without any package of pictures or models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from extraction import write_features

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
pytest.importorskip("rich")

from PIL import Image

from sparc_fast import cli
from sparc_fast.data import FeatureFolder
from sparc_fast.demo import emoji
from sparc_fast.demo.emoji import write_choosing
from sparc_fast.evaluate import Carried, latents_of_one_concept

KINDS = ["cat", "heart", "rocket"]
N = 360


def write_emoji(folder: Path) -> Path:
    """360 samples of three kinds in groups of two, seen by two streams of pictures and two of texts."""
    rng = np.random.default_rng(0)
    kinds = np.arange(N) // 2 % 3
    (folder / "pictures").mkdir(parents=True)
    for kind, colour in zip(KINDS, ("orange", "red", "grey"), strict=True):
        Image.new("RGB", (12, 12), colour).save(folder / "pictures" / f"{kind}.png")
    seen = (("a", "picture", 8), ("b", "picture", 7), ("c", "name", 6), ("d", "translated", 5))
    streams = {name: (column, np.eye(D)[kinds] * 3 + rng.normal(0, 0.3, (N, D))) for name, column, D in seen}
    rows = [
        {
            "id": f"item {i}", "picture": f"{KINDS[kinds[i]]}.png", "thumbnail": None, "name": f"a {KINDS[kinds[i]]}",
            "translated": f"{KINDS[kinds[i]]} ネコ", "label": [KINDS[kinds[i]]], "group": f"g{i // 2}",
            "split": "held_out" if i // 2 % 5 == 0 else "train",
        }
        for i in range(N)
    ]  # fmt: skip
    about = {"pictures": "pictures", "attribution": "Pictures by nobody, CC-BY 4.0"}
    return write_features(folder, streams, rows, ("name", "translated"), **about)


def test_the_demo_goes_from_a_finished_folder_to_table_page_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoji, "SETTINGS", {**emoji.SETTINGS, "n_latents": 192, "k": 8})
    features = write_emoji(tmp_path / "out" / "features")
    before = {path: path.stat().st_mtime_ns for path in features.rglob("*") if path.is_file()}
    command = ["demo", "--data", "emoji", "--steps", "60", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    for words in ("SPARC", "independent SAEs", "untrained SPARC", "c → a", "share a word in every stream"):
        assert words in printed
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Pictures by nobody, CC-BY 4.0" in page
    assert "sparc-fast demo --data emoji --steps 60" in page
    with Image.open(tmp_path / "out" / "alignment.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24) or ()) > 10
    sessions = tmp_path / "out" / "sparc" / "sessions.jsonl"
    assert cli.main(command) == 0
    assert capsys.readouterr().out == printed
    began = [json.loads(line)["from_step"] for line in sessions.read_text().splitlines()]
    assert began == [0, 60], "a finished run is not trained again"
    assert {path: path.stat().st_mtime_ns for path in features.rglob("*") if path.is_file()} == before


def test_ablations_are_of_glyphs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--data", "emoji", "--ablations", "--out", str(tmp_path)]) == 1
    assert "--ablations must be left out with --data emoji" in capsys.readouterr().err


def test_settings_are_chosen_on_training_samples_alone_and_no_group_is_on_both_sides(tmp_path: Path) -> None:
    whole = FeatureFolder(write_emoji(tmp_path / "features"))
    write_choosing(whole.path, tmp_path / "choosing")
    choosing = FeatureFolder(tmp_path / "choosing")
    assert choosing.column("id") == whole.column("id", "train")
    fitted, chosen_on = set(choosing.column("group", "train")), set(choosing.column("group", "held_out"))
    assert not fitted & chosen_on
    assert 0 < len(chosen_on) < len(fitted)
    for stream in whole.streams:
        expected = np.load(whole.path / stream / "00000.npy")[whole.rows("train")]
        np.testing.assert_array_equal(np.load(choosing.path / stream / "00000.npy"), expected)


def test_a_latent_is_of_a_concept_only_where_enough_of_the_strongest_of_every_stream_carry_the_same() -> None:
    carried = Carried.from_labels(torch.tensor([[True, False]] * 5 + [[False, True]] * 5))

    def code(*strongest: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.zeros(10, len(strongest))
        for latent, rows in enumerate(strongest):
            for place, row in enumerate(rows):
                values[row, latent] = 9.0 - place
        return values, torch.arange(len(strongest), dtype=torch.int32).repeat(10, 1)

    one = code([0, 1, 2, 5, 6], [0, 1, 5, 6, 2], [0, 1, 2], [0, 1, 2, 3, 4], [0, 1])
    other = code([2, 3, 4, 8, 9], [5, 6, 7, 0, 1], [], [0, 1, 2, 9, 8], [0, 1])
    found = latents_of_one_concept({"a": one, "b": other}, carried, 5)
    assert found.tolist() == [True, False, False, True, False]
    assert latents_of_one_concept({"a": one, "b": other}, carried, 5, n=2, share=1).tolist()[4]
    with pytest.raises(ValueError, match="share must be > 0 and at most 1, got 0"):
        latents_of_one_concept({"a": one}, carried, 5, share=0)
