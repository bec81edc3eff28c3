"""Which ranks are still there: each says so once a second where all can read it; it is read when an exchange fails.

The error of a broken connection names an address, and reaches the neighbours of the lost rank alone; the others see
these go, in turn. Which processes of a host are there, its system knows at once. A host that loses its power or its
cable closes no connection: whoever it leaves waiting ends when it was silent for long.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .shared_memory import _place

BEAT = 1.0  # seconds
SILENT = 4.0  # seconds after which a rank that said nothing is lost
GONE = 30.0  # seconds of silence after which nobody waits any longer
LOST, ENDED, PROCESS = "sparc_fast/lost", "sparc_fast/ended", "sparc_fast/process"


class Watch:
    """Of the ranks of this process's torch.distributed."""

    def __init__(self) -> None:
        store = distributed_c10d._get_default_store()
        self._store = store.clone() if hasattr(store, "clone") else store
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.group = weakref.ref(dist.group.WORLD)
        self._ended = threading.Event()
        self._waits: list[float] = []
        """When each began of what is done with other ranks now."""
        if self.ranks == 1:
            return
        self._place = _place()
        self._store.set(f"{PROCESS}/{self.rank}", f"{os.getpid()} {self._place}")
        self._beat()
        thread = threading.Thread(target=self._run, name="sparc_fast ranks", daemon=True)
        thread.start()
        atexit.register(self._end, thread)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done here needs other ranks."""
        self._waits.append(began := time.monotonic())
        try:
            yield
        finally:
            self._waits.remove(began)

    def lost(self) -> list[int]:
        """The ranks that are gone, as the first that looked has found."""
        try:
            gone = [] if self._store.check([LOST]) else self._gone()
            if gone and not self._store.check([LOST]):
                self._store.set(LOST, " ".join(map(str, gone)))
            return [int(rank) for rank in self._store.get(LOST).decode().split()] if self._store.check([LOST]) else []
        except RuntimeError:  # whoever keeps the store is gone, with all that is in it
            return [0]

    def _gone(self) -> list[int]:
        """Takes some seconds where they are of other hosts, since a rank that works is silent for one."""
        before, here = [self._count(rank) for rank in range(self.ranks)], self._processes()
        until = time.monotonic() + SILENT
        while time.monotonic() < until:
            if ended := [rank for rank, process in here.items() if _has_ended(process)]:
                return ended
            time.sleep(0.05)
        return [rank for rank in range(self.ranks) if rank != self.rank and self._count(rank) == before[rank]]

    def _processes(self) -> dict[int, int]:
        """The numbers of those of the other ranks that are of this host."""
        found = {}
        for rank in range(self.ranks):
            if rank != self.rank and self._place and self._store.check([key := f"{PROCESS}/{rank}"]):
                number, _, place = self._store.get(key).decode().partition(" ")
                if place == self._place:
                    found[rank] = int(number)
        return found

    def _run(self) -> None:
        now = time.monotonic()
        heard = {rank: (0, now) for rank in range(self.ranks) if rank != self.rank}
        try:
            while not self._ended.wait(BEAT):
                self._beat()
                self._end_without(self._silent(heard))
        except RuntimeError:  # the store is gone, and rank 0, which kept it
            self._ended.set()
            self._end_in_vain()

    def _silent(self, heard: dict[int, tuple[int, float]]) -> list[int]:
        """Ranks that were not heard of for long and did not end; `heard` is when their counts last changed."""
        now = time.monotonic()
        for rank, (count, _) in heard.items():
            if (new := self._count(rank)) != count:
                heard[rank] = new, now
        late = [rank for rank, (_, at) in heard.items() if now - at > GONE]
        return [rank for rank in late if not self._store.check([f"{ENDED}/{rank}"])]

    def _end_in_vain(self) -> None:
        """Once nobody tells any more who is there, an exchange that takes long waits for the lost."""
        since = time.monotonic()
        while self.group() is dist.group.WORLD:
            time.sleep(BEAT)
            if time.monotonic() - max(since, min(list(self._waits), default=math.inf)) > GONE:
                self._end_without([0])

    def _end_without(self, gone: list[int]) -> None:
        """The thread that waits for them is in a library that nothing interrupts."""
        if gone:
            names = f"rank {gone[0]} is" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} are"
            print(f"sparc-fast: {names} gone: silent for {GONE:.0f} seconds", file=sys.stderr, flush=True)
            os._exit(1)

    def _beat(self) -> None:
        self._store.add(f"sparc_fast/beat/{self.rank}", 1)

    def _count(self, rank: int) -> int:
        return self._store.add(f"sparc_fast/beat/{rank}", 0)

    def _end(self, thread: threading.Thread) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        with suppress(RuntimeError):
            self._store.set(f"{ENDED}/{self.rank}", "")
        thread.join(BEAT)


def _has_ended(process: int) -> bool:
    """Whether there is no such process any more, but for what its parent may ask of it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


_watches: list[Watch] = []


def watch() -> Watch:
    """That of this process: of the torch.distributed that it has joined last."""
    if not _watches or _watches[0].group() is not dist.group.WORLD:
        _watches[:] = [Watch()]
    return _watches[0]
