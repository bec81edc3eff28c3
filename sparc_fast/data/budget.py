"""How large blocks and windows may be, so that a loader stays within its memory."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from typing import NamedTuple

import torch

from .readers import Reader
from .shuffle import Shuffling

__all__ = ["Needs", "check_fits", "default_threads", "make_plan"]

READ_AT_ONCE = 2**20  # bytes: below, a disk loses time between reads
JOB_BYTES = 2**21  # blocks are read so many bytes together, so that Python has little to do with each
BLOCKS_TO_MIX = 1024  # blocks a window should hold; blocks shrink below READ_AT_ONCE for it ...
READ_AT_LEAST = 2**18  # ... but not below this, as long as the window holds FEWEST_BLOCKS
FEWEST_BLOCKS = 16  # blocks a window must hold: fewer would not mix
CONVERTED_TOGETHER = 2**19  # bytes on the way to another dtype, still in cache
ORDER_BYTES = 40  # for each row of a window: its place in the order (8), and sorting the next window's (32)
THREADS = 4  # reckoned with at least, so that windows do not depend on the processors
THREAD_BYTES = 2**20  # a thread's own stack and small buffers


class Needs(NamedTuple):
    """Bytes a loader takes: these, `row` for each row it holds, and `order` for each of a window."""

    fixed: int
    row: int
    order: int

    @classmethod
    def of(cls, readers: Collection[Reader], batch_size: int, dtype: torch.dtype, n_threads: int) -> Needs:
        batch = batch_size * sum(reader.width for reader in readers) * dtype.itemsize
        row = sum(reader.row_bytes for reader in readers)
        thread = max(reader.scratch for reader in readers) + THREAD_BYTES
        conversion = max(CONVERTED_TOGETHER, max(reader.row_bytes for reader in readers))
        # three batches: one in use, one to come, a short one
        order = ORDER_BYTES + sum(reader.order_bytes for reader in readers)
        return cls(3 * batch + max(n_threads, THREADS) * thread + conversion, row, order)


def default_threads() -> int:
    """Reading threads: what a fast disk can use, and no more than half of the processors."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(THREADS, mine // 2))


def make_plan(readers: Collection[Reader], needs: Needs, memory: int, seed: int, shuffle: bool) -> Shuffling:
    """The plan with the largest windows that fit: one, kept from epoch to epoch, or else two at a time."""
    n_rows = next(iter(readers)).n_rows
    granule = _granule(readers, n_rows)
    narrowest = min(reader.row_bytes for reader in readers)
    target = READ_AT_ONCE // narrowest
    everything = n_rows * (needs.row + needs.order) + needs.fixed
    if everything <= memory:
        block = min(_whole(target, granule), n_rows)
        return Shuffling(n_rows, block, -(-n_rows // block), seed, shuffle)
    of_window, of_blocks = 2 * needs.row + needs.order, _order_of_blocks(n_rows, granule)
    capacity = (memory - needs.fixed - of_blocks) // of_window
    mixing = max(capacity // BLOCKS_TO_MIX, min(READ_AT_LEAST // narrowest, capacity // FEWEST_BLOCKS))
    block = _whole(min(target, mixing), granule)
    decoded = max(reader.decodes for reader in readers)  # again for each window, where rows are in another order
    if capacity < max(FEWEST_BLOCKS * block, decoded):
        least = min(needs.fixed + of_blocks + max(FEWEST_BLOCKS * granule, decoded) * of_window, everything)
        coarse = max(readers, key=lambda reader: reader.granule)
        hint = f"; {coarse.title} is stored {coarse.granule} rows a piece" if coarse.granule > 1 else ""
        raise ValueError(f"memory must be at least {least} bytes here, got {memory}{hint}")
    return Shuffling(n_rows, block, capacity // block, seed, shuffle)


def check_fits(plan: Shuffling, needs: Needs, memory: int) -> None:
    """Raise ValueError unless a plan made elsewhere fits this memory."""
    held = 1 if plan.n_windows == 1 else 2
    least = needs.fixed + plan.window_rows * (held * needs.row + needs.order) + 40 * plan.n_blocks * (held - 1)
    if least > memory:
        raise ValueError(f"memory must be at least {least} bytes to go on with this state's windows, got {memory}")


def _granule(readers: Collection[Reader], n_rows: int) -> int:
    """Rows at multiples of which all files can be read without waste, if there are such."""
    granules = [reader.granule for reader in readers]
    common = math.lcm(*granules)
    return common if common <= min(n_rows, 4 * max(granules)) else max(granules)


def _whole(rows: int, granule: int) -> int:
    """About so many rows, in whole granules; at least one."""
    return max(1, rows // granule) * granule


def _order_of_blocks(n_rows: int, granule: int) -> int:
    """Bytes of the epoch's order of blocks, at the smallest blocks."""
    return 40 * -(-n_rows // granule)
