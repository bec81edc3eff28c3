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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, pairwise
from math import log
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from sparc_fast.planning.process_memory import available_bytes
from sparc_fast.planning.roofline import Roofline, measure_roofs

from .. import memory
from ..cases import WIDTHS, Shape
from ..main import environment, heading
from ..steps import CPU, phases, trainer
from ..timing import spread

BATCHES = 8
WARM_UP = 2


@dataclass(frozen=True)
class Width:
    """What was measured at one number of latents."""

    L: int
    seconds: float
    """Median of the steps."""
    spread: float
    """Distance of the quartiles over the median."""
    floor: float
    """Seconds below which float32 work cannot come at the roofs of this run."""
    bytes_held: int
    """Weights, moments and inputs."""
    bytes_beyond: int
    loss: tuple[float, float]
    """Of the first step and the last."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every width that fits in memory; the exit status is 1 if none did."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    where = environment(CPU) | {"dtype": "float32"}
    print(heading(where))
    roofs = measure_roofs()
    widths = list(_measured(arguments.latents, roofs, arguments.seconds))
    exponents = [exponent(a, b) for a, b in pairwise(widths)]
    for (narrow, wide), found in zip(pairwise(widths), exponents, strict=True):
        print(f"time ~ L^{found:.2f} from L = {narrow.L:,} to {wide.L:,}")
    if arguments.json:
        record = {"environment": where, "roofs": asdict(roofs), "widths": [asdict(width) for width in widths]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        plot(widths, arguments.plot)
    return int(not widths)


def exponent(narrow: Width, wide: Width) -> float:
    """a, where time grows as L^a from one width to the other."""
    return log(wide.seconds / narrow.seconds) / log(wide.L / narrow.L)


def _measured(latents: Sequence[int], roofs: Roofline, seconds: float) -> Iterator[Width]:
    for shape in WIDTHS:
        if shape.L not in latents:
            continue
        gc.collect()  # the model of the width before
        needed, free = shape.held_bytes + 2**29, available_bytes()
        if free is not None and needed > free:
            print(f"L = {shape.L:,}: not run, needs {needed / 1e9:.1f} GB of {free / 1e9:.1f} free")
            continue
        width = _at(shape, roofs, seconds)
        print(
            f"L = {width.L:9,}  {width.seconds * 1e3:9.1f} ms ±{width.spread:4.0%}  "
            f"{width.seconds / width.L * 1e9:6.0f} ns a latent  {width.floor / width.seconds:4.0%} of roof  "
            f"{width.bytes_held / 1e9:6.2f} GB held  {width.bytes_beyond / 1e6:6.0f} MB beyond  "
            f"loss {width.loss[0]:.4f} → {width.loss[1]:.4f}",
            flush=True,
        )
        yield width


def _at(shape: Shape, roofs: Roofline, seconds: float) -> Width:
    beyond = memory.extra_bytes("auto", shape)
    contender = trainer("auto", shape)
    batches = cycle([shape.inputs(seed) for seed in range(1, BATCHES + 1)])
    losses = [float(contender.step(next(batches))) for _ in range(WARM_UP)]
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        x, start = next(batches), perf_counter()
        losses.append(float(contender.step(x)))
        times.append(perf_counter() - start)
    floor = roofs.floor(phases(shape))
    held = shape.held_bytes
    return Width(shape.L, median(times), spread(times), floor, held, beyond, (losses[0], losses[-1]))


def plot(widths: Sequence[Width], path: Path) -> None:
    """Time a step and memory beyond what Adam cannot do without, over L, beside lines proportional to L."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'sparc_fast[demo]'") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = (
        ("seconds a step", [width.seconds for width in widths], "o-"),
        ("MB beyond weights, moments, inputs", [width.bytes_beyond / 1e6 for width in widths], "s-"),
    )
    latents = [width.L for width in widths]
    for axes, (what, measured, style) in zip(figure.subplots(1, 2), panels, strict=True):
        proportional = [measured[-1] * L / latents[-1] for L in latents]
        axes.loglog(latents, proportional, "--", color="#b8b8b8", label="proportional to L")
        axes.loglog(latents, measured, style, color="#3b6ea5", label="measured")
        for L, value in zip(latents, measured, strict=True):
            axes.annotate(f"{value:.3g}", (L, value), textcoords="offset points", xytext=(0, 7), ha="center")
        axes.set_xticks(latents, [f"{L:,}" for L in latents])
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
