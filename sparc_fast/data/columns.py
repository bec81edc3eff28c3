"""Columns of Arrow tables that hold a vector in every row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .readers import Reader, choose_name, numpy_dtype, require

__all__ = ["PiecewiseReader", "as_matrix", "column_ids", "vector_column"]


def vector_column(schema: Any, name: str | None, path: Path) -> tuple[str, torch.dtype]:
    """(name, dtype) of the column of vectors meant: list, large_list or fixed_size_list of floats."""
    types = require("pyarrow", path).types
    kinds = {field.name: _stored(field.type) for field in schema}
    lists: Mapping[str, Any] = {
        column: kind
        for column, kind in kinds.items()
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    }
    if not lists or (name in kinds and name not in lists):
        there = ", ".join(f"{column!r} ({kind})" for column, kind in list(kinds.items())[:6]) + ", …" * (len(kinds) > 6)
        raise ValueError(f"{path} must hold a column of lists of floats, a row in each, got {there}")
    name = choose_name(lists, name, path)
    item = lists[name].value_type
    dtype = numpy_dtype(np.dtype(item.to_pandas_dtype())) if types.is_floating(item) else None
    if dtype is None:
        raise ValueError(f"{path}[{name}] must hold lists of float16, float32 or float64, got lists of {item}")
    return name, dtype


def _stored(kind: Any) -> Any:
    """What an extension type such as fixed_shape_tensor stores; one of matrices is left as it is, no list."""
    return kind.storage_type if hasattr(kind, "storage_type") and len(getattr(kind, "shape", ())) < 2 else kind


def as_matrix(column: Any, title: str, width: int | None = None) -> npt.NDArray[Any]:
    """An arrow array of lists as [rows, width], without a copy; ValueError where a row is null or another length."""
    column = getattr(column, "storage", column)
    values = column.flatten()
    width = (len(values) // len(column) if len(column) else 0) if width is None else width
    lengths = set() if hasattr(column.type, "list_size") else set(np.unique(column.value_lengths().to_numpy(False)))
    if column.null_count or values.null_count or lengths - {width} or len(values) != len(column) * width:
        raise ValueError(f"{title} must hold lists of equal length {width} without nulls, got others")
    matrix: npt.NDArray[Any] = values.to_numpy().reshape(len(column), width)
    return matrix


def column_ids(table: Any, name: str | None, path: Path) -> npt.NDArray[Any]:
    """The values of a column of an Arrow table."""
    return np.asarray(table.column(choose_name(table.schema.names, name, path)).to_pylist())


class PiecewiseReader(Reader):
    """Rows that lie in several matrices of so many rows each, one after the other."""

    def __init__(self, title: str, lengths: Sequence[int], width: int, dtype: torch.dtype, **about: int) -> None:
        super().__init__(title, (sum(lengths), width), dtype, **about)
        self._ends = np.cumsum(lengths, dtype=np.int64)

    @abstractmethod
    def _piece(self, number: int) -> npt.NDArray[Any]:
        """A whole piece, [rows, width]."""

    def _fill(self, start: int, out: Tensor) -> None:
        done = 0
        while done < len(out):
            number = int(np.searchsorted(self._ends, start + done, side="right"))
            rows = self._piece(number)
            first = start + done - (int(self._ends[number]) - len(rows))
            part = rows[first : first + len(out) - done]
            out.numpy()[done : done + len(part)] = part
            done += len(part)
