"""The benchmark command: choose cases, check, time in turns, print a line a contender and the figures."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sparc_fast
from sparc_fast import available_backends
from sparc_fast.planning.process_memory import available_bytes
from sparc_fast.planning.roofline import Roofline, measure_roofs, processor

from . import memory
from .cases import SMALL, WIDE, Case, Place, Shape
from .figures import Line, reached
from .operators import OPERATORS, cpu_case
from .optimizer_options import OPTIONS
from .processes import commit
from .steps import RIVALS, WHOLE, Whole
from .timing import Clock, ratio, spread

CASES = {
    **WHOLE,
    **{op: Whole(op, own.shapes, tuple(own.cpu), partial(cpu_case, op)) for op, own in OPERATORS.items()},
    **OPTIONS,
}
CPU = Place(torch.device("cpu"), "auto")
MEMORY_SHAPES = (WIDE, SMALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; the exit status is 1 if a contender was wrong."""
    arguments = _parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or threads)
    try:
        return _run(arguments)
    finally:
        torch.set_num_threads(threads)


def _run(arguments: argparse.Namespace) -> int:
    environment = environment_of_run()
    print(heading(environment))
    roofs = measure_roofs(small=arguments.quick)
    print(
        f"roofs: copy {roofs.copy / 1e9:.1f} GB/s, GEMM float32 {roofs.float32 / 1e9:.0f} GFLOP/s, "
        f"bfloat16 {roofs.bfloat16 / 1e9:.0f} GFLOP/s\n"
    )
    lines, failed = [], False
    for op, shape in _chosen(arguments):
        gc.collect()  # the models of the case before
        if op == "memory":
            found = list(_memory_lines(shape, arguments.backend))
        else:
            found, wrong = _case_lines(op, shape, roofs, arguments)
            failed |= wrong
        lines += found
    _print_figures(lines, arguments.goals)
    if arguments.json:
        record = {"environment": environment, "roofs": asdict(roofs), "lines": [asdict(line) for line in lines]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        from .plot import plot

        plot(lines, arguments.plot)
    return int(failed)


def _case_lines(op: str, shape: Shape, roofs: Roofline, arguments: argparse.Namespace) -> tuple[list[Line], bool]:
    """What a case measured, and whether a contender was wrong."""
    try:
        case = CASES[op].case(shape, arguments.backend)
    except MemoryError as error:
        print(_start(op, shape.name, ", ".join(arguments.backend)) + f"not run: {error}")
        return [], False
    for name, complaint in case.wrong.items():
        print(_start(op, shape.name, name) + f"WRONG, not timed: {complaint}")
    if not case.ours:
        print(_start(op, shape.name, ", ".join(arguments.backend)) + "has no such operator")
    found = []
    for line in _lines(case, roofs, arguments.seconds, 3 if arguments.quick else 0):
        print(_row(line), flush=True)
        found.append(line)
    return found, bool(case.wrong)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    ops = (*CASES, "memory")
    shapes = dict.fromkeys(shape.name for op in ops for shape in _shapes(op))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time every operator and the whole training step against plain PyTorch, in turns. A contender "
        "whose result is not the reference's is not timed. Names may be given several times.",
    )
    parser.add_argument("--op", action="append", choices=ops, help="only this one (all)")
    parser.add_argument("--shape", action="append", choices=shapes, help="only this one (all but small)")
    parser.add_argument("--backend", action="append", choices=available_backends("cpu"), help="ours (the fastest)")
    parser.add_argument("--threads", type=int, help="of PyTorch and of ours (PyTorch's default)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each case (%(default)g)")
    parser.add_argument("--quick", action="store_true", help="small shapes, 3 rounds: does it run at all?")
    parser.add_argument("--goals", action="store_true", help="print what this project asks of each figure beside it")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the ratios (needs matplotlib)")
    arguments = parser.parse_args(argv)
    arguments.backend = arguments.backend or list(available_backends("cpu")[:1])
    arguments.op = arguments.op or list(ops)
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    if not list(_chosen(arguments)):
        has = [f"{op} has {', '.join(shape.name for shape in _shapes(op))}" for op in arguments.op]
        parser.error(f"--shape must be one that --op has, got {', '.join(arguments.shape)}: {'; '.join(has)}")
    return arguments


