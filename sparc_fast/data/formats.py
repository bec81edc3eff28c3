"""The file formats there are: one line each, and each has a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparc_fast.arrays import as_tensor

from . import arrow, hdf5, npy, parquet, safetensors_file, torch_file
from .feature_folder import FeatureFolder, Split, is_feature_folder
from .readers import Reader, Source, TensorReader, Where, closed_on_failure, numpy_dtype
from .shards import files_of, is_list_of_files
from .views import one_after_the_other

__all__ = ["FORMATS", "Format", "open_reader", "where_and_name"]


class Format(Protocol):
    """What the module of a file format has."""

    def open_file(self, path: Path, name: str | None) -> Reader:
        """Rows of the data set of this name, of one that is meant where it is None."""

    def read_ids(self, path: Path, name: str | None) -> npt.NDArray[Any]:
        """Identifiers: the whole data set or column of this name; None where a file holds just one."""


FORMATS: Mapping[str, Format] = {
    ".h5": hdf5,
    ".hdf5": hdf5,
    ".npy": npy,
    ".safetensors": safetensors_file,
    ".pt": torch_file,
    ".pth": torch_file,
    ".parquet": parquet,
    ".arrow": arrow,
    ".feather": arrow,
}
"""Suffix of a file -> what reads it."""


def open_reader(source: Source, stream: str, split: Split = "all") -> Reader:
    """The reader of a source; ValueError says what is wrong with it, FileNotFoundError that there is none.

    Of a folder of features these are the rows of the split, of the stream named or of this one.
    """
    if isinstance(source, np.ndarray):
        if numpy_dtype(source.dtype.newbyteorder("=")) is None:
            raise ValueError(f"source of {stream!r} must hold float16, float32 or float64, got {source.dtype}")
        return TensorReader(as_tensor(source), f"array of {stream!r}")
    if isinstance(source, Tensor):
        return TensorReader(source.cpu(), f"tensor of {stream!r}")
    where, name = where_and_name(source, stream)
    if is_feature_folder(where):
        return FeatureFolder(where).reader(name or stream, split)
    files = files_of(where, f"source of {stream!r}", FORMATS)
    with closed_on_failure() as readers:
        for path in files:
            readers.append(FORMATS[path.suffix.lower()].open_file(path, name))
        return readers[0] if len(readers) == 1 else one_after_the_other(readers)


def where_and_name(source: Any, stream: str) -> tuple[Where, str | None]:
    """Where the files of a source are, and the name of the data set in them."""
    if is_list_of_files(source, FORMATS):
        return source, None
    where, name = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    is_place = isinstance(where, str | Path) or is_list_of_files(where, FORMATS)
    if not is_place or not (name is None or isinstance(name, str)):
        raise ValueError(
            f"source of {stream!r} must be a path, a list of files, (either, name of the data set), "
            f"a tensor or an array, got {source!r}"
        )
    return where, name
