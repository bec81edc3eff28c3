"""Several files, one stream each, whose rows belong together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparc_fast.files import Closing
from sparc_fast.sizes import counted

from .feature_folder import FeatureFolder, Split, samples_and_tokens
from .formats import open_reader
from .ids import Ids, check_equal, check_lengths, ids_of_streams
from .join import Join, Matched, Repeated, check_words, join_by
from .readers import FLOATS, Reader, Source, closed_on_failure, first_not_finite
from .shuffle import Rows

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


class AlignedFiles(Closing):
    """Streams in their files: row n of every stream is the same sample. `open` makes it."""

    def __init__(
        self,
        readers: Mapping[str, Reader],
        present: Tensor | None = None,
        matched: Matched | None = None,
        groups: Rows | None = None,
        ids: npt.NDArray[Any] | None = None,
    ) -> None:
        self.readers = dict(readers)
        self.n_rows = next(iter(self.readers.values())).n_rows
        """N."""
        self.d_streams = {stream: reader.width for stream, reader in self.readers.items()}
        """name -> width D_s, in order: what `SPARC` takes."""
        self.present = present
        """bool [N, S], True where a sample has a stream; None where every sample has all. Absent rows are zeros."""
        self.matched = matched
        """How many rows of each stream were joined by their identifiers; None where none were."""
        self.groups = groups
        """Where the rows of each sample begin, with `repeated="all"`, [samples + 1]: they are kept together."""
        self.ids = ids
        """The identifier of every row, integers or text [N]; None where none were given."""

    def __len__(self) -> int:
        return self.n_rows

    def sample_of_rows(self) -> npt.NDArray[np.int64] | None:
        """The number of each row's sample, [N], where samples have several rows."""
        return None if self.groups is None else np.repeat(np.arange(len(self.groups) - 1), np.diff(self.groups))

    def __repr__(self) -> str:
        widths = ", ".join(f"{stream} {width:,}" for stream, width in self.d_streams.items())
        return f"AlignedFiles({counted(self.n_rows, 'row')}: {widths})"

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows start <= n < stop of all streams side by side, [stop - start, D], in `dtype`."""
        check_dtype(dtype)
        return torch.cat([reader.rows(start, stop).to(dtype) for reader in self.readers.values()], dim=1)

    def room(self, n_rows: int, streams: Iterable[str]) -> dict[str, Tensor]:
        """What so many rows of some streams, as they are stored, are read into: [n_rows, D_s] each."""
        readers = {stream: self.readers[stream] for stream in streams}
        return {s: torch.empty(n_rows, r.width, dtype=r.dtype, device="cpu") for s, r in readers.items()}

    def read(self, start: int, stop: int, room: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows start <= n < stop, in the first rows of `room`; ValueError names the file and row of NaN or infinity."""
        rows = {stream: whole[: stop - start] for stream, whole in room.items()}
        for stream, out in rows.items():
            self.readers[stream].read([(start, stop)], out, True)
        return rows

    def scan(self) -> dict[str, Scan]:
        """Read everything once, a few MB at a time, and count rows that are not finite or all 0."""
        columns = [None] * len(self.readers) if self.present is None else self.present.unbind(1)
        return {
            stream: _scan(reader, present)
            for (stream, reader), present in zip(self.readers.items(), columns, strict=True)
        }

    def close(self) -> None:
        """Close the files."""
        for reader in self.readers.values():
            reader.close()


