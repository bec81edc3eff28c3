"""Sockets between the ranks of one host, for the few bytes by which they wait for each other.

A process group hands them from thread to thread and through the network, which costs the processors a millisecond where
their caches have other things to do; a socket wakes the one that waits. It closes with its process, however that ends.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch.distributed.constants import default_pg_timeout

MOST = 4096
"""Bytes of a message, of which a socket takes several though nobody reads them yet."""
CONNECTING = 20.0  # seconds


class Neighbours:
    """The other ranks of an exchange."""

    def __init__(self, rank: int, others: Mapping[int, socket.socket]) -> None:
        self._rank, self._others = rank, others
        self._coming: deque[dict[int, memoryview]] = deque()
        """Where what comes from other ranks goes."""
        for other in others.values():
            other.settimeout(default_pg_timeout.total_seconds())

    def begin_gather(self, own: bytes, sizes: Sequence[int]) -> Callable[[], bytearray]:
        """The few bytes of all ranks, so many of each, one after another; when it is called, it waits for them.

        Raises:
            OSError: a rank is gone, or silent for long.
        """
        for other in self._others.values():
            other.sendall(own)
        found = bytearray(sum(sizes))
        places, first = {}, 0
        for rank, size in enumerate(sizes):
            places[rank] = memoryview(found)[first : first + size]
            first += size
        places.pop(self._rank)[:] = own
        self._coming.append(places)

        def wait() -> bytearray:
            while any(some is places for some in self._coming):  # what was sent before comes before
                for rank, place in self._coming[0].items():
                    _receive(self._others[rank], place)
                self._coming.popleft()
            return found

        return wait


def neighbours(own: int, ranks: int, told: Callable[[Any], list[Any]]) -> Neighbours | None:
    """Those of rank `own`, when all ask; None where they are not on one host. `told` gives what every rank has."""
    with socket.socket(socket.AF_UNIX if sys.platform == "linux" else socket.AF_INET) as listener:
        listener.settimeout(CONNECTING)
        address = ""
        with suppress(OSError):
            if sys.platform == "linux":
                address = f"\0sparc_fast/{secrets.token_hex(16)}"  # no file
                listener.bind(address)
                listener.listen(ranks)
        networks, addresses = zip(*told((_network(), address)), strict=True)
        others = {}
        with suppress(OSError):
            if all(addresses) and len(set(networks)) == 1:
                for rank in range(own):
                    others[rank] = _connected(addresses[rank], own)
                for _ in range(own + 1, ranks):
                    other, _ = listener.accept()
                    other.settimeout(CONNECTING)
                    number = bytearray(8)
                    _receive(other, memoryview(number))
                    others[int.from_bytes(number, "big")] = other
    found = sorted({*others, own}) == list(range(ranks))
    return Neighbours(own, others) if all(told(found)) else None


def _network() -> str:
    """Where an address without a file is that of one socket; empty where that is not known."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as boot:
        return f"{boot.read()}{os.readlink('/proc/self/ns/net')}"
    return ""


def _connected(address: str, rank: int) -> socket.socket:
    other = socket.socket(socket.AF_UNIX)
    other.settimeout(CONNECTING)
    other.connect(address)
    other.sendall(rank.to_bytes(8, "big"))
    return other


def _receive(other: socket.socket, place: memoryview) -> None:
    while len(place):
        if not (n := other.recv_into(place)):
            raise ConnectionResetError("a rank has closed its socket")
        place = place[n:]
