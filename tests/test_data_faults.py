"""What files people really have: right, or one clear error that says what to do."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_data_files import sample, write_hdf5, write_npy, write_parquet

from sparc_fast import data
from sparc_fast.data import budget, flat
from sparc_fast.data.parquet import ParquetReader
from sparc_fast.data.views import PickedReader


@pytest.mark.parametrize("separator", ["\u2028", "\x0c", "\x85", "\x1c", "\r", "\x0b"])
def test_ids_end_in_a_newline_and_in_nothing_else(tmp_path: Path, separator: str) -> None:
    ids = [f"a cat{separator}on a mat", "x", f"{separator}y", ""]
    rows = {"a": sample(4), "b": sample(4)}
    texts = {"plain": "\n".join(ids), "closed": "\n".join(ids) + "\n", "windows": "\r\n".join(ids) + "\r\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    (tmp_path / "other.ids").write_bytes(texts["closed"].encode())
    data.open(rows, ids={"a": ids, "b": tmp_path / "other.ids"}).close()
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + texts["closed"].encode())
    for name in ("closed", "windows", "marked"):
        if name != "windows" or separator != "\r":
            data.open(rows, ids={"a": ids, "b": tmp_path / f"{name}.txt"}).close()


def test_ids_that_are_no_ids_are_refused(tmp_path: Path) -> None:
    rows = {"a": sample(3), "b": sample(3)}
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\nx\ny\n")
    np.save(tmp_path / "objects.npy", np.array(["a", "b", "c"], object), allow_pickle=True)
    pq.write_table(pa.table({"id": [1, None, 3]}), tmp_path / "null.parquet")
    for source, message in (
        (tmp_path / "latin.txt", r"ids in .*latin\.txt must be text in UTF-8, got other bytes"),
        (tmp_path / "objects.npy", r"ids in .*objects\.npy must be integers or text, saved as array\.astype\(str\)"),
        ((tmp_path / "null.parquet", "id"), r"ids must be there for every row, got none in row 1 of .*null\.parquet"),
        (np.array([1.0, np.nan, 2.0]), "ids must be integers or text, got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            data.open(rows, ids={"a": [1, 2, 3], "b": source})


def test_links_of_hdf5_lead_where_they_say(tmp_path: Path) -> None:
    rows = sample()
    write_hdf5(tmp_path / "real", rows)
    with h5py.File(tmp_path / "links.h5", "w") as file:
        file["group/rows"] = rows.numpy() + 1
        file["soft"] = h5py.SoftLink("/group/rows")
        file["external"] = h5py.ExternalLink("real.h5", "/features")
        file["group/external"] = h5py.ExternalLink("real.h5", "/features")
        file["gone"], file["lost"] = h5py.SoftLink("/nowhere"), h5py.ExternalLink("gone.h5", "/features")
    for name, there in (("soft", rows + 1), ("external", rows), ("group/external", rows), ("/group/rows", rows + 1)):
        with data.open({"a": (tmp_path / "links.h5", name)}) as files:
            assert torch.equal(files.rows(0, len(rows)), there), name
    for name, where in (("gone", "none at /nowhere, its link's end"), ("lost", r"none at /features of gone\.h5")):
        with pytest.raises(ValueError, match=rf"links\.h5\[{name}\] must lead to a data set, but there is {where}"):
            data.open({"a": (tmp_path / "links.h5", name)})
    with pytest.raises(ValueError, match=r"name must be a data set of .*'external', 'group/external', 'group/rows'"):
        data.open({"a": (tmp_path / "links.h5", "other")})
    for link in (h5py.SoftLink("/g/rows"), h5py.ExternalLink("real.h5", "/features")):
        with h5py.File(tmp_path / "one.h5", "w") as file:
            file["g/rows"], file["features"] = rows.numpy(), link
        with data.open({"a": tmp_path / "one.h5"}) as files:
            assert torch.equal(files.rows(0, len(rows)), rows), "features is the default name"


def test_missing_parts_of_a_virtual_data_set_are_refused(tmp_path: Path) -> None:
    rows = sample(20)
    layout = h5py.VirtualLayout(shape=(20, 7), dtype="f4")
    for i in range(2):
        write_hdf5(tmp_path / f"part_{i}", rows[10 * i : 10 * i + 10])
        layout[10 * i : 10 * i + 10] = h5py.VirtualSource(f"part_{i}.h5", "features", shape=(10, 7))
    with h5py.File(tmp_path / "whole.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("features", layout)
    with data.open({"a": tmp_path / "whole.h5"}) as files:
        assert torch.equal(files.rows(0, 20), rows)
    with h5py.File(tmp_path / "part_1.h5", "w") as file:
        file["other"] = rows.numpy()
    message = r"whole\.h5\[features\] must have all its parts, but .*part_1\.h5 has no data set features"
    with pytest.raises(ValueError, match=message):
        data.open({"a": tmp_path / "whole.h5"})
    (tmp_path / "part_1.h5").unlink()
    with pytest.raises(ValueError, match=r"must have all its parts, but there is no file .*part_1\.h5"):
        data.open({"a": tmp_path / "whole.h5"})


def test_a_data_set_for_each_row_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for n in range(6):
            file[f"image_{n}"] = np.zeros(3, "f4")
    with pytest.raises(ValueError, match=r"a data set of rows, \[N, D_s\], got 'image_0' \[3\], .* and 2 more"):
        data.open({"a": tmp_path / "a.h5"})


@pytest.mark.parametrize(("reason", "readable"), [("Function not implemented", True), ("No locks available", True),
                                                  ("Resource temporarily unavailable", False)])  # fmt: skip
def test_hdf5_is_read_where_the_file_system_has_no_locks(
    tmp_path: Path, reason: str, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = write_hdf5(tmp_path / "a", sample()), h5py.File

    def opened(*arguments: Any, locking: bool | None = None, **options: Any) -> Any:
        if locking is not False:
            raise OSError(f"Unable to open file (unable to lock file, errno = 38, error message = '{reason}')")
        return file(*arguments, locking=locking, **options)

    monkeypatch.setattr(h5py, "File", opened)
    if readable:
        with data.open({"a": path}) as files:
            assert torch.equal(files.rows(0, files.n_rows), sample())
    else:
        with pytest.raises(ValueError, match=r"a\.h5 must be closed by who writes it to be read, but is locked"):
            data.open({"a": path})


def test_what_torch_save_cannot_give_safely_says_what_to_do(tmp_path: Path) -> None:
    rows = sample()
    contents: dict[str, tuple[Any, str]] = {
        "array": (rows.numpy(), r"holds NumPy arrays \(numpy.*\): save torch\.from_numpy\(array\)"),
        "arrays": ({"features": rows.numpy()}, "holds NumPy arrays"),
        "scalar": ({"features": rows, "mean": np.float64(1)}, "holds NumPy arrays"),
        "class": ({"features": rows, "code": argparse.Namespace}, "holds other objects"),
        "objects": ({"features": rows, "args": argparse.Namespace()}, r"holds other objects \(argparse\.Namespace\)"),
        "sparse": (rows.to_sparse(), r"must be dense, got torch\.sparse_coo: save tensor\.to_dense\(\)"),
        "bool": (rows > 0, r"must hold float16, bfloat16, float32 or float64, got torch\.bool"),
        "int8": (rows.to(torch.int8), r"got torch\.int8"),
        "float8": (rows.to(torch.float8_e4m3fn), r"got torch\.float8_e4m3fn"),
        "tokens": (rows[:100].reshape(10, 10, 7), r"got shape \[10, 10, 7\]: save the tokens of all samples as rows"),
    }
    for name, (content, message) in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=rf"{name}\.pt.*{message}") as error:
            data.open({"a": tmp_path / f"{name}.pt"})
        assert "weights_only" not in str(error.value), "no advice to unpickle"
        assert len(str(error.value)) < len(str(tmp_path)) + 300
    torch.save(rows, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"is in the format from before torch 1\.6: load it with torch\.load"):
        data.open({"a": tmp_path / "old.pt"})
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match=r"empty\.pt must hold tensors only, .* but it is truncated or foreign"):
        data.open({"a": tmp_path / "empty.pt"})
    for tensor, message in ((rows.to_sparse(), "must be dense"), (rows > 0, r"got torch\.bool")):
        with pytest.raises(ValueError, match=message):
            data.open({"a": tensor})


def test_columns_that_hold_no_vectors_are_listed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "emb": [b"1234"]}), tmp_path / "a.parquet")
    for source in (tmp_path / "a.parquet", (tmp_path / "a.parquet", "emb")):
        with pytest.raises(ValueError, match=r"a column of lists of floats, .* got 'id' \(int64\), 'emb' \(binary\)"):
            data.open({"a": source})


def test_fixed_shape_tensors_are_rows(tmp_path: Path) -> None:
    rows = sample()
    table = pa.table({"id": range(len(rows)), "emb": pa.FixedShapeTensorArray.from_numpy_ndarray(rows.numpy())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=16)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=16)
    for name in ("a.parquet", "a.arrow"):
        with data.open({"a": tmp_path / name}) as files:
            assert torch.equal(files.rows(5, 60), rows[5:60])
    square = pa.FixedShapeTensorArray.from_numpy_ndarray(rows[:, :6].reshape(-1, 2, 3).numpy().copy())
    pq.write_table(pa.table({"emb": square}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="must hold a column of lists of floats"):
        data.open({"a": tmp_path / "b.parquet"})


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed lists", "lists"])
def test_a_large_row_group_is_decoded_piece_by_piece(
    tmp_path: Path, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sample(3000, 100)
    write_parquet(tmp_path / "a", rows, fixed, group=2000)
    monkeypatch.setattr("sparc_fast.data.parquet.LARGE", 2**16)
    monkeypatch.setattr("sparc_fast.data.parquet.DECODED_TOGETHER", 2**14)
    begun: list[int] = []
    with data.open({"a": tmp_path / "a.parquet"}) as files:
        reader = files.readers["a"]
        assert isinstance(reader, ParquetReader)
        assert (reader.granule, reader.scattered) == (1, True)
        for start, stop in ((0, 3000), (1990, 2010), (5, 6), (2999, 3000), (7, 7)):
            assert torch.equal(files.rows(start, stop), rows[start:stop])
        opened = reader._file
        monkeypatch.setattr(reader, "_file", lambda: (begun.append(1), opened())[1])
        for start in range(0, 3000, 50):
            assert torch.equal(files.rows(start, start + 50), rows[start : start + 50])
        assert len(begun) == 2, "read in order, each row group is decoded once"
        order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
        begun.clear()
        assert torch.equal(PickedReader(reader, order.numpy()).rows(0, 3000), rows[order])
        assert len(begun) == 2, "and in any order, for all rows asked for at once"
        memory = budget.Needs.of([reader], 64, torch.float32, 2).fixed + 700_000
        loader = data.Loader(files, 64, memory=memory, n_threads=2)
        assert loader.plan.n_windows > 2
        x = torch.cat(list(loader))
        assert torch.equal(x[x[:, 0].argsort()], rows[rows[:, 0].argsort()])


def test_a_single_row_group_asks_for_no_more_than_all_rows_take(tmp_path: Path) -> None:
    rows = torch.randn(20_000, 128)
    with (
        data.open({"a": write_parquet(tmp_path / "a", rows, group=None)}) as files,
        pytest.raises(ValueError, match="at least") as error,
    ):
        data.Loader(files, 64, memory=1)
    least = int(str(error.value).split()[5])
    needs = budget.Needs.of(files.readers.values(), 64, torch.float32, 4)
    assert least == 20_000 * (needs.row + needs.order) + needs.fixed


def test_a_parquet_file_may_begin_with_an_empty_row_group(tmp_path: Path) -> None:
    rows = torch.randn(50, 3)
    filled = pa.table({"x": pa.array(rows.tolist(), pa.list_(pa.float32()))})
    with pq.ParquetWriter(tmp_path / "a.parquet", filled.schema) as writer:
        for table in (filled[:0], filled):
            writer.write_table(table)
    with data.open({"a": tmp_path / "a.parquet"}) as files:
        assert torch.equal(files.rows(0, 50), rows)


def test_the_least_memory_for_rows_in_another_order_decodes_no_piece_a_thousand_times(tmp_path: Path) -> None:
    n, rows = 20_000, torch.randn(20_000, 64)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("rows", data=rows.numpy(), chunks=(1000, 64))
    sources, ids = (
        {"a": rows, "b": tmp_path / "b.h5"},
        {"a": np.arange(n), "b": np.random.default_rng(0).permutation(n)},
    )
    with data.open(sources, ids=ids, join="inner") as files:
        with pytest.raises(ValueError, match="at least") as error:
            data.Loader(files, 256, memory=1)
        loader = data.Loader(files, 256, memory=int(str(error.value).split()[5]))
        assert loader.plan.window_rows > 900


@pytest.mark.parametrize("missing", ["sched_getaffinity", "posix_fadvise", "preadv"])
def test_systems_that_lack_a_call_read_all_the_same(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sample(300)
    path = write_npy(tmp_path / "a", rows)
    monkeypatch.delattr(os, missing, raising=False)
    for module in (flat, sys.modules["sparc_fast.data.readers"], sys.modules["sparc_fast.data.loader"]):
        monkeypatch.setattr(module, "_cpu", None)
    with data.open({"a": path}) as files:
        assert torch.equal(torch.cat(list(data.Loader(files, 10, shuffle=False))), rows)


def test_batches_are_on_the_cpu_whatever_the_default_device_is(tmp_path: Path) -> None:
    rows = sample(300)
    files = data.open({"a": write_npy(tmp_path / "a", rows), "b": rows}, ids={"a": range(300), "b": range(50, 350)},
                      join="outer")  # fmt: skip
    with torch.device("meta"):
        x, present = next(data.Loader(files, 350, shuffle=False).batches())
        assert files.rows(0, 3).device.type == "cpu"
    assert torch.equal(x[50:300, 7:], rows[:250])
    assert present.device == x.device == torch.device("cpu")


def test_integers_of_numpy_and_sizes_with_units_are_taken() -> None:
    files = data.open({"a": torch.randn(50, 4)})
    loader = data.Loader(files, np.int64(10), memory="1GiB", seed=np.uint8(3), n_threads=np.int32(1))
    assert (loader.memory, len(next(iter(loader)))) == (2**30, 10)
    assert type(loader.state_dict()["batch_size"]) is int
    for memory in ("1 apple", "", "-1GiB", True, 1.5, float("inf"), None):
        with pytest.raises(ValueError, match='memory must be an integer >= 1, in bytes, or a size such as "4GiB"'):
            data.Loader(files, 10, memory=memory)
