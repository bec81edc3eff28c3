"""Identifiers of rows: do all files hold the same samples in the same order?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from . import npy
from .feature_folder import FeatureFolder, Split, is_feature_folder
from .formats import FORMATS, Format, where_and_name
from .readers import Reader, Source
from .shards import files_of, is_list_of_files

__all__ = ["Ids", "as_comparable", "check_equal", "check_lengths", "ids_of_streams", "read_ids"]

Ids = str | Mapping[str, "str | Path | tuple[str | Path, str] | Sequence[Any] | npt.NDArray[Any] | Tensor"]
"""The name of the identifiers' data set in every file, or a source of them for each stream to be compared."""
SUFFIXES = (*FORMATS, ".txt")
"""Of files of identifiers in a folder."""


def ids_of_streams(
    ids: Ids, sources: Mapping[str, Source], of_all: bool, split: Split = "all"
) -> dict[str, npt.NDArray[Any]]:
    """stream -> identifiers, of at least two streams, or of all."""
    if isinstance(ids, str):
        if in_memory := [stream for stream, source in sources.items() if not isinstance(source, str | Path | Sequence)]:
            raise ValueError(
                f"ids must map streams to identifiers where a source is in memory, as {in_memory[0]!r}, got {ids!r}"
            )
        places = {s: where_and_name(source, s) for s, source in sources.items()}
        for stream, (where, _) in places.items():
            if not is_feature_folder(where) and _format(files_of(where, f"source of {stream!r}", FORMATS)[0]) is npy:
                raise ValueError(
                    f"ids must map streams to identifiers where a file has rows alone, as {where}, got {ids!r}"
                )
        return {
            s: _of_folder(FeatureFolder(where), ids, name or s, split)
            if is_feature_folder(where)
            else read_ids((where, ids))
            for s, (where, name) in places.items()
        }
    if not isinstance(ids, Mapping) or set(ids) - set(sources) or len(ids) < (len(sources) if of_all else 2):
        wanted = "all" if of_all else "at least two"
        raise ValueError(f"ids must be a name, or identifiers of {wanted} of the streams {list(sources)}, got {ids!r}")
    return {stream: read_ids(ids[stream]) for stream in sources if stream in ids}


def check_lengths(found: Mapping[str, npt.NDArray[Any]], readers: Mapping[str, Reader]) -> None:
    """ValueError unless there is one a row."""
    for stream, ids in found.items():
        if len(ids) != (n := readers[stream].n_rows):
            raise ValueError(f"ids of {stream!r} must be one a row, {n} in all, got {len(ids)}")


def check_equal(found: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raise ValueError unless the streams' identifiers are equal row by row; it names the first row that differs."""
    (first, theirs), *others = found.items()
    for stream, mine in others:
        here, there = as_comparable([mine, theirs])
        if (differs := here != there).any():
            row = int(differs.argmax())
            raise ValueError(
                f"ids of {stream!r} must match those of {first!r} row by row, got {str(here[row])!r} and "
                f"{str(there[row])!r} in row {row}, the first that differ"
            )


def as_comparable(several: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Integers, or else all of them text."""
    same = len({ids.dtype.kind for ids in several}) == 1
    return [ids if same else ids.astype(np.str_) for ids in several]


def read_ids(source: Any) -> npt.NDArray[Any]:
    """Identifiers, [N]: integers, or text.

    `source` is a sequence, a text file with one in a line, a .npy file, (file, name) of a data set or column, or
    several such files: a list, a folder or a pattern.
    """
    if isinstance(source, Tensor):
        return _plain(source.cpu().numpy(), "tensor")
    if isinstance(source, str | Path):
        where, name = source, None
    elif isinstance(source, tuple) and len(source) == 2 and _is_place(source[0]) and isinstance(source[1], str):
        where, name = source
    elif is_list_of_files(source, SUFFIXES) and Path(source[0]).exists():
        where, name = source, None
    else:
        return _plain(np.asarray(source), "sequence")
    parts = [_read(path, name) for path in files_of(where, "ids", SUFFIXES, others=True)]
    return parts[0] if len(parts) == 1 else np.concatenate(as_comparable(parts))


def _of_folder(folder: FeatureFolder, column: str, stream: str, split: Split) -> npt.NDArray[Any]:
    """A column of the items, one a row of the stream."""
    return np.repeat(_plain(np.array(folder.column(column, split)), str(folder.path)), folder.tokens(stream))


def _is_place(where: Any) -> bool:
    return is_list_of_files(where, SUFFIXES) or (
        isinstance(where, str | Path) and (_format(where) is not None or Path(where).is_dir())
    )


def _read(path: Path, name: str | None) -> npt.NDArray[Any]:
    if (form := _format(path)) is None:
        return _plain(np.array(_lines(path), dtype=np.str_), str(path))
    if name is None and form is not npy:
        raise ValueError(f"ids in {path} must be given as (path, name of the data set), path#name, got the path alone")
    return _plain(form.read_ids(path, name), str(path) if name is None else f"{path}[{name}]")


def _lines(path: Path) -> list[str]:
    """Lines end in a newline, before which a carriage return may stand, and in nothing else."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"ids in {path} must be text in UTF-8, got other bytes: {error.reason}") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def _format(path: str | Path) -> Format | None:
    return FORMATS.get(Path(path).suffix.lower())


def _plain(ids: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """[N] of int64, or of text."""
    if ids.ndim == 2 and ids.shape[1] == 1:
        ids = ids[:, 0]
    if ids.ndim != 1:
        raise ValueError(f"ids must be one a row, [N], got shape {list(ids.shape)} in {where}")
    if not len(ids):
        return np.empty(0, np.int64)
    if ids.dtype.kind in "iu":
        return ids.astype(np.str_ if ids.max(initial=0) > np.iinfo(np.int64).max else np.int64)
    if ids.dtype.kind not in "SUO":
        raise ValueError(f"ids must be integers or text, got {ids.dtype} in {where}")
    values = ids.tolist()
    if missing := [row for row, value in enumerate(values) if value is None or value != value]:
        raise ValueError(f"ids must be there for every row, got none in row {missing[0]} of {where}")
    return np.array([i.decode() if isinstance(i, bytes) else str(i) for i in values], dtype=np.str_)
