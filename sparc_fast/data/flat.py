"""Rows that lie in a file one after the other, as memory holds them."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

from .readers import Reader, Spans, _cpu

__all__ = ["FlatReader"]

AT_ONCE = 2**30  # bytes a single call may ask for; systems stop short of 2 GiB
_one_at_a_time = threading.Lock()


class FlatReader(Reader):
    """Reads straight into the result, without a map: a file cut short is an error here, not the process's end."""

    def __init__(self, path: Path, title: str, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> None:
        super().__init__(title, shape, dtype)
        if sys.byteorder != "little":
            raise ValueError(f"{title} must be read on a little-endian machine, got a {sys.byteorder}-endian one")
        self._offset = offset
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # Windows would translate line ends
        self._closing = weakref.finalize(self, os.close, self._file)

    def _fill(self, start: int, out: Tensor) -> None:
        if not self._closing.alive:
            raise ValueError(f"{self.title} must be open to be read, got a closed file")
        target = out.view(torch.uint8).numpy().data.cast("B")
        at = self._offset + start * self.row_bytes
        done = 0
        while done < len(target):
            got = _read_at(self._file, target[done : done + AT_ONCE], at + done)
            if not got:
                raise OSError(f"{self.title} ends before row {start + len(out)}: the file was cut short")
            done += got

    def read(self, spans: Spans, out: Tensor, check_finite: bool) -> None:
        """In one call of compiled code, where there is some: blocks are many, and small beside what Python costs."""
        if _cpu is None:
            super().read(spans, out, check_finite)
            return
        if not self._closing.alive:
            raise ValueError(f"{self.title} must be open to be read, got a closed file")
        begins, lengths = self._bytes(spans)
        done, error, found = _cpu.read_spans(
            self._file, begins, lengths, out, self.dtype == torch.bfloat16, check_finite
        )
        if error:
            raise OSError(error, os.strerror(error), self.title)
        if found >= 0:
            self._refuse(spans, found // self.width)
        if done < sum(lengths):
            raise OSError(f"{self.title} ends before row {spans[-1][1]}: the file was cut short")

    def will_need(self, spans: Spans) -> None:
        begins, lengths = self._bytes(spans)
        if _cpu is not None:
            _cpu.will_need(self._file, begins, lengths)
        elif hasattr(os, "posix_fadvise"):
            for at, length in zip(begins, lengths, strict=True):
                os.posix_fadvise(self._file, at, length, os.POSIX_FADV_WILLNEED)

    def _bytes(self, spans: Spans) -> tuple[list[int], list[int]]:
        """(where each begins in the file, how long each is)"""
        return (
            [self._offset + start * self.row_bytes for start, _ in spans],
            [(stop - start) * self.row_bytes for start, stop in spans],
        )

    def close(self) -> None:
        self._closing()


def _read_at(file: int, target: memoryview, at: int) -> int:
    """Bytes read from there."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [target], at)
    with _one_at_a_time:  # Windows has one position in a file
        os.lseek(file, at, os.SEEK_SET)
        some = os.read(file, len(target))
        target[: len(some)] = some
        return len(some)
