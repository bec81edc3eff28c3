"""What a run on a device leaves behind: rows, written one by one so that a stopped phase keeps what it had."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import torch

from .cases import Place
from .timing import Work


@dataclass(frozen=True)
class Row:
    """One thing measured or checked, or the reason why it was not."""

    phase: str
    what: str
    shape: str = ""
    contender: str = ""
    dtype: str = ""
    value: float | None = None
    """In `unit`: seconds ("s"), bytes ("B"), a rate ("/s"), or 1 and 0 for held and not held ("held")."""
    unit: str = "s"
    seconds: tuple[float, ...] = ()
    work: tuple[dict[str, float], ...] = ()
    """Fields of `Work`, one after another."""
    note: str = ""
    error: str = ""


@dataclass
class Record:
    """Where a phase writes its rows, and how long it may go on."""

    phase: str
    place: Place
    quick: bool = False
    path: Path | None = None
    until: float = float("inf")
    rows: list[Row] = field(default_factory=list)

    def left(self) -> float:
        """Seconds."""
        return self.until - monotonic()

    def add(self, what: str, shape: str = "", contender: str = "", dtype: str = "", **rest: Any) -> Row:
        row = Row(self.phase, what, shape, contender, dtype, **rest)
        self.rows.append(row)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        return row

    def times(
        self, what: str, shape: str, contender: str, dtype: str, taken: Sequence[float], *work: Work, note: str = ""
    ) -> None:
        """`work` are its phases."""
        phases = tuple(map(asdict, work))
        self.add(what, shape, contender, dtype, value=median(taken), seconds=tuple(taken), work=phases, note=note)

    @contextlib.contextmanager
    def guard(self, what: str, shape: str = "", contender: str = "", dtype: str = "") -> Iterator[None]:
        """A failure inside becomes a row; the phase goes on."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.add(what, shape, contender, dtype, error=f"does not fit: {first_line(error)}")
        except Exception as error:
            self.add(what, shape, contender, dtype, error=f"{type(error).__name__}: {first_line(error)}")
        finally:
            if self.place.is_gpu:
                with contextlib.suppress(Exception):
                    torch.cuda.empty_cache()

    def has_time(self, seconds: float, what: str, shape: str = "", contender: str = "", dtype: str = "") -> bool:
        """Whether so many seconds are left; if not, a row says so."""
        if self.left() >= seconds:
            return True
        self.add(what, shape, contender, dtype, error="no time left")
        return False


def first_line(error: BaseException, most: int = 300) -> str:
    return (str(error).strip().splitlines() or [""])[0][:most]


def read_rows(path: Path) -> list[Row]:
    """The rows written so far; a line cut short by a killed process is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError, TypeError):
            read = json.loads(line)
            rows.append(Row(**{**read, "seconds": tuple(read["seconds"]), "work": tuple(read["work"])}))
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
