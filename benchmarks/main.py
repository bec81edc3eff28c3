"""The benchmark command: choose cases and a device, check, time in turns, print a line a contender and the figures."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import sparc_fast
from sparc_fast import available_backends
from sparc_fast.files import atomic_path
from sparc_fast.planning.roofline import Roofline, processor

from . import busy, distributed, figures, memory, operators, options, steps
from .cases import SMALL, TYPES, Place, Shape
from .processes import commit, run_until
from .record import Record
from .table import figures_table, rows_table
from .timing import measure_roofs

CASES = {**steps.CASES, **operators.CASES, **options.CASES, "memory": memory.CASE, "busy": busy.CASE,
         "distributed": distributed.CASE}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; the exit status is 1 if a contender was wrong or failed."""
    arguments = _parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or threads)
    try:
        return _run(arguments)
    finally:
        torch.set_num_threads(threads)


def _run(arguments: argparse.Namespace) -> int:
    place = Place(torch.device(arguments.device), {name: name for name in arguments.backend})
    where = environment(place) | {"dtype": arguments.dtype}
    print(heading(where))
    record = Record("", place)
    rates = measure_roofs(record.clock, small=arguments.quick)
    roofs = Roofline(**{name: rate for name, rate in rates.items() if name != "tf32"})
    print(
        f"roofs: copy {roofs.copy / 1e9:.1f} GB/s, GEMM float32 {roofs.float32 / 1e9:.0f} GFLOP/s, "
        f"bfloat16 {roofs.bfloat16 / 1e9:.0f} GFLOP/s\n"
    )
    for op, shape in _chosen(arguments):
        gc.collect()  # the models of the case before
        before = len(record.rows)
        CASES[op].run(record, shape, arguments.dtype, 0.0 if arguments.quick else arguments.seconds)
        print(rows_table(record.rows[before:], roofs), flush=True)
    wanted = figures.ON_GPU if place.is_gpu else figures.ON_CPU
    if found := [figure for figure in figures.reached(record.rows, wanted) if figure.held != "not measured"]:
        print("\n" + figures_table(found, arguments.goals))
    if arguments.json:
        rows = [asdict(row) | {"floor": roofs.floor(row.work) if row.work else None} for row in record.rows]
        report = {"environment": where, "roofs": rates, "figures": [asdict(figure) for figure in found], "rows": rows}
        with atomic_path(arguments.json) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        from .tools.plot import plot

        plot(record.rows, arguments.plot)
    return int(any(row.error and not row.error.startswith("not run") for row in record.rows))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    shapes = dict.fromkeys(shape.name for case in CASES.values() for shape in (*case.shapes, *case.gpu_shapes))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time every operator and the whole training step against plain PyTorch, in turns. A contender "
        "whose result is not the reference's is not timed. Names may be given several times.",
    )
    parser.add_argument("--op", action="append", choices=CASES, help="only this one (all)")
    parser.add_argument("--shape", action="append", choices=shapes, help="only this one (all but small)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    backends = dict.fromkeys((*available_backends("cpu"), *available_backends("cuda")))
    parser.add_argument("--backend", action="append", choices=backends, help="ours (the fastest)")
    parser.add_argument("--dtype", choices=TYPES, help="of weights and inputs (float32; bfloat16 on a GPU)")
    parser.add_argument("--threads", type=int, help="of PyTorch and of ours (PyTorch's default)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each case (%(default)g)")
    parser.add_argument("--quick", action="store_true", help="small shapes, 3 rounds: does it run at all?")
    parser.add_argument("--goals", action="store_true", help="print what this project asks of each figure beside it")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the ratios (needs matplotlib)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and PyTorch finds none here")
    arguments.backend = arguments.backend or list(available_backends(arguments.device)[:1])
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    arguments.op = arguments.op or list(CASES)
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    if not list(_chosen(arguments)):
        has = (f"{op} has {', '.join(shape.name for shape in _shapes(op, arguments))}" for op in arguments.op)
        shapes_given = ", ".join(arguments.shape or ["those of a run without --shape"])
        parser.error(f"--shape must be one that --op has, got {shapes_given}: {'; '.join(has)}")
    return arguments


def _shapes(op: str, arguments: argparse.Namespace) -> tuple[Shape, ...]:
    return CASES[op].gpu_shapes if arguments.device == "cuda" else CASES[op].shapes


def _chosen(arguments: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    for op in arguments.op:
        for shape in _shapes(op, arguments):
            default = (shape.name == SMALL.name) == arguments.quick
            if shape.name in arguments.shape if arguments.shape else default:
                yield op, shape


def environment(place: Place) -> dict[str, Any]:
    """What the figures of a run hang on."""
    try:
        from sparc_fast import _cpu
    except ImportError:
        compiled = None
    else:
        compiled = ("baseline", "AVX2", "AVX-512")[_cpu.simd_level()]
    found = {
        "sparc_fast": sparc_fast.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ"),
        "compiled": compiled,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    if place.as_gpu:
        import triton

        found |= {
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "gpu": f"no GPU: {platform.machine()} stands in",
        }
    if place.is_gpu:
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        asked = run_until(10, ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
        clocks = dict(zip(query.split(","), asked.strip().splitlines()[0].split(", "), strict=False))
        found |= {"gpu": torch.cuda.get_device_name(place.device), **clocks}
    return found


def heading(environment: Mapping[str, Any]) -> str:
    """The environment in two lines, and a GPU's in a third."""
    of_gpu = list(environment)[list(environment).index("triton") :] if "triton" in environment else []
    lines = [
        f"sparc_fast {environment['sparc_fast']} ({environment['commit']}) at {Path(sparc_fast.__file__).parent}, "
        f"compiled module: {environment['compiled'] or 'NO, the reference runs'}",
        f"torch {environment['torch']}, {environment['processor']}, {environment['threads']} thread(s)"
        + (f", {environment['dtype']}" if "dtype" in environment else ""),
        ", ".join(f"{name} {environment[name]}" for name in of_gpu if name != "dtype" and environment[name]),
    ]
    return "\n".join(filter(None, lines))


if __name__ == "__main__":
    sys.exit(main())
