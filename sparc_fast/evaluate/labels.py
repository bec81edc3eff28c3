"""What is known of each sample: the concepts it carries, and the group it belongs to; in memory or in files."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparc_fast.data.formats import FORMATS

__all__ = ["PerSample", "as_groups", "as_ids", "as_labels", "as_named_labels"]

PerSample = Tensor | npt.NDArray[Any] | Sequence[Any] | str | Path | tuple[str | Path, str]
"""A tensor, array or list; or a file, "file:column", or (file, column)."""

TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*FORMATS, *TABLES)
COLUMN = "label"  # the one meant where a file has several
INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")


def as_labels(labels: PerSample, leading: Sequence[int], name: str = "labels") -> Tensor:
    """Which concepts each sample carries, bool [n, C], for inputs with these leading dimensions, n samples flattened.

    Given as bool [N, C]; as bool [N], one concept; or as classes [N], a concept for each that occurs, in order:
    integers, -1 for none, or names, "" for none. For inputs [N, T, D] those of a sample are repeated for its T tokens;
    or there are [N, T], or N * T, of them, one a token.
    """
    return as_named_labels(labels, leading, name)[0]


def as_named_labels(labels: PerSample, leading: Sequence[int], name: str = "labels") -> tuple[Tensor, tuple[str, ...]]:
    """`as_labels`, and what each concept is called, [C]: its class, or the number of its column of truth values."""
    given = _Given(labels, name, f"bool [N={leading[0]}, C] or [N], or class ids or names [N]", leading)
    if given.values.dtype == np.bool_:
        truth = given.of_samples(truth=True)
        return torch.from_numpy(truth), tuple(map(str, range(truth.shape[1])))
    classes = given.of_samples()
    is_text = classes.dtype.kind == "U"
    if not is_text and classes.min(initial=0) < -1:
        raise ValueError(f"{name} must be class ids >= 0, or -1 for none, got {classes.min()}{given.where}")
    names, number = np.unique(classes, return_inverse=True)
    some = np.flatnonzero(names != ("" if is_text else -1))
    return torch.from_numpy(number[:, None] == some), tuple(map(str, names[some]))


def as_groups(groups: PerSample, leading: Sequence[int]) -> Tensor:
    """A number for the group of each sample, int64 [n]; given by ids [N], integers or text, or one a token."""
    given = _Given(groups, "groups", f"ids [N={leading[0]}], integers or text", leading)
    if given.values.dtype == np.bool_:
        raise given.error()
    ids = given.of_samples()
    if ids.dtype.kind == "U" and (ids == "").any():
        raise ValueError(f"groups must have an id for every sample, got none for {int((ids == '').argmax())}")
    return torch.from_numpy(np.unique(ids, return_inverse=True)[1].astype(np.int64))


def as_ids(ids: PerSample, what: str) -> npt.NDArray[Any]:
    """Identifiers [n] of rows of labels or groups, in any of their forms, integers or text."""
    given = _Given(ids, what, "ids [N], integers or text", (0,))
    if given.values.ndim != 1 or given.values.dtype.kind not in "iU":
        raise given.error()
    return given.values


class _Given:
    """Truth values, integers or text, and the words for what is wrong with it."""

    def __init__(self, source: PerSample, what: str, expected: str, leading: Sequence[int]) -> None:
        if not leading:
            raise ValueError(f"{what} must be of samples, [N], got inputs without a leading dimension")
        self.what, self.expected, self.leading = what, expected, tuple(leading)
        self.n, self.where = math.prod(leading), ""
        if (file := _path_and_column(source)) is not None:
            path, column = file
            self.where = f" in {path}" + (f":{column}" if column else "")
            values = self._read(path, column)
        elif isinstance(source, Tensor):  # NumPy lacks some dtypes, and all that is sparse
            if source.layout != torch.strided or source.is_floating_point():
                kind = source.dtype if source.layout == torch.strided else source.layout
                raise self.error(str(kind).removeprefix("torch."), source.shape)
            values = source.cpu().numpy()
        else:
            values = _array(source)
        self.values = values = _as_text(values) if values.dtype.kind in "SUO" else values
        if values.dtype.kind not in "biuU" or (values.dtype.kind == "u" and values.max(initial=0) >= 2**63):
            raise self.error()

    def of_samples(self, truth: bool = False) -> npt.NDArray[Any]:
        """One for each of the n samples, [n], or truth values, [n, C]."""
        values = self.values[:, None] if truth and self.values.ndim == 1 else self.values
        n_outer = values.ndim - truth
        outer, inner = values.shape[:n_outer], values.shape[n_outer:]
        if outer in ((self.n,), self.leading):
            return values.reshape(self.n, *inner)
        if outer != self.leading[:1]:
            raise self.error()
        return values.repeat(self.n // max(len(values), 1), axis=0)

    def error(self, kind: str = "", shape: Sequence[int] = ()) -> ValueError:
        """What was expected and what came: the values, or something of this kind and shape."""
        if not kind:
            kind = {"U": "text", "V": "objects"}.get(self.values.dtype.kind, str(self.values.dtype))
            shape = self.values.shape
        tokens = f", or one for each of {list(self.leading)} tokens" if len(self.leading) > 1 else ""
        return ValueError(f"{self.what} must be {self.expected}{tokens}, got {kind} {list(shape)}{self.where}")

    def _read(self, path: Path, column: str | None) -> npt.NDArray[Any]:
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise ValueError(f"{self.what} must be in a file that ends in one of {', '.join(SUFFIXES)}, got {path}")
        if not path.is_file():
            raise FileNotFoundError(f"{self.what} must be a file, but there is none at {path}")
        try:
            if suffix in TABLES:
                return _column_of_table(path, column, TABLES[suffix], {self.leading[0], self.n})
            if suffix == ".npy":
                return _array_of_file(path, column)
            return _data_set(path, column)
        except ValueError as error:
            raise ValueError(f"{self.what} must be {self.expected}, but {error}") from None


def _path_and_column(source: PerSample) -> tuple[Path, str | None] | None:
    """ "labels.csv:class" -> (labels.csv, class), but a path that is there is taken whole; None for what is no file."""
    if isinstance(source, tuple) and len(source) == 2 and all(isinstance(one, str | Path) for one in source):
        path, column = Path(source[0]), str(source[1])
        return (path, column) if path.suffix.lower() in SUFFIXES else None
    if not isinstance(source, str | Path):
        return None
    path_text, colon, column = str(source).rpartition(":")
    if colon and not Path(source).exists() and Path(path_text).suffix.lower() in SUFFIXES:
        return Path(path_text), column
    return Path(source), None


def _array(source: Any) -> npt.NDArray[Any]:
    try:
        found = np.asarray(source)
    except ValueError:  # rows of several lengths
        return np.empty((), dtype=np.void)
    return found if found.shape != (0,) else found.astype(np.int64)  # an empty list has no dtype


def _as_text(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Names; integers where all are written as such. What is missing is ""."""
    flat = values.ravel().tolist()
    if not all(value is None or isinstance(value, str | bytes | int) or value != value for value in flat):
        return np.empty(values.shape, dtype=np.void)
    texts = [
        "" if v is None or v != v else v.decode(errors="backslashreplace") if isinstance(v, bytes) else str(v)
        for v in flat
    ]
    if texts and all(map(INTEGER.fullmatch, texts)):
        return np.array([int(text) for text in texts], np.int64).reshape(values.shape)
    return np.array(texts, dtype=np.str_).reshape(values.shape)


