"""The file formats there are: one line each, and each has a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import arrow, hdf5, npy, parquet, safetensors_file, torch_file
from .readers import Reader, Source, TensorReader, numpy_dtype

__all__ = ["FORMATS", "Format", "open_reader"]


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


def open_reader(source: Source, stream: str) -> Reader:
    """The reader of a source; ValueError says what is wrong with it, FileNotFoundError that there is none."""
    if isinstance(source, np.ndarray):
        if numpy_dtype(source.dtype) is None:
            raise ValueError(f"source of {stream!r} must hold float16, float32 or float64, got {source.dtype}")
        return TensorReader(torch.from_numpy(source), f"array of {stream!r}")
    if isinstance(source, Tensor):
        return TensorReader(source.cpu(), f"tensor of {stream!r}")
    path, name = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    if not isinstance(path, str | Path) or not (name is None or isinstance(name, str)):
        raise ValueError(
            f"source of {stream!r} must be a path, (path, name of the data set), a tensor or an array, got {source!r}"
        )
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"source of {stream!r} must end in one of {', '.join(FORMATS)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"source of {stream!r} must be a file, but there is none at {path}")
    return FORMATS[path.suffix.lower()].open_file(path, name)
