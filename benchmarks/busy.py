"""How much a training step slows beside a core that others keep busy, over how much a bare product of PyTorch does.

On two cores nobody gets below a third more. What a step adds to what the product pays is its own fault: threads that
wait for one which stands still, or spin where it could run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from statistics import median

from .cases import SMALL, STEP, Shape
from .figures import GROWTH
from .record import Case, Record
from .steps import CPU_RIVALS, PRODUCT, check_step, trainer
from .timing import Run

SPELLS = 3
SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10000))"


@contextmanager
def busy_core() -> Iterator[None]:
    """One core kept busy by a process of as much right as this one, which stays on it."""
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        with suppress(AttributeError):  # where it cannot be held to a core
            os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(process.pid))})
        yield
    finally:
        process.kill()
        process.wait()


def measure(record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    """Quiet and busy spells in turns; of each contender its median in both, and its growth over the product's."""
    x, W = shape.inputs(), shape.model().W_enc.data
    runs: dict[str, Run] = {PRODUCT: lambda: x @ W.T}
    for name in (*record.place.ours, CPU_RIVALS[-1]):
        if not record.is_wrong(check_step(name, record.place), GROWTH, shape.name, name, dtype):
            runs[name] = partial(trainer(name, shape, record.place, dtype).step, x)
    quiet: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(SPELLS):
        for times, beside in ((quiet, nullcontext()), (busy, busy_core())):
            with beside:
                for name, taken in record.clock.operators(runs, seconds / SPELLS / 2).items():
                    times[name] += taken
    growth = {name: median(busy[name]) / median(quiet[name]) for name in runs}
    for name, times in growth.items():
        note = f"{median(quiet[name]) * 1e3:.2f} → {median(busy[name]) * 1e3:.2f} ms, {times:.2f}×"
        record.add(GROWTH, shape.name, name, dtype, value=times / growth[PRODUCT], unit="× the product's", note=note)


CASE = Case(measure, (STEP[0], SMALL))
