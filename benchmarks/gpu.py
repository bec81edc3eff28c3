"""Everything that needs a GPU, in one command: proves the kernels there, measures them, and says which figures hold.

``python -m benchmarks.gpu [--quick] [--out FILE]`` takes less than 8 minutes (2 with --quick) and needs nothing but
torch, triton, numpy, pytest and hypothesis; where nvcc is, it compiles the CUDA C++ kernels if nobody has. Each phase
is a process of its own with its own share of the time: one that hangs, or breaks the GPU's context, costs itself and no
other. A profile and whole steps at shape A come first, within 4 minutes; then other shapes, PyTorch's ways, the tests,
the sanitizers and the search for launch choices. After each phase its rows are printed, and everything measured so far
is in one JSON file under benchmarks/results and at --out. The table of figures comes last, with what they justify as
text to paste. Without a GPU the exit status is 2; with --stand-in every phase runs at a tiny shape on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from sparc_fast.files import atomic_path
from sparc_fast.ops import backends
from sparc_fast.planning.roofline import Roofline

from . import checks, distributed, memory, steps, timing
from .cases import SHAPES, TINY, Place, Shape
from .figures import ON_GPU, faster_in_cuda, launch_choices, reached, to_paste
from .main import environment, heading
from .operators import OPERATORS, measure, own_kernels
from .processes import ROOT, Process, joined, left
from .record import Record, Row, read_rows
from .table import figures_table, rows_table

ALL = [name for name in OPERATORS if name != "topk_rows"]


def shape_of(record: Record, name: str) -> Shape:
    """The shape, or a tiny one of its name where a CPU stands in."""
    return SHAPES[name] if record.place.is_gpu else replace(TINY, name=name)


def roofs(record: Record) -> None:
    for name, rate in timing.measure_roofs(record.clock, small=not record.place.is_gpu).items():
        record.add("roof", contender=name, value=rate, unit="/s")


def small(record: Record) -> None:
    checks.run_small(record, {role: BACKENDS[record.place.device.type][role] for role in ("triton", "cuda")})


def profile(name: str, record: Record) -> None:
    steps.profile(record, shape_of(record, name), "bfloat16")


def operators(name: str, record: Record) -> None:
    own = [operator for operator in ALL if operator in own_kernels(record.place.backend)]
    measure(record, shape_of(record, name), "bfloat16", own, seconds(record, 0.5), rivals=False)


def step(name: str, record: Record) -> None:
    steps.compare(record, shape_of(record, name), [(record.place.role, "bfloat16")], seconds(record, 3))


def graph(name: str, record: Record) -> None:
    steps.graph(record, shape_of(record, name), "bfloat16", seconds(record, 2))


def rows(record: Record) -> None:
    for name in ("A", "B"):
        measure(record, shape_of(record, name), "float32", ["topk_rows"], seconds(record, 2))


def upstream(record: Record) -> None:
    """Shape U: the research code's own size."""
    for dtype in ("bfloat16", "float32"):
        steps.repeat(record, shape_of(record, "U"), dtype)
    step("U", record)


def step_rivals(name: str, record: Record) -> None:
    shape = shape_of(record, name)
    wanted = steps.contenders(record.place, ["bfloat16", "float32"])
    if name == "B":
        wanted = [(record.place.role, "bfloat16"), ("Lean, dense products", "bfloat16")]
    steps.compare(record, shape, wanted, seconds(record, 3))
    if name == "A":
        memory.measure(record, shape, wanted)


def operator_rivals(record: Record) -> None:
    measure(record, shape_of(record, "A"), "bfloat16", ALL, seconds(record, 1))


def tests(record: Record) -> None:
    checks.run_tests(record, checks.test_files())


def ranks(record: Record) -> None:
    """One rank over NCCL, and one on each device where there are several."""
    distributed.on_devices(record, shape_of(record, "A"), "bfloat16", seconds(record, 6))


def sweep(record: Record) -> None:
    from .tools import launch_sweep

    launch_sweep.sweep(record)


def seconds(record: Record, full: float) -> float:
    """To time for; a stand-in's times say nothing."""
    if not record.place.is_gpu:
        return 0.0
    return full / 3 if record.quick else full


@dataclass(frozen=True)
class Phase:
    run: Callable[[Record], None]
    seconds: float
    """It may take at most."""
    role: str = "hybrid"
    """What is measured: a key of `BACKENDS`."""
    quick: bool = False
    """Whether a quick run has it too."""


