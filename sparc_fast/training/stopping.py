"""Ctrl-C and SIGTERM end a run between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Whether somebody asked to stop."""

    signal: signal.Signals | None = None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a request; a second one raises KeyboardInterrupt.

    Only the main thread can catch signals; in any other they keep their meaning.
    """
    stop = Stop()

    def ask(number: int, _: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