def _shapes(op: str) -> tuple[Shape, ...]:
    return MEMORY_SHAPES if op == "memory" else CASES[op].shapes


def _chosen(arguments: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    for op in arguments.op:
        for shape in _shapes(op):
            default = (shape.name == SMALL.name) == arguments.quick
            if shape.name in arguments.shape if arguments.shape else default:
                yield op, shape


def _lines(case: Case, roofs: Roofline, seconds: float, rounds: int) -> Iterator[Line]:
    if not case.contenders:
        return
    times = Clock(CPU).operators(case.contenders, seconds, rounds)
    ours = next((times[name] for name in case.ours if name in times), None)
    flops, moved = sum(phase.flops for phase in case.phases), sum(phase.bytes for phase in case.phases)
    floor = roofs.floor(case.phases)
    for name, taken in times.items():
        role = "ours" if name in case.ours else "yardstick" if name in case.yardsticks else "baseline"
        over_ours = ratio(taken, ours) if ours else None
        middle = median(taken)
        yield Line(
            case.op, case.shape.name, name, role, taken, middle, spread(taken), over_ours, flops, moved, floor / middle
        )


def _memory_lines(shape: Shape, backends: Sequence[str]) -> Iterator[Line]:
    lazy = f"{backends[0]}, replay"
    for name in (*backends, lazy, *RIVALS):
        needed, free = memory.expected_bytes(name, shape), available_bytes()
        if free is not None and needed > 0.75 * free:
            print(_start("memory", shape.name, name) + f"not run: needs {needed / 1e9:.0f} GB of {free / 1e9:.0f} free")
            continue
        role = "ours" if name in (*backends, lazy) else "baseline"
        line = Line("memory", shape.name, name, role, [], 0, 0, None, 0, 0, 0, memory.extra_bytes(name, shape))
        print(_row(line), flush=True)
        yield line


def _start(op: str, shape: str, contender: str) -> str:
    return f"{op:16} {shape:15} {contender:26} "


def _row(line: Line) -> str:
    row = _start(line.op, line.shape, line.contender)
    if line.bytes_beyond is not None:
        return row + f"{line.bytes_beyond / 1e6:10.1f} MB beyond weights, moments and inputs"
    row += f"{line.median * 1e3:10.3f} ms ±{line.spread:4.0%} "
    row += f"{line.ratio:7.2f}× " if line.ratio is not None else " " * 9
    if line.role == "yardstick":  # it does not do this case's work
        return row
    rates = f"{line.bytes / line.median / 1e9:7.1f} GB/s {line.flops / line.median / 1e9:7.1f} GFLOP/s"
    return row + f"{rates} {line.of_roof:5.0%} of roof"


def _print_figures(lines: Sequence[Line], goals: bool) -> None:
    if figures := reached(lines):
        wanted = f"{'must':>8} {'aim':>8} " if goals else ""
        print(f"\n{'figure':64} {wanted}{'reached':>12}")
    for figure, whose, value in figures:
        wanted = f"{figure.must:>8} {figure.aim:>8} " if goals else ""
        print(f"{figure.what:64} {wanted}{value:>9.2f}{figure.unit:3} {whose}")


def environment_of_run() -> dict[str, Any]:
    """What the figures of a run hang on."""
    try:
        from sparc_fast import _cpu
    except ImportError:
        compiled = None
    else:
        compiled = ("baseline", "AVX2", "AVX-512")[_cpu.simd_level()]
    return {
        "sparc_fast": sparc_fast.__version__,
        "commit": commit(),
        "compiled": compiled,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }


def heading(environment: dict[str, Any]) -> str:
    """The environment in two lines."""
    compiled = environment["compiled"]
    return (
        f"sparc_fast {environment['sparc_fast']} ({environment['commit']}) at {Path(sparc_fast.__file__).parent}, "
        f"compiled module: {compiled or 'NO, the reference runs'}\n"
        f"torch {environment['torch']}, {environment['processor']}, {environment['threads']} thread(s), float32"
    )


if __name__ == "__main__":
    sys.exit(main())
