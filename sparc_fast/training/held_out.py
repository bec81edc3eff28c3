"""Some rows of files held out of training: two views of the same files."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

from torch import Tensor

from sparc_fast.data import AlignedFiles, Reader
from sparc_fast.data.readers import Spans

BLOCKS = 64  # held-out blocks at most: enough of them to see every region of a sorted file


class Part(Reader):
    """Rows of another reader: those of some spans (start, stop), in order."""

    def __init__(self, whole: Reader, spans: Spans, title: str) -> None:
        ends = list(accumulate(stop - start for start, stop in spans))
        shape = (ends[-1], whole.width)
        super().__init__(title, shape, whole.dtype, granule=whole.granule, scratch=whole.scratch)
        self._whole, self._spans, self._ends = whole, spans, ends

    def _fill(self, start: int, out: Tensor) -> None:
        at = 0
        for first, stop in self._pieces(start, start + len(out)):
            self._whole.rows(first, stop, out[at : at + stop - first])
            at += stop - first

    def read(self, spans: Spans, out: Tensor, check_finite: bool) -> None:
        self._whole.read(self._of_whole(spans), out, check_finite)  # an error names the file's own row

    def will_need(self, spans: Spans) -> None:
        self._whole.will_need(self._of_whole(spans))

    def _of_whole(self, spans: Spans) -> Spans:
        return [piece for span in spans for piece in self._pieces(*span)]

    def close(self) -> None:
        self._whole.close()

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where rows start <= n < stop of the part are in the whole."""
        pieces = []
        i = bisect_right(self._ends, start)
        while start < stop:
            end = min(stop, self._ends[i])
            offset = self._spans[i][1] - self._ends[i]
            pieces.append((start + offset, end + offset))
            start, i = end, i + 1
        return pieces


def hold_out(files: AlignedFiles, n_rows: int) -> tuple[AlignedFiles, AlignedFiles]:
    """(files without some rows, those rows): about `n_rows` of them, in up to 64 blocks spread evenly.

    Blocks are whole chunks of the files where these are small enough, so that no chunk is read twice; else exactly
    `n_rows` are held out.

    Raises:
        ValueError: that would be more than half of the rows.
    """
    if not 1 <= n_rows <= files.n_rows // 2:
        raise ValueError(f"validation_rows must be between 1 and {files.n_rows // 2}, half of the rows, got {n_rows}")
    unit = math.lcm(*(reader.granule for reader in files.readers.values()))
    unit = unit if unit <= n_rows else 1
    held = held_spans(files.n_rows, n_rows, unit)
    rest = [(a, b) for (_, a), (b, _) in zip([(0, 0), *held], [*held, (files.n_rows, 0)], strict=True) if a < b]
    return _part(files, rest, "without the held-out rows"), _part(files, held, "held-out rows")


def held_spans(n: int, n_held: int, unit: int) -> list[tuple[int, int]]:
    """Spans of whole units, the last part of each of up to 64 equal stretches of n rows."""
    units, held = n // unit, n_held // unit
    blocks = min(BLOCKS, held)
    ends = [(i + 1) * units // blocks for i in range(blocks)]
    sizes = [(i + 1) * held // blocks - i * held // blocks for i in range(blocks)]
    return [((end - size) * unit, end * unit) for end, size in zip(ends, sizes, strict=True)]


def _part(files: AlignedFiles, spans: Spans, words: str) -> AlignedFiles:
    return AlignedFiles({s: Part(reader, spans, f"{reader.title} ({words})") for s, reader in files.readers.items()})
