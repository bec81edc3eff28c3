"""Folders of features as data: splits, tokens, joins, labels, and manifests that mean no good."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extraction import write_features
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_fast import data
from sparc_fast.cli import main
from sparc_fast.data import FeatureFolder
from sparc_fast.data.feature_folder import below

pytest.importorskip("pyarrow", reason="items are Parquet")

N = 12


def write_folder(path: Path, streams: dict[str, np.ndarray], splits: list[str] | None = None, **item: Any) -> Path:
    """A folder of features; streams [N, D] or [N, T, D] in two files each."""
    n = len(next(iter(streams.values())))
    splits = splits or ["train", "train", "held_out"] * n
    rows_of_items = [
        {"id": f"i{i}", "picture": f"{i}.png", "thumbnail": None, "text": f"t{i}", "label": ["odd"] * (i % 2) + ["all"],
         "group": f"g{i // 2}", "split": splits[i], **{k: v[i] for k, v in item.items()}} for i in range(n)
    ]  # fmt: skip
    seen = {name: ("picture", rows) for name, rows in streams.items()}
    return write_features(path, seen, rows_of_items, ["text"], parts=2, pictures="pictures")


def numbered(*shape: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("split", ["train", "held_out", "all"])
def test_each_split_is_its_samples_in_order(split: Any, tmp_path: Path) -> None:
    a, b = numbered(N, 3), numbered(N, 2, start=1000)
    folder = write_folder(tmp_path / "f", {"a": a, "b": b})
    kept = [n for n in range(N) if split == "all" or (n % 3 == 2) == (split == "held_out")]
    with data.open(folder, split=split) as files:
        assert torch.equal(files.rows(0, len(kept)), torch.from_numpy(np.concatenate([a, b], 1)[kept]))
        found = torch.cat(list(data.Loader(files, 3, shuffle=False)))
        assert torch.equal(found, files.rows(0, len(kept)))
    with data.open({"b": folder}, split=split) as files:
        assert torch.equal(files.rows(0, len(kept)), torch.from_numpy(b[kept]))
    assert FeatureFolder(folder).column("id", split) == [f"i{n}" for n in kept]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.lists(st.sampled_from(["train", "held_out"]), min_size=9, max_size=9))
def test_a_stream_without_tokens_repeats_its_row_for_every_token_of_another(
    tmp_path_factory: pytest.TempPathFactory, n: int, T: int, splits: list[str]
) -> None:
    splits[0] = "train"
    tokens, whole = numbered(n, T, 2), numbered(n, 3, start=500)
    folder = write_folder(tmp_path_factory.mktemp("t") / "f", {"tokens": tokens, "whole": whole}, splits)
    kept = [i for i in range(n) if splits[i] == "train"]
    with data.open(folder, split="train") as files:
        assert len(files) == len(kept) * T
        expected = np.concatenate([tokens[kept].reshape(-1, 2), np.repeat(whole[kept], T, 0)], 1)
        assert torch.equal(files.rows(0, len(files)), torch.from_numpy(expected))
        assert T == 1 or files.groups.tolist() == list(range(0, len(kept) * T + 1, T))


def test_streams_of_different_numbers_of_tokens_are_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", {"a": numbered(N, 4, 2), "b": numbered(N, 3, 2)})
    with pytest.raises(
        ValueError, match="must have one row of a sample, or equally many tokens, got 4 and 3: 4 in 'a', 3 in 'b'"
    ):
        data.open(folder)


def test_streams_extracted_at_different_times_are_joined_by_the_items_identifiers(tmp_path: Path) -> None:
    a, b = numbered(N, 3), numbered(N, 2, start=1000)
    one = write_folder(tmp_path / "one", {"a": a})
    order = list(reversed(range(1, N)))
    splits = [["train", "train", "held_out"][n % 3] for n in order]
    other = write_folder(tmp_path / "other", {"b": b[order]}, splits, id=[f"i{n}" for n in order])
    with data.open({"a": one, "b": other}, split="train", ids="id", join="inner") as files:
        kept = [n for n in range(1, N) if n % 3 != 2]
        assert torch.equal(files.rows(0, len(kept)), torch.from_numpy(np.concatenate([a, b], 1)[kept]))
    with pytest.raises(ValueError, match=r"sources must have equally many rows"):
        data.open({"a": one, "b": other})


def test_labels_are_truth_values_of_those_that_enough_samples_carry(tmp_path: Path) -> None:
    folder = FeatureFolder(write_folder(tmp_path / "f", {"a": numbered(N, 3)}))
    truth, names = folder.labels()
    assert names == ["all", "odd"]
    assert truth.tolist() == [[True, bool(n % 2)] for n in range(N)]
    truth, names = folder.labels("train", at_least=N // 2)
    assert (names, truth.shape) == (["all"], (8, 1))
    assert folder.labels(at_least=N + 1) is None
    pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")
    items = pq.read_table(folder.path / "items.parquet")
    texts = pa.array([f"class {n % 2}" for n in range(N)])
    pq.write_table(
        items.set_column(items.schema.get_field_index("label"), "label", texts), folder.path / "items.parquet"
    )
    truth, names = folder.labels()
    assert (names, truth.sum()) == (["class 0", "class 1"], N), "a text is one label"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other/1"}, r"must be a manifest of features, but its format is 'other/1'"),
        ({"streams": None}, r"must be a manifest of features, but "),
        ({"items": "many"}, r"must be a manifest of features, but "),
        ({"items": 11}, r"stream 'a' must hold 11 rows, got 12"),
        ({"files": ["../a.npy"]}, r"files of stream 'a' must stay below .*, got '../a.npy'"),
        ({"files": ["/etc/passwd"]}, r"files of stream 'a' must stay below .*, got '/etc/passwd'"),
        ({"files": ["a/00000.npy"]}, r"stream 'a' must hold 12 rows, got 6"),
    ],
)
def test_a_manifest_that_is_none_or_names_other_files_is_an_error(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "f", {"a": numbered(N, 3)})
    manifest = json.loads((folder / "manifest.json").read_text())
    if "files" in change:
        manifest["streams"]["a"] |= change
    else:
        manifest |= change
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        data.open(folder)


@pytest.mark.parametrize("path", ["../x.png", "/etc/passwd", "a/../../x.png", "link/x.png", "a\0b"])
def test_a_path_out_of_the_folder_is_refused_by_name(path: str, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"picture must stay below .*, got "):
        below(tmp_path / "f", path, "picture")
    assert below(tmp_path / "f", "a/../b.png", "picture") == (tmp_path / "f" / "b.png").resolve()


def test_a_split_or_a_stream_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "f", {"a": numbered(N, 3)}, ["train"] * N)
    with pytest.raises(ValueError, match="must hold held-out samples, got none of 12: split all"):
        data.open(folder, split="held_out")
    with pytest.raises(ValueError, match="split must be one of train, held_out, all, got 'test'"):
        data.open(folder, split="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stream must be one of a of .*, got 'c'"):
        data.open({"c": folder})
    with pytest.raises(FileNotFoundError, match=r"must hold a manifest.json, but there is none in"):
        data.open(tmp_path)
    command = f"train --data {tmp_path} --out {tmp_path / 'run'} --n-latents 4 --k 2 --steps 1"
    assert main(command.split()) == 1
    assert "must hold a manifest.json" in capsys.readouterr().err
