"""Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .columns import PiecewiseReader, as_matrix, column_ids, vector_column
from .readers import Spans, choose_name, first_not_finite, require
from .shuffle import Rows

__all__ = ["ParquetReader", "open_file", "read_ids"]


def read_ids(path: Path, name: str | None) -> npt.NDArray[Any]:
    """The values of one column."""
    pq = require("pyarrow.parquet", path)
    name = choose_name(pq.read_schema(path).names, name, path)
    return column_ids(pq.read_table(path, columns=[name]), name, path)


LARGE = 2**24  # bytes of a row group: a larger one is decoded piece by piece, and never held whole
DECODED_TOGETHER = 2**20  # bytes of such a piece
PAGES = 3 * 2**22  # bytes that decoding piece by piece takes beside the piece: pages as stored and as decoded


class ParquetReader(PiecewiseReader):
    """Rows of one column of vectors. Row groups are decoded from their first on: write them small (some thousand)."""

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
        filled = next((g for g, n_rows in enumerate(groups) if n_rows), None)
        width = 1 if filled is None else self._width(schema.field(self._name).type, filled, title)
        granule = max(groups, default=1)
        scratch = 3 * granule * width * dtype.itemsize + 2**22  # as stored, decoded, joined; pyarrow's own
        self.scattered = granule * width * dtype.itemsize > LARGE
        if self.scattered:
            granule, scratch = 1, 3 * DECODED_TOGETHER + PAGES
        super().__init__(title, groups, width, dtype, granule=granule, scratch=scratch)
        self.order_bytes = 64 if self.scattered else 0
        self._places: list[_Place] = []

    def _width(self, kind: Any, group: int, title: str) -> int:
        kind = getattr(kind, "storage_type", kind)
        if hasattr(kind, "list_size"):
            return int(kind.list_size)
        few = self._metadata.row_group(group).total_byte_size <= LARGE
        n_rows = self._metadata.num_rows if few else 1
        with self._file() as file:  # all of a small one, so that what cannot be read is known at once
            batch = next(file.iter_batches(n_rows, [group], [self._name], use_threads=False))
            return int(as_matrix(batch.column(0), title).shape[1])

    def _file(self) -> Any:
        return self._pq.ParquetFile(self._path, metadata=self._metadata, buffer_size=DECODED_TOGETHER, pre_buffer=False)

    def _piece(self, number: int) -> npt.NDArray[Any]:
        with self._pq.ParquetFile(self._path, metadata=self._metadata) as file:  # a reader is not for two threads
            table = file.read_row_group(number, columns=[self._name], use_threads=False)
        return as_matrix(table.column(self._name).combine_chunks(), self.title, self.width)

    def _fill(self, start: int, out: Tensor) -> None:
        if not self.scattered:
            super()._fill(start, out)
            return
        self.pick(np.arange(start, start + len(out)), np.arange(len(out)), out)

    def read(self, spans: Spans, out: Tensor, check_finite: bool) -> None:
        if not self.scattered:
            super().read(spans, out, check_finite)
            return
        rows = np.concatenate([np.arange(*span) for span in spans])
        order = np.argsort(rows, kind="stable")
        self.pick(rows[order], order, out)
        if check_finite and (found := first_not_finite(out)) is not None:
            self._refuse(spans, found)

    def pick(self, rows: Rows, places: Rows, out: Tensor) -> None:
        """In one pass over the row groups that hold such rows, piece by piece."""
        if not self.scattered:
            super().pick(rows, places, out)
            return
        done, target, place = 0, out.numpy(), self._places.pop() if self._places else None
        while done < len(rows):
            row = int(rows[done])
            if place is None or not place.start <= row < place.group_stop:
                place = _Place(self, int(np.searchsorted(self._ends, row, side="right")))
            piece = place.piece_of(row)
            high = int(np.searchsorted(rows, place.stop))
            target[places[done:high]] = piece[rows[done:high] - place.start]
            done = high
        self._places = [place] if place is not None else []  # who reads on in order goes on from here

    @property
    def pick_scratch(self) -> int:
        return self.scratch if self.scattered else super().pick_scratch

    def close(self) -> None:
        self._places.clear()


open_file = ParquetReader


class _Place:
    """How far a row group is decoded: rows start <= n < stop are at hand, and it goes on from there."""

    def __init__(self, reader: ParquetReader, group: int) -> None:
        self._reader, self.group_stop = reader, int(reader._ends[group])
        self.start = self.stop = int(reader._ends[group - 1]) if group else 0
        self._piece: npt.NDArray[Any] = np.empty((0, reader.width))
        n = max(1, DECODED_TOGETHER // reader.row_bytes)
        self._batches = reader._file().iter_batches(n, [group], columns=[reader._name], use_threads=False)

    def piece_of(self, row: int) -> npt.NDArray[Any]:
        """Rows start <= n < stop, which that row is among."""
        while self.stop <= row:
            batch = next(self._batches)
            self._piece = as_matrix(batch.column(0), self._reader.title, self._reader.width)
            self.start, self.stop = self.stop, self.stop + len(batch)
        return self._piece
