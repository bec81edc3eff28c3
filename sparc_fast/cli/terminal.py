"""Words on terminals: of an encoding that lacks some of our signs, and warnings in a line."""

from __future__ import annotations

import codecs
import sys
import warnings
from io import TextIOWrapper
from unicodedata import normalize

__all__ = ["warn_in_a_line", "write_anywhere"]

ALIKE = {"→": ">", "–": "-", "·": ";", "×": "x", "÷": "/", "±": "~", "≥": ">=", "≤": "<=", "λ": "lambda"}
"""What is written instead; one letter for each sign of a table, whose columns stay aligned."""


def write_anywhere() -> None:
    """From now on standard output and error write what they cannot encode as something alike, or escaped."""
    codecs.register_error("sparc_fast.alike", _alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="sparc_fast.alike")


def warn_in_a_line() -> None:
    """From now on our warnings are a line each, as errors are, without a place in the code."""
    usual = warnings.formatwarning

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is UserWarning:
            return f"sparc-fast: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = format_warning


def _alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(sign: str) -> str:
    letters = ALIKE.get(sign) or normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return letters or sign.encode("ascii", "backslashreplace").decode()
