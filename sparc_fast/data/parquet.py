"""Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .columns import as_matrix, vector_column
from .readers import Reader, require


def open_file(path: Path, name: str | None) -> Reader:
    """Rows of one column of vectors."""
    return ParquetReader(path, name)


class ParquetReader(Reader):
    """Parquet decodes whole row groups: write them small (some thousand rows)."""

    def __init__(self, path: Path, name: str | None) -> None:
        pyarrow, self._pq = require("pyarrow", path), require("pyarrow.parquet", path)
        try:
            self._metadata = self._pq.read_metadata(path)
            schema = self._metadata.schema.to_arrow_schema()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is truncated or no Parquet file: {error}") from error
        self._path = path
        self._name, dtype = vector_column(schema, name, path)
        title = f"{path}[{self._name}]"
        groups = [self._metadata.row_group(g).num_rows for g in range(self._metadata.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)
        n_rows = int(self._ends[-1]) if groups else 0
        width = self._group(0, title).shape[1] if n_rows else 1
        granule = max(groups, default=1)
        scratch = 3 * granule * width * dtype.itemsize + 2**22  # as stored, decoded, joined; pyarrow's own
        super().__init__(title, (n_rows, width), dtype, granule=granule, scratch=scratch)

    def _group(self, group: int, title: str, width: int | None = None) -> np.ndarray[Any, Any]:
        with self._pq.ParquetFile(self._path, metadata=self._metadata) as file:  # a reader is not for two threads
            table = file.read_row_group(group, columns=[self._name], use_threads=False)
        return as_matrix(table.column(self._name).combine_chunks(), title, width)

    def _fill(self, start: int, out: Tensor) -> None:
        done = 0
        while done < len(out):
            group = int(np.searchsorted(self._ends, start + done, side="right"))
            rows = self._group(group, self.title, self.width)
            first = start + done - (int(self._ends[group]) - len(rows))
            part = rows[first : first + len(out) - done]
            out.numpy()[done : done + len(part)] = part
            done += len(part)
