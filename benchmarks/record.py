"""What a run leaves behind: rows, written one by one so that a stopped phase keeps what it had."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import torch

from sparc_fast.planning.roofline import Cost

from .cases import Place, Shape
from .timing import Clock, Run


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
    """Of each round; those of contenders that took turns belong together."""
    work: tuple[Cost, ...] = ()
    """Phases, one after another."""
    note: str = ""
    error: str = ""
    role: str = ""
    """"ours", "baseline", or "yardstick": one that does less than the others."""


@dataclass
class Record:
    """Where a phase writes its rows, and how long it may go on."""

    phase: str
    place: Place
    quick: bool = False
    path: Path | None = None
    until: float = float("inf")
    rows: list[Row] = field(default_factory=list)

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.place)

    def left(self) -> float:
        """Seconds."""
        return self.until - monotonic()

    def add(self, what: str, shape: str = "", contender: str = "", dtype: str = "", **rest: Any) -> None:
        """What, shape, contender and type name a row here and below, as far as they apply."""
        role = "ours" if contender in self.place.ours else ""
        row = Row(self.phase, what, shape, contender, dtype, **{"role": role, **rest})
        self.rows.append(row)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    def race(
        self, what: str, shape: str, dtype: str, runs: Mapping[str, Run], seconds: float, work: Sequence[Cost],
        ours: Sequence[str] = (), yardsticks: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Times runs in turns. Ours are the place's, or those of these names."""
        for name, taken in self.clock.operators(runs, seconds).items():
            role = "ours" if name in (ours or self.place.ours) else "yardstick" if name in yardsticks else "baseline"
            self.times(what, shape, name, dtype, taken=taken, work=work, role=role)

    def times(self, *name: str, taken: Sequence[float], work: Sequence[Cost], **rest: Any) -> None:
        self.add(*name, value=median(taken), seconds=tuple(taken), work=tuple(work), **rest)

    @contextlib.contextmanager
    def guard(self, *name: str) -> Iterator[None]:
        """A failure inside becomes a row; the phase goes on."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.add(*name, error=f"does not fit: {first_line(error)}")
        except Exception as error:
            self.add(*name, error=f"{type(error).__name__}: {first_line(error)}")
        finally:
            if self.place.is_gpu:
                with contextlib.suppress(Exception):
                    torch.cuda.empty_cache()

    def is_wrong(self, complaint: str | None, *name: str) -> bool:
        """Whether anything was found wrong with a contender, which is then not timed; a row says it."""
        if complaint:
            self.add(*name, error=f"WRONG, not timed: {complaint}")
        return bool(complaint)

    def has_time(self, seconds: float, *name: str) -> bool:
        """Whether so many seconds are left; if not, a row says so."""
        if self.left() >= seconds:
            return True
        self.add(*name, error="no time left")
        return False

    def fits(self, needed: float, *name: str, share: float = 0.75) -> bool:
        """Whether so many bytes are free, on a CPU within this share of all that are; if not, a row says so."""
        free = self.place.free_bytes() * (1.0 if self.place.is_gpu else share)
        if needed <= free:
            return True
        self.add(*name, error=f"not run: needs about {needed / 1e9:.0f} GB of {free / 1e9:.0f} free")
        return False


@dataclass(frozen=True)
class Case:
    """Contenders that do the same work, and where: `python -m benchmarks` chooses among these."""

    run: Callable[[Record, Shape, str, float], None]
    """Checks and times them at a shape, in a type, for so many seconds."""
    shapes: tuple[Shape, ...]
    """On a CPU."""
    gpu_shapes: tuple[Shape, ...] = ()


def first_line(error: BaseException, most: int = 300) -> str:
    return (str(error).strip().splitlines() or [""])[0][:most]


def read_rows(path: Path) -> list[Row]:
    """The rows written so far; a line cut short by a killed process is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError, TypeError):
            read = json.loads(line)
            work = tuple(Cost(**phase) for phase in read["work"])
            rows.append(Row(**{**read, "seconds": tuple(read["seconds"]), "work": work}))
    return rows
