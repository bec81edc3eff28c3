"""The best a machine does, and what work cannot do without: what benchmarks and plans are held against."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """What a phase cannot do without."""

    flops: float = 0.0
    """Multiplications and additions."""
    bytes: float = 0.0
    """Moved between memory and chip: every operand once, every touched row once, every result once."""
    dtype: str = "float32"
    """In which it may multiply: "float32" or "bfloat16"."""
    gathered: float = 0.0
    """Bytes read by gathers, on a GPU from its L2 cache."""


@dataclass(frozen=True)
class Roofline:
    """The best a machine did, in bytes and FLOP a second."""

    copy: float
    float32: float
    bfloat16: float
    gather: float | None = None
    """Of bytes from the L2 cache; None: gathers are not counted."""

    @property
    def faster_type(self) -> str:
        """Of the encoder's product, which may be screened in bfloat16."""
        return "bfloat16" if self.bfloat16 > self.float32 else "float32"

    def floor(self, phases: Iterable[Cost]) -> float:
        """Seconds below which the work of these phases, one after another, cannot come."""
        return sum(map(self._seconds, phases))

    def _seconds(self, phase: Cost) -> float:
        products = phase.flops / {"float32": self.float32, "bfloat16": self.bfloat16}[phase.dtype]
        gathers = phase.gathered / self.gather if self.gather else 0.0
        return max(phase.bytes / self.copy, products, gathers)


def measure_roofs(small: bool = False) -> Roofline:
    """Copy rate of a tensor beyond the caches (1 GiB in all); rate of a square matrix product in each type."""
    source = torch.ones(2**20 if small else 2**27, dtype=torch.float32, device="cpu")
    target = torch.ones_like(source)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source))
    n = 256 if small else 2048

    def gemm(dtype: torch.dtype) -> float:
        a, b = torch.randn(2, n, n, dtype=torch.float32, device="cpu").to(dtype)
        return 2 * n**3 / _best(lambda: a @ b.T)

    return Roofline(copy, gemm(torch.float32), gemm(torch.bfloat16))


def _best(run: Callable[[], Any], times: int = 5) -> float:
    run()
    return min(seconds_of(run) for _ in range(times))


def seconds_of(run: Callable[[], Any], repeats: int = 1) -> float:
    """Of one run, the mean of `repeats` back to back."""
    start = perf_counter()
    for _ in range(repeats):
        run()
    return (perf_counter() - start) / repeats


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
