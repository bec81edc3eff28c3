"""Which rows of several files are the same samples, by their identifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparc_fast.sizes import counted

from .ids import as_comparable
from .readers import Reader
from .shuffle import Rows
from .views import PickedReader, SampledReader

__all__ = ["Join", "Joined", "Match", "Matched", "Repeated", "check_words", "join_by"]

Join = Literal["inner", "outer"]
"""Samples that every stream has, or all that any has."""
Repeated = Literal["sample", "all"]
"""Of several rows with one identifier, one drawn in every epoch, or each of them a sample of its own."""


class Match(NamedTuple):
    """What became of a stream's rows."""

    rows: int
    """In its files."""
    matched: int
    """Of them, those whose identifier is in the joined data."""
    absent: int
    """Samples that the stream does not have."""


@dataclass(frozen=True)
class Matched:
    """What a join by identifiers matched."""

    n_samples: int
    """Different identifiers in the joined data."""
    streams: Mapping[str, Match]

    def __str__(self) -> str:
        parts = [
            f"{one.matched:,} of {one.rows:,} rows of {stream!r}" + f", absent in {one.absent:,}" * bool(one.absent)
            for stream, one in self.streams.items()
        ]
        return f"{counted(self.n_samples, 'sample')} joined by id: {'; '.join(parts)}"


class Joined(NamedTuple):
    """Streams whose row n is the same sample."""

    readers: dict[str, Reader]
    present: Tensor | None
    """bool [N, S]; None where no stream lacks a sample."""
    matched: Matched
    groups: Rows | None
    """Where the rows of each sample begin, [samples + 1], where a sample may have several."""
    ids: npt.NDArray[Any]
    """Of each row."""


def check_words(join: Any, repeated: Any) -> None:
    for name, value, words in (("join", join, get_args(Join)), ("repeated", repeated, get_args(Repeated))):
        if value is not None and value not in words:
            raise ValueError(f'{name} must be None, "{words[0]}" or "{words[1]}", got {value!r}')
    if repeated is not None and join is None:
        raise ValueError(f'join must be "inner" or "outer" with repeated={repeated!r}, got None')


def join_by(
    ids: Mapping[str, npt.NDArray[Any]], readers: Mapping[str, Reader], join: Join, repeated: Repeated | None
) -> Joined:
    """Match the streams' rows by identifiers, one array [N_s] each.

    Samples come as in the first stream, then those that only the second has, and so on.
    """
    lengths = [len(found) for found in ids.values()]
    every = np.concatenate(as_comparable(list(ids.values())))
    _, first, sample = np.unique(every, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    of_row = np.split(rank[sample], np.cumsum(lengths)[:-1])
    counts = np.stack([np.bincount(samples, minlength=len(first)) for samples in of_row])
    if repeated is None:
        for (stream, found), samples, count in zip(ids.items(), of_row, counts, strict=True):
            _refuse_doubles(stream, found, samples, count)
    kept = (counts > 0).all(0) if join == "inner" else np.ones(len(first), np.bool_)
    if not kept.any():
        examples = ", ".join(f"{str(found[0])!r} in {stream!r}" for stream, found in ids.items() if len(found))
        raise ValueError(f"ids must have a sample in common to be joined, got none; the first are {examples or 'none'}")
    counts, names = counts[:, kept], every[np.sort(first)][kept]
    renamed = np.where(kept, np.cumsum(kept) - 1, -1)
    n, n_of = counts.shape[1], counts.max(0)
    matched = {
        stream: Match(length, int(count.sum()), int((count == 0).sum()))
        for stream, length, count in zip(ids, lengths, counts, strict=True)
    }
    times = n_of if repeated == "all" else np.ones(n, np.int64)
    groups = np.append(0, np.cumsum(times))
    expand = np.repeat(np.arange(n), times)  # of a row of the joined data, its sample ...
    nth = np.arange(len(expand)) - groups[expand]  # ... and which of that sample's rows it is
    joined: dict[str, Reader] = {}
    for (stream, reader), samples, count in zip(readers.items(), of_row, counts, strict=True):
        samples = renamed[samples]
        rows = np.argsort(samples, kind="stable")
        rows = rows[np.searchsorted(samples[rows], 0) :]  # those of one sample after those of another
        starts = np.append(0, np.cumsum(count))
        if repeated == "sample" and count.max() > 1:
            joined[stream] = SampledReader(reader, rows, starts)
            continue
        if (uneven := (count > 1) & (count != n_of)).any():
            some = int(uneven.argmax())
            raise ValueError(
                'repeated="all" takes one row of a sample from a stream, or as many as from the others, '
                f"got {count[some]} of {n_of[some]} from {stream!r} for its sample in row {rows[starts[some]]}"
            )
        row = starts[expand] + np.where(count[expand] > 1, nth, 0)
        numbers = np.append(rows, -1)[np.where(count[expand] > 0, row, -1)]
        same = len(numbers) == reader.n_rows and bool((numbers == np.arange(len(numbers))).all())
        joined[stream] = reader if same else PickedReader(reader, numbers)
    present = None if (counts > 0).all() else torch.from_numpy((counts > 0)[:, expand].T.copy())
    return Joined(joined, present, Matched(n, matched), groups if repeated == "all" else None, names[expand])


def _refuse_doubles(stream: str, ids: npt.NDArray[Any], samples: Rows, count: Rows) -> None:
    if count.max(initial=0) < 2:
        return
    order = np.argsort(samples, kind="stable")
    again = int(order[1:][np.diff(samples[order]) == 0].min())
    before = int(np.flatnonzero(samples == samples[again])[0])
    raise ValueError(
        f"ids of {stream!r} must be unique to be joined, got {str(ids[again])!r} in rows {before} and {again}; "
        'where several rows are one sample, repeated must be "sample" or "all"'
    )
