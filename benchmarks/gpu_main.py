"""The phases of the GPU command, each in a process of its own, and the report made of what they leave."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from . import gpu, gpu_build, gpu_checks, gpu_operators, gpu_steps
from .gpu_cases import A, B, C, Place, U
from .gpu_checks import ROOT
from .gpu_figures import faster_in_cuda, figures_table, floor_of, reached, rows_table
from .gpu_record import Record, Row, read_rows, write_atomically
from .gpu_timing import Clock, Roofs, measure_roofs

BFLOAT16 = torch.bfloat16


def roofs(record: Record) -> None:
    for name, rate in measure_roofs(Clock(record.place), small=not record.place.is_gpu).items():
        record.add("roof", contender=name, value=rate, unit="/s")


def tests(record: Record) -> None:
    gpu_checks.run_tests(record, gpu_checks.test_files(record.quick))


def sanitizer(record: Record) -> None:
    gpu_checks.run_sanitizer(record)


def rows(record: Record) -> None:
    clock = Clock(record.place)
    for shape in (A, B):
        gpu_operators.measure(record, clock, shape, torch.float32, ["topk_rows"], _seconds(record, 3))


ALL = [name for name in gpu_operators.OPERATORS if name not in ("topk_rows", "global_topk")]


def upstream(record: Record) -> None:
    """Shape U: the research code's own size."""
    clock, seconds = Clock(record.place), _seconds(record, 3)
    gpu_steps.compare(record, clock, U, list(gpu_steps.trainers(U, record.place)), seconds)
    for dtype in ("bfloat16", "float32"):
        gpu_steps.repeat(record, U, dtype)
    gpu_steps.graph(record, clock, U, "bfloat16", seconds)
    if not record.quick:
        gpu_operators.measure(record, clock, U, BFLOAT16, ["global_topk", *ALL], 0.5)


def shape_a(record: Record) -> None:
    clock, seconds = Clock(record.place), _seconds(record, 4)
    gpu_operators.measure(record, clock, A, BFLOAT16, ["global_topk"], _seconds(record, 2))
    wanted = [("ours", "bfloat16"), ("Lean, dense products", "bfloat16")]
    if not record.quick:
        wanted = list(gpu_steps.trainers(A, record.place))
    gpu_steps.compare(record, clock, A, wanted, seconds)
    gpu_steps.memory(record, A, wanted)
    if not record.quick:
        gpu_operators.measure(record, clock, A, BFLOAT16, ALL, 1.0)
        gpu_steps.graph(record, clock, A, "bfloat16", 1.0)


def shape_b(record: Record) -> None:
    clock = Clock(record.place)
    gpu_operators.measure(record, clock, B, BFLOAT16, ["global_topk"], _seconds(record, 2))
    wanted = [("ours", "bfloat16"), ("Lean, dense products", "bfloat16")]
    gpu_steps.compare(record, clock, B, wanted, _seconds(record, 4))
    if not record.quick:
        gpu_operators.measure(record, clock, B, BFLOAT16, ALL, 1.0)


def shape_c(record: Record) -> None:
    wanted = [("ours", "bfloat16"), ("Lean, dense products", "bfloat16")]
    gpu_steps.compare(record, Clock(record.place), C, wanted, 5.0)


def sweep(record: Record) -> None:
    from . import launch_sweep

    launch_sweep.sweep(record, Clock(record.place))


def _seconds(record: Record, full: float) -> float:
    return full / 3 if record.quick else full


@dataclass(frozen=True)
class Phase:
    run: Callable[[Record], None]
    seconds: float
    """It may take at most, of a full run."""
    quick: float
    """… and of a quick one; 0 leaves it out."""


