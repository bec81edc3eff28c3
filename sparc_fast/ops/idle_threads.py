"""PyTorch's idle threads leave their cores to whoever has work.

Those of GNU OpenMP spin for about 5 ms after each operation before they sleep, and so does the one that waits for them:
beside any other work, time that a thread which still computes goes without. Where there are more of them than CPUs
they spin for a few microseconds (GOMP_SPINCOUNT in its manual, whose variable is read before anyone could set it here).
"""

from __future__ import annotations

import os
import sys
import threading

import torch

__all__ = ["let_sleep"]

GRAIN = 32768  # numbers from which PyTorch gives another thread work


def let_sleep() -> None:
    """Keep as many more threads asleep as that takes. Once is enough for a process."""
    threads = torch.get_num_threads()
    if sys.platform != "linux":
        return
    for _ in range(_missing(len(os.sched_getaffinity(0)), threads)):
        started = threading.Event()
        threading.Thread(target=_sleep, args=(threads, started), name="sparc_fast, asleep", daemon=True).start()
        started.wait()


def _missing(cpus: int, threads: int) -> int:
    """Threads with threads of their own; two at most, since spinning hurts only where most CPUs are used."""
    return max(0, min(2, -((threads - cpus - 1) // (threads - 1)))) if threads > 1 else 0


def _sleep(threads: int, started: threading.Event) -> None:
    torch.zeros(threads * GRAIN, dtype=torch.uint8, device="cpu").add_(1)  # on threads of its own, which stay
    started.set()
    threading.Event().wait()
