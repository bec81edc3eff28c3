"""HDF5 files, chunked and compressed in any way, or contiguous."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .flat import FlatReader
from .readers import DEFAULT_NAME, Reader, choose_name, numpy_dtype, require

__all__ = ["Hdf5Reader", "open_file", "read_ids"]

NO_LOCKS = re.compile(r"unable to lock file.*(Function not implemented|No locks available|not supported)")
"""A file system without locks, such as some of NFS and Lustre."""


def open_file(path: Path, name: str | None) -> Reader:
    """Rows of one data set; names of data sets in groups are written with a slash."""
    reader = Hdf5Reader(path, name)
    if (offset := reader.offset_in_file()) is None:
        return reader
    reader.close()
    return FlatReader(reader.path, reader.title, (reader.n_rows, reader.width), reader.dtype, offset)


def read_ids(path: Path, name: str | None) -> npt.NDArray[Any]:
    """Everything in one data set."""
    with open_h5(path) as file:
        found: npt.NDArray[Any] = _data_set(file, name, path)[()]
    return found


def open_h5(path: Path) -> Any:
    """The open h5py.File."""
    h5py = require("h5py", path)
    try:
        try:
            return h5py.File(path, "r", rdcc_nbytes=0)  # blocks are whole chunks: none is wanted twice
        except OSError as error:
            if not NO_LOCKS.search(str(error)):
                raise
            return h5py.File(path, "r", rdcc_nbytes=0, locking=False)
    except OSError as error:
        if "unable to lock file" in str(error):
            raise ValueError(f"{path} must be closed by who writes it to be read, but is locked: {error}") from error
        raise ValueError(f"{path} must be an HDF5 file, but is truncated or foreign: {error}") from error


def dataset_names(file: Any) -> dict[str, int]:
    """Every data set in the file and what links lead to, under the links' names -> its number of dimensions."""
    found: dict[str, int] = {}

    def note(name: str, entry: Any) -> None:
        if hasattr(entry, "chunks"):  # groups have none
            found[name] = entry.ndim

    def follow(name: str, link: Any) -> None:
        # a soft link is a second name of a data set of this file, so that only the name that is looked for adds to it
        if hasattr(link, "filename") or (hasattr(link, "path") and name == DEFAULT_NAME):
            note(name, _entry(file, name))

    file.visititems(note)
    file.visititems_links(follow)
    return found


def _entry(file: Any, name: str) -> Any:
    """What a name or a link leads to; None where that is not there."""
    try:
        return file[name]
    except (KeyError, OSError):
        return None


def _data_set(file: Any, name: str | None, path: Path, names: Collection[str] | None = None) -> Any:
    """The data set meant, with all the files in which it lies."""
    data: Any = None if name is None else _entry(file, name)
    if not hasattr(data, "chunks"):
        link: Any = None if name is None or data is not None else file.get(name, getlink=True)
        if link is not None and hasattr(link, "path"):
            where = f"{link.path} of {link.filename}" if hasattr(link, "filename") else link.path
            raise ValueError(f"{path}[{name}] must lead to a data set, but there is none at {where}, its link's end")
        data = file[choose_name(dataset_names(file) if names is None else names, name, path)]
    if data.is_virtual:
        for source in data.virtual_sources():
            _check_source(Path(data.file.filename).parent, source, f"{path}[{data.name.lstrip('/')}]")
    return data


def _check_source(folder: Path, source: Any, title: str) -> None:
    """Missing parts of a virtual data set would read as zeros."""
    if source.file_name == "." or "%" in source.file_name:  # this file, or a pattern
        return
    path = folder / source.file_name
    if not path.is_file():
        raise ValueError(f"{title} must have all its parts, but there is no file {path}")
    with open_h5(path) as file:
        if not hasattr(_entry(file, source.dset_name), "chunks"):
            raise ValueError(f"{title} must have all its parts, but {path} has no data set {source.dset_name}")


class Hdf5Reader(Reader):
    """HDF5 reads and inflates whole chunks, one thread at a time."""

    def __init__(self, path: Path, name: str | None) -> None:
        self._path, self._file = path, open_h5(path)
        try:
            data = _data_set(self._file, name, path, None if name is not None else self._matrices())
            native = numpy_dtype(data.dtype.newbyteorder("="))  # HDF5 turns bytes around while it reads
            if native is None:
                raise ValueError(f"{path}[{data.name}] must hold float16, float32 or float64, got {data.dtype}")
            chunk = data.chunks or (1, 0)
            super().__init__(
                f"{path}[{data.name.lstrip('/')}]", data.shape, native,
                granule=min(chunk[0], max(1, data.shape[0])) if data.ndim == 2 else 1,
                scratch=2 * math.prod(chunk) * data.dtype.itemsize + 2**20,  # inflated, deflated, and HDF5's own
            )  # fmt: skip
        except BaseException:
            self._file.close()
            raise
        self._data = data
        self.path = Path(data.file.filename)
        """Where it lies, which a link may say."""

    def _matrices(self) -> list[str]:
        """Data sets of rows; a single one of anything else."""
        found = dataset_names(self._file)
        rows = [name for name, n in found.items() if n == 2]
        if not rows and len(found) > 1:
            shown = ", ".join(f"{name!r} {list(self._file[name].shape)}" for name in list(found)[:4])
            more = f" and {len(found) - 4:,} more" if len(found) > 4 else ""
            raise ValueError(f"{self._path} must hold a data set of rows, [N, D_s], got {shown}{more}")
        return rows or list(found)

    def offset_in_file(self) -> int | None:
        """Where the rows begin, if they lie in the file as memory holds them; else, in chunks for one, None."""
        stored, native = self._data.id, require("h5py", self._path).h5t.py_create(self._data.dtype)
        whole = stored.get_storage_size() == self.n_rows * self.row_bytes  # what was never written has no place yet
        as_in_memory = sys.byteorder == "little" and self._data.dtype.isnative and native.equal(stored.get_type())
        offset: int | None = stored.get_offset() if whole and as_in_memory else None
        return offset

    def _fill(self, start: int, out: Tensor) -> None:
        try:
            self._data.read_direct(out.numpy(), np.s_[start : start + len(out)])
        except (OSError, ValueError) as error:
            raise OSError(f"cannot read rows {start} to {start + len(out)} of {self.title}: {error}") from error

    def close(self) -> None:
        self._file.close()
