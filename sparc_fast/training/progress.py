"""What a person at a terminal sees of a run."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from typing import Protocol, TextIO

from .metrics import Record


class Progress(Protocol):
    """Told of every step and every record."""

    def start(self, step: int, steps: int, batch_size: int) -> None: ...
    def advance(self, step: int) -> None: ...
    def say(self, words: str) -> None: ...
    def record(self, record: Record) -> None: ...
    def close(self) -> None: ...


class Silent:
    """Nothing to see."""

    def start(self, step: int, steps: int, batch_size: int) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def say(self, words: str) -> None:
        pass

    def record(self, record: Record) -> None:
        pass

    def close(self) -> None:
        pass


class Lines(Silent):
    """A line a record, with throughput and the time left, as a log file wants it."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._started = time.perf_counter()
        self._first, self._steps, self._batch_size = 0, 0, 0

    def start(self, step: int, steps: int, batch_size: int) -> None:
        self._first, self._steps, self._batch_size = step, steps, batch_size
        self._started = time.perf_counter()

    def say(self, words: str) -> None:
        print(words, file=self._out, flush=True)

    def record(self, record: Record) -> None:
        step = record["step"]
        speed = (step - self._first) / max(time.perf_counter() - self._started, 1e-9)
        left = f", {duration((self._steps - step) / speed)} left" if speed else ""
        at = f"step {step:,} of {self._steps:,}, {speed * self._batch_size:,.0f} rows/s{left}"
        self.say(f"{at}: {summary(record)}")


def best_progress() -> Progress:
    """A bar where there is a terminal and rich, else lines."""
    if sys.stderr.isatty() and find_spec("rich") is not None:
        from .bar import Bar

        return Bar()
    return Lines()


def summary(record: Record) -> str:
    """The record's main figures."""
    if (found := record.get("validation")) is not None:
        return f"validation loss {found['loss']:.4f}, each stream alone {found['single_loss']:.4f}"
    train = record["train"]
    cross = "" if train["cross"] is None else f", cross {train['cross']:.4f}"
    return f"loss {train['loss']:.4f}, self {train['self']:.4f}{cross}, {train['dead']:,} dead"


def duration(seconds: float) -> str:
    """As hours, minutes and seconds."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02}"
