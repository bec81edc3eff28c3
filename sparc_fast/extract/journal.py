"""Rows, items and failures as they are written: batch by batch, each there in whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Journal", "State"]

JOURNAL, ITEMS, FAILED = "journal.jsonl", "items.jsonl", "failed.jsonl"
STORED = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "|V2"}  # bfloat16 as ml_dtypes saves it


@dataclass
class State:
    """How far an extraction is: a line of the journal."""

    consumed: int = 0
    """Items of the source that were looked at."""
    last: str = ""
    """The identifier of the last of them."""
    items: int = 0
    failed: int = 0
    items_bytes: int = 0
    failed_bytes: int = 0
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """stream -> (tokens of an item, width)."""
    pooled: dict[str, str] = field(default_factory=dict)
    """stream -> how its model's tokens became rows."""


class Journal:
    """The files of an extraction under way.

    A batch counts once its line stands in the journal, which is written last; what a killed process wrote beyond that
    is cut off. So every item is in all files or in none.
    """

    def __init__(
        self, folder: Path, streams: Mapping[str, Path], dtypes: Mapping[str, torch.dtype], shard_items: int
    ) -> None:
        self._journal, self._items, self.failed_path = folder / JOURNAL, folder / ITEMS, folder / FAILED
        self._rows = {name: Rows(path, dtypes[name], shard_items) for name, path in streams.items()}
        self.state, end = self._last_whole()
        for path, size in ((self._journal, end), (self._items, self.state.items_bytes),
                           (self.failed_path, self.state.failed_bytes)):  # fmt: skip
            path.touch()
            os.truncate(path, size)
        for name, rows in self._rows.items():
            rows.cut(self.state.items, *self.state.shapes.get(name, (0, 0)))

    def add(
        self,
        consumed: int,
        last: str,
        rows: Mapping[str, Tensor],
        items: Sequence[str],
        failed: Sequence[str],
        pooled: Mapping[str, str] | None = None,
    ) -> None:
        """A batch: how many items of the source it was, which was the last, and what is kept of it."""
        state = self.state
        if items:
            for name, of_stream in rows.items():
                shape = (1 if of_stream.ndim == 2 else of_stream.shape[1], of_stream.shape[-1])
                if (before := state.shapes.setdefault(name, shape)) != shape:
                    raise ValueError(
                        f"rows of {name!r} must all have {list(before)} tokens and numbers, got {list(shape)}"
                    )
                self._rows[name].add(of_stream)
        state.items_bytes += _append(self._items, items)
        state.failed_bytes += _append(self.failed_path, failed)
        state.consumed, state.last = state.consumed + consumed, last
        state.pooled.update(pooled or {})
        state.items, state.failed = state.items + len(items), state.failed + len(failed)
        _append(self._journal, [json.dumps(asdict(state), ensure_ascii=False)])

    def items(self) -> Iterator[dict[str, Any]]:
        """Every item, as it was given."""
        with self._items.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield json.loads(line)

    def close(self) -> dict[str, list[str]]:
        """End the files; stream -> their names, relative to the folder of all streams."""
        return {name: rows.close() for name, rows in self._rows.items()}

    def _last_whole(self) -> tuple[State, int]:
        """The last line that all files bear out, and where it ends."""
        if not self._journal.is_file():
            return State(), 0
        lines = self._journal.read_bytes().splitlines(keepends=True)
        ends = np.cumsum([len(line) for line in lines])
        for line, end in zip(reversed(lines), reversed(ends.tolist()), strict=True):
            if not line.endswith(b"\n"):
                continue
            state = State(**json.loads(line))
            state.shapes = {name: (int(tokens), int(width)) for name, (tokens, width) in state.shapes.items()}
            files = ((self._items, state.items_bytes), (self.failed_path, state.failed_bytes))
            if all(_size(path) >= size for path, size in files) and all(
                self._rows[name].holds(state.items, *shape) for name, shape in state.shapes.items()
            ):
                return state, end
        return State(), 0


class Rows:
    """The rows of a stream in .npy files of equally many items; the one being filled has a name with a dot before."""

    def __init__(self, folder: Path, dtype: torch.dtype, shard_items: int) -> None:
        self._folder, self._dtype, self._shard_items = folder, dtype, shard_items
        self._items, self._tokens, self._width = 0, 0, 0

    def holds(self, items: int, tokens: int, width: int) -> bool:
        """Whether the rows of so many items are there."""
        shard, rest = divmod(items, self._shard_items)
        whole = all(self._whole(n).is_file() or self._growing(n).is_file() for n in range(shard))
        return whole and (
            not rest or max(map(_size, (self._whole(shard), self._growing(shard)))) >= self._bytes(rest, tokens, width)
        )

    def cut(self, items: int, tokens: int, width: int) -> None:
        """Keep the rows of so many items, and go on behind them."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._items, self._tokens, self._width = items, tokens, width
        shard, rest = divmod(items, self._shard_items)
        for path in self._folder.glob("*.npy"):
            if int(path.stem.lstrip(".")) > shard - (not rest):
                path.unlink()
        if rest:
            if self._whole(shard).is_file():
                self._whole(shard).rename(self._growing(shard))
            os.truncate(self._growing(shard), self._bytes(rest, tokens, width))
        elif shard and self._growing(shard - 1).is_file():  # full, and not yet called so
            self._end(shard - 1, self._shard_items)

    def add(self, rows: Tensor) -> None:
        """Rows [n, D] or [n, T, D] of the next n items."""
        self._tokens, self._width = (1 if rows.ndim == 2 else rows.shape[1]), rows.shape[-1]
        while len(rows):
            shard, rest = divmod(self._items, self._shard_items)
            part, rows = rows[: self._shard_items - rest], rows[self._shard_items - rest :]
            stored = part.to(self._dtype).contiguous().view(torch.uint8).numpy()
            with self._growing(shard).open("ab", buffering=0) as file:
                if not rest:
                    _write(file.fileno(), self._header(0, self._width))
                _write(file.fileno(), stored.tobytes())
            self._items += len(part)
            if self._items % self._shard_items == 0:
                self._end(shard, self._shard_items)

    def close(self) -> list[str]:
        """End the last file; names of all, relative to the folder's own."""
        shard, rest = divmod(self._items, self._shard_items)
        if rest:
            self._end(shard, rest)
        return [f"{self._folder.name}/{self._whole(n).name}" for n in range(shard + (rest > 0))]

    def _end(self, shard: int, items: int) -> None:
        with self._growing(shard).open("r+b") as file:
            file.write(self._header(items * self._tokens, self._width))
            file.flush()
            os.fsync(file.fileno())
        self._growing(shard).rename(self._whole(shard))

    def _header(self, rows: int, width: int) -> bytes:
        """Of equal length whatever the number of rows: NumPy leaves room for it to grow."""
        file = BytesIO()
        about = {"descr": STORED[self._dtype], "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, about)
        return file.getvalue()

    def _bytes(self, items: int, tokens: int, width: int) -> int:
        """Of a file of so many items."""
        return len(self._header(0, width)) + items * tokens * width * self._dtype.itemsize

    def _whole(self, shard: int) -> Path:
        return self._folder / f"{shard:05d}.npy"

    def _growing(self, shard: int) -> Path:
        return self._folder / f".{shard:05d}.npy"


def _append(path: Path, lines: Sequence[str]) -> int:
    """In one write; how many bytes."""
    data = "".join(f"{line}\n" for line in lines).encode()
    if data:
        with path.open("ab", buffering=0) as file:
            _write(file.fileno(), data)
    return len(data)


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(handle, view) :]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
