"""A stream in several files reads as if it were in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from test_data_files import WRITERS, sample, write_hdf5, write_npy

from sparc_fast import data
from sparc_fast.data.shards import in_natural_order

SIZES = (17, 1, 0, 40, 23, 5, 30, 2, 8, 9, 16, 12)  # twelve, so that 2 comes before 10


def write_shards(folder: Path, kind: str, width: int = 7, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    folder.mkdir()
    rows = sample(sum(SIZES), width, dtype)
    for i, part in enumerate(rows.split(list(SIZES))):
        WRITERS[kind](folder / f"part_{i}", part.clone())
    return rows


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if "," not in kind or "lists" in kind])
def test_a_folder_a_pattern_and_a_list_are_read_as_one_file_in_natural_order(tmp_path: Path, kind: str) -> None:
    rows = write_shards(tmp_path / "shards", kind)
    (tmp_path / "shards" / "notes.txt").touch()
    (tmp_path / "shards" / ".hidden.npy").touch()
    (suffix,) = {path.suffix for path in (tmp_path / "shards").glob("part*")}
    paths = in_natural_order((tmp_path / "shards").glob("part*"))
    assert [path.stem for path in paths] == [f"part_{i}" for i in range(12)]
    for source in (tmp_path / "shards", str(tmp_path / "shards" / f"part_*{suffix}"), paths, tuple(map(str, paths))):
        with data.open({"a": source}) as files:
            assert (files.n_rows, files.d_streams) == (len(rows), {"a": 7})
            for start, stop in ((0, len(rows)), (16, 19), (18, 18), (50, 100), (160, 163)):
                assert torch.equal(files.rows(start, stop), rows[start:stop])
    with data.open({"a": paths, "b": rows}) as files, data.Loader(files, 10, n_threads=2) as loader:
        for batch in loader:
            assert torch.equal(batch[:, :7], batch[:, 7:])


def test_the_data_set_in_each_file_may_be_named(tmp_path: Path) -> None:
    rows = sample(20)
    for i, part in enumerate(rows.split(10)):
        with h5py.File(tmp_path / f"{i}.h5", "w") as file:
            file["image"], file["text"] = part.numpy(), part.numpy() + 1
    for where in (tmp_path, str(tmp_path / "*.h5"), [tmp_path / "0.h5", tmp_path / "1.h5"]):
        with data.open({"a": (where, "text"), "b": (where, "image")}) as files:
            assert torch.equal(files.rows(0, 20), torch.cat([rows + 1, rows], 1))


def test_a_data_set_that_datasets_saved_is_its_shards_and_not_its_caches(tmp_path: Path) -> None:
    rows = write_shards(tmp_path / "saved", "arrow stream")
    paths = in_natural_order((tmp_path / "saved").iterdir())
    for i, path in enumerate(paths):
        path.rename(path.with_name(f"data-{i:05d}-of-{len(paths):05d}.arrow"))
    write_shards(tmp_path / "other", "arrow stream")
    (tmp_path / "other" / "part_3.arrow").rename(tmp_path / "saved" / "cache-1234.arrow")
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "saved" / name).write_text("{}")
    with data.open({"a": tmp_path / "saved"}) as files:
        assert torch.equal(files.rows(0, files.n_rows), rows)
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.raises(ValueError, match=r"source of 'a' must be one split of the data set .*: other, saved, train"):
        data.open({"a": tmp_path})


def test_a_file_that_differs_from_the_others_is_named(tmp_path: Path) -> None:
    for i, (width, dtype) in enumerate([(7, torch.float32), (7, torch.float32), (6, torch.float32)]):
        write_npy(tmp_path / f"w_{i}", sample(5, width, dtype))
    with pytest.raises(ValueError, match=r"equal widths and dtypes, got width 6 in .*w_2\.npy and 7 in .*w_0\.npy"):
        data.open({"a": str(tmp_path / "w_*.npy")})
    write_npy(tmp_path / "w_2", sample(5, 7, torch.float16))
    with pytest.raises(ValueError, match=r"got dtype torch\.float16 in .*w_2\.npy and torch\.float32 in .*w_0\.npy"):
        data.open({"a": str(tmp_path / "w_*.npy")})


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("empty", FileNotFoundError, r"source of 'a' must be a folder of files, but none in .*empty ends in"),
        ("none_*.npy", FileNotFoundError, r"source of 'a' must be a pattern of files, but none are like .*none_\*"),
        ("mixed", ValueError, r"must be a folder of files of one kind, got a\.npy and b\.h5 in .*mixed"),
    ],
)
def test_a_place_without_files_is_one_clear_error(tmp_path: Path, source: str, error: Any, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    write_npy(tmp_path / "mixed" / "a", sample(5))
    write_hdf5(tmp_path / "mixed" / "b", sample(5))
    with pytest.raises(error, match=message):
        data.open({"a": tmp_path / source})
    with pytest.raises(ValueError, match=r"got the address https://x\.org/a\.npy: download it first"):
        data.open({"a": "https://x.org/a.npy"})


def test_ids_lie_in_shards_as_rows_do(tmp_path: Path) -> None:
    rows = write_shards(tmp_path / "shards", "arrow file")
    with pytest.raises(ValueError, match="ids of 'a' must be unique"):
        data.open({"a": tmp_path / "shards", "b": tmp_path / "shards"}, ids="id", join="inner")
    data.open({"a": tmp_path / "shards", "b": tmp_path / "shards"}, ids="id").close()
    (tmp_path / "ids").mkdir()
    numbers = np.arange(len(rows))
    for i, part in enumerate(np.split(numbers, np.cumsum(SIZES)[:-1])):
        (tmp_path / "ids" / f"ids_{i}.txt").write_text("".join(f"{n}\n" for n in part))
        np.save(tmp_path / f"ids_{i}.npy", part)
    arrays = in_natural_order(tmp_path.glob("*.npy"))
    for source in (tmp_path / "ids", str(tmp_path / "ids" / "*.txt"), arrays, str(tmp_path / "ids_*.npy")):
        ids = {"a": source, "b": numbers[::-1]}
        with data.open({"a": tmp_path / "shards", "b": rows}, ids=ids, join="inner") as files:
            assert torch.equal(files.rows(0, len(rows)), torch.cat([rows, rows.flip(0)], 1))


def test_a_row_that_is_not_finite_is_named_in_its_shard(tmp_path: Path) -> None:
    rows = sample(100)
    rows[57, 2] = torch.inf
    for i, part in enumerate(rows.split(40)):
        write_npy(tmp_path / f"{i}", part)
    files = data.open({"a": tmp_path})
    with pytest.raises(ValueError, match=r"1\.npy must be finite, but row 17 is not"):
        list(data.Loader(files, 10))
    with pytest.raises(ValueError, match=r"1\.npy must be finite, but 1 of 100 rows are not; the first is row 17"):
        data.open({"a": tmp_path}, scan=True)


def test_more_shards_than_files_may_usually_be_open_are_read(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    rows = sample(400, 3)
    for i, part in enumerate(rows.split(1)):
        np.save(tmp_path / f"{i}.npy", part.numpy())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with data.open({"a": tmp_path}) as files:
            assert torch.equal(files.rows(0, 400), rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