BACKENDS = {
    "cuda": {"triton": "triton", "cuda": "cuda", "hybrid": "auto", "graph": "auto"},
    "cpu": {"triton": "reference", "cuda": "cpu", "hybrid": "auto", "graph": "auto"},
}
"""Device -> role -> backend. What stands in for a GPU's has the same vocabulary, and nothing else in common."""

# An illegal access breaks a process: each backend has one of its own at each shape. What decides most comes first.
PHASES: dict[str, Phase] = {
    "roofs": Phase(roofs, 20, quick=True),
    "small": Phase(small, 40, quick=True),
    "profile-A": Phase(partial(profile, "A"), 25, "triton", quick=True),
    "profile-A-cuda": Phase(partial(profile, "A"), 15, "cuda"),
    "operators-A-triton": Phase(partial(operators, "A"), 25, "triton"),
    "operators-A-cuda": Phase(partial(operators, "A"), 15, "cuda"),
    "step-A-triton": Phase(partial(step, "A"), 12, "triton", quick=True),
    "step-A-cuda": Phase(partial(step, "A"), 12, "cuda", quick=True),
    "step-A-hybrid": Phase(partial(step, "A"), 12, "hybrid"),
    "step-A-graph": Phase(partial(graph, "A"), 12, "graph", quick=True),
    "profile-B": Phase(partial(profile, "B"), 12, "triton"),
    "operators-B-triton": Phase(partial(operators, "B"), 20, "triton"),
    "operators-B-cuda": Phase(partial(operators, "B"), 12, "cuda"),
    "step-B-triton": Phase(partial(step, "B"), 10, "triton"),
    "step-B-cuda": Phase(partial(step, "B"), 10, "cuda"),
    "step-B-hybrid": Phase(partial(step, "B"), 10, "hybrid"),
    "step-C-triton": Phase(partial(step, "C"), 18, "triton"),
    "step-C-hybrid": Phase(partial(step, "C"), 18, "hybrid"),
    "rows-triton": Phase(rows, 12, "triton"),
    "rows-cuda": Phase(rows, 10, "cuda"),
    "step-U": Phase(upstream, 12, "hybrid"),
    "step-U-graph": Phase(partial(graph, "U"), 10, "graph"),
    "rivals-A": Phase(partial(step_rivals, "A"), 18, "hybrid"),
    "rivals-operators-A": Phase(operator_rivals, 20, "hybrid"),
    "rivals-B": Phase(partial(step_rivals, "B"), 12, "hybrid"),
    "rivals-U": Phase(partial(step_rivals, "U"), 10, "hybrid"),
    "tests": Phase(tests, 120, "triton"),
    "ranks": Phase(ranks, 60),
    "sanitizer": Phase(checks.run_sanitizer, 60, "triton"),
    "sanitizer-cuda": Phase(checks.run_sanitizer, 60, "cuda"),
    "sweep": Phase(sweep, 120, "triton"),
}
FIRST = "step-A-graph"
"""Up to here a run has its first useful result, within 4 minutes."""
BUDGET = {False: 465.0, True: 115.0}
"""Seconds of a full and of a quick run; a phase gets no more than is left."""


def main(argv: Sequence[str] | None = None) -> int:
    status = joined("gpu", argv)
    if status is not None:
        return status
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 minutes: a profile and whole steps at shape A only")
    parser.add_argument("--out", type=Path, help="write the JSON here as well as under benchmarks/results")
    parser.add_argument("--only", action="append", choices=PHASES, help="only this phase; may be given several times")
    parser.add_argument(
        "--stand-in", action="store_true", help="every phase at a tiny shape on the CPU: tries the command, no figure"
    )
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.stand_in and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and PyTorch finds none here")
        return 2
    place = Place(torch.device("cpu" if arguments.stand_in else "cuda"), {}, arguments.stand_in)
    if arguments.stand_in:
        # for the phases, which import Triton and PyTorch after this
        os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    if arguments.phase:
        told = json.loads(sys.stdin.readline() or "null")  # until then this process only loads what it needs
        if told is not None:  # else the parent is gone
            run_phase(arguments.phase, place, arguments.quick, arguments.record, told)
        return 0
    command = [sys.executable, "-m", f"{__package__}.gpu"]
    command += ["--quick"] * arguments.quick + ["--stand-in"] * arguments.stand_in
    chosen = arguments.only or [name for name, phase in PHASES.items() if not arguments.quick or phase.quick]
    building = checks.Build(torch.cuda.get_device_capability(place.device)) if place.is_gpu else None
    where = environment(place)
    name = result_name(where)
    paths = [path for path in (arguments.out, ROOT / "benchmarks" / "results" / name) if path is not None]
    if arguments.stand_in:
        paths = paths[: len(paths) - 1]  # nothing of it is a result

    def keep(found: Sequence[Row]) -> None:
        for path in paths:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(whole_report(where, found), indent=1) + "\n")

    patience = 5 if arguments.stand_in else 1  # a busy CPU proves nothing
    found = run_phases(chosen, arguments.quick, command, building, keep, patience)
    figures = reached(found, ON_GPU)
    print("\n" + heading(where) + "\n\n" + figures_table(figures))
    print("\n" + to_paste(found, where["gpu"], where["commit"]))
    print("\neverything measured: " + " and ".join(map(str, paths)))
    return int(any(figure.held == "NO" for figure in figures))


