"""The compiled module's help for the loader, where it is there: all of it has a way round in Python."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sparc_fast import backends

__all__ = []

_cpu: Any = import_module("sparc_fast._cpu") if "cpu" in backends.available("cpu") else None
