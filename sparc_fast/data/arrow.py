"""Arrow IPC files and streams: Feather, and what Hugging Face datasets writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from .columns import PiecewiseReader, as_matrix, column_ids, vector_column
from .readers import require

__all__ = ["ArrowReader", "open_file", "read_ids"]


def read_ids(path: Path, name: str | None) -> npt.NDArray[Any]:
    """The values of one column."""
    pyarrow = require("pyarrow", path)
    with pyarrow.memory_map(str(path)) as file:
        batches, schema = _open(pyarrow, file)
        return column_ids(pyarrow.Table.from_batches(batches, schema), name, path)


class ArrowReader(PiecewiseReader):
    """Rows of one column of vectors. The file is mapped, so it must not be compressed."""

    def __init__(self, path: Path, name: str | None) -> None:
        pyarrow = require("pyarrow", path)
        held = pyarrow.total_allocated_bytes()
        self._map = pyarrow.memory_map(str(path))
        try:
            batches, schema = _open(pyarrow, self._map)
            column, dtype = vector_column(schema, name, path)
            title = f"{path}[{column}]"
            parts: list[npt.NDArray[Any]] = []
            for batch in batches:
                if pyarrow.total_allocated_bytes() > held + 2**16:
                    raise ValueError(f"{path} must not be compressed, got compressed columns; write Parquet for that")
                if len(batch):
                    width = parts[0].shape[1] if parts else None
                    parts.append(as_matrix(batch.column(batch.schema.get_field_index(column)), title, width))
        except (pyarrow.ArrowInvalid, OSError) as error:
            self._map.close()
            raise ValueError(f"{path} must be an Arrow file, but is truncated or foreign: {error}") from error
        except BaseException:
            self._map.close()
            raise
        self._parts = parts
        super().__init__(title, list(map(len, parts)), parts[0].shape[1] if parts else 1, dtype)

    def _piece(self, number: int) -> npt.NDArray[Any]:
        return self._parts[number]

    def close(self) -> None:
        self._parts = []
        self._ends = self._ends[:0]
        self._map.close()


open_file = ArrowReader


def _open(pyarrow: Any, source: Any) -> tuple[Any, Any]:
    """(record batches, schema) of the file format, or else of the stream format."""
    try:
        file = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        stream = pyarrow.ipc.open_stream(source)
        return iter(stream), stream.schema
    return (file.get_batch(b) for b in range(file.num_record_batches)), file.schema
