"""Memory that the ranks of one host share: what they exchange is written once, and read where it is.

Who has written is told through their process group, so that a lost rank is found as in every other exchange. The memory
has no name: it is gone with the processes, however they end.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

LEAST = 4096
"""Bytes; fewer come with a message as soon as word of them would."""
LEAST_DEALT = 1
"""The same where each rank takes its own of what others have, which is no message to all."""
MOST_BUFFERS = 62
"""Which of them are held is one number."""
MEMORY = 5  # a call, as ranks tell them apart


class SharedMemory:
    """Buffers that all ranks of an exchange have; one is free again when no rank has a tensor of it left."""

    def __init__(self, rank: int, numbers: Callable[..., list[list[int]]]) -> None:
        self._rank, self._numbers = rank, numbers
        self._buffers: list[_Buffer] = []
        self._held = 0
        """Bits, of the buffers that some rank held when all last told, and of those lent since."""
        self._told = self._heard = 0

    def take(self, n_bytes: int) -> Tensor | None:
        """The same free memory, uint8 [n_bytes], on all ranks, which ask together; None where there is none."""
        size = max(mmap.PAGESIZE, 1 << (n_bytes - 1).bit_length())  # whatever nobody writes to takes no memory
        fit = (i for i, buffer in enumerate(self._buffers) if buffer.size == size and not self._held >> i & 1)
        if (number := next(fit, None)) is None:
            if len(self._buffers) == MOST_BUFFERS or (memory := self._map(size)) is None:
                return None
            number = len(self._buffers)
            self._buffers.append(_Buffer(memory, size))
        self._held |= 1 << number
        return self._buffers[number].lent(n_bytes, self._told)

    def held(self) -> tuple[int, int]:
        """(number, bits): the number of what a rank tells all, from 1 on, and which buffers it holds then."""
        self._told += 1
        return self._told, sum(1 << i for i, buffer in enumerate(self._buffers) if buffer.is_held)

    def heard(self, number: int, of_ranks: Iterable[int]) -> None:
        """What all ranks held when they told that number."""
        if number <= self._heard:  # a later one is more up to date
            return
        self._heard = number
        self._held = sum(1 << i for i, buffer in enumerate(self._buffers) if buffer.lent_after >= number)
        for of_rank in of_ranks:
            self._held |= of_rank

    def _map(self, size: int) -> mmap.mmap | None:
        """New memory of the first rank, opened by all; None where one of them cannot."""
        descriptor, memory = -1, None
        with suppress(OSError):
            if self._rank == 0:
                descriptor = os.memfd_create("sparc_fast", os.MFD_CLOEXEC)
                os.ftruncate(descriptor, size)
        try:
            pid, theirs, _ = self._numbers(MEMORY, os.getpid(), descriptor, size)[0]
            with suppress(OSError):
                if self._rank:
                    descriptor = os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR | os.O_CLOEXEC)
                memory = mmap.mmap(descriptor, size)
            return memory if all(found for (found,) in self._numbers(MEMORY, memory is not None)) else None
        finally:
            if descriptor >= 0:
                os.close(descriptor)


class _Buffer:
    def __init__(self, memory: mmap.mmap, size: int) -> None:
        self._memory, self.size = memory, size
        self._window: weakref.ref[memoryview] | None = None
        self.lent_after = 0
        """The number of what was told last."""

    def lent(self, n_bytes: int, told: int) -> Tensor:
        self.lent_after = told
        window = memoryview(self._memory)  # which lives as long as a tensor is on it
        self._window = weakref.ref(window)
        return torch.frombuffer(window, dtype=torch.uint8, count=n_bytes)

    @property
    def is_held(self) -> bool:
        return self._window is not None and self._window() is not None


def shared_memory(
    rank: int, told: Callable[[Any], list[Any]], numbers: Callable[..., list[list[int]]]
) -> SharedMemory | None:
    """That of the ranks, which all ask; None where they are not on one host.

    Args:
        told: what every rank has, from what this one has.
        numbers: the same of a call's numbers: `Exchange.numbers`.
    """
    places = told(_place())
    return SharedMemory(rank, numbers) if places[0] and len(set(places)) == 1 else None


def _place() -> str:
    """Where a process's number means it; empty where that is not known, or memory cannot be shared by number."""
    with suppress(OSError):
        if hasattr(os, "memfd_create"):
            with open("/proc/sys/kernel/random/boot_id") as boot:
                return f"{boot.read()}{os.readlink('/proc/self/ns/pid')}"
    return ""
