"""What a setting may be, in words and in code: files, flags and Python are held to the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Sources = Mapping[str, str | tuple[str, str]]
"""stream -> a file, or (file, name of the data set in it)."""


@dataclass(frozen=True)
class Kind:
    """The values a setting takes."""

    expected: str
    """In words, for messages."""
    convert: Callable[[Any], Any]
    """The value as it is kept; TypeError or ValueError where it is none."""
    parse: Callable[[str], Any] = str
    """The value that a text stands for; ValueError where it stands for none."""


def about(kind: Kind, help: str, *, free: bool = False) -> dict[str, Any]:
    """What a field of settings carries. A `free` one may change when a run goes on, since no result depends on it."""
    return {"kind": kind, "help": help, "free": free}


def setting(default: Any, kind: Kind, help: str, *, free: bool = False) -> Any:
    """A field of a dataclass of settings."""
    return field(default=default, metadata=about(kind, help, free=free))


def integer(least: int) -> Kind:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError
        return value

    return Kind(f"an integer >= {least}", convert, int)


def number(expected: str, fits: Callable[[float], bool]) -> Kind:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
            raise ValueError
        return float(value)

    return Kind(expected, convert, float)


def choice(*names: str) -> Kind:
    def convert(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError
        return value

    return Kind(f"one of {', '.join(names)}", convert)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _sources(value: Any) -> dict[str, str | tuple[str, str]]:
    if not isinstance(value, Mapping) or not all(isinstance(stream, str) and stream for stream in value):
        raise ValueError
    return {stream: _source(source) for stream, source in value.items()}


def _source(source: Any) -> str | tuple[str, str]:
    if isinstance(source, str | Path) and str(source):
        return str(source)
    path, name = source  # TypeError or ValueError where there are not two
    if isinstance(path, str | Path) and isinstance(name, str):
        return str(path), name
    raise ValueError


def parse_source(text: str) -> tuple[str, str | tuple[str, str]]:
    """(stream, source) of a text ``stream=path`` or ``stream=path#name``."""
    stream, equals, source = text.partition("=")
    path, _, name = source.partition("#")
    if not stream or not equals or not path:
        raise ValueError(f"a source must be stream=path or stream=path#name, got {text!r}")
    return stream, (path, name) if name else path


flag = Kind("true or false", _flag)
text = Kind("text", _text)
sources = Kind("a table of streams, each a path or [path, name]", _sources)
part = number("a number from 0 to 1", lambda x: 0 <= x <= 1)
below_one = number("a number >= 0 and < 1", lambda x: 0 <= x < 1)
positive = number("a number > 0", lambda x: x > 0)
not_negative = number("a number >= 0", lambda x: x >= 0)
