"""What a person at a terminal sees of a run."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from typing import Any, TextIO

from .metrics import Record


class Display:
    """Told of every step and every record; this one shows nothing."""

    def start(self, step: int, steps: int, batch_size: int) -> None: ...
    def advance(self, step: int) -> None: ...
    def say(self, words: str) -> None: ...
    def record(self, record: Record) -> None: ...
    def close(self) -> None: ...


class Lines(Display):
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


class Bar(Display):
    """By rich: steps done, rows a second, the time left, and the last figures."""

    def __init__(self, console: Any = None) -> None:
        from rich import console as consoles
        from rich import progress
        from rich.text import Text

        class Rows(progress.ProgressColumn):
            def render(self, task: progress.Task) -> Text:
                speed = (task.speed or 0) * task.fields.get("batch_size", 0)
                return Text(f"{speed:,.0f} rows/s" if speed else "")

        self._console = console or consoles.Console(stderr=True)
        self._bar = progress.Progress(
            progress.BarColumn(), progress.MofNCompleteColumn(), Rows(), progress.TimeRemainingColumn(),
            progress.TextColumn("{task.description}"), console=self._console,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, start=False)

    def start(self, step: int, steps: int | None, batch_size: int) -> None:
        """`steps` is None where nobody knows how many there are."""
        self._bar.update(self._task, completed=step, total=steps, batch_size=batch_size)
        self._bar.start_task(self._task)
        self._bar.start()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def say(self, words: str) -> None:
        self._console.print(words, highlight=False)

    def record(self, record: Record) -> None:
        if "validation" in record:
            self.say(f"step {record['step']:,}: {summary(record)}")
        else:
            self._bar.update(self._task, description=summary(record))

    def close(self) -> None:
        self._bar.stop()


def best_display() -> Display:
    """A bar where rich can draw one, at a terminal or with ipywidgets in a notebook, else lines."""
    if find_spec("rich") is None:
        return Lines()
    from rich.console import Console

    console = Console(stderr=True)
    if sys.stderr.isatty() or (console.is_jupyter and find_spec("ipywidgets") is not None):
        return Bar(console)
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
