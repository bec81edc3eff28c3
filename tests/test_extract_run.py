"""Extraction: from pictures and texts to a folder, through kills, bad items and hostile paths."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import extraction
import numpy as np
import pytest
import ranks
import torch
from extraction import SETTINGS, contents, write_csv, write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_fast import data
from sparc_fast.cli import main
from sparc_fast.data import FeatureFolder
from sparc_fast.extract import Item, extract, read_extraction, run
from sparc_fast.extract.items import split_of
from sparc_fast.extract.journal import Journal

pytest.importorskip("pyarrow", reason="extraction writes Parquet")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def begin(folder: Path, n: int = 37, **texts: str) -> Path:
    """Pictures, their table and settings; the path of the settings."""
    write_csv(folder / "pictures.csv", write_pictures(folder, n))
    content = SETTINGS
    for old, new in texts.items():
        content = content.replace(old, new)
    (folder / "extract.toml").write_text(content, encoding="utf-8")
    return folder / "extract.toml"


def test_a_table_of_pictures_and_texts_becomes_a_folder_that_is_opened_like_files(tmp_path: Path) -> None:
    done = extract(read_extraction(begin(tmp_path)), tmp_path / "features")
    assert (done.items, done.failed) == (37, 0)
    folder = FeatureFolder(tmp_path / "features")
    assert (tmp_path / "features" / "ids.txt").read_text().splitlines() == [f"p{n}" for n in range(37)]
    assert sorted(p.name for p in (tmp_path / "features" / "colours").iterdir()) == [f"{n:05}.npy" for n in range(4)]
    assert folder.column("text")[1] == "picture b of kitten"
    assert folder.picture(folder.column("picture")[3]) == (tmp_path / "pictures" / "003.png").resolve()
    assert not (tmp_path / "features" / ".partial").exists()
    with data.open(tmp_path / "features") as files:
        assert files.d_streams == {"colours": 6, "letters": 26}
        rows = files.rows(0, 37)
    expected = extraction.colours([extraction.picture(n) for n in range(37)])
    torch.testing.assert_close(rows[:, :6], expected)
    assert torch.equal(rows[:, 6:], extraction.letters(folder.column("text")))


def test_training_takes_the_training_split_and_evaluation_the_one_held_out(tmp_path: Path, capsys) -> None:
    extract(read_extraction(begin(tmp_path)), tmp_path / "features")
    folder, out = FeatureFolder(tmp_path / "features"), str(tmp_path / "run")
    n_train, n_held_out = len(folder.rows("train")), len(folder.rows("held_out"))
    assert n_train + n_held_out == 37
    assert min(n_train, n_held_out) > 3
    small = ["--n-latents", "16", "--k", "4", "--batch-size", "5", "--epochs", "1", "--progress", "none"]
    features = str(tmp_path / "features")
    with pytest.warns(UserWarning, match="a run of [0-9]+ steps? is short"):
        assert main(["train", "--data", features, "--validation-data", features, "--out", out, *small]) == 0
    assert f"{n_train // 5} steps done" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["validation"]["rows"] == n_held_out
    assert main(["eval", out, "--data", features, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"]["n_samples"] == n_held_out
    assert main(["encode", out, "--data", features, "--out", str(tmp_path / "codes.safetensors")]) == 0
    assert "37 samples of colours, letters" in capsys.readouterr().out


def test_a_run_that_goes_on_finds_its_folder_of_features_from_anywhere(tmp_path: Path, monkeypatch, capsys) -> None:
    extract(read_extraction(begin(tmp_path)), tmp_path / "features")
    (tmp_path / "train.toml").write_text('data = "features"\nn_latents = 16\nk = 4\nbatch_size = 5\nsteps = 2\n')
    monkeypatch.chdir(tmp_path.parent)
    for steps in ("2", "2"):
        arguments = ["train", str(tmp_path / "train.toml"), "--out", str(tmp_path / "run"), "--steps", steps]
        assert main([*arguments, "--progress", "none"]) == 0
    assert "2 steps done" in capsys.readouterr().out


def test_items_that_fail_are_listed_and_left_out_of_every_stream(tmp_path: Path) -> None:
    settings_file = begin(tmp_path)
    (tmp_path / "pictures" / "005.png").write_bytes(b"no picture")
    (tmp_path / "pictures" / "006.png").unlink()
    rows = (tmp_path / "pictures.csv").read_text().splitlines()
    rows[8] = rows[8].replace("pictures/007.png", "../secret.png")
    rows[9] = rows[9].replace("picture i of kitten", "123")  # no letters: a row of zeros
    rows[10] = rows[10].replace("picture j of rocket", " ")
    rows[11] = rows[11].replace("p10,", "p9,").replace("p9,", "p0,")
    (tmp_path / "pictures.csv").write_text("\n".join(rows))
    extraction.picture(99).save(tmp_path.parent / "secret.png")
    done = extract(read_extraction(settings_file), tmp_path / "features")
    assert (done.items, done.failed) == (31, 6)
    lines = map(json.loads, (tmp_path / "features" / "failed.jsonl").read_text().splitlines())
    failed = {line["id"]: line["reason"] for line in lines}
    assert sorted(failed) == ["p0", "p5", "p6", "p7", "p8", "p9"]
    assert "must stay below" in failed["p7"]
    assert failed["p8"] == "its row of stream 'letters' is 0 throughout"
    assert failed["p9"] == "it has no text in 'text' for stream 'letters'"
    assert failed["p0"] == "its id is that of an item before it"
    kept = [n for n in range(37) if n not in (5, 6, 7, 8, 9, 10)]
    with data.open(tmp_path / "features") as files:
        assert torch.equal(files.rows(0, 31)[:, :6], extraction.colours([extraction.picture(n) for n in kept]))
        assert not (files.rows(0, 31) == 0).all(1).any()


def test_a_link_out_of_the_pictures_folder_is_refused_by_name(tmp_path: Path) -> None:
    settings_file = begin(tmp_path / "here", 4)
    extraction.picture(99).save(tmp_path / "secret.png")
    (tmp_path / "here" / "pictures" / "002.png").unlink()
    (tmp_path / "here" / "pictures" / "002.png").symlink_to(tmp_path / "secret.png")
    extract(read_extraction(settings_file), tmp_path / "features")
    (line,) = (tmp_path / "features" / "failed.jsonl").read_text().splitlines()
    assert "must stay below" in line
    assert "pictures/002.png" in line


def extract_or_die(*arguments: str) -> None:
    """The command, in a process that kills itself after five batches."""
    extraction.batches_left = 5
    raise SystemExit(main(["extract", *arguments, "--progress", "none"]))


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_an_extraction_killed_again_and_again_ends_in_the_same_bytes_as_one_that_was_not(tmp_path: Path) -> None:
    settings_file = begin(tmp_path, 61, **{"extraction:letters": "extraction:mortal"})
    (tmp_path / "pictures" / "030.png").write_bytes(b"no picture")
    extract(read_extraction(settings_file), tmp_path / "whole")
    ended: list[int | None] = []
    while not (tmp_path / "killed" / "manifest.json").exists():
        arguments = str(settings_file), "--out", str(tmp_path / "killed")
        process = ranks.context().Process(target=extract_or_die, args=arguments)
        process.start()
        process.join()
        ended.append(process.exitcode)
        assert process.exitcode == 0 or len(ended) < 16
    assert ended == [-signal.SIGKILL] * (len(ended) - 1) + [0]
    assert len(ended) > 3
    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert list(whole) == list(killed)
    assert [name for name in whole if whole[name] != killed[name]] == []


@pytest.mark.parametrize("where", ["write_items", "atomic_path", "write_manifest", "shutil.rmtree"])
def test_one_that_is_stopped_while_it_finishes_ends_in_the_same_bytes(where: str, tmp_path: Path, monkeypatch) -> None:
    described = read_extraction(begin(tmp_path, 13))
    extract(described, tmp_path / "whole")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "stopped" / ".partial").mkdir(parents=True)
    run._keep(tmp_path / "stopped" / ".partial", run._settings(described), tmp_path / "stopped")
    with monkeypatch.context() as patched:
        patched.setattr(f"sparc_fast.extract.run.{where}", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(described, tmp_path / "stopped")
    (tmp_path / "stopped" / ".items.parquet.123-abc").write_bytes(b"half a table")
    extract(described, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


SHARD, WIDTHS = 5, {"a": (1, 3), "b": (4, 2)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 5), st.integers(0, 2**31), st.data())
def test_what_was_written_behind_the_last_whole_batch_is_cut_off(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], batch: int, seed: int, data_: st.DataObject
) -> None:
    """A batch is torn at any place: some of its files written, one of them in part, its line in the journal not."""
    folder = tmp_path_factory.mktemp("torn")
    (folder / "p").mkdir()
    streams = {name: folder / name for name in WIDTHS}
    dtypes = {"a": torch.float32, "b": torch.bfloat16}
    generator = torch.Generator().manual_seed(seed)
    rows = [{s: torch.randn(n, T, D, generator=generator) for s, (T, D) in WIDTHS.items()} for n in sizes]

    def add(journal: Journal, b: int) -> None:
        lines = [json.dumps({"id": f"{b}-{n}"}) for n in range(sizes[b])]
        failed = [json.dumps({"failed": b})] * (b % 2)
        tokens = {s: x if WIDTHS[s][0] > 1 else x[:, 0] for s, x in rows[b].items()}
        journal.add(sizes[b] + b % 2, f"last {b}", tokens, lines, failed)

    torn = Journal(folder / "p", streams, dtypes, SHARD)
    before = contents(folder)
    for b in range(min(batch, len(sizes))):
        before = contents(folder)
        add(torn, b)
    journal = folder / "p" / "journal.jsonl"
    whole = journal.read_bytes()
    if batch and whole:
        cut = data_.draw(st.integers(1, len(whole.splitlines(keepends=True)[-1])))
        journal.write_bytes(whole[:-cut])  # the line of the last batch is torn
        grown = [name for name, content in contents(folder).items() if len(content) > len(before.get(name, b""))]
        if data_.draw(st.booleans()) and (names := [name for name in grown if name.startswith(("b/.", "p/items"))]):
            name = data_.draw(st.sampled_from(names))
            least = len(before.get(name, b""))
            os.truncate(folder / name, data_.draw(st.integers(least, (folder / name).stat().st_size)))
    again = Journal(folder / "p", streams, dtypes, SHARD)
    for b in range(len(journal.read_bytes().splitlines()), len(sizes)):
        add(again, b)
    files = again.close()
    for stream, (T, D) in WIDTHS.items():
        expected = torch.cat([x[stream] for x in rows]).reshape(-1, D).to(dtypes[stream])
        if not len(expected):
            assert files[stream] == []
            continue
        stored = np.concatenate([np.load(folder / name) for name in files[stream]])
        kind = torch.bfloat16 if stream == "b" else torch.float32
        found = torch.from_numpy(stored.view(np.uint8).copy()).view(kind).reshape(-1, D)
        assert torch.equal(found, expected)
        assert {len(np.load(folder / name)) for name in files[stream][:-1]} <= {SHARD * T}
    assert [item["id"] for item in again.items()] == [f"{b}-{n}" for b, size in enumerate(sizes) for n in range(size)]
    assert again.state.consumed == sum(sizes) + sum(b % 2 for b in range(len(sizes)))


def test_a_folder_goes_on_only_with_the_settings_it_was_begun_with(tmp_path: Path) -> None:
    settings_file = begin(tmp_path, 9)
    extract(read_extraction(settings_file), tmp_path / "features")
    again = extract(read_extraction(settings_file), tmp_path / "features")
    assert (again.items, again.before) == (9, 9)
    message = r"out must be a new folder, or go on as it was begun; .* has other batch_size"
    with pytest.raises(ValueError, match=message):
        extract(read_extraction(settings_file, batch_size=3), tmp_path / "features")


def test_settings_that_failed_before_a_batch_was_written_may_be_put_right(tmp_path: Path) -> None:
    settings_file = begin(tmp_path, 9)
    described = read_extraction(settings_file)
    wrong = {name: replace(stream, model="extraction:nothing") for name, stream in described.streams.items()}
    with pytest.raises(ValueError, match="model must name a function of its module"):
        extract(replace(described, streams=wrong), tmp_path / "features")
    assert extract(described, tmp_path / "features").items == 9


def test_a_source_that_changed_under_a_killed_extraction_is_an_error(tmp_path: Path) -> None:
    settings_file = begin(tmp_path, 9)
    described = read_extraction(settings_file)
    begun: list[int] = []

    def stop(done: int, _: int | None) -> None:
        begun.append(done)
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(described, tmp_path / "features", progress=stop)
    assert begun == [0, 4]
    lines = (tmp_path / "pictures.csv").read_text().splitlines()
    (tmp_path / "pictures.csv").write_text("\n".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match=r"source must be as it was when .* was begun, but item 4 is not 'p3'"):
        extract(described, tmp_path / "features")


def test_every_text_of_a_picture_is_a_sample_of_the_pictures_group(tmp_path: Path) -> None:
    rows = write_pictures(tmp_path, 6)
    with (tmp_path / "pictures.jsonl").open("w") as file:
        file.writelines(json.dumps({**row, "text": [row["text"], f"again {row['text']}"]}) + "\n" for row in rows)
    content = SETTINGS.replace('csv = "pictures.csv"', 'jsonl = "pictures.jsonl"\nevery_text = true')
    (tmp_path / "extract.toml").write_text(content)
    extract(read_extraction(tmp_path / "extract.toml"), tmp_path / "features")
    folder = FeatureFolder(tmp_path / "features")
    assert folder.column("id")[:3] == ["p0#0", "p0#1", "p1#0"]
    assert folder.column("group")[:3] == ["p0", "p0", "p1"]
    of_group = {}
    for group, split in zip(folder.column("group"), folder.column("split"), strict=True):
        assert of_group.setdefault(group, split) == split
    with data.open(tmp_path / "features") as files:
        assert torch.equal(files.rows(0, 12)[::2, :6], files.rows(0, 12)[1::2, :6])


@given(st.text(min_size=1), st.floats(0, 1, exclude_max=True), st.integers(0, 5))
def test_the_split_depends_on_the_group_and_the_seed_alone(group: str, held_out: float, seed: int) -> None:
    one, other = (Item(name, group=group, texts={"text": name}) for name in ("one", "other"))
    assert split_of(one, held_out, seed) == split_of(other, held_out, seed)
    assert split_of(one, 0.0, seed) == "train"


def test_about_the_part_asked_for_is_held_out() -> None:
    splits = [split_of(Item(f"item {n}"), 0.2, 0) for n in range(5000)]
    assert abs(splits.count("held_out") / 5000 - 0.2) < 0.02


def test_a_split_of_the_source_is_kept() -> None:
    assert [split_of(Item("x", split=s), 0.5, 0) for s in ("train", "Training", "val", "test", "held_out")] == [
        "train", "train", "held_out", "held_out", "held_out"]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size = 4", "batch_size = 0", "batch_size must be an integer >= 1, got 0"),
        ("batch_size = 4", "batchsize = 4", "batchsize is not a setting; did you mean batch_size?"),
        ('csv = "pictures.csv"', "", "source must give one of images, csv, .*, got none"),
        ('csv = "pictures.csv"', 'csv = "none.csv"', "source.csv must be a file, but there is none at"),
        ('csv = "pictures.csv"', 'csv = "pictures.csv"\nlabel = "kind"', "source.csv must have a column 'kind'"),
        ('modality = "text"', 'modality = "sound"', "streams.letters.modality must be one of image, text, got 'sound'"),
        ("[streams.letters]", '[streams."../x"]', r"streams must have names of letters, .*, got '\.\./x'"),
        ('"extraction:letters"', '"extraction"', "streams.letters.model must be FAMILY:NAME, got 'extraction'"),
        ('"extraction:letters"', '"no_such_module:f"', "model must begin with timm:, .* got 'no_such_module:f'"),
        ('"extraction:letters"', '"extraction:SETTINGS"', "model must name a function, got 'extraction:SETTINGS', a str"),
        ('"extraction:letters"', '"extraction:len"', "model must name a function of its module"),
        ('dtype = "float16"', 'pooling = "tokens"', "pooling must be another than tokens for texts"),
        ('dtype = "float16"', "layer = 2", "layer, pooling, revision and weights must be left to the function"),
        ('dtype = "float16"', 'text = "label"', "text must be another column than id, picture, .*, got 'label'"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    settings_file = begin(tmp_path, 3, **{old: new})
    with pytest.raises((ValueError, OSError), match=message):
        extract(read_extraction(settings_file), tmp_path / "features")


def test_a_function_that_gives_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def f(texts):\n    return [[1, 2]]\n")
    settings_file = begin(tmp_path, 5, **{"extraction:letters": "own:f"})
    with pytest.raises(ValueError, match=r"own:f must give floats \[4, D\] or \[4, T, D\], got int64 \[1, 2\]"):
        extract(read_extraction(settings_file), tmp_path / "features")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "gives_none.py").write_text("def f(texts):\n    return None\n")
    settings_file = begin(tmp_path / "other", 5, **{"extraction:letters": "gives_none:f"})
    with pytest.raises(ValueError, match="gives_none:f must give a tensor or an array, got NoneType"):
        extract(read_extraction(settings_file), tmp_path / "others")


def test_rows_that_are_too_large_for_their_dtype_are_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text(
        "import torch\n\ndef f(texts):\n    return torch.tensor([[7e4 if 'kitten' in text else 1, 1] for text in texts])\n"
    )
    settings_file = begin(tmp_path, 5, **{"extraction:letters": "large:f"})
    done = extract(read_extraction(settings_file), tmp_path / "features")
    lines = (tmp_path / "features" / "failed.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in lines} == {"its row of stream 'letters' is not finite in float16"}
    assert 0 < len(lines) == done.failed
    with data.open(tmp_path / "features") as files:
        assert files.scan()["letters"].not_finite == 0


def runs_when_opened(folder: Path) -> bool:
    sys.path.insert(0, str(folder))
    with data.open(folder / "features", split="train") as files:
        files.rows(0, 1)
    return "bomb" in sys.modules


def test_reading_a_folder_of_features_runs_no_module_that_its_manifest_names(tmp_path: Path) -> None:
    (tmp_path / "bomb.py").write_text("import extraction\nletters = extraction.letters\n")
    settings_file = begin(tmp_path, 9, **{"extraction:letters": "bomb:letters"})
    extract(read_extraction(settings_file), tmp_path / "features")
    assert not ranks.in_fork(runs_when_opened, tmp_path)


def test_the_command_says_what_it_did(tmp_path: Path, capsys) -> None:
    settings_file = begin(tmp_path, 7)
    (tmp_path / "pictures" / "005.png").write_bytes(b"no picture")
    assert main(["extract", str(settings_file), "--out", str(tmp_path / "features"), "--progress", "lines"]) == 0
    assert "6 items, 1 left out" in capsys.readouterr().out
    assert main(["extract", str(tmp_path / "none.toml"), "--out", str(tmp_path / "features")]) == 1
    assert "there is no file" in capsys.readouterr().err
