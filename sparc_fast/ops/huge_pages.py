"""Memory for large matrices: rows that are gathered, results that are new in every step, what is freed."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_HAS_COMPILED = find_spec("sparc_fast._cpu") is not None
LARGE = 2**22  # bytes, two huge pages


def empty_rows(*size: int, **like: Any) -> Tensor:
    """torch.empty(*size), on a CPU in huge pages where it grants them: fewer page walks and faults."""
    rows = torch.empty(*size, **like)
    if _HAS_COMPILED and rows.device.type == "cpu" and rows.nbytes >= LARGE:
        from sparc_fast import _cpu

        _cpu.prefer_huge_pages(rows)
    return rows


def give_back_freed() -> None:
    """Give freed memory back to the system, so that it is not mistaken for memory in use."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
