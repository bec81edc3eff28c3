"""Memory for large matrices: rows that are gathered, results that are new in every step, what is freed."""

from __future__ import annotations

import ctypes
import math
import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_HAS_COMPILED = find_spec("sparc_fast._cpu") is not None
LARGE = 2**22  # bytes, two huge pages
LENT = 2**20  # bytes of the least that is lent; fewer are quickly had from the allocator


def empty_rows(*size: int, **like: Any) -> Tensor:
    """torch.empty(*size), on a CPU in huge pages where it grants them: fewer page walks and faults."""
    rows = torch.empty(*size, **like)
    if _HAS_COMPILED and rows.device.type == "cpu" and rows.nbytes >= LARGE:
        from sparc_fast import _cpu

        _cpu.prefer_huge_pages(rows)
    return rows


def lent(*size: int, dtype: torch.dtype, device: torch.device | str = "cpu", for_long: bool = True) -> Tensor:
    """torch.empty(*size) for a result of every step: on a CPU, a large one in memory that others have left.

    Fresh pages cost more than filling them. The memory is the tensor's for as long as anything refers to it; what
    nobody has used for some steps goes back to the system. What is not had `for_long`, but gone with the call that
    asks, may be part of a larger piece.
    """
    if not _HAS_COMPILED or (n_bytes := math.prod(size) * dtype.itemsize) < LENT or torch.device(device).type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    from sparc_fast import _cpu

    memory = torch.frombuffer(_cpu.LentMemory(n_bytes, for_long), dtype=dtype, count=n_bytes // dtype.itemsize).view(
        size
    )
    # no view of another tensor, which nobody may change in place and differentiate
    rows: Tensor = torch.empty(0, dtype=dtype, device="cpu").set_(memory.untyped_storage(), 0, size, memory.stride())
    settings: Any = torch.utils.deterministic
    if torch.are_deterministic_algorithms_enabled() and settings.fill_uninitialized_memory:  # as torch.empty does
        rows.fill_(math.nan if dtype.is_floating_point else torch.iinfo(dtype).max)
    return rows


def give_back_freed() -> None:
    """Give freed memory back to the system, so that it is not mistaken for memory in use."""
    if _HAS_COMPILED:
        from sparc_fast import _cpu

        _cpu.let_memory_go()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
