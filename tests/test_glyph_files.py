"""`sparc-fast glyphs`: the glyphs as a large data set in files. The regular face alone, and few rows, serve."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")

import sparc_fast as sf
from sparc_fast import cli, data
from sparc_fast.cli import glyphs as command
from sparc_fast.data import FeatureFolder, Glyphs, glyphs, write_glyphs
from sparc_fast.demo.glyphs import draw
from sparc_fast.demo.jitter import CHANGES, jitter
from sparc_fast.training import read_config

FACES = ["regular"]
ROWS = 3000  # a little more than all training characters once


@pytest.fixture(scope="module")
def base() -> Glyphs:
    return glyphs(faces=FACES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glyphs")
    write_glyphs(folder, ROWS, faces=FACES, threads=1)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_arguments_give_the_same_bytes_on_any_number_of_threads(folder: Path, tmp_path: Path) -> None:
    before, told = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        write_glyphs(tmp_path, ROWS, faces=FACES, threads=3, progress=lambda *now: told.append(now))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path) == contents(folder)
    assert told == [(done, ROWS) for done in (512, 1024, 1536, 2048, 2515, 3000)], "in rounds of 2515 characters"


def test_another_seed_gives_another_split_and_other_pictures(folder: Path, tmp_path: Path) -> None:
    write_glyphs(tmp_path, 600, seed=1, faces=FACES)
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
    for part, n, dtype in (
        ("train", ROWS, np.float16),
        ("held_out/regular", 629, np.float32),
        ("held_out/jittered", 629, np.float32),
    ):
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


def test_a_row_says_which_character_it_is(folder: Path, base: Glyphs) -> None:
    about = json.loads((folder / "glyphs.json").read_text(encoding="utf-8"))
    rows, names = np.load(folder / "train" / "rows.npy"), np.load(folder / "train" / "name.npy")
    labels = np.load(folder / "labels.npy")
    order = torch.tensor([base.characters.index(character) for character in about["characters"]])
    assert about["names"] == [base.names[n] for n in order]
    assert np.array_equal(labels, base.labels[order].numpy())
    assert_same_fit(torch.from_numpy(names), base.inputs["name"][order[rows[:, 0]]].half())


def test_the_held_out_rows_of_a_face_are_those_of_the_demo(folder: Path, base: Glyphs) -> None:
    rows = base.rows(held_out=True, face="regular")
    for stream, x in base.inputs.items():
        assert_same_fit(torch.from_numpy(np.load(folder / "held_out/regular" / f"{stream}.npy")), x[rows])
    assert np.array_equal(np.load(folder / "held_out" / "regular" / "labels.npy"), base.labels[rows].numpy())


def test_a_character_is_drawn_anew_each_time_and_still_recognised(folder: Path, base: Glyphs) -> None:
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
    folder: Path, base: Glyphs
) -> None:
    features = FeatureFolder(folder)
    rows = base.rows(held_out=True, face="regular").tolist()
    assert features.column("text", "held_out") == [base.names[n] for n in rows]
    assert len(set(features.column("id"))) == ROWS + len(rows)
    with data.open(folder, split="held_out") as files, data.open(folder, split="train") as trained:
        x = torch.cat([base.inputs[stream][rows] for stream in base.inputs], dim=1)
        torch.testing.assert_close(files.rows(0, len(rows)), x, rtol=0, atol=3e-3)
        assert len(trained) == ROWS
    found = Image.open(io.BytesIO(features.column("serif", "held_out")[5]))
    assert np.array_equal(255 - np.asarray(found), base.images["serif"][rows[5]].numpy())
    truth, names = features.labels("held_out")
    assert [base.concepts.index(name) for name in names] == sorted(base.concepts.index(name) for name in names)
    assert torch.equal(torch.from_numpy(truth), base.labels[rows][:, [base.concepts.index(name) for name in names]])
    groups = dict(zip(features.column("group"), features.column("split"), strict=True))
    assert all(groups[g] == s for g, s in zip(features.column("group"), features.column("split"), strict=True))


def test_the_files_open_and_the_settings_train(folder: Path, tmp_path: Path) -> None:
    config = read_config(folder / "train.toml")
    with data.open(config.data, scan=True) as files:
        assert (files.n_rows, files.d_streams) == (ROWS, {"sans": 256, "serif": 256, "name": 256})
    assert config.n_latents == 32768
    assert read_config(folder / "independent.toml").differences(config) == [
        "selection",
        "cross_loss_coef",
        "support_dropout",
    ]
    arguments = ["--n-latents", "64", "--k", "4", "--steps", "2", "--batch-size", "32", "--progress", "none"]
    for name in ("train", "independent"):
        assert cli.main(["train", str(folder / f"{name}.toml"), "--out", str(tmp_path / name), *arguments]) == 0
        assert sf.SPARC.load(tmp_path / name / "model.safetensors").n_latents == 64


def test_killed_writing_leaves_no_settings_to_train_on_half_a_file(tmp_path: Path) -> None:
    def stop(done: int, rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_glyphs(tmp_path, 1200, faces=FACES, progress=stop)
    assert not (tmp_path / "train.toml").exists()
    assert list((tmp_path / "train").iterdir()) == []


def test_no_change_is_none_and_a_picture_depends_on_its_own_row() -> None:
    pictures = torch.from_numpy(draw(list("aÅЖ√"), "regular")[:, 0])
    still = torch.zeros(4, CHANGES)
    still[:, -1] = -1  # sharp
    assert torch.equal(jitter(pictures, still), pictures)
    changes = torch.rand(4, CHANGES, generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
    whole = jitter(pictures, changes)
    assert all(torch.equal(jitter(pictures[n : n + 1], changes[n : n + 1])[0], whole[n]) for n in range(4))
    assert not (whole == pictures).flatten(1).all(1).any()


@pytest.mark.parametrize(("change", "direction"), [(3, (0, 1)), (4, (1, 0))], ids=["right", "down"])
def test_a_shift_moves_the_ink(change: int, direction: tuple[int, int]) -> None:
    picture = torch.from_numpy(draw(["x"], "regular")[:, 0])
    changes = torch.zeros(1, CHANGES)
    changes[0, -1] = -1
    before = _middle(jitter(picture, changes)[0])
    changes[0, change] = 1
    after = _middle(jitter(picture, changes)[0])
    torch.testing.assert_close(after - before, torch.tensor(direction, dtype=torch.float), rtol=0, atol=0.1)


def test_weight_adds_and_takes_ink_and_blur_keeps_it() -> None:
    picture = torch.from_numpy(draw(["x"], "regular")[:, 0])
    ink = {}
    for name, change, amount in (("still", 0, 0), ("heavier", 5, 1), ("thinner", 5, -1), ("blurred", 6, 1)):
        changes = torch.zeros(1, CHANGES)
        changes[0, -1] = -1
        changes[0, change] = amount
        ink[name] = float(jitter(picture, changes).float().sum())
    assert ink["thinner"] < 0.9 * ink["still"] < 1.1 * ink["still"] < ink["heavier"]
    assert ink["blurred"] == pytest.approx(ink["still"], rel=0.01)


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


def test_the_command_writes_all_faces_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["glyphs", "--out", str(tmp_path / "glyphs"), "--rows", "300"]) == 0
    assert re.search(r"300 rows; now: sparc-fast train .*train\.toml --out", capsys.readouterr().out)
    folders = sorted(path.name for path in (tmp_path / "glyphs" / "held_out").iterdir())
    assert folders == ["bold", "bold_oblique", "jittered", "mono", "oblique", "regular"]
    assert len(np.load(tmp_path / "glyphs" / "train" / "name.npy")) == 300


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
