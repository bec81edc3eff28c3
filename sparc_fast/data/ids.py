"""Identifiers of rows: do all files hold the same samples in the same order?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from . import npy
from .formats import FORMATS, Format
from .readers import Source

__all__ = ["Ids", "check_ids", "read_ids"]

Ids = str | Mapping[str, "str | Path | tuple[str | Path, str] | Sequence[Any] | npt.NDArray[Any] | Tensor"]
"""The name of the identifiers' data set in every file, or a source of them for each stream to be compared."""


def check_ids(ids: Ids, sources: Mapping[str, Source], n_rows: int) -> None:
    """Raise ValueError unless the streams' identifiers are equal row by row; it names the first row that differs."""
    if isinstance(ids, str):
        if in_memory := [stream for stream, source in sources.items() if not isinstance(source, str | Path | tuple)]:
            raise ValueError(
                f"ids must map streams to identifiers where a source is in memory, as {in_memory[0]!r}, got {ids!r}"
            )
        of_stream: dict[str, Any] = {s: (f[0] if isinstance(f, tuple) else f, ids) for s, f in sources.items()}
    elif isinstance(ids, Mapping) and len(ids) >= 2 and not set(ids) - set(sources):
        of_stream = dict(ids)
    else:
        raise ValueError(
            f"ids must be a name, or identifiers of at least two of the streams {list(sources)}, got {ids!r}"
        )
    first: tuple[str, npt.NDArray[Any]] | None = None
    for stream, source in of_stream.items():
        found = read_ids(source)
        if len(found) != n_rows:
            raise ValueError(f"ids of {stream!r} must be one a row, {n_rows} in all, got {len(found)}")
        if first is None:
            first = stream, found
            continue
        mine, theirs = (found, first[1]) if found.dtype.kind == first[1].dtype.kind else map(_text, (found, first[1]))
        if (differs := mine != theirs).any():
            row = int(differs.argmax())
            raise ValueError(
                f"ids of {stream!r} must match those of {first[0]!r} row by row, got {str(mine[row])!r} and "
                f"{str(theirs[row])!r} in row {row}, the first that differ"
            )


def read_ids(source: Any) -> npt.NDArray[Any]:
    """Identifiers, [N]: integers, or text.

    `source` is a sequence, a text file with one in a line, a .npy file, or (file, name) of a data set or column.
    """
    if isinstance(source, Tensor):
        return _plain(source.cpu().numpy(), "tensor")
    named = isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], str | Path)
    path, name = source if named else (source, None)
    if not isinstance(path, str | Path) or (named and _format(path) is None):
        return _plain(np.asarray(source), "sequence")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"ids must be in a file, but there is none at {path}")
    if (form := _format(path)) is None:
        return _plain(np.array(path.read_text(encoding="utf-8").splitlines()), str(path))
    if name is None and form is not npy:
        raise ValueError(f"ids in {path} must be given as (path, name of the data set), got the path alone")
    return _plain(form.read_ids(path, name), str(path) if name is None else f"{path}[{name}]")


def _format(path: str | Path) -> Format | None:
    return FORMATS.get(Path(path).suffix.lower())


def _plain(ids: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """[N] of int64, or of text."""
    if ids.ndim == 2 and ids.shape[1] == 1:
        ids = ids[:, 0]
    if ids.ndim != 1:
        raise ValueError(f"ids must be one a row, [N], got shape {list(ids.shape)} in {where}")
    if ids.dtype.kind in "iu":
        return ids.astype(np.int64)
    if ids.dtype.kind in "SUO":
        return np.array([i.decode() if isinstance(i, bytes) else str(i) for i in ids.tolist()], dtype=np.str_)
    raise ValueError(f"ids must be integers or text, got {ids.dtype} in {where}")


def _text(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return ids.astype(np.str_)
