"""Words on terminals whose encoding lacks some of our signs."""

from __future__ import annotations

import codecs
import sys
from io import TextIOWrapper
from unicodedata import normalize

__all__ = ["write_anywhere"]

ALIKE = {"→": ">", "–": "-", "·": ";", "×": "x", "÷": "/", "±": "~", "≥": ">=", "≤": "<=", "λ": "lambda"}
"""What is written instead; one letter for each sign of a table, whose columns stay aligned."""


def write_anywhere() -> None:
    """From now on standard output and error write what they cannot encode as something alike, or escaped."""
    codecs.register_error("sparc_fast.alike", _alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="sparc_fast.alike")


def _alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(sign: str) -> str:
    letters = ALIKE.get(sign) or normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return letters or sign.encode("ascii", "backslashreplace").decode()
