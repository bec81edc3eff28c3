"""Reading in the background."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .readers import Reader, Spans

__all__ = ["Job", "Reading"]

AHEAD = 8  # jobs the disk is told of beforehand, so that it need not wait for the next


class Job(NamedTuple):
    """Spans of a reader's rows, and where they go, one after the other."""

    reader: Reader
    spans: Spans
    out: Tensor


class Reading:
    """Jobs, begun in the order given, done by threads of their own."""

    def __init__(self, jobs: Iterable[Job], n_threads: int, check_finite: bool) -> None:
        self._todo = _Todo(deque(jobs), check_finite)
        # a thread more than were reckoned with must take no memory of its own
        self._who_waits_reads = all(job.reader.scratch == 0 for job in self._todo.jobs)
        self._threads = [threading.Thread(target=self._todo.work, daemon=True) for _ in range(n_threads)]
        # stopped when nobody waits any more, and at exit: the interpreter must not go away under a reading thread
        self._end = weakref.finalize(self, _end, self._todo, self._threads)
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until all is read, and read along meanwhile; raises the first error."""
        if self._who_waits_reads:
            self._todo.work()
        for thread in self._threads:
            thread.join()
        if self._todo.errors:
            raise self._todo.errors[0]

    def stop(self) -> None:
        """Leave what has not begun; nothing is written any more once this returns."""
        self._end()


@dataclass
class _Todo:
    """What the threads share: not the `Reading`, which must be able to end before them."""

    jobs: deque[Job]
    check_finite: bool
    errors: list[Exception] = field(default_factory=list)
    hinted: deque[Job] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self) -> None:
        try:
            while (job := self._next()) is not None:
                job.reader.read(job.spans, job.out, self.check_finite)
        except Exception as error:  # raised again by wait()
            self.errors.append(error)
            self.clear()

    def _next(self) -> Job | None:
        """The next job; it, and those soon to come, have been announced to the disk."""
        with self.lock:
            while self.jobs and len(self.hinted) <= AHEAD:
                self.jobs[0].reader.will_need(self.jobs[0].spans)
                self.hinted.append(self.jobs.popleft())
            return self.hinted.popleft() if self.hinted else None

    def clear(self) -> None:
        with self.lock:
            self.jobs.clear()
            self.hinted.clear()


def _end(todo: _Todo, threads: list[threading.Thread]) -> None:
    todo.clear()
    for thread in threads:
        if thread.ident is not None:
            thread.join()
