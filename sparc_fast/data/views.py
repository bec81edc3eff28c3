"""Readers of other readers' rows: several one after the other, or rows by number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import numpy as np
import torch
from torch import Tensor

from .readers import Reader, Spans, first_not_finite
from .shuffle import Rows, uniform

__all__ = ["PickedReader", "PiecesReader", "SampledReader", "one_after_the_other"]


class PiecesReader(Reader):
    """Rows start <= n < stop of each of some (reader, start, stop), one after the other."""

    def __init__(self, pieces: Sequence[tuple[Reader, int, int]], title: str) -> None:
        readers = [reader for reader, _, _ in pieces]
        for reader in readers[1:]:
            for what in ("width", "dtype"):
                if (here := getattr(reader, what)) != (first := getattr(readers[0], what)):
                    raise ValueError(
                        f"files of one stream must have equal widths and dtypes, "
                        f"got {what} {here} in {reader.title} and {first} in {readers[0].title}"
                    )
        self._ends = np.array(list(accumulate(stop - start for _, start, stop in pieces)), np.int64)
        super().__init__(
            title, (int(self._ends[-1]), readers[0].width), readers[0].dtype,
            granule=max(reader.granule for reader in readers), scratch=max(reader.scratch for reader in readers),
        )  # fmt: skip
        self._pieces = list(pieces)
        self._shift = np.array([stop for _, _, stop in pieces], np.int64) - self._ends
        self.scattered, self.draws = any(r.scattered for r in readers), any(r.draws for r in readers)
        self.order_bytes = max(reader.order_bytes for reader in readers)

    def _fill(self, start: int, out: Tensor) -> None:
        at = 0
        for reader, spans in self._of_readers([(start, start + len(out))]):
            for first, stop in spans:
                reader.rows(first, stop, out[at : at + stop - first])
                at += stop - first

    def read(self, spans: Spans, out: Tensor, check_finite: bool) -> None:
        at = 0
        for reader, some in self._of_readers(spans):
            n = sum(stop - start for start, stop in some)
            reader.read(some, out[at : at + n], check_finite)  # an error names the file's own row
            at += n

    def will_need(self, spans: Spans) -> None:
        for reader, some in self._of_readers(spans):
            reader.will_need(some)

    def pick(self, rows: Rows, places: Rows, out: Tensor) -> None:
        numbers = rows + self._shift[np.searchsorted(self._ends, rows, side="right")]
        at = 0
        for _, pieces in groupby(enumerate(self._pieces), lambda piece: id(piece[1][0])):
            number, (reader, _, _) = list(pieces)[-1]
            stop = int(np.searchsorted(rows, self._ends[number]))
            if at < stop:
                reader.pick(numbers[at:stop], places[at:stop], out)
            at = stop

    @property
    def pick_scratch(self) -> int:
        return max(reader.pick_scratch for reader, _, _ in self._pieces)

    def origin(self, row: int) -> tuple[str, int]:
        ((reader, ((start, _),)),) = self._of_readers([(row, row + 1)])
        return reader.origin(start)

    def at(self, seed: int, epoch: int) -> Reader:
        if not self.draws:
            return self
        drawn = {id(reader): reader.at(seed, epoch) for reader, _, _ in self._pieces}  # one for all its pieces
        return PiecesReader([(drawn[id(reader)], a, b) for reader, a, b in self._pieces], self.title)

    def close(self) -> None:
        for reader, _, _ in self._pieces:
            reader.close()

    def _of_readers(self, spans: Spans) -> list[tuple[Reader, Spans]]:
        """Where these rows are, in order."""
        found = []
        for start, stop in spans:
            number = int(np.searchsorted(self._ends, start, side="right"))
            while start < stop:
                end, shift = min(stop, int(self._ends[number])), int(self._shift[number])
                if start < end:
                    found.append((self._pieces[number][0], (start + shift, end + shift)))
                start, number = max(start, end), number + 1
        runs = [list(same) for _, same in groupby(found, lambda piece: id(piece[0]))]
        return [(run[0][0], [span for _, span in run]) for run in runs]


def one_after_the_other(readers: Sequence[Reader], title: str | None = None) -> Reader:
    """All their rows; readers without any, whose width nobody may know, are left out."""
    filled = [reader for reader in readers if reader.n_rows] or readers[:1]
    of_all = f"{filled[0].title} and {len(filled) - 1} more" if len(filled) > 1 else filled[0].title
    return PiecesReader([(reader, 0, reader.n_rows) for reader in filled], title or of_all)


class PickedReader(Reader):
    """Row n is row ``numbers[n]`` of another reader, and zeros where that is -1."""

    order_bytes = 64  # its number and place, sorted, and what tells neighbours

    def __init__(self, whole: Reader, numbers: Rows) -> None:
        ascending = bool((np.diff(numbers[numbers >= 0]) >= 0).all())
        super().__init__(
            whole.title, (len(numbers), whole.width), whole.dtype,
            granule=whole.granule if ascending else 1, scratch=whole.pick_scratch,
        )  # fmt: skip
        self.decodes = whole.decodes
        self.scattered = whole.scattered or not ascending
        self._whole, self._numbers = whole, numbers

    def numbers(self, start: int, stop: int) -> Rows:
        """Of rows start <= n < stop, those of the other reader."""
        return self._numbers[start:stop]

    def _fill(self, start: int, out: Tensor) -> None:
        self._pick(self.numbers(start, start + len(out)), out)

    def read(self, spans: Spans, out: Tensor, check_finite: bool) -> None:
        self._pick(np.concatenate([self.numbers(*span) for span in spans]), out)
        if check_finite and (found := first_not_finite(out)) is not None:
            self._refuse(spans, found)

    def _pick(self, numbers: Rows, out: Tensor) -> None:
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        n_absent = int(np.searchsorted(ordered, 0))
        if n_absent:
            out.index_fill_(0, torch.from_numpy(order[:n_absent]), 0)
        self._whole.pick(ordered[n_absent:], order[n_absent:], out)

    def origin(self, row: int) -> tuple[str, int]:
        return self._whole.origin(int(self.numbers(row, row + 1)[0]))

    def close(self) -> None:
        self._whole.close()


class SampledReader(PickedReader):
    """Several rows of another reader are one sample: row n is one of ``rows[starts[n] : starts[n + 1]]``, drawn anew
    in every epoch, the first of them where no epoch is said, and zeros where there is none.

    All streams of a sample draw alike, so that two that have equally many rows of it give the same one.
    """

    draws = True

    def __init__(self, whole: Reader, rows: Rows, starts: Rows, epoch: tuple[int, int] | None = None) -> None:
        super().__init__(whole, rows)
        self.n_rows = len(starts) - 1
        self._starts, self._epoch = starts, epoch

    def numbers(self, start: int, stop: int) -> Rows:
        begins = self._starts[start:stop]
        counts = self._starts[start + 1 : stop + 1] - begins
        chance = 0.0 if self._epoch is None else uniform(start, stop, *self._epoch)
        row = begins + (chance * counts).astype(np.int64)
        return np.where(counts > 0, self._numbers[np.minimum(row, len(self._numbers) - 1)], -1)

    def at(self, seed: int, epoch: int) -> Reader:
        return SampledReader(self._whole, self._numbers, self._starts, (seed, epoch))
