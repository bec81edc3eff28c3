"""Which ranks are still there: each says so once a second where all can read it; it is read when an exchange fails.

The error of a broken connection names an address, and reaches the neighbours of the lost rank alone; the others see
these go, in turn.
"""

from __future__ import annotations

import atexit
import threading
import time
from contextlib import suppress
from functools import cache

import torch.distributed as dist
from torch.distributed import distributed_c10d

BEAT = 1.0  # seconds
SILENT = 4.0  # seconds after which a rank that said nothing is lost
LOST = "sparc_fast/lost"


class Watch:
    """Of the ranks of this process's torch.distributed."""

    def __init__(self) -> None:
        store = distributed_c10d._get_default_store()
        self._store = store.clone() if hasattr(store, "clone") else store
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._ended = threading.Event()
        self._beat()
        thread = threading.Thread(target=self._run, name="sparc_fast ranks", daemon=True)
        thread.start()
        atexit.register(self._end, thread)

    def lost(self) -> list[int]:
        """The ranks that are gone; takes some seconds, since a rank that works is silent for one."""
        try:
            if self._store.check([LOST]):
                return [int(rank) for rank in self._store.get(LOST).decode().split()]
            before = [self._count(rank) for rank in range(self.ranks)]
            time.sleep(SILENT)
            gone = [rank for rank in range(self.ranks) if rank != self.rank and self._count(rank) == before[rank]]
            if gone and not self._store.check([LOST]):
                self._store.set(LOST, " ".join(map(str, gone)))
            return gone
        except RuntimeError:  # whoever keeps the store is gone, with all that is in it
            return [0]

    def _run(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(RuntimeError):
                self._beat()

    def _beat(self) -> None:
        self._store.add(f"sparc_fast/beat/{self.rank}", 1)

    def _count(self, rank: int) -> int:
        return self._store.add(f"sparc_fast/beat/{rank}", 0)

    def _end(self, thread: threading.Thread) -> None:
        self._ended.set()
        thread.join(BEAT)


@cache
def watch() -> Watch:
    """That of this process."""
    return Watch()