PHASES: dict[str, Phase] = {
    "roofs": Phase(roofs, 30, 20),
    "tests": Phase(tests, 100, 35),
    "rows": Phase(rows, 35, 15),
    "A": Phase(shape_a, 75, 25),
    "U": Phase(upstream, 50, 25),
    "B": Phase(shape_b, 55, 0),
    "C": Phase(shape_c, 50, 0),
    "sanitizer": Phase(sanitizer, 70, 0),
    "sweep": Phase(sweep, 120, 0),
}
BUDGET = {False: 465.0, True: 115.0}
"""Seconds of a full and of a quick run; a phase gets no more than is left."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=gpu.__doc__)
    parser.add_argument("--quick", action="store_true", help="2 minutes: fewer tests, shapes A and U only")
    parser.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/<GPU>-<commit>-<date>.json)")
    parser.add_argument("--only", action="append", choices=PHASES, help="only this phase; may be given several times")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and PyTorch finds none here")
        return 2
    place = Place(torch.device("cuda"), "triton")
    if arguments.phase:
        path, until = arguments.record, monotonic() + arguments.seconds
        run_phase(PHASES[arguments.phase], Record(arguments.phase, place, arguments.quick, path, until))
        return 0
    command = [sys.executable, "-m", f"{__package__}.gpu", *(["--quick"] if arguments.quick else [])]
    chosen = arguments.only or [name for name, phase in PHASES.items() if not arguments.quick or phase.quick]
    building = gpu_build.Build(torch.cuda.get_device_capability(place.device))
    found = run_phases(chosen, arguments.quick, command, building)
    report = whole_report(environment(place), found)
    print("\n" + rows_table(found, roofs_of(found)))
    print("\n" + heading(report["environment"]) + "\n\n" + figures_table(reached(found)))
    print("\n" + faster_in_cuda(found))
    path = arguments.out or ROOT / "benchmarks" / "results" / result_name(report["environment"])
    write_atomically(path, json.dumps(report, indent=1) + "\n")
    print(f"\neverything measured: {path}")
    return int(any(figure.held == "NO" for figure in reached(found)))


def run_phase(phase: Phase, record: Record) -> None:
    """One phase in this process; a failure becomes a row."""
    with record.guard("phase"):
        phase.run(record)


def run_phases(
    names: Sequence[str], quick: bool, command: Sequence[str], building: gpu_build.Build | None = None
) -> list[Row]:
    """Each phase in a process of its own, one after another, within the budget; all but the roofs await the build."""
    found: list[Row] = []
    end = monotonic() + BUDGET[quick]
    for name in names:
        if building is not None and name != "roofs":
            found.append(building.row())
            building = None
        phase = PHASES[name]
        seconds = min(phase.quick if quick else phase.seconds, end - monotonic())
        began = monotonic()
        found += _in_process(name, seconds, command)
        print(f"{name}: {monotonic() - began:.0f} s of at most {seconds:.0f}", flush=True)
    return found


def _in_process(name: str, seconds: float, command: Sequence[str]) -> list[Row]:
    if seconds < 5:
        return [Row(name, "phase", error="no time left")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        began = monotonic()
        # what a phase does not stop itself is stopped a little later
        arguments = ["--phase", name, "--record", str(path), "--seconds", str(seconds - 4)]
        printed = gpu_checks.run_until(seconds, [*command, *arguments])
        found = read_rows(path)
        if monotonic() - began >= seconds:
            found.append(Row(name, "phase", error=f"stopped after {seconds:.0f} s"))
        elif not found:
            found.append(Row(name, "phase", error=f"left nothing: {printed.strip()[-1000:]}"))
        return found


def roofs_of(found: Sequence[Row]) -> Roofs | None:
    measured = {row.contender: row.value for row in found if row.what == "roof" and row.value}
    return Roofs(**measured) if len(measured) == 5 else None


def whole_report(where: Mapping[str, Any], found: Sequence[Row]) -> dict[str, Any]:
    known = roofs_of(found)
    lines = [asdict(row) | {"floor": floor_of(row, known)} for row in found]
    return {
        "environment": dict(where),
        "roofs": asdict(known) if known else None,
        "figures": [asdict(figure) for figure in reached(found)],
        "rows": lines,
    }


def environment(place: Place) -> dict[str, Any]:
    """The GPU, its driver and clocks, the versions, and the commit."""
    import triton

    if place.is_gpu:
        name = torch.cuda.get_device_name(place.device)
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        asked = gpu_checks.run_until(10, ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
        clocks = dict(zip(query.split(","), asked.strip().splitlines()[0].split(", "), strict=False))
    else:
        name, clocks = platform.machine(), {}
    return {
        "gpu": name, **clocks, "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ"),
    }  # fmt: skip


def commit() -> str | None:
    """Of the checkout, a + marking uncommitted changes; or SPARC_FAST_COMMIT, for a copy without its history."""
    named = os.environ.get("SPARC_FAST_COMMIT")
    if named or not (ROOT / ".git").exists():
        return named
    try:
        return gpu_checks.run_until(10, ["git", "describe", "--always", "--dirty=+", "--exclude=*"]).strip() or None
    except OSError:
        return None


def heading(where: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in where.items() if value)


def result_name(where: Mapping[str, Any]) -> str:
    parts = (where["gpu"], where["commit"] or "no-commit", where["date"])
    return "-".join(re.sub(r"[^A-Za-z0-9.+]+", "-", str(part)).strip("-") for part in parts) + ".json"
