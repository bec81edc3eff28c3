"""What every file format answers: rows of one stream, by number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparc_fast.ops import backends

from .shuffle import Rows

__all__ = ["FLOATS", "Reader", "Source", "Spans", "TensorReader", "first_not_finite"]

Where = str | Path | Sequence[str | Path]
"""A file, or several one after the other: a list of them, a folder, or a pattern such as ``"shards/*.npy"``."""
Source = Where | tuple[Where, str] | Tensor | npt.NDArray[Any]
"""Files, (files, name of the data set in each), or rows already in memory, [N, D_s]."""

Spans = Sequence[tuple[int, int]]
"""Runs of neighbouring rows, (start, stop) each."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEFAULT_NAME = "features"  # what the research code's extraction scripts call it
_cpu: Any = import_module("sparc_fast._cpu") if "cpu" in backends.available("cpu") else None
"""The compiled module's help for the loader, where it is there: all of it has a way round in Python."""
PICKED_TOGETHER = 2**19  # bytes that picking single rows reads before it puts them where they belong
READ_OVER = 2**14  # bytes between two rows that are read along: another read would take longer
_NUMPY = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


class Reader(ABC):
    """Rows of one stream, [N, D_s], in the dtype in which they are stored.

    `rows` may be called from several threads at once.
    """

    scattered = False
    """Whether rows are best asked for many at a time, however they lie: a loader then reads a window in one piece."""
    draws = False
    """Whether its rows are others in every epoch."""
    order_bytes = 0
    """Bytes for each row that is read, to put it in its place."""
    tokens = 1
    """Rows of a sample, where its file says that it has several."""

    def __init__(
        self, title: str, shape: tuple[int, ...], dtype: torch.dtype, *, granule: int = 1, scratch: int = 0
    ) -> None:
        if len(shape) == 3:
            raise ValueError(
                f"{title} must hold rows of one stream, [N, D_s], got shape {list(shape)}: "
                "save the tokens of all samples as rows, array.reshape(-1, D_s)"
            )
        if len(shape) != 2 or shape[1] < 1:
            raise ValueError(f"{title} must hold rows of one stream, [N, D_s], got shape {list(shape)}")
        if dtype not in FLOATS:
            raise ValueError(f"{title} must hold float16, bfloat16, float32 or float64, got {dtype}")
        self.title = title
        """The file and the data set in it, for messages."""
        self.n_rows, self.width, self.dtype = int(shape[0]), int(shape[1]), dtype
        self.granule = max(1, granule)
        """Rows that the format can only read together; reads that start at multiples of it waste nothing."""
        self.decodes = self.granule
        """Rows that are decoded for one: as many as the granule, or more where rows are picked in another order."""
        self.scratch = scratch
        """Bytes that a read takes beyond its result."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        return self.width * self.dtype.itemsize

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows start <= n < stop, [stop - start, D_s], in `dtype`; written to `out` where it is given (contiguous)."""
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"rows must lie in 0 to {self.n_rows} of {self.title}, got {start} to {stop}")
        if out is None:
            out = torch.empty(stop - start, self.width, dtype=self.dtype, device="cpu")
        elif out.shape != (stop - start, self.width) or out.dtype != self.dtype or not out.is_contiguous():
            expected = f"contiguous {self.dtype} of shape {[stop - start, self.width]}"
            raise ValueError(f"out must be {expected}, got {out.dtype} of {list(out.shape)}")
        if start < stop:
            self._fill(start, out)
        return out

    @abstractmethod
    def _fill(self, start: int, out: Tensor) -> None:
        """Write len(out) >= 1 rows from row `start` to `out`."""

    def read(self, spans: Spans, out: Tensor, check_finite: bool) -> None:
        """The rows of these spans one after the other to `out`; ValueError names one that is not finite."""
        at = 0
        for start, stop in spans:
            rows = self.rows(start, stop, out[at : at + stop - start])
            if check_finite and (found := first_not_finite(rows)) is not None:
                self._refuse(spans, at + found)
            at += stop - start

    def _refuse(self, spans: Spans, position: int) -> NoReturn:
        """That the row at this position of what was read is not finite."""
        numbers = chain.from_iterable(range(*span) for span in spans)
        title, row = self.origin(next(islice(numbers, position, None)))
        raise ValueError(f"{title} must be finite, but row {row} is not")

    def pick(self, rows: Rows, places: Rows, out: Tensor) -> None:
        """Row rows[i] to out[places[i]] for every i; `rows` ascend, and may repeat.

        Neighbours are read together, and as many as go into half a megabyte before they are put in their places.
        """
        if not len(rows):
            return
        unit = self._picked_together()
        far = (np.diff(rows) > READ_OVER // self.row_bytes + 1) & (np.diff(rows // self.granule) > 0)
        first = np.flatnonzero(np.append(True, far | (np.diff(rows // unit) > 0)))  # which of `rows` begin a span
        begins, ends = rows[first], rows[np.append(first[1:], len(rows)) - 1] + 1
        after = np.cumsum(ends - begins)
        within = after - ends  # to be added to a row of each span: where it is when all are read one after the other
        edges = np.flatnonzero(np.append(True, np.diff((after - 1) // unit) > 0))  # which spans begin a batch of them
        batches = list(zip(edges.tolist(), [*edges[1:].tolist(), len(first)], strict=True))
        scratch = torch.empty(2 * unit, self.width, dtype=self.dtype, device="cpu")
        for i, j in batches:
            spans = list(zip(begins[i:j].tolist(), ends[i:j].tolist(), strict=True))
            self.will_need(list(zip(begins[j : 2 * j - i].tolist(), ends[j : 2 * j - i].tolist(), strict=True)))
            low, high = int(first[i]), int(first[j]) if j < len(first) else len(rows)
            counts = np.diff(np.append(first[i:j], high))
            base = int(within[i] + begins[i])
            position = rows[low:high] + np.repeat(within[i:j], counts) - base
            n, to = int(after[j - 1]) - base, places[low:high]
            if n == high - low and (np.diff(to) == 1).all() and (np.diff(position) == 1).all():
                self.read(spans, out[to[0] : to[0] + n], False)
                continue
            self.read(spans, scratch[:n], False)
            for at in range(0, high - low, unit):
                some = scratch.index_select(0, torch.from_numpy(position[at : at + unit]))
                out.index_copy_(0, torch.from_numpy(to[at : at + unit]), some)

    def _picked_together(self) -> int:
        """Rows, in whole granules."""
        return max(1, PICKED_TOGETHER // (self.row_bytes * self.granule)) * self.granule

    @property
    def pick_scratch(self) -> int:
        """Bytes that `pick` takes."""
        return self.scratch + 3 * self._picked_together() * self.row_bytes

    def origin(self, row: int) -> tuple[str, int]:
        """(title of the file, number in it) of a row."""
        return self.title, row

    def at(self, seed: int, epoch: int) -> Reader:
        """The rows of an epoch: these, where they are the same in all."""
        return self

    def will_need(self, spans: Spans) -> None:  # noqa: B027
        """A hint that these rows are wanted soon; does nothing where the format has no use for it."""

    def close(self) -> None:  # noqa: B027
        """Let go of the file."""


@contextmanager
def closed_on_failure() -> Iterator[list[Reader]]:
    """A list for readers, which are closed where the block does not end well."""
    readers: list[Reader] = []
    try:
        yield readers
    except BaseException:
        for reader in readers:
            reader.close()
        raise


class TensorReader(Reader):
    """Rows of a tensor, which may be a map of a file."""

    def __init__(self, tensor: Tensor, title: str) -> None:
        if tensor.layout != torch.strided:
            raise ValueError(f"{title} must be dense, got {tensor.layout}: save tensor.to_dense()")
        super().__init__(title, tuple(tensor.shape), tensor.dtype)
        self._tensor: Tensor | None = tensor.detach()

    def _fill(self, start: int, out: Tensor) -> None:
        if self._tensor is None:
            raise ValueError(f"{self.title} must be open to be read, got a closed file")
        out.copy_(self._tensor[start : start + len(out)])

    def close(self) -> None:
        self._tensor = None


def choose_name(names: Collection[str], wanted: str | None, path: Path) -> str:
    """The data set meant: the one asked for, else "features", else the only one there is."""
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"name must be a data set of {path}, which has {_listed(names)}, got {wanted!r}")
        return wanted
    if DEFAULT_NAME in names:
        return DEFAULT_NAME
    if len(names) != 1:
        raise ValueError(
            f"{path} must hold a data set {DEFAULT_NAME!r} or a single one, or be given as (path, name), "
            f"on the command line path#name, got {_listed(names)}"
        )
    return next(iter(names))


def refuse_name(path: Path, name: str | None, what: str) -> None:
    """Raise ValueError where a data set of a file that has just one is named."""
    if name is not None:
        raise ValueError(f"{path} must be given without a name, as it holds a single {what}, got {name!r}")


def _listed(names: Collection[str], at_most: int = 12) -> str:
    shown = ", ".join(map(repr, sorted(names)[:at_most]))
    return (shown or "none") + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


def numpy_dtype(dtype: np.dtype[Any]) -> torch.dtype | None:
    """The torch dtype of a native numpy float; None for anything else."""
    return _NUMPY.get(dtype.name) if dtype.isnative else None


def require(module: str, path: Path) -> Any:
    """An optional library, or one clear error."""
    try:
        return import_module(module)
    except ImportError as error:
        extra = module.partition(".")[0]
        raise ImportError(f"reading {path.name} needs {extra}: pip install 'sparc_fast[{extra}]'") from error


SUMMED_TOGETHER = 2**15 - 1  # numbers: torch adds up more than these with several threads, which others need


def first_not_finite(rows: Tensor) -> int | None:
    """Position of the first of `rows`, [n, D_s] contiguous, that holds NaN or infinity; None if there is none.

    Where nothing is compiled: a sum is finite only if all its terms are, and adding up is the fastest thing to do with
    numbers. A sum of finite numbers may overflow, so where one is not finite a second look decides.
    """
    if _cpu is not None:
        position = _cpu.first_not_finite(rows, rows.dtype == torch.bfloat16)
        return None if position < 0 else position // rows.shape[1]
    numbers = rows.reshape(-1)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    for start in range(0, len(numbers), SUMMED_TOGETHER):
        some = numbers[start : start + SUMMED_TOGETHER]
        if not math.isfinite(some.sum(dtype=wide).item()) and len(found := (~some.isfinite()).nonzero()):
            return (start + int(found[0])) // rows.shape[1]
    return None
