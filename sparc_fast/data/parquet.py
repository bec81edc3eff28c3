"""Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from .columns import PiecewiseReader, as_matrix, column_ids, vector_column
from .readers import Reader, choose_name, require

__all__ = ["ParquetReader", "open_file", "read_ids"]


def open_file(path: Path, name: str | None) -> Reader:
    """Rows of one column of vectors."""
    return ParquetReader(path, name)


def read_ids(path: Path, name: str | None) -> npt.NDArray[Any]:
    """The values of one column."""
    pq = require("pyarrow.parquet", path)
    name = choose_name(pq.read_schema(path).names, name, path)
    return column_ids(pq.read_table(path, columns=[name]), name, path)


class ParquetReader(PiecewiseReader):
    """Parquet decodes whole row groups: write them small (some thousand rows)."""

    def __init__(self, path: Path, name: str | None) -> None:
        pyarrow, self._pq = require("pyarrow", path), require("pyarrow.parquet", path)
        try:
            self._metadata = self._pq.read_metadata(path)
            schema = self._metadata.schema.to_arrow_schema()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} must be a Parquet file, but is truncated or foreign: {error}") from error
        self._path = path
        self._name, dtype = vector_column(schema, name, path)
        title = f"{path}[{self._name}]"
        groups = [self._metadata.row_group(g).num_rows for g in range(self._metadata.num_row_groups)]
        n_rows = self._set_lengths(groups)
        width = self._group(0, title).shape[1] if n_rows else 1
        granule = max(groups, default=1)
        scratch = 3 * granule * width * dtype.itemsize + 2**22  # as stored, decoded, joined; pyarrow's own
        super().__init__(title, (n_rows, width), dtype, granule=granule, scratch=scratch)

    def _group(self, group: int, title: str, width: int | None = None) -> npt.NDArray[Any]:
        with self._pq.ParquetFile(self._path, metadata=self._metadata) as file:  # a reader is not for two threads
            table = file.read_row_group(group, columns=[self._name], use_threads=False)
        return as_matrix(table.column(self._name).combine_chunks(), title, width)

    def _piece(self, number: int) -> npt.NDArray[Any]:
        return self._group(number, self.title, self.width)
