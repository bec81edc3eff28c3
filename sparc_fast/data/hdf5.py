"""HDF5 files, chunked and compressed in any way, or contiguous."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .flat import FlatReader
from .readers import Reader, choose_name, numpy_dtype, require

__all__ = ["Hdf5Reader", "open_file", "read_ids"]


def open_file(path: Path, name: str | None) -> Reader:
    """Rows of one data set; names of data sets in groups are written with a slash."""
    reader = Hdf5Reader(path, name)
    if (offset := reader.offset_in_file()) is None:
        return reader
    reader.close()
    return FlatReader(path, reader.title, (reader.n_rows, reader.width), reader.dtype, offset)


def read_ids(path: Path, name: str | None) -> npt.NDArray[Any]:
    """Everything in one data set."""
    with open_h5(path) as file:
        found: npt.NDArray[Any] = file[choose_name(dataset_names(file), name, path)][()]
    return found


def open_h5(path: Path) -> Any:
    """The open h5py.File."""
    h5py = require("h5py", path)
    try:
        return h5py.File(path, "r", rdcc_nbytes=0)  # blocks are whole chunks: none is wanted twice
    except OSError as error:
        raise ValueError(f"{path} must be an HDF5 file, but is truncated, locked or foreign: {error}") from error


def dataset_names(file: Any) -> list[str]:
    """Every data set in the file."""
    names: list[str] = []
    file.visititems(lambda name, entry: names.append(name) if hasattr(entry, "chunks") else None)  # groups have none
    return names


class Hdf5Reader(Reader):
    """HDF5 reads and inflates whole chunks, one thread at a time."""

    def __init__(self, path: Path, name: str | None) -> None:
        self._path, self._file = path, open_h5(path)
        try:
            names = [n for n in dataset_names(self._file) if name is not None or self._file[n].ndim == 2]
            data = self._file[choose_name(names, name, path)]
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
