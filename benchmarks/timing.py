"""Times on any device, taken in turns, and the device's roofs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sparc_fast.planning import roofline

from .cases import TYPES, Place

Run = Callable[[], Any]


CYCLES = 2e9
"""A second of a GPU whose clock is as fast as any: a sleep of so many cycles never ends early."""
MOST_HIDDEN = 0.02
"""Seconds for which a GPU sleeps at most while the host starts what is timed."""


class Clock:
    """Times one run at a time, by the device's own events where there is a device."""

    def __init__(self, place: Place) -> None:
        self.place = place
        # twice the largest L2 cache there is: what was in the cache is gone after writing it
        self.flushed = torch.empty(2**28 if place.is_gpu else 0, dtype=torch.int8, device=place.device)

    def host_seconds(self, run: Run) -> float:
        """Until the call returns: what the host needs to start a run, and what it waits for."""
        if self.place.is_gpu:
            torch.cuda.synchronize()
        began = perf_counter()
        run()
        return perf_counter() - began

    def seconds(self, run: Run, repeats: int = 1, cold: bool = False, hidden: float = 0.0) -> float:
        """Of one run, the mean of `repeats` back to back; `cold`: not from a warm L2 cache.

        A GPU first sleeps for `hidden` seconds, in which the host goes ahead: its time then is no part of the figure.
        """
        if not self.place.is_gpu:
            return roofline.seconds_of(run, repeats)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if cold:
            self.flushed.zero_()
        if hidden:
            torch.cuda._sleep(int(CYCLES * min(hidden, MOST_HIDDEN)))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats

    def operators(self, runs: Mapping[str, Run], seconds: float) -> dict[str, list[float]]:
        """Each run's times, in seconds, A B C A B C … for about `seconds` (at least 3 rounds).

        Each runs twice before: once to warm up, once to see how long the host takes. On a GPU what is timed is the
        device alone, from a cold L2 cache; on a CPU as many runs back to back as can be timed at all (2 ms).
        """
        once, timed = 0.0, {}
        for name, run in runs.items():
            run()
            host = self.host_seconds(run)
            if self.place.is_gpu:
                hidden = 2 * host + 5e-5
                timed[name] = partial(self.seconds, run, 1, True, hidden)
                once += timed[name]() + hidden + 2e-4
            else:
                repeats = max(1, math.ceil(2e-3 / max(host, 1e-9)))
                timed[name] = partial(self.seconds, run, repeats)
                once += host * repeats
        return self._rounds(timed, once, seconds)

    def steps(self, runs: Mapping[str, Run], seconds: float, together: int = 10) -> dict[str, list[float]]:
        """Each run's times as a training loop has them, host and all: on a GPU `together` back to back, in turns."""
        if not self.place.is_gpu:
            return self.operators(runs, seconds)
        once = 0.0
        for run in runs.values():
            run()
            once += self.seconds(run, 2) * together
        timed = {name: partial(self.seconds, run, together) for name, run in runs.items()}
        return self._rounds(timed, once, seconds)

    @staticmethod
    def _rounds(timed: Mapping[str, Callable[[], float]], once: float, seconds: float) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(max(3, min(50, round(seconds / max(once, 1e-6))))):
            for name, seconds in timed.items():
                times[name].append(seconds())
        return times


def spread(times: Sequence[float]) -> float:
    """Distance of the quartiles over the median."""
    if len(times) < 2:
        return 0.0
    low, _, high = quantiles(times, n=4, method="inclusive")
    return (high - low) / median(times)


def ratio(times: Sequence[float], ours: Sequence[float]) -> float:
    """How many times ours fits into theirs: the median over rounds, so that a slow spell hits both alike."""
    return median(a / b for a, b in zip(times, ours, strict=True))


def measure_roofs(clock: Clock, small: bool = False) -> dict[str, float]:
    """The fields of `Roofline`, best of 5; of a GPU also the rate of products in TensorFloat-32."""
    place, device = clock.place, clock.place.device
    if not place.as_gpu:
        return {name: rate for name, rate in asdict(roofline.measure_roofs(small)).items() if rate is not None}
    best = lambda run: min(clock.seconds(run, hidden=1e-4) for _ in range(6))  # noqa: E731  (the first warms up)
    source = torch.ones(2**16 if small else 2**28, device=device)
    target = torch.empty_like(source)
    roofs = {"copy": 2 * source.nbytes / best(lambda: target.copy_(source))}
    run, gathered = gather_run(device, programs=4 if small else 16384, rows=64 if small else 12288)
    roofs["gather"] = gathered / best(run)
    for name, size in (("bfloat16", 8192), ("tf32", 8192), ("float32", 4096)):
        torch.manual_seed(0)
        a, b = torch.randn(2, *[64 if small else size] * 2, device=device).to(TYPES.get(name, torch.float32))
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        try:
            roofs[name] = 2 * len(a) ** 3 / best(lambda a=a, b=b: a @ b.T)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    return roofs


def gather_run(device: torch.device, programs: int, rows: int, columns: int = 1024) -> tuple[Run, int]:
    """Programs that each add up 64 random rows of a bfloat16 table of 24 MB, and the bytes they read."""
    from .tools.gather import sum_rows

    torch.manual_seed(0)
    table = torch.randn(rows, columns, device=device).to(torch.bfloat16)
    chosen = torch.randint(rows, (programs, 64), device=device, dtype=torch.int32)
    return (lambda: sum_rows(table, chosen)), programs * 64 * columns * 2


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(integers[x.element_size()])