def _array_of_file(path: Path, column: str | None) -> npt.NDArray[Any]:
    if column is not None:
        raise ValueError(f"{path} holds a single array, and no column {column!r}")
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):  # whose words advise to unpickle, which runs whatever code a file holds
        raise ValueError(f"{path} is truncated or foreign, or holds objects: save array.astype(str)") from None
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path} is no .npy file")
    return found


def _data_set(path: Path, column: str | None) -> npt.NDArray[Any]:
    form = FORMATS[path.suffix.lower()]
    try:
        return form.read_ids(path, column or COLUMN)
    except ValueError:
        if column is not None:
            raise
    try:
        return form.read_ids(path, None)
    except ValueError:
        return form.read_ids(path, COLUMN)  # whose words are about the column that is meant


def _column_of_table(path: Path, column: str | None, delimiter: str, lengths: Collection[int]) -> npt.NDArray[Any]:
    """Below a line of names, which a table of a single column may lack."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table in UTF-8: {error}") from None
    while rows and not rows[-1]:
        rows.pop()
    if max(map(len, rows), default=0) == 1:  # an empty line is a sample without
        rows = [row or [""] for row in rows]
    rows = [row for row in rows if row]
    head = rows[0] if rows else []
    if uneven := next((n for n, row in enumerate(rows) if len(row) != len(head)), 0):
        raise ValueError(f"{path} has {len(head)} columns, but {len(rows[uneven])} in its row {uneven}")
    if len(head) > 1 or column is not None:
        if (name := column or COLUMN) not in head:
            hint = "" if column else ": name one, FILE:COLUMN"
            raise ValueError(f"{path} has no column {name!r} among {', '.join(map(repr, head)) or 'none'}{hint}")
        place, rows = head.index(name), rows[1:]
    else:
        place = 0
        if head == [COLUMN] or (len(rows) not in lengths and len(rows) - 1 in lengths):
            rows = rows[1:]
    return np.array([row[place] for row in rows], dtype=np.str_)
