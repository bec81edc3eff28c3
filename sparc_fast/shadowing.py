"""A checkout's sources, which are not compiled, found before the installed package, which is."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

__all__ = ["warn_of_hidden_installation"]


def warn_of_hidden_installation() -> None:
    """Warn where this package, whose compiled half is missing, hides an installed one that has it."""
    here = Path(__file__).resolve().parent
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != here.parent]
    installed = PathFinder.find_spec("sparc_fast", elsewhere)
    places: Sequence[str] = (installed and installed.submodule_search_locations) or []
    if PathFinder.find_spec("sparc_fast._cpu", places) is not None:
        warnings.warn(
            f"sparc_fast is used from its sources in {here}, which are not compiled and slow, instead of {places[0]}, "
            "where it is installed: start Python in another folder, or compile the sources with "
            f"pip install -e {here.parent}",
            stacklevel=3,
        )
