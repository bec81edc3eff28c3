"""A progress bar, by rich."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.progress import ProgressColumn as Column
from rich.text import Text

from .metrics import Record
from .progress import summary


class Bar:
    """Steps done, rows a second, the time left, and the last figures."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), _Rows(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task("", total=None, start=False)

    def start(self, step: int, steps: int, batch_size: int) -> None:
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


class _Rows(Column):
    def render(self, task: Task) -> Text:
        speed = (task.speed or 0) * task.fields.get("batch_size", 0)
        return Text(f"{speed:,.0f} rows/s" if speed else "")
