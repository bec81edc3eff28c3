"""Several files, one stream each, whose rows belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from .formats import open_reader
from .ids import Ids, check_ids
from .readers import FLOATS, Reader, Source, first_not_finite

__all__ = ["AlignedFiles", "Scan", "blocks", "check_dtype", "open"]

SCANNED_TOGETHER = 2**22  # bytes


class Scan(NamedTuple):
    """What a look at every row of a stream found."""

    not_finite: int
    """Rows with NaN or infinity in them."""
    first_not_finite: int | None
    """The first such row."""
    zero: int
    """Rows that are 0 throughout, which have no direction to reconstruct."""


class AlignedFiles:
    """Streams in their files: row n of every stream is the same sample. `open` makes it."""

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        self.readers = dict(readers)
        self.n_rows = next(iter(self.readers.values())).n_rows
        """N."""
        self.d_streams = {stream: reader.width for stream, reader in self.readers.items()}
        """name -> width D_s, in order: what `SPARC` takes."""

    def __len__(self) -> int:
        return self.n_rows

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows start <= n < stop of all streams side by side, [stop - start, D], in `dtype`."""
        check_dtype(dtype)
        return torch.cat([reader.rows(start, stop).to(dtype) for reader in self.readers.values()], dim=1)

    def scan(self) -> dict[str, Scan]:
        """Read everything once, a few MB at a time, and count rows that are not finite or all 0."""
        return {stream: _scan(reader) for stream, reader in self.readers.items()}

    def close(self) -> None:
        """Close the files."""
        for reader in self.readers.values():
            reader.close()

    def __enter__(self) -> AlignedFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open(sources: Mapping[str, Source], *, ids: Ids | None = None, scan: bool = False) -> AlignedFiles:
    """Open the files of several streams whose rows are the same samples in the same order.

    Args:
        sources: name -> where a stream's rows [N, D_s] are, in the order of the model's streams: a path, (path, name
            of the data set in it), or a tensor or array. HDF5 (.h5, .hdf5), NumPy (.npy), safetensors, torch.save
            (.pt, .pth), Parquet and Arrow (.parquet, .arrow, .feather: one column of lists), holding float16,
            bfloat16, float32 or float64. Without a name: "features", else the only data set there is.
        ids: identifiers that must be equal row by row: the name of their data set or column in every file, or
            stream -> identifiers (a sequence, a text file with one a line, a .npy file, or (path, name)).
        scan: read everything once and refuse NaN and infinity. The loader checks what it reads in any case.

    Raises:
        ValueError: a file is truncated, foreign or of a wrong shape or dtype, numbers of rows or ids differ, or a
            scanned row is not finite.
        FileNotFoundError: a file is missing.
        ImportError: h5py or pyarrow, which HDF5 and Parquet or Arrow need, is missing.
    """
    if not isinstance(sources, Mapping) or not sources or not all(isinstance(s, str) and s for s in sources):
        raise ValueError(f"sources must map the name of at least one stream to its file, got {sources!r}")
    readers: dict[str, Reader] = {}
    try:
        for stream, source in sources.items():
            readers[stream] = open_reader(source, stream)
        counts = {stream: reader.n_rows for stream, reader in readers.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{n} in {stream!r}" for stream, n in counts.items())
            raise ValueError(f"sources must have equally many rows, row n being the same sample in each, got {listed}")
        files = AlignedFiles(readers)
        if ids is not None:
            check_ids(ids, sources, files.n_rows)
        for stream, found in (files.scan() if scan else {}).items():
            if found.not_finite:
                raise ValueError(
                    f"{readers[stream].title} must be finite, but {found.not_finite} of {files.n_rows} rows are not; "
                    f"the first is row {found.first_not_finite}"
                )
    except BaseException:
        for reader in readers.values():
            reader.close()
        raise
    return files


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")


def blocks(reader: Reader, bytes_at_once: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of all rows of a reader in order, in whole granules of about so many bytes."""
    granules = max(1, bytes_at_once // (reader.row_bytes * reader.granule))
    step = granules * reader.granule
    return ((start, min(start + step, reader.n_rows)) for start in range(0, reader.n_rows, step))


def _scan(reader: Reader) -> Scan:
    not_finite, first, zero = 0, None, 0
    for start, stop in blocks(reader, SCANNED_TOGETHER):
        rows = reader.rows(start, stop)
        zero += int((rows == 0).all(1).sum())
        if (found := first_not_finite(rows)) is not None:
            first = start + found if first is None else first
            not_finite += int((~rows.isfinite()).any(1).sum())
    return Scan(not_finite, first, zero)