def run_phase(name: str, place: Place, quick: bool, path: Path | None, told: Mapping[str, Any]) -> Record:
    """One phase in this process; a failure becomes a row."""
    phase = PHASES[name]
    ours = {phase.role: BACKENDS[place.device.type][phase.role]}
    record = Record(name, replace(place, ours=ours), quick, path, told["until"])
    backends.FASTER_IN_CUDA.update(dict.fromkeys(told["faster"], "measured in this run"))
    with record.guard("phase"):
        phase.run(record)
    return record


def run_phases(
    names: Sequence[str],
    quick: bool,
    command: Sequence[str],
    building: checks.Build | None = None,
    keep: Callable[[Sequence[Row]], None] = lambda found: None,
    patience: float = 1,
) -> list[Row]:
    """Each phase in a process of its own, one after another, within the budget; all but the roofs await the build.

    The next process loads PyTorch while one measures. What is found is printed and kept after every phase. All times
    are `patience` times as long.
    """
    found: list[Row] = []
    began = monotonic()
    end = began + BUDGET[quick] * patience
    with tempfile.TemporaryDirectory() as folder:
        waiting = [Child(name, command, Path(folder)) for name in names[:1]]
        for at, name in enumerate(names):
            child = waiting.pop()
            waiting += [Child(other, command, Path(folder)) for other in names[at + 1 : at + 2]]
            if building is not None and name != "roofs":
                found.append(building.row())
                building = None
            given = min(PHASES[name].seconds * patience, left(end))
            took = monotonic()
            new = child.run(given, list(faster_in_cuda(found)))
            found += new
            print(f"\n{name}: {monotonic() - took:.0f} s of at most {given:.0f}, {monotonic() - began:.0f} s in all")
            print(rows_table(new, roofs_of(found)), flush=True)
            keep(found)
    return found


class Child:
    """A process that has loaded everything and waits to be told when its phase must have ended."""

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name, self.path = name, folder / f"{name}.jsonl"
        self.process = Process([*command, "--phase", name, "--record", str(self.path)])

    def run(self, seconds: float, faster: Sequence[str]) -> list[Row]:
        if seconds < 5:
            self.process.end()
            return [Row(self.name, "phase", error="no time left")]
        # what a phase does not stop itself is stopped a little later
        self.process.tell(json.dumps({"until": monotonic() + seconds - 4, "faster": list(faster)}))
        ended = self.process.wait(seconds)
        printed = self.process.end()
        found = read_rows(self.path)
        if not ended:
            found.append(Row(self.name, "phase", error=f"stopped after {seconds:.0f} s"))
        elif self.process.status or not found:
            found.append(Row(self.name, "phase", error=f"failed: {printed.strip()[-1000:]}"))
        return found


def roofs_of(found: Sequence[Row]) -> Roofline | None:
    rates = {row.contender: row.value for row in found if row.what == "roof" and row.value}
    rates.pop("tf32", None)
    return Roofline(**rates) if len(rates) == 4 else None


def whole_report(where: Mapping[str, Any], found: Sequence[Row]) -> dict[str, Any]:
    known = roofs_of(found)
    return {
        "environment": dict(where),
        "roofs": asdict(known) if known else None,
        "figures": [asdict(figure) for figure in reached(found, ON_GPU)],
        "faster_in_cuda": faster_in_cuda(found),
        "launch_choices": launch_choices(found),
        "rows": [asdict(row) | {"floor": known.floor(row.work) if known and row.work else None} for row in found],
    }


def result_name(where: Mapping[str, Any]) -> str:
    parts = (where["gpu"], where["commit"] or "no-commit", where["date"])
    return "-".join(re.sub(r"[^A-Za-z0-9.+]+", "-", str(part)).strip("-") for part in parts) + ".json"


if __name__ == "__main__":
    sys.exit(main())
