"""Rows that lie in a file one after the other, as memory holds them."""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path

import torch
from torch import Tensor

from .readers import Reader

AT_ONCE = 2**30  # bytes a single call may ask for; systems stop short of 2 GiB


class FlatReader(Reader):
    """Reads straight into the result, without a map: a file cut short is an error here, not the process's end."""

    def __init__(self, path: Path, title: str, shape: tuple[int, ...], dtype: torch.dtype | None, offset: int) -> None:
        super().__init__(title, shape, dtype)
        if sys.byteorder != "little":
            raise ValueError(f"{title} is little-endian, which this machine cannot read in place")
        self._offset = offset
        self._file = os.open(path, os.O_RDONLY)
        self._closing = weakref.finalize(self, os.close, self._file)

    def _fill(self, start: int, out: Tensor) -> None:
        if not self._closing.alive:
            raise ValueError(f"{self.title} is closed")
        target = out.view(torch.uint8).numpy().data.cast("B")
        at = self._offset + start * self.row_bytes
        done = 0
        while done < len(target):
            got = os.preadv(self._file, [target[done : done + AT_ONCE]], at + done)
            if not got:
                raise OSError(f"{self.title} ends before row {start + len(out)}: the file was cut short")
            done += got

    def will_need(self, start: int, stop: int) -> None:
        if hasattr(os, "posix_fadvise"):
            at, length = self._offset + start * self.row_bytes, (stop - start) * self.row_bytes
            os.posix_fadvise(self._file, at, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        self._closing()
