"""The built-in data set, and `sparc-fast glyphs`, the same as a large one in files. The regular face alone, and few
rows, serve where they can."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from extraction import contents
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")

import sparc_fast as sf
from sparc_fast import cli, data
from sparc_fast.cli import glyphs as command
from sparc_fast.data import FeatureFolder, Glyphs, glyph_files, glyphs, write_glyphs
from sparc_fast.data.glyphs import FACES, Principal, _blurred, _hog, _semantic, draw
from sparc_fast.data.jitter import CHANGES, jitter
from sparc_fast.training import read_config

REGULAR = ["regular"]
ROWS = 3000  # a little more than all training characters once


@pytest.fixture(scope="module")
def every(drawn_glyphs: Callable[..., Glyphs]) -> Glyphs:
    """In all faces."""
    return drawn_glyphs()


@pytest.fixture(scope="module")
def regular(drawn_glyphs: Callable[..., Glyphs]) -> Glyphs:
    return drawn_glyphs(*REGULAR)


@pytest.fixture(scope="module")
def folder(made_once: Callable[..., Path]) -> Path:
    return made_once("glyph files", partial(write_glyphs, rows=ROWS, faces=REGULAR, threads=1))


# ---- in memory


def test_every_field_has_one_entry_per_row_and_there_are_at_least_9000_rows(every: Glyphs) -> None:
    n = len(every.characters)
    assert n >= 9000
    assert {len(every.names), len(every.faces), len(every.held_out), len(every.labels)} == {n}
    assert {len(x) for x in (*every.inputs.values(), *every.images.values())} == {n}
    assert list(every.inputs) == ["sans", "serif", "name"]


def test_a_row_is_a_character_in_a_face_and_its_unicode_name(every: Glyphs) -> None:
    assert len(set(zip(every.characters, every.faces, strict=True))) == len(every.characters)
    assert every.names == [unicodedata.name(character) for character in every.characters]


def test_inputs_are_finite_float32_rows_of_unit_length(every: Glyphs) -> None:
    for x in every.inputs.values():
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)))


def test_the_split_is_by_character_and_keeps_out_a_fifth_of_them(every: Glyphs) -> None:
    held_out = {every.characters[i] for i in every.rows(held_out=True)}
    trained = {every.characters[i] for i in every.rows(held_out=False)}
    assert not held_out & trained
    assert len(held_out) == round(0.2 * len(held_out | trained))


def test_the_split_does_not_depend_on_the_faces(every: Glyphs, regular: Glyphs) -> None:
    rows = torch.tensor([face == "regular" for face in every.faces])
    assert torch.equal(every.held_out[rows], regular.held_out)


def test_rows_choose_by_split_and_face_and_together_cover_everything(every: Glyphs) -> None:
    both = torch.cat([every.rows(held_out=False), every.rows(held_out=True)])
    assert torch.equal(both.sort().values, torch.arange(len(every.characters)))
    bold = every.rows(held_out=True, face="bold")
    assert bold.dtype == torch.int64
    assert len(bold) > 500
    assert all(every.held_out[i] and every.faces[i] == "bold" for i in bold)


@pytest.mark.parametrize("features", [_hog, _blurred])
def test_held_out_pictures_do_not_change_what_is_fitted(regular: Glyphs, features) -> None:
    images, train = regular.images["sans"][:300], ~regular.held_out[:300]
    changed = images.clone()
    changed[~train] = changed[~train].flip(1)  # upside down
    before, after = (Principal.fit(features(x)[train], 16)(features(x)) for x in (images, changed))
    torch.testing.assert_close(before[train], after[train], rtol=0, atol=1e-5)
    assert not torch.allclose(before[~train], after[~train], atol=0.1)


def test_a_row_s_own_picture_is_described_as_the_row(regular: Glyphs) -> None:
    for stream in ("sans", "serif"):
        torch.testing.assert_close(regular.describe(stream, regular.images[stream][:50]), regular.inputs[stream][:50])
    with pytest.raises(ValueError, match=r"stream must be one of \['sans', 'serif'\], got 'name'"):
        regular.describe("name", regular.images["sans"])


def test_held_out_names_do_not_change_what_is_fitted(regular: Glyphs) -> None:
    names, train = regular.names[:1500], ~regular.held_out[:1500]
    changed = [name if trained else "ZZQ" for name, trained in zip(names, train.tolist(), strict=True)]
    before, after = _semantic(names, train), _semantic(changed, train)
    torch.testing.assert_close(before[train], after[train], rtol=0, atol=1e-5)
    assert not torch.allclose(before[~train], after[~train], atol=0.1)


def test_concepts_are_the_words_of_15_to_600_characters_names(regular: Glyphs) -> None:
    words = [re.split(r"[ -]", name) for name in regular.names]
    counts = Counter(word for name in words for word in set(name))
    assert regular.concepts == sorted(word for word, count in counts.items() if 15 <= count <= 600)
    assert {"ACUTE", "ARROW", "GREEK", "BRAILLE"} <= set(regular.concepts)
    assert regular.labels.sum(0).tolist() == [counts[concept] for concept in regular.concepts]


def test_a_label_says_that_the_word_is_in_the_name(every: Glyphs) -> None:
    row = every.names.index("GREEK SMALL LETTER ALPHA WITH TONOS")
    concepts = [every.concepts[i] for i in every.labels[row].nonzero().flatten()]
    assert concepts == ["ALPHA", "GREEK", "TONOS"]


def test_pictures_are_never_blank_and_sans_differs_from_serif(every: Glyphs) -> None:
    sans, serif = every.images["sans"], every.images["serif"]
    assert sans.dtype == serif.dtype == torch.uint8
    assert sans.flatten(1).any(1).all()
    assert serif.flatten(1).any(1).all()
    assert (sans != serif).flatten(1).any(1).float().mean() > 0.8  # braille and box drawings are the same in both


def test_faces_differ_from_each_other(every: Glyphs) -> None:
    a = [i for i, character in enumerate(every.characters) if character == "a"]
    assert len(a) == len(set(every.faces))
    assert len({every.images["sans"][i].numpy().tobytes() for i in a}) == len(a)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"faces": ["regular", "gothic"]}, r"faces must be distinct names out of .*'regular'.*, got .*gothic"),
        ({"faces": "bold"}, r"faces must be .*, got 'bold'"),
        ({"faces": []}, r"faces must be .*, got \[\]"),
        ({"faces": ["bold", "bold"]}, r"faces must be distinct"),
        ({"held_out": 0.0}, r"held_out must be a share .*, got 0.0"),
        ({"held_out": 1}, r"held_out must be a share .*, got 1"),
        ({"width": 0}, r"width must be 1 to 400, got 0"),
        ({"seed": -1}, r"seed must be 0 or more, got -1"),
    ],
)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        glyphs(**arguments)


def test_rows_of_an_absent_face_say_which_are_there(regular: Glyphs) -> None:
    with pytest.raises(ValueError, match=r"face must be one of \['regular'\], got 'bold'"):
        regular.rows(held_out=True, face="bold")


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn"])
def test_a_missing_extra_is_one_sentence_with_the_command(monkeypatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'sparc_fast\[demo\]'"):
        glyphs()


# ---- in files


def test_the_same_arguments_give_the_same_bytes_on_any_number_of_threads(folder: Path, tmp_path: Path) -> None:
    before, told = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        write_glyphs(tmp_path, ROWS, faces=REGULAR, threads=3, progress=lambda *now: told.append(now))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path) == contents(folder)
    assert told == [(done, ROWS) for done in (512, 1024, 1536, 2048, 2515, 3000)], "in rounds of 2515 characters"


def test_another_seed_gives_another_split_and_other_pictures(folder: Path, tmp_path: Path) -> None:
    write_glyphs(tmp_path, 600, seed=1, faces=REGULAR)
    ours, other = (json.loads((path / "glyphs.json").read_text(encoding="utf-8")) for path in (folder, tmp_path))
    assert ours["characters"] == other["characters"]
    assert ours["held_out"] != other["held_out"]
    assert sum(ours["held_out"]) == sum(other["held_out"])
    assert not np.array_equal(np.load(folder / "train" / "sans.npy")[:600], np.load(tmp_path / "train" / "sans.npy"))


def test_no_held_out_character_is_in_the_training_files(folder: Path) -> None:
    about = json.loads((folder / "glyphs.json").read_text(encoding="utf-8"))
    trained = set(np.load(folder / "train" / "rows.npy")[:, 0].tolist())
    held_out = {n for n, held in enumerate(about["held_out"]) if held}
    assert not trained & held_out
    assert trained | held_out == set(range(len(about["characters"])))
    rows = json.loads((folder / "held_out" / "regular" / "rows.json").read_text(encoding="utf-8"))
    assert {about["characters"][n] for n in held_out} == set(rows["characters"])


def test_files_have_a_row_for_each_row_at_unit_length_that_no_pickle_holds(folder: Path) -> None:
    parts = ("train", ROWS, "f2"), ("held_out/regular", 629, "f4"), ("held_out/jittered", 629, "f4")
    for part, n, dtype in parts:
        for stream in ("sans", "serif", "name"):
            x = np.load(folder / part / f"{stream}.npy", allow_pickle=False)
            assert (x.shape, x.dtype) == ((n, 256), dtype)
            np.testing.assert_allclose(np.linalg.norm(x.astype(np.float64), axis=1), 1, atol=1e-3)
    rows = np.load(folder / "train" / "rows.npy", allow_pickle=False)
    assert (rows.shape, rows.dtype) == ((ROWS, 3), np.int32)
    assert set(rows[:, 2].tolist()) == {20, 22, 24}
    assert np.load(folder / "labels.npy", allow_pickle=False).dtype == np.bool_


def assert_same_fit(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Rows of unit length; the last components of a fit depend on how many threads multiply matrices."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_a_row_says_which_character_it_is(folder: Path, regular: Glyphs) -> None:
    about = json.loads((folder / "glyphs.json").read_text(encoding="utf-8"))
    rows, names = np.load(folder / "train" / "rows.npy"), np.load(folder / "train" / "name.npy")
    labels = np.load(folder / "labels.npy")
    order = torch.tensor([regular.characters.index(character) for character in about["characters"]])
    assert about["names"] == [regular.names[n] for n in order]
    assert np.array_equal(labels, regular.labels[order].numpy())
    assert_same_fit(torch.from_numpy(names), regular.inputs["name"][order[rows[:, 0]]].half())


def test_the_held_out_rows_of_a_face_are_those_of_the_demo(folder: Path, regular: Glyphs) -> None:
    rows = regular.rows(held_out=True, face="regular")
    for stream, x in regular.inputs.items():
        assert_same_fit(torch.from_numpy(np.load(folder / "held_out/regular" / f"{stream}.npy")), x[rows])
    assert np.array_equal(np.load(folder / "held_out" / "regular" / "labels.npy"), regular.labels[rows].numpy())


def test_a_character_is_drawn_anew_each_time_and_still_recognised(folder: Path, regular: Glyphs) -> None:
    rows = np.load(folder / "train" / "rows.npy")
    once = 2515
    assert np.array_equal(rows[once:, :2], rows[: ROWS - once, :2]), "the second round goes as the first"
    assert not (rows[once:, 2] == rows[: ROWS - once, 2]).any(), "in another size"
    for stream in ("sans", "serif"):
        x = torch.from_numpy(np.load(folder / "train" / f"{stream}.npy")).float()
        first, again = x[: ROWS - once], x[once:]
        assert not (first == again).all(1).any()
        nearest = (first @ again.T).argmax(1)
        assert (nearest == torch.arange(len(first))).float().mean() > 0.3, "by chance 0.002"


def test_the_folder_is_one_of_features_with_the_names_and_pictures_of_what_is_held_out(
    folder: Path, regular: Glyphs
) -> None:
    features = FeatureFolder(folder)
    rows = regular.rows(held_out=True, face="regular").tolist()
    assert features.column("text", "held_out") == [regular.names[n] for n in rows]
    assert len(set(features.column("id"))) == ROWS + len(rows)
    with data.open(folder, split="held_out") as files, data.open(folder, split="train") as trained:
        x = torch.cat([regular.inputs[stream][rows] for stream in regular.inputs], dim=1)
        torch.testing.assert_close(files.rows(0, len(rows)), x, rtol=0, atol=3e-3)
        assert len(trained) == ROWS
    found = Image.open(io.BytesIO(features.column("serif", "held_out")[5]))
    assert np.array_equal(255 - np.asarray(found), regular.images["serif"][rows[5]].numpy())
    truth, names = features.labels("held_out")
    order = [regular.concepts.index(name) for name in names]
    assert order == sorted(order)
    assert torch.equal(torch.from_numpy(truth), regular.labels[rows][:, order])
    groups = dict(zip(features.column("group"), features.column("split"), strict=True))
    assert all(groups[g] == s for g, s in zip(features.column("group"), features.column("split"), strict=True))


def test_the_files_open_and_the_settings_train(folder: Path, tmp_path: Path) -> None:
    config = read_config(folder / "train.toml")
    with data.open(config.data, scan=True) as files:
        assert (files.n_rows, files.d_streams) == (ROWS, {"sans": 256, "serif": 256, "name": 256})
    assert config.n_latents == 32768
    independent = read_config(folder / "independent.toml")
    assert independent.differences(config) == ["selection", "cross_loss_coef", "support_dropout"]
    arguments = ["--n-latents", "64", "--k", "4", "--steps", "2", "--batch-size", "32", "--progress", "none"]
    for name in ("train", "independent"):
        assert cli.main(["train", str(folder / f"{name}.toml"), "--out", str(tmp_path / name), *arguments]) == 0
        assert sf.SPARC.load(tmp_path / name / "model.safetensors").n_latents == 64


def test_killed_writing_leaves_no_settings_to_train_on_half_a_file(
    regular: Glyphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glyph_files, "glyphs", lambda **_: regular)

    def stop(done: int, rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_glyphs(tmp_path, 1200, faces=REGULAR, progress=stop)
    assert not (tmp_path / "train.toml").exists()
    assert list((tmp_path / "train").iterdir()) == []


def changed(pictures: torch.Tensor, change: int = -1, amount: float = -1) -> torch.Tensor:
    """Sharp pictures, changed in one way at most."""
    changes = torch.zeros(len(pictures), CHANGES)
    changes[:, -1] = -1
    changes[:, change] = amount
    return jitter(pictures, changes)


def test_no_change_is_none_and_a_picture_depends_on_its_own_row() -> None:
    pictures = torch.from_numpy(draw(list("aÅЖ√"), "regular")[:, 0])
    assert torch.equal(changed(pictures), pictures)
    changes = torch.rand(4, CHANGES, generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
    whole = jitter(pictures, changes)
    assert all(torch.equal(jitter(pictures[n : n + 1], changes[n : n + 1])[0], whole[n]) for n in range(4))
    assert not (whole == pictures).flatten(1).all(1).any()


@pytest.mark.parametrize(("change", "direction"), [(3, (0, 1)), (4, (1, 0))], ids=["right", "down"])
def test_a_shift_moves_the_ink(change: int, direction: tuple[int, int]) -> None:
    picture = torch.from_numpy(draw(["x"], "regular")[:, 0])
    moved = _middle(changed(picture, change, 1)[0]) - _middle(changed(picture)[0])
    torch.testing.assert_close(moved, torch.tensor(direction, dtype=torch.float), rtol=0, atol=0.1)


def test_weight_adds_and_takes_ink_and_blur_keeps_it() -> None:
    picture = torch.from_numpy(draw(["x"], "regular")[:, 0])
    ways = (0, 0), (5, 1), (5, -1), (6, 1)
    still, heavier, thinner, blurred = (float(changed(picture, *way).float().sum()) for way in ways)
    assert thinner < 0.9 * still < 1.1 * still < heavier
    assert blurred == pytest.approx(still, rel=0.01)


def test_letters_of_all_sizes_have_their_middle_in_one_place() -> None:
    middles = [_middle(torch.from_numpy(draw(["x"], "regular", size)[0, 0])) for size in (20, 22, 24)]
    assert max(float((middle - middles[0]).abs().max()) for middle in middles) < 1


def _middle(picture: torch.Tensor) -> torch.Tensor:
    """(row, column) of the ink's centre."""
    places = torch.stack(torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij"))
    return (places * picture).sum((1, 2)) / picture.sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows must be 1 or more, got 0"),
        ({"threads": 0}, "threads must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"faces": ["gothic"]}, "faces must be distinct names"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_glyphs(tmp_path / "glyphs", **arguments)
    assert not (tmp_path / "glyphs").exists()


def test_the_command_writes_all_faces_and_says_how_to_go_on(
    every: Glyphs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(glyph_files, "glyphs", lambda **asked: drawn.append(asked) or every)
    assert cli.main(["glyphs", "--out", str(tmp_path / "glyphs"), "--rows", "300"]) == 0
    assert re.search(r"300 rows; now: sparc-fast train .*train\.toml --out", capsys.readouterr().out)
    folders = sorted(path.name for path in (tmp_path / "glyphs" / "held_out").iterdir())
    assert folders == ["bold", "bold_oblique", "jittered", "mono", "oblique", "regular"]
    assert len(np.load(tmp_path / "glyphs" / "train" / "name.npy")) == 300
    assert drawn == [{"faces": tuple(FACES), "seed": 0}]


def test_errors_of_the_command_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["glyphs", "--out", str(tmp_path), "--rows", "0"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "sparc-fast: rows must be 1 or more, got 0"
    (tmp_path / "file").write_text("")
    assert cli.main(["glyphs", "--out", str(tmp_path / "file")]) == 1
    assert re.fullmatch(r"sparc-fast: --out must be a folder that can be written, got .*\n", capsys.readouterr().err)
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "sklearn" else object())
    assert cli.main(["glyphs"]) == 1
    assert "the glyphs need sklearn: pip install 'sparc_fast[demo,data]'" in capsys.readouterr().err
