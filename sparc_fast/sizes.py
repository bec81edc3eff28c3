"""Numbers as people give and read them: sizes with units, NumPy's integers, counts of things."""

from __future__ import annotations

import re
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

__all__ = ["as_bytes", "counted", "is_integer", "is_number", "parse_bytes"]


def is_integer(value: Any) -> bool:
    """Python's integers and NumPy's; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Python's numbers and NumPy's; True is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def counted(number: float, thing: str, things: str | None = None) -> str:
    """1, "step" -> "1 step"; 1150 -> "1,150 steps"; 0.5, "epoch" -> "0.5 epochs"."""
    number = int(number) if float(number).is_integer() else number
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def parse_bytes(text: str) -> int:
    """ "80GiB" -> 85899345920; ValueError where the text stands for no size."""
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*(?:([KMGT])(i?))?B?\s*", text)
    if found is None:
        raise ValueError
    number, prefix, binary = found.groups()
    size = float(number) * (1024 if binary else 1000) ** (" KMGT".index(prefix or " "))
    if not 1 <= size < 2**63:
        raise ValueError
    return int(size)


def as_bytes(value: Any, name: str) -> int:
    """A number of bytes, or a text such as "4GiB"; ValueError names the argument."""
    with suppress(ValueError):
        if isinstance(value, str):
            return parse_bytes(value)
    if is_integer(value) and value >= 1:
        return int(value)
    raise ValueError(f'{name} must be an integer >= 1, in bytes, or a size such as "4GiB", got {value!r}')
