"""Shuffled batches from files that are read in large pieces, in one direction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparc_fast.files import Closing
from sparc_fast.ops.huge_pages import empty_rows, give_back_freed, lent
from sparc_fast.sizes import as_bytes, is_integer

from . import budget
from .aligned import AlignedFiles, check_dtype
from .prefetch import Job, Reading
from .readers import _cpu
from .shuffle import Rows, Shuffling

__all__ = ["LastBatch", "Loader", "Window"]

LastBatch = Literal["keep", "drop"]


class Window(NamedTuple):
    """Rows `start` to `start + len(order)` of an epoch: those of the buffers, in this order."""

    epoch: int
    number: int
    start: int
    order: Tensor
    buffers: list[Tensor]
    blocks: Rows
    """Which the buffers hold, one after the other."""

    @property
    def stop(self) -> int:
        return self.start + len(self.order)


class Loader(Closing):
    """Batches of all streams side by side, [batch_size, D], from files of any size, shuffled anew in every epoch.

    ``for batch in loader`` is one epoch, or what is left of it; the next ``for`` is the next epoch. Where samples lack
    streams, ``for x, present in loader.batches()`` says which. Batches are the caller's own. What comes when depends on
    the seed, the epoch and the windows alone (not on threads or time): after `load_state_dict` the batches are those
    that would have followed, bit for bit.

    How well it shuffles: data that fit in `memory` are read once and permuted uniformly. Larger data are read in
    blocks of neighbouring rows (about 1 MB of each stream); each epoch deals the blocks at random to windows of about
    half of `memory`, and permutes each window uniformly while the next is being read. So any row can come at any
    time, but rows of one block come in the same window; docs/data.md measures what that means.

    Args:
        files: what `open` gave.
        batch_size: rows of a batch.
        memory: bytes this may take, or a size such as "4GiB": windows, orders, what reading needs, the batch in the
            caller's hands and the next.
        seed: of the shuffling, >= 0.
        shuffle: False gives rows in order.
        last: an epoch's last batch, when it is short: "keep" gives it as it is, "drop" leaves it out (each epoch other
            rows, when shuffled).
        dtype: of the batches; windows keep what is on disk.
        check_finite: refuse NaN and infinity when they are read, naming file and row.
        n_threads: reading threads; by default up to 4, at most half of the processors.
        pin_memory: batches in page-locked memory, from which copies to a GPU need not wait; by default where CUDA is.
        part: (r, R) gives only part r of each batch, counted from 0, of R that are as even as can be, in order:
            processes that share batches see together what one would see. Each reads all windows.

    Raises:
        ValueError: an argument is out of range, or `memory` too small. While iterating: a row is not finite.
        OSError: while iterating: a file cannot be read.
    """

    def __init__(
        self,
        files: AlignedFiles,
        batch_size: int,
        *,
        memory: int | str = 2**31,
        seed: int = 0,
        shuffle: bool = True,
        last: LastBatch = "keep",
        dtype: torch.dtype = torch.float32,
        check_finite: bool = True,
        n_threads: int | None = None,
        pin_memory: bool | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if not isinstance(files, AlignedFiles):
            raise ValueError(f"files must be what sparc_fast.data.open gave, got {type(files).__name__}")
        n_threads = budget.default_threads() if n_threads is None else n_threads
        memory = as_bytes(memory, "memory")
        for name, value, least in (("batch_size", batch_size, 1), ("memory", memory, 1), ("n_threads", n_threads, 1),
                                   ("seed", seed, 0)):  # fmt: skip
            if not is_integer(value) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        batch_size, seed, n_threads = int(batch_size), int(seed), int(n_threads)
        if last not in ("keep", "drop"):
            raise ValueError(f'last must be "keep" or "drop", got {last!r}')
        if files.n_rows < (batch_size if last == "drop" else 1):
            raise ValueError(f"files must hold at least one batch, got {files.n_rows} rows for batch_size {batch_size}")
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory must be False or None where there is no CUDA device, got True")
        check_dtype(dtype)
        if not (
            isinstance(part, Sequence) and len(part) == 2 and all(map(is_integer, part)) and 0 <= part[0] < part[1]
        ):
            raise ValueError(f"part must be (r, R), integers 0 <= r < R, got {part!r}")
        self.files, self.batch_size, self.memory, self.last = files, batch_size, memory, last
        self.dtype, self.check_finite, self.n_threads = dtype, check_finite, n_threads
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.part = part
        self._readers = list(files.readers.values())
        self._needs = budget.Needs.of(self._readers, batch_size, dtype, n_threads)
        self._plan = budget.make_plan(self._readers, self._needs, memory, seed, shuffle)
        self._epoch = self._row = 0
        self._window: Window | None = None
        self._next: tuple[Window, Reading] | None = None
        self._spare: list[list[Tensor]] = []
        self._dealt: tuple[int, list[Rows]] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, counted from 0."""
        return self._epoch

    @property
    def plan(self) -> Shuffling:
        """The blocks and windows chosen."""
        return self._plan

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-self._rows_of_epoch // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        if self.files.present is not None:
            raise ValueError(
                "files must hold every stream of every sample to be iterated over, but some are absent: "
                "iterate over loader.batches(), which says which streams each sample has"
            )
        yield from (x for x, _ in self._rest(numbered=False))

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(x [n, D], present) of what is left of this epoch, in the same order: `present`, bool [n, S], says which
        streams each sample has, or is None where all have all. Absent rows are zeros."""
        present = self.files.present
        for x, rows in self._rest(numbered=present is not None):
            yield x, None if present is None else present[rows]

    def numbered_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(x [n, D], numbers [n] of its rows in `files`) of what is left of this epoch, in the same order."""
        return self._rest(numbered=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain numbers and text that JSON can hold."""
        return {"epoch": self._epoch, "row": self._row, "batch_size": self.batch_size, "last": self.last,
                "d_streams": dict(self.files.d_streams), **asdict(self._plan)}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader stood, with its seed and its windows, whatever memory it had.

        Raises:
            ValueError: the state is of other files or batches, or its windows do not fit in `memory`.
        """
        expected = self.state_dict()
        if not isinstance(state, Mapping) or set(state) != set(expected):
            raise ValueError(f"state must be what state_dict() gave, with {', '.join(expected)}, got {state!r}")
        for name in ("batch_size", "last", "n_rows", "d_streams"):
            same = list(state[name].items()) == list(expected[name].items()) if name == "d_streams" else (
                state[name] == expected[name])  # fmt: skip
            if not same:
                raise ValueError(f"state must have {name} {expected[name]!r}, as this loader has, got {state[name]!r}")
        epoch, row = state["epoch"], state["row"]
        if epoch < 0 or not 0 <= row < self._rows_of_epoch or row % self.batch_size:
            raise ValueError(f"state must stand before a batch, got epoch {epoch} and row {row}")
        plan = Shuffling(**{name: state[name] for name in asdict(self._plan)})
        budget.check_fits(plan, self._needs, self.memory)
        self.close()
        self._plan, self._epoch, self._row = plan, epoch, row

    def close(self) -> None:
        """Stop reading and let go of all memory; the files stay open, and iterating goes on where it was."""
        if self._next is not None:
            self._next[1].stop()
        self._window, self._next, self._dealt = None, None, None
        self._spare = []
        give_back_freed()

    @property
    def _rows_of_epoch(self) -> int:
        n = self.files.n_rows
        return n if self.last == "keep" else n - n % self.batch_size

    def _rest(self, numbered: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of what is left of this epoch, and where they are asked for, the numbers of their rows."""
        epoch = self._epoch
        while self._epoch == epoch:
            yield self._batch(numbered)

    def _batch(self, numbered: bool) -> tuple[Tensor, Tensor]:
        n = min(self.batch_size, self._rows_of_epoch - self._row)
        r, R = self.part
        begin, end = r * n // R, (r + 1) * n // R
        batch = self._new_batch(end - begin)
        done, numbers = 0, [torch.empty(0, dtype=torch.int64, device="cpu")]
        while done < n:
            window = self._window_at(self._epoch, self._row + done)
            first = self._row + done - window.start
            of_window = window.order[first : first + n - done]
            rows = of_window[max(begin - done, 0) : max(end - done, 0)]
            at = max(done, begin) - begin
            _gather(window.buffers, rows, batch[at : at + len(rows)])
            if numbered:
                size, blocks = self._plan.block_rows, torch.from_numpy(window.blocks)
                numbers.append(blocks[rows // size] * size + rows % size)
            done += len(of_window)
        self._row += n
        if self._row == self._rows_of_epoch:
            self._epoch, self._row = self._epoch + 1, 0
        return batch, torch.cat(numbers)

    def _new_batch(self, n: int) -> Tensor:
        D = sum(self.files.d_streams.values())
        if self.pin_memory:  # which torch keeps
            return torch.empty(n, D, dtype=self.dtype, device="cpu", pin_memory=True)
        return lent(n, D, dtype=self.dtype)

    def _window_at(self, epoch: int, row: int) -> Window:
        """The window with that row of the epoch; when it is a new one, the one after it starts being read."""
        if (window := self._window) is not None and window.epoch == epoch and window.start <= row < window.stop:
            return window
        if self._plan.n_windows == 1:
            self._window = self._same_rows(window, epoch) if window is not None else self._read_now(epoch, 0, 0)
            return self._window
        if window is not None:
            self._spare.append(window.buffers)
            self._window = None
        number, start = self._find(epoch, row)
        if self._next is not None and (self._next[0].epoch, self._next[0].number) == (epoch, number):
            (window, reading), self._next = self._next, None
            reading.wait()
        else:
            window = self._read_now(epoch, number, start)
        self._window = window
        self._next = self._begin(*self._after(window))
        return window

    def _same_rows(self, window: Window, epoch: int) -> Window:
        """The same buffers, but for streams that are drawn anew, in another order."""
        if window.epoch != epoch:
            self._read(window.buffers, window.blocks, epoch, drawn_only=True).wait()
        order = torch.from_numpy(self._plan.order(epoch, 0, self._plan.n_rows))
        return window._replace(epoch=epoch, order=order)

    def _find(self, epoch: int, row: int) -> tuple[int, int]:
        start = 0
        for number, blocks in enumerate(self._deal(epoch)):
            n = self._plan.n_rows_of(blocks)
            if row < start + n:
                return number, start
            start += n
        raise AssertionError("a row is in a window")

    def _after(self, window: Window) -> tuple[int, int, int]:
        """(epoch, number, start) of the window after this one; the next epoch's first follows the last."""
        if window.number + 1 < self._plan.n_windows and window.stop < self._rows_of_epoch:
            return window.epoch, window.number + 1, window.stop
        return window.epoch + 1, 0, 0

    def _deal(self, epoch: int) -> list[Rows]:
        if self._dealt is None or self._dealt[0] != epoch:
            self._dealt = epoch, self._plan.windows(epoch)
        return self._dealt[1]

    def _read_now(self, epoch: int, number: int, start: int) -> Window:
        window, reading = self._begin(epoch, number, start)
        reading.wait()
        return window

    def _begin(self, epoch: int, number: int, start: int) -> tuple[Window, Reading]:
        """The window, filled by threads."""
        blocks = self._deal(epoch)[number]
        buffers = self._spare.pop() if self._spare else self._new_buffers()
        reading = self._read(buffers, blocks, epoch)
        order = torch.from_numpy(self._plan.order(epoch, number, self._plan.n_rows_of(blocks)))
        return Window(epoch, number, start, order, buffers, blocks), reading

    def _read(self, buffers: list[Tensor], blocks: Rows, epoch: int, drawn_only: bool = False) -> Reading:
        """These blocks to the buffers; only those of streams that every epoch draws anew, where that is asked for."""
        spans = [self._plan.rows(block) for block in blocks.tolist()]
        jobs = []
        for of_all, buffer in zip(self._readers, buffers, strict=True):
            if drawn_only and not of_all.draws:
                continue
            reader = of_all.at(self._plan.seed, epoch)
            together = max(1, budget.JOB_BYTES // (self._plan.block_rows * reader.row_bytes))
            together = len(spans) if reader.scattered else together
            at = 0
            for first in range(0, len(spans), together):
                some = spans[first : first + together]
                n = sum(stop - start for start, stop in some)
                jobs.append(Job(reader, some, buffer[at : at + n]))
                at += n
        return Reading(jobs, self.n_threads, self.check_finite)

    def _new_buffers(self) -> list[Tensor]:
        return [empty_rows(self._plan.window_rows, r.width, dtype=r.dtype, device="cpu") for r in self._readers]


def _gather(buffers: list[Tensor], rows: Tensor, out: Tensor) -> None:
    """Write these rows of every buffer to `out`, [n, D], side by side."""
    left = 0
    for buffer in buffers:
        right = left + buffer.shape[1]
        columns = out[:, left:right]
        if _cpu is not None and (widening := _widening(buffer.dtype, out.dtype)) is not None:
            _cpu.gather_rows(columns, buffer, rows, widening, torch.get_num_threads())
        elif buffer.dtype == out.dtype:
            torch.index_select(buffer, 0, rows, out=columns)
        else:
            step = max(1, budget.CONVERTED_TOGETHER // (buffer.shape[1] * buffer.itemsize))
            for at in range(0, len(rows), step):
                columns[at : at + step].copy_(buffer.index_select(0, rows[at : at + step]))
        left = right


def _widening(stored: torch.dtype, wanted: torch.dtype) -> int | None:
    """How compiled code is to gather rows; None where it cannot."""
    if stored == wanted:
        return 0
    return {torch.bfloat16: 1, torch.float16: 2}.get(stored) if wanted == torch.float32 else None