def open(
    sources: Mapping[str, Source] | str | Path,
    *,
    split: Split = "all",
    ids: Ids | None = None,
    join: Join | None = None,
    repeated: Repeated | None = None,
    scan: bool = False,
) -> AlignedFiles:
    """Open the files of several streams whose rows are the same samples, in the same order or by their identifiers.

    Args:
        sources: name -> where a stream's rows [N, D_s] are, in the order of the model's streams: a path, (path, name
            of the data set in it), or a tensor or array. Several files are one stream: a list of them, a folder or a
            pattern such as ``"shards/*.npy"``, in natural order. HDF5 (.h5, .hdf5), NumPy (.npy), safetensors,
            torch.save (.pt, .pth), Parquet and Arrow (.parquet, .arrow, .feather: one column of lists), holding
            float16, bfloat16, float32 or float64. Without a name: "features", else the only data set there is.
            A folder of features that `sparc-fast extract` wrote is a source of all its streams, or of one.
        split: "train", "held_out" or "all" samples of such folders.
        ids: identifiers that must be equal row by row: the name of their data set or column in every file, or
            stream -> identifiers (a sequence, a text file with one a line, a .npy file, or (path, name)).
        join: "inner" takes the samples whose identifier every stream has, "outer" all that any has: absent rows are
            zeros, and `AlignedFiles.present` says which. In the order of the first stream, then of what only the second
            has, and so on; `AlignedFiles.matched` counts.
        repeated: what several rows of a stream with one identifier are, such as the captions of an image: "sample", one
            of them is drawn in every epoch; "all", each is a sample, with the rows of the other streams repeated.
        scan: read everything once and refuse NaN and infinity. The loader checks what it reads in any case.

    Raises:
        ValueError: a file is truncated, foreign or of a wrong shape or dtype, numbers of rows or ids differ, or a
            scanned row is not finite.
        FileNotFoundError: a file is missing.
        ImportError: h5py or pyarrow, which HDF5 and Parquet or Arrow need, is missing.
    """
    if isinstance(sources, str | Path) and not Path(sources).is_file():
        folder = FeatureFolder(sources)
        sources = {stream: (folder.path, stream) for stream in folder.streams}
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    if not isinstance(sources, Mapping) or not sources or not all(isinstance(s, str) and s for s in sources):
        raise ValueError(
            f"sources must map the name of at least one stream to its file, or be a folder of features, got {sources!r}"
        )
    with closed_on_failure() as opened:
        for stream, source in sources.items():
            opened.append(open_reader(source, stream, split))
        files = _aligned(sources, dict(zip(sources, opened, strict=True)), ids, join, repeated, split)
        for stream, found in (files.scan() if scan else {}).items():
            if found.first_not_finite is not None:
                title, row = files.readers[stream].origin(found.first_not_finite)
                raise ValueError(
                    f"{title} must be finite, but {found.not_finite} of {files.n_rows} rows are not; "
                    f"the first is row {row}"
                )
    return files


def _aligned(
    sources: Mapping[str, Source],
    readers: dict[str, Reader],
    ids: Ids | None,
    join: Join | None,
    repeated: Repeated | None,
    split: Split,
) -> AlignedFiles:
    check_words(join, repeated)
    if join is not None:
        if ids is None:
            raise ValueError(f"ids must be given for join to match rows by, got join {join!r} without ids")
        found = ids_of_streams(ids, sources, of_all=True, split=split)
        check_lengths(found, readers)
        return AlignedFiles(*join_by(found, readers, join, repeated))
    readers, groups = samples_and_tokens(readers)
    counts = {stream: reader.n_rows for stream, reader in readers.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{n} in {stream!r}" for stream, n in counts.items())
        raise ValueError(
            f"sources must have equally many rows, row n being the same sample in each, got {listed}; "
            "rows in another order, or missing, are matched by ids and join (on the command line --ids and --join)"
        )
    if ids is None:
        return AlignedFiles(readers, groups=groups)
    found = ids_of_streams(ids, sources, of_all=False, split=split)
    if groups is not None:  # one a sample, or one a token
        found = {s: np.repeat(of_stream, counts[s] // max(len(of_stream), 1)) for s, of_stream in found.items()}
    check_lengths(found, readers)
    check_equal(found)
    return AlignedFiles(readers, groups=groups, ids=next(iter(found.values())))


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be torch.float32, bfloat16, float16 or float64, got {dtype!r}")


def blocks(reader: Reader, bytes_at_once: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of all rows of a reader in order, in whole granules of about so many bytes."""
    granules = max(1, bytes_at_once // (reader.row_bytes * reader.granule))
    step = granules * reader.granule
    return ((start, min(start + step, reader.n_rows)) for start in range(0, reader.n_rows, step))


def _scan(reader: Reader, present: Tensor | None) -> Scan:
    not_finite, first, zero = 0, None, 0
    for start, stop in blocks(reader, SCANNED_TOGETHER):
        rows = reader.rows(start, stop)
        is_zero = (rows == 0).all(1)
        zero += int((is_zero if present is None else is_zero & present[start:stop]).sum())
        if (found := first_not_finite(rows)) is not None:
            first = start + found if first is None else first
            not_finite += int((~rows.isfinite()).any(1).sum())
    return Scan(not_finite, first, zero)
