"""Wide dictionaries on one machine: ``python -m benchmarks.experiments.width``.

Whole training steps at S = 2, D = 256, k = 32, N = 512 and ever more latents: seconds a step, what it needs beyond
weights, moments and inputs (in a process of its own, as `memory.py` says), and how both grow with L. The exponent of
time is between neighbouring widths: 1 is time proportional to L.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle, pairwise
from math import log
from pathlib import Path
from time import perf_counter

import torch

from sparc_fast.planning.roofline import measure_roofs

from ..cases import WIDTHS, Shape
from ..main import environment, heading
from ..memory import measure
from ..record import Record, Row
from ..steps import CPU, phases, trainer
from ..table import rows_table
from ..tools.plot import new_figure

BATCHES = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every width that fits in memory; the exit status is 1 if none did."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    where, roofs, record = environment(CPU), measure_roofs(), Record("", CPU)
    print(heading(where))
    for shape in WIDTHS:
        if shape.L not in arguments.latents:
            continue
        gc.collect()  # the model of the width before
        before = len(record.rows)
        if record.fits(shape.held_bytes + 2**29, "step", shape.name, share=1.0):
            measure(record, shape, [("auto", "float32")])
            _time(record, shape, arguments.seconds)
        print(rows_table(record.rows[before:], roofs), flush=True)
    steps = [row for row in record.rows if row.seconds]
    for narrow, wide in pairwise(steps):
        print(f"time ~ L^{exponent(narrow, wide):.2f} from L = {latents(narrow):,} to {latents(wide):,}")
    if arguments.json:
        rows = [asdict(row) | {"floor": roofs.floor(row.work)} for row in record.rows]
        arguments.json.write_text(json.dumps({"environment": where, "roofs": asdict(roofs), "rows": rows}) + "\n")
    if arguments.plot:
        plot(record.rows, arguments.plot)
    return int(not steps)


def latents(row: Row) -> int:
    return next(shape.L for shape in WIDTHS if shape.name == row.shape)


def exponent(narrow: Row, wide: Row) -> float:
    """a, where time grows as L^a from one width to the other."""
    return log((wide.value or 0.0) / (narrow.value or 1.0)) / log(latents(wide) / latents(narrow))


def _time(record: Record, shape: Shape, seconds: float) -> None:
    """Steps one after another on batches that come round, after two to warm up."""
    contender = trainer("auto", shape)
    batches = cycle([shape.inputs(seed) for seed in range(1, BATCHES + 1)])
    losses = [float(contender.step(next(batches))) for _ in range(2)]
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        x, start = next(batches), perf_counter()
        losses.append(float(contender.step(x)))
        times.append(perf_counter() - start)
    note = f"{shape.held_bytes / 1e9:.2f} GB held, loss {losses[0]:.4f} → {losses[-1]:.4f}"
    record.times("step", shape.name, "auto", "float32", taken=times, work=phases(shape), note=note)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time a step and memory beyond what Adam cannot do without, over L, beside lines proportional to L."""
    figure = new_figure(9, 3.6)
    panels = (("s", 1.0, "seconds a step", "o-"), ("B", 1e6, "MB beyond weights, moments, inputs", "s-"))
    for axes, (unit, scale, what, style) in zip(figure.subplots(1, 2), panels, strict=True):
        own = [row for row in rows if row.unit == unit and row.value is not None]
        L, measured = [latents(row) for row in own], [(row.value or 0.0) / scale for row in own]
        axes.loglog(L, [measured[-1] * n / L[-1] for n in L], "--", color="#b8b8b8", label="proportional to L")
        axes.loglog(L, measured, style, color="#3b6ea5", label="measured")
        for at in zip(L, measured, strict=True):
            axes.annotate(f"{at[1]:.3g}", at, textcoords="offset points", xytext=(0, 7), ha="center")
        axes.set_xticks(L, [f"{n:,}" for n in L])
        axes.minorticks_off()
        axes.margins(y=0.25)
        axes.set_xlabel("latents L")
        axes.set_title(what, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    known = [shape.L for shape in WIDTHS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments.width", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--latents", type=int, nargs="+", choices=known, default=known[1:], help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing for each width (%(default)g)")
    parser.add_argument("--threads", type=int, help="of PyTorch and of ours (PyTorch's default)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw how both grow (needs matplotlib)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
