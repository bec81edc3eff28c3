"""Times taken in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

from sparc_fast.planning.roofline import seconds_of


def interleave(contenders: Mapping[str, Callable[[], Any]], seconds: float, rounds: int = 0) -> dict[str, list[float]]:
    """Each contender's times, in seconds, taken A B C A B C … for about `seconds` (at least 3 rounds), or `rounds`.

    Each runs twice before: once to warm up, once to see how often it must repeat to be timed at all (2 ms).
    """
    repeats = {}
    once = 0.0
    for name, run in contenders.items():
        run()
        warm = seconds_of(run)
        repeats[name] = max(1, math.ceil(2e-3 / warm))
        once += warm * repeats[name]
    rounds = rounds or min(50, max(3, round(seconds / once)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(seconds_of(run, repeats[name]))
    return times


def spread(times: list[float]) -> float:
    """Distance of the quartiles over the median."""
    if len(times) < 2:
        return 0.0
    low, _, high = quantiles(times, n=4, method="inclusive")
    return (high - low) / median(times)


def ratio(times: list[float], ours: list[float]) -> float:
    """How many times ours fits into theirs: the median over rounds, so that a slow spell hits both alike."""
    return median(a / b for a, b in zip(times, ours, strict=True))
