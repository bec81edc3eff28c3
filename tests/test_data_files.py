"""Every format gives the rows that were written, and says clearly what is wrong with a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparc_fast import data
from sparc_fast.data.flat import FlatReader

N, WIDTH = 103, 7


def sample(n: int = N, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n + width), device="cpu").to(dtype)


def numbered(n: int, width: int, first: int = 0) -> Tensor:
    """Rows whose first two numbers are their own, by thousands so that half precision holds them."""
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(width), device="cpu")
    number = torch.arange(first, first + n)
    rows[:, 0], rows[:, 1] = number % 1000, number // 1000
    return rows


def write_npy(path: Path, rows: Tensor) -> Path:
    array = rows.view(torch.int16).numpy().view("V2") if rows.dtype == torch.bfloat16 else rows.numpy()
    np.save(path.with_suffix(".npy"), array)
    return path.with_suffix(".npy")


def write_hdf5(path: Path, rows: Tensor, **options: object) -> Path:
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file.create_dataset("features", data=rows.numpy(), **options)
        file.create_dataset("indices", data=np.arange(len(rows), dtype=np.int32))
    return path.with_suffix(".h5")


def write_safetensors(path: Path, rows: Tensor) -> Path:
    save_file({"a": torch.ones(3), "features": rows, "ids": torch.arange(len(rows))}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def write_pt(path: Path, rows: Tensor) -> Path:
    torch.save(rows, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def table(rows: Tensor, fixed: bool = True) -> pa.Table:
    values = pa.array(rows.numpy().ravel())
    if fixed:
        column = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    else:
        column = pa.ListArray.from_arrays(np.arange(len(rows) + 1) * rows.shape[1], values)
    return pa.table({"id": [f"sample {n}" for n in range(len(rows))], "embedding": column})


def write_parquet(path: Path, rows: Tensor, fixed: bool = True, group: int | None = 16) -> Path:
    pq.write_table(table(rows, fixed), path.with_suffix(".parquet"), row_group_size=group)
    return path.with_suffix(".parquet")


def write_arrow(path: Path, rows: Tensor, stream: bool = True) -> Path:
    path = path.with_suffix(".arrow")
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table(rows).schema) as file:
        file.write_table(table(rows), max_chunksize=16)
    return path


WRITERS: dict[str, Callable[[Path, Tensor], Path]] = {
    "npy": write_npy,
    "hdf5": write_hdf5,
    "hdf5, gzip": lambda path, rows: write_hdf5(path, rows, chunks=(32, rows.shape[1]), compression="gzip"),
    "hdf5, shuffle and odd chunks": lambda path, rows: write_hdf5(path, rows, chunks=(10, 3), compression="gzip", shuffle=True),
    "safetensors": write_safetensors,
    "pt": write_pt,
    "parquet": write_parquet,
    "parquet, lists": lambda path, rows: write_parquet(path, rows, fixed=False),
    "arrow stream": write_arrow,
    "arrow file": lambda path, rows: write_arrow(path, rows, stream=False),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_rows_that_were_written(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and kind not in ("npy", "safetensors", "pt"):
        pytest.skip("the format has no bfloat16")
    rows = sample(dtype=dtype)
    with data.open({"a": WRITERS[kind](tmp_path / "file", rows)}) as files:
        reader = files.readers["a"]
        assert (reader.n_rows, reader.width, reader.dtype) == (N, WIDTH, dtype)
        for start, stop in ((0, N), (5, 6), (15, 49), (100, N), (7, 7), (0, 0), (N, N)):
            assert torch.equal(reader.rows(start, stop), rows[start:stop])
        for start, stop in ((-1, 3), (5, N + 1), (6, 5)):
            with pytest.raises(ValueError, match=f"rows must lie in 0 to {N} of .*file.*, got {start} to {stop}"):
                reader.rows(start, stop)
        out = torch.empty(10, WIDTH, dtype=dtype)
        assert reader.rows(20, 30, out) is out
        assert torch.equal(out, rows[20:30])
        with pytest.raises(ValueError, match="out must be contiguous"):
            reader.rows(20, 31, out)
        assert torch.equal(files.rows(3, 9), rows[3:9].float())


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if not kind.startswith("hdf5,")])  # chunks have rows
def test_a_file_without_rows_has_none(tmp_path: Path, kind: str) -> None:
    with data.open({"a": WRITERS[kind](tmp_path / "file", sample(0))}) as files:
        assert len(files) == 0


@pytest.mark.parametrize("kind", WRITERS)
def test_a_truncated_or_foreign_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / "file", sample())
    whole = path.read_bytes()
    message = r"file\..* must (be an? .* file, but is truncated|hold an array of numbers|hold tensors only)"
    for content in (b"", whole[: len(whole) // 2], b"this is no such file at all, whatever its name says"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.open({"a": path})


def test_a_file_cut_short_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "file", sample(10_000))
    with data.open({"a": path}) as files:
        with path.open("r+b") as file:
            file.truncate(5000)
        with pytest.raises(OSError, match=r"file\.npy ends before row 10000: the file was cut short"):
            files.rows(0, 10_000)


def test_one_file_can_hold_all_streams_under_their_names(tmp_path: Path) -> None:
    a, b = sample(width=3), sample(width=4)
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file["streams/a"], file["streams/b"] = a.numpy(), b.numpy()
    save_file({"a": a, "b": b}, tmp_path / "all.safetensors")
    torch.save({"a": a, "b": b, "note": "text"}, tmp_path / "all.pt")
    for name, prefix in (("all.h5", "streams/"), ("all.safetensors", ""), ("all.pt", "")):
        path = tmp_path / name
        with data.open({"a": (path, prefix + "a"), "b": (path, prefix + "b")}) as files:
            assert files.d_streams == {"a": 3, "b": 4}
            assert torch.equal(files.rows(0, N), torch.cat([a, b], 1))
        with pytest.raises(ValueError, match=r"must hold a data set 'features' or a single one.*got .*a', .*b'"):
            data.open({"a": path})
        with pytest.raises(ValueError, match=r"name must be a data set of .*, which has '.*, got 'c'"):
            data.open({"a": (path, "c")})


@pytest.mark.parametrize(
    ("array", "message"),
    [
        *[(np.zeros((3, 4), kind), "hold float16, bfloat16, float32 or float64") for kind in ("i4", "c8", ">f4", "?")],
        *[
            (np.zeros(shape, "f4"), r"hold rows of one stream, \[N, D_s\], got shape \[")
            for shape in ((5,), (5, 2, 3), (5, 0))
        ],
        (np.asfortranarray(sample().numpy()), r"be C-ordered, got Fortran order; save np\.ascontiguousarray"),
        (np.array([[print]], object), "hold an array of numbers, but is truncated or foreign"),  # and not unpickled
    ],
)
def test_other_numbers_layouts_shapes_and_objects_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "file.npy", array)
    with pytest.raises(ValueError, match=rf"file\.npy must {message}"):
        data.open({"a": tmp_path / "file.npy"})
    if array.dtype.kind in "icb":  # in memory, other byte orders are turned around
        with pytest.raises(ValueError, match="must hold float16, float32 or float64"):
            data.open({"a": array})


@pytest.mark.parametrize("userblock", [0, 512])
def test_hdf5_rows_are_right_wherever_they_lie_and_contiguous_ones_are_read_without_hdf5(
    tmp_path: Path, userblock: int
) -> None:
    rows = sample()
    rows_bf16 = h5py.h5t.IEEE_F32LE.copy()  # bfloat16's bits as a type of HDF5's own, which it widens while it reads
    rows_bf16.set_fields(15, 7, 8, 0, 7)
    rows_bf16.set_size(2)
    with h5py.File(tmp_path / "file.h5", "w", userblock_size=userblock or None) as file:
        file["plain"], file["big_endian"] = rows.numpy(), rows.numpy().astype(">f4")
        file.create_dataset("unwritten", rows.shape, np.float32)
        file.create_dataset("elsewhere", rows.shape, np.float32, external=[(str(tmp_path / "raw"), 0, 10_000)])
        file["elsewhere"][...] = rows.numpy()
        layout = h5py.VirtualLayout(rows.shape, np.float32)
        layout[:] = h5py.VirtualSource(file["plain"])
        file.create_virtual_dataset("virtual", layout)
        compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        compact.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple(tuple(rows.shape))
        for name, stored, how in (("compact", h5py.h5t.IEEE_F32LE, compact), ("bfloat16", rows_bf16, None)):
            h5py.Dataset(h5py.h5d.create(file.id, name.encode(), stored, space, how))[...] = rows.numpy()
        names = list(file)
    for name in names:
        expected = torch.zeros(N, WIDTH) if name == "unwritten" else rows
        with data.open({"a": (tmp_path / "file.h5", name)}) as files:
            got = files.rows(0, N)
            torch.testing.assert_close(got, expected, rtol=2**-8 if name == "bfloat16" else 0, atol=0, msg=name)
            assert isinstance(files.readers["a"], FlatReader) == (name == "plain"), name


def test_ragged_lists_and_nulls_are_refused(tmp_path: Path) -> None:
    for rows in ([[1.0, 2.0], [3.0]], [[1.0, 2.0], None], [[1.0, None], [2.0, 3.0]]):
        pq.write_table(pa.table({"embedding": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "file.parquet")
        with pytest.raises(ValueError, match=r"must hold lists of equal length .* without nulls"):
            data.open({"a": tmp_path / "file.parquet"})
    pq.write_table(pa.table({"embedding": [[1, 2], [3, 4]]}), tmp_path / "file.parquet")
    with pytest.raises(ValueError, match="must hold lists of float16, float32 or float64, got lists of int64"):
        data.open({"a": tmp_path / "file.parquet"})


def test_a_compressed_arrow_file_is_refused(tmp_path: Path) -> None:
    pa.feather.write_feather(table(sample(4000)), tmp_path / "file.feather", compression="lz4")
    with pytest.raises(ValueError, match=r"file\.feather must not be compressed, got compressed columns"):
        data.open({"a": tmp_path / "file.feather"})


@pytest.mark.filterwarnings("error")
def test_arrays_of_any_byte_order_and_layout_are_read_and_mapped_ones_where_they_lie(tmp_path: Path) -> None:
    rows = sample(20).numpy()
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    arrays = {"swapped": rows.astype(">f4"), "backwards": rows[::-1].copy()[::-1], "strided": rows.repeat(2, 1)[:, ::2]}
    with data.open({**arrays, "mapped": mapped}) as files:
        assert torch.equal(files.rows(3, 20), torch.from_numpy(rows[3:20]).repeat(1, 4))
        assert files.readers["mapped"]._tensor.data_ptr() == mapped.ctypes.data


def test_a_missing_file_and_an_unknown_suffix_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source of 'a' must be a file, but there is none at .*nothing\.npy"):
        data.open({"a": tmp_path / "nothing.npy"})
    with pytest.raises(ValueError, match=r"source of 'a' must end in one of \.h5, .*, got .*file\.csv"):
        data.open({"a": tmp_path / "file.csv"})
    for name, instead in (("a.csv", "Parquet with a column of lists"), ("a.npz", "a .npy file for each array")):
        with pytest.raises(ValueError, match=f"got .*{name}: save it as .*{instead}"):
            data.open({"a": tmp_path / name})
    for sources in ({}, [1], {"": "a.npy"}, {3: "a.npy"}):
        with pytest.raises(ValueError, match="sources must map the name of at least one stream to its file"):
            data.open(sources)
    (tmp_path / "file.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"to its file, or be a folder of features, got .*file\.npy"):
        data.open(tmp_path / "file.npy")
    with pytest.raises(ValueError, match="source of 'a' must be a path"):
        data.open({"a": 3})


@pytest.mark.parametrize(
    ("module", "name"), [("h5py", "file.h5"), ("pyarrow", "file.parquet"), ("pyarrow", "file.arrow")]
)
def test_a_missing_library_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"reading {name} needs {module}: pip install 'sparc_fast\[{module}\]'"):
        data.open({"a": tmp_path / name})


def test_streams_of_different_length_are_refused(tmp_path: Path) -> None:
    sources = {"a": write_npy(tmp_path / "a", sample(5)), "b": write_pt(tmp_path / "b", sample(6))}
    with pytest.raises(ValueError, match=r"sources must have equally many rows.* got 5 in 'a', 6 in 'b'"):
        data.open(sources)


def test_ids_must_match_row_by_row_and_the_first_that_differ_are_named(tmp_path: Path) -> None:
    rows = sample(20)
    sources = {"a": write_hdf5(tmp_path / "a", rows), "b": write_npy(tmp_path / "b", rows)}
    ids = np.arange(20)
    (tmp_path / "ids.txt").write_text("\n".join(map(str, ids)))
    np.save(tmp_path / "ids.npy", ids)
    in_files = tmp_path / "ids.txt", tmp_path / "ids.npy"
    for of_b in (ids, ids.tolist(), torch.arange(20), *in_files, [str(i) for i in ids]):
        data.open(sources, ids={"a": (sources["a"], "indices"), "b": of_b}).close()
    swapped = ids.copy()
    swapped[[7, 12]] = swapped[[12, 7]]
    message = "ids of 'b' must match those of 'a' row by row, got '12' and '7' in row 7"
    for bad in (swapped, [str(i) for i in swapped]):
        with pytest.raises(ValueError, match=message):
            data.open(sources, ids={"a": (sources["a"], "indices"), "b": bad})
    with pytest.raises(ValueError, match="ids of 'b' must be one a row, 20 in all, got 19"):
        data.open(sources, ids={"a": ids, "b": ids[:-1]})
    with pytest.raises(ValueError, match="identifiers of at least two of the streams"):
        data.open(sources, ids={"a": ids})


def test_ids_can_lie_beside_the_rows_in_every_file(tmp_path: Path) -> None:
    rows, ids = sample(20), [f"sample {n}" for n in range(20)]
    torch.save({"features": rows, "id": ids}, tmp_path / "c.pt")
    torch.save({"features": rows, "id": [*ids[:19], "other"]}, tmp_path / "other.pt")
    sources = {"a": write_parquet(tmp_path / "a", rows), "b": write_arrow(tmp_path / "b", rows), "c": tmp_path / "c.pt"}
    data.open(sources, ids="id").close()
    with pytest.raises(ValueError, match=r"ids of 'c' .* got 'other' and 'sample 19' in row 19"):
        data.open({**sources, "c": tmp_path / "other.pt"}, ids="id")
    with pytest.raises(ValueError, match=r"name must be a data set of .*, got 'name'"):
        data.open(sources, ids="name")
    message = r"ids must map streams to identifiers where a file has rows alone, as .*d\.npy, got 'id'"
    with pytest.raises(ValueError, match=message):
        data.open({**sources, "d": write_npy(tmp_path / "d", rows)}, ids="id")
    with pytest.raises(ValueError, match=r"ids in .*c\.pt must be given as \(path, name .*, got the path alone"):
        data.open(sources, ids={"a": np.arange(20), "c": tmp_path / "c.pt"})
    data.open({"a": (write_safetensors(tmp_path / "s", rows), "features"), "b": write_hdf5(tmp_path / "h", rows)},
              ids={"a": (tmp_path / "s.safetensors", "ids"), "b": (tmp_path / "h.h5", "indices")}).close()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_scan_counts_what_is_not_finite_and_what_is_zero(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    rows = sample(3000, 500, dtype)
    rows[4], rows[17] = 0, torch.finfo(dtype).max
    path = write_safetensors(tmp_path / "file", rows)
    assert data.open({"a": path}, scan=True).scan() == {"a": data.Scan(0, None, 1)}
    rows[2900, 499], rows[2999, 0] = value, value
    path = write_safetensors(tmp_path / "file", rows)
    assert data.open({"a": path}).scan() == {"a": data.Scan(2, 2900, 1)}
    message = r"file\.safetensors\[features\] must be finite, but 2 of 3000 rows are not; the first is row 2900"
    with pytest.raises(ValueError, match=message):
        data.open({"a": path}, scan=True)
