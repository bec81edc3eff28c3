"""Times taken in turns, and the machine's roofs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch

from .cases import Cost


@dataclass(frozen=True)
class Roofs:
    """The best this machine did in this run, in bytes and FLOP a second."""

    copy: float
    float32: float
    bfloat16: float

    def floor(self, phases: Iterable[Cost]) -> float:
        """Seconds below which float32 work of these phases, one after another, cannot come."""
        return sum(max(phase.bytes / self.copy, phase.flops / self.float32) for phase in phases)


def measure_roofs(small: bool = False) -> Roofs:
    """Copy rate of a tensor beyond the caches; rate of a square matrix product in each type."""
    source = torch.ones(2**20 if small else 2**27)
    target = torch.ones_like(source)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source))
    n = 256 if small else 2048

    def gemm(dtype: torch.dtype) -> float:
        a, b = torch.randn(2, n, n).to(dtype)
        return 2 * n**3 / _best(lambda: a @ b.T)

    return Roofs(copy, gemm(torch.float32), gemm(torch.bfloat16))


def _best(run: Callable[[], Any], times: int = 5) -> float:
    run()
    return min(_seconds(run) for _ in range(times))


def interleave(contenders: Mapping[str, Callable[[], Any]], seconds: float, rounds: int = 0) -> dict[str, list[float]]:
    """Each contender's times, in seconds, taken A B C A B C … for about `seconds` (at least 3 rounds), or `rounds`.

    Each runs twice before: once to warm up, once to see how often it must repeat to be timed at all (2 ms).
    """
    repeats = {}
    once = 0.0
    for name, run in contenders.items():
        run()
        warm = _seconds(run)
        repeats[name] = max(1, math.ceil(2e-3 / warm))
        once += warm * repeats[name]
    rounds = rounds or min(50, max(3, round(seconds / once)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(_seconds(run, repeats[name]))
    return times


def _seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    start = perf_counter()
    for _ in range(repeats):
        run()
    return (perf_counter() - start) / repeats


def spread(times: list[float]) -> float:
    """Distance of the quartiles over the median."""
    if len(times) < 2:
        return 0.0
    low, _, high = quantiles(times, n=4, method="inclusive")
    return (high - low) / median(times)


def ratio(times: list[float], ours: list[float]) -> float:
    """How many times ours fits into theirs: the median over rounds, so that a slow spell hits both alike."""
    return median(a / b for a, b in zip(times, ours, strict=True))
