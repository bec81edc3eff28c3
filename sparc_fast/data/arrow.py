"""Arrow IPC files and streams: Feather, and what Hugging Face datasets writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .columns import as_matrix, vector_column
from .readers import Reader, require


def open_file(path: Path, name: str | None) -> Reader:
    """Rows of one column of vectors, mapped."""
    return ArrowReader(path, name)


class ArrowReader(Reader):
    """The file is mapped, so it must not be compressed."""

    def __init__(self, path: Path, name: str | None) -> None:
        pyarrow = require("pyarrow", path)
        held = pyarrow.total_allocated_bytes()
        self._map = pyarrow.memory_map(str(path))
        try:
            batches, schema = self._open(pyarrow)
            column, dtype = vector_column(schema, name, path)
            title = f"{path}[{column}]"
            parts: list[np.ndarray[Any, Any]] = []
            for batch in batches:
                if pyarrow.total_allocated_bytes() > held + 2**16:
                    raise ValueError(f"{path} is compressed; write it uncompressed, or as Parquet in small row groups")
                if len(batch):
                    width = parts[0].shape[1] if parts else None
                    parts.append(as_matrix(batch.column(batch.schema.get_field_index(column)), title, width))
        except (pyarrow.ArrowInvalid, OSError) as error:
            self._map.close()
            raise ValueError(f"{path} is truncated or no Arrow file: {error}") from error
        except BaseException:
            self._map.close()
            raise
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        shape = (int(self._ends[-1]), parts[0].shape[1]) if parts else (0, 1)
        super().__init__(title, shape, dtype)

    def _open(self, pyarrow: Any) -> tuple[Any, Any]:
        """(record batches, schema) of the file format, or else of the stream format."""
        try:
            file = pyarrow.ipc.open_file(self._map)
        except pyarrow.ArrowInvalid:
            self._map.seek(0)
            stream = pyarrow.ipc.open_stream(self._map)
            return iter(stream), stream.schema
        return (file.get_batch(b) for b in range(file.num_record_batches)), file.schema

    def _fill(self, start: int, out: Tensor) -> None:
        done = 0
        while done < len(out):
            p = int(np.searchsorted(self._ends, start + done, side="right"))
            rows = self._parts[p]
            first = start + done - (int(self._ends[p]) - len(rows))
            part = rows[first : first + len(out) - done]
            out.numpy()[done : done + len(part)] = part
            done += len(part)

    def close(self) -> None:
        self._parts = []
        self._ends = self._ends[:0]
        self._map.close()
