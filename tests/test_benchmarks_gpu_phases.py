"""The GPU command's phases: apart, within their time, all of them on stand-ins; what they justify, as text to paste."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import context

pytest.importorskip("triton")

from sparc_fast.benchmarks import checks, distributed, gpu, processes, timing
from sparc_fast.benchmarks.cases import Place
from sparc_fast.benchmarks.figures import to_paste
from sparc_fast.benchmarks.record import Record, Row
from sparc_fast.benchmarks.table import rows_table
from sparc_fast.benchmarks.timing import Clock
from sparc_fast.benchmarks.tools import launch_sweep

LONG = f"600.{os.getpid()}"  # seconds that no other process sleeps
STAND_IN = Place(torch.device("cpu"), {}, stands_in=True)
PHASE = """# as `gpu --phase NAME --record PATH`, without the time that importing torch takes
import json, subprocess, sys, time
name, path = sys.argv[2], sys.argv[4]
if name == "small": time.sleep(1)  # slow to load
told = json.loads(sys.stdin.readline())
row = {row!r}
if name == "profile-A": sys.exit("segmentation fault")
seconds = told["until"] - time.monotonic(), told["until"]
open(path, "w").write(json.dumps(row | {{"note": json.dumps(told["faster"]), "seconds": seconds}}))
if name == "step-A-cuda": subprocess.Popen(["sleep", "{long}1"], start_new_session=True).wait()
if name == "step-A-triton": subprocess.Popen(["sleep", "{long}2"], start_new_session=True)
"""


@pytest.fixture
def phases(tmp_path: Path) -> list[str]:
    script = tmp_path / "phase.py"
    script.write_text(PHASE.format(row=asdict(Row("roofs", "roof", contender="copy", value=1.0)), long=LONG))
    return [sys.executable, str(script)]


def running(*command: str) -> bool:
    wanted = b"\0".join(word.encode() for word in command) + b"\0"
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:  # it has just ended
            continue
    return wanted in found


def test_phases_run_apart_and_a_failing_one_costs_itself_only(
    phases: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {name: replace(phase, seconds=60.0) for name, phase in gpu.PHASES.items()}
    monkeypatch.setattr(gpu, "PHASES", short)
    kept: list[int] = []
    names = ["roofs", "profile-A", "small", "step-A-triton"]
    found = gpu.run_phases(names, True, phases, keep=lambda found: kept.append(len(found)))
    assert [row.contender for row in found] == ["copy", "", "copy", "copy"]
    assert "segmentation fault" in found[1].error
    assert kept == [1, 2, 3, 4]
    assert not running("sleep", f"{LONG}2")
    printed = capsys.readouterr().out
    assert all(f"\n{name}: " in printed for name in names)


def test_a_deadline_is_absolute_and_counts_from_when_the_phase_may_begin(
    phases: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PHASES", {"roofs": gpu.Phase(print, 60.0), "small": gpu.Phase(print, 60.0)})
    for name, loading in (("roofs", 0), ("small", 1)):
        began = monotonic()
        ((left, until),) = (row.seconds for row in gpu.run_phases([name], True, phases))
        assert until >= began + 56  # four seconds less than it may take, to end by itself
        assert left <= 56 - loading  # those that it took to load are gone


def test_a_phase_that_hangs_is_stopped_with_all_it_started_in_any_session(
    phases: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PHASES", {"step-A-cuda": gpu.Phase(print, 5.0, "cuda")})
    row, stopped = gpu.run_phases(["step-A-cuda"], True, phases)
    assert row.contender == "copy"
    assert stopped.error == "stopped after 5 s"
    assert not running("sleep", f"{LONG}1")


def test_no_phase_starts_when_the_budget_is_spent(phases: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BUDGET", {False: 1.0, True: 1.0})
    built: Any = SimpleNamespace(row=lambda: Row("build", checks.MODULE))
    late = gpu.run_phases(["roofs", "small", "step-B-cuda"], False, phases, built)
    assert [(row.phase, row.error) for row in late] == [
        ("roofs", "no time left"), ("build", ""), ("small", "no time left"), ("step-B-cuda", "no time left"),
    ]  # fmt: skip


def test_a_hybrid_is_made_of_what_this_run_has_measured(phases: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "faster_in_cuda", lambda found: {"update_rows": "A"})
    (row,) = gpu.run_phases(["roofs"], True, phases)
    assert json.loads(row.note) == ["update_rows"]


def test_a_command_that_outlasts_its_time_is_stopped_with_its_children() -> None:
    seconds = [f"{LONG}{i}" for i in range(3, 6)]
    command = "echo said; sleep {} & setsid sleep {} & sleep {}".format(*seconds)
    assert processes.run_until(0.5, ["sh", "-c", command]) == "said\n"
    assert not any(running("sleep", each) for each in seconds)


@pytest.mark.parametrize("name", [name for name in gpu.PHASES if name != "tests"])
def test_every_phase_runs_on_stand_ins_at_a_tiny_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.backends, "FASTER_IN_CUDA", {})
    monkeypatch.setattr(distributed, "mp", SimpleNamespace(get_context=lambda _: context()))  # nothing is loaded again
    told = {"until": monotonic() + 60, "faster": ["update_rows"]}
    record = gpu.run_phase(name, STAND_IN, False, None, told)
    assert {row.what for row in record.rows} >= ({"kernel, triton", "all kernels"} if name == "profile-A" else set())
    assert record.rows
    assert record.rows[0].error or name != "sweep"
    needs_gpu = ("needs a GPU", "only a GPU counts its memory", "the backend 'reference' has none")
    assert not [row for row in record.rows if row.error and row.error not in needs_gpu]
    assert gpu.backends.FASTER_IN_CUDA == {"update_rows": "measured in this run"}
    assert len(rows_table(record.rows, None).splitlines()) == len(record.rows)


def test_the_command_runs_whole_on_stand_ins(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    names = ["roofs", "step-A-triton"]
    before = set((processes.ROOT / "benchmarks").rglob("*.json"))
    gpu.main(["--stand-in", "--out", str(out), *[word for name in names for word in ("--only", name)]])
    report = json.loads(out.read_text())
    assert {row["phase"] for row in report["rows"]} == set(names)
    assert not [row for row in report["rows"] if row["error"]]
    assert {row["what"] for row in report["rows"]} >= {"roof", "step"}
    printed = capfd.readouterr().out
    assert "no GPU" in printed
    assert "FASTER_IN_CUDA: dict[str, str] = {" in printed
    assert set((processes.ROOT / "benchmarks").rglob("*.json")) == before


def test_time_of_the_host_is_no_part_of_a_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    host = queue = 0.0

    def sleep(cycles: int) -> None:
        nonlocal queue
        queue = max(queue, host) + cycles / timing.CYCLES

    def synchronize() -> None:
        nonlocal host
        host = max(host, queue)

    def run() -> None:  # 100 µs of Python for 250 µs of work
        nonlocal host, queue
        host += 100e-6
        queue = max(queue, host) + 250e-6

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = max(queue, host)

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1e3

    for name, stand_in in {"_sleep": sleep, "synchronize": synchronize, "Event": Event}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(timing, "perf_counter", lambda: host)
    clock = Clock(STAND_IN)
    clock.place = Place(torch.device("cuda"), {"triton": "triton"})
    assert clock.host_seconds(run) == pytest.approx(100e-6)
    assert clock.seconds(run) == pytest.approx(350e-6)
    assert clock.operators({"ours": run}, 0.0)["ours"] == pytest.approx([250e-6] * 3)
    # a training loop waits for its host before the first of ten steps alone
    assert clock.steps({"ours": run}, 0.0)["ours"] == pytest.approx([260e-6] * 3)


def test_tests_are_dealt_in_turn_so_that_no_file_waits_for_one_worker() -> None:
    assert checks.dealt(["a1", "a2", "a3", "b1", "b2"], 2) == [["a1", "a3", "b2"], ["a2", "b1"]]
    assert checks.dealt(["a1"], 14) == [["a1"]]


def test_a_sanitizer_watches_our_kernels_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    names = checks.kernel_names()
    assert {"_update_encoder_kernel", "_filter", "settle_supports_kernel", "update_rows_kernel"} <= set(names)
    commands: list[list[str]] = []
    monkeypatch.setattr(checks, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(checks, "run_until", lambda seconds, command, environment: commands.append(command) or "")
    on_gpu = Record("phase", Place(torch.device("cuda"), {"triton": "triton"}))
    checks.run_sanitizer(on_gpu)
    assert len(commands) == len(on_gpu.rows) == 2
    for command in commands:
        assert [value for option, value in pairwise(command) if option == "--kernel-name"] == [
            f"kns={name}" for name in names
        ]
        assert command[-3:] == ["sparc_fast.benchmarks.checks", "cuda", "triton"]


def test_what_a_run_justifies_is_printed_as_it_belongs_into_the_sources() -> None:
    def row(what: str, shape: str, contender: str, value: float, note: str = "") -> Row:
        return Row("A", what, shape, contender, "bfloat16", value, note=note)

    rows = [
        row("global_topk", "A", "triton", 1e-3), row("global_topk", "A", "cuda", 0.9e-3),
        row("global_topk", "B", "triton", 1e-3), row("global_topk", "B", "cuda", 1.1e-3),
        row("update_rows", "A", "triton", 3e-3), row("update_rows", "A", "cuda", 2e-3),
        row("update_rows", "B", "triton", 8e-3), row("update_rows", "B", "cuda", 4e-3),
        row("step", "A", "triton", 3e-3), row("step", "A", "cuda", 2e-3),
        row("replay_rows", "A", "cuda", 1e-3), row("sparse_decode", "A", "triton", 1e-3),
        row("launch choice", "A", "update_rows.encoder_choice", 2e-3, "9 tried; ROWS 4 -> 8; 3.000 -> 2.000 ms"),
        row("launch choice", "U", "update_rows.encoder_choice", 2e-3, "7 tried; stays; 2.000 -> 2.000 ms"),
    ]  # fmt: skip
    table, _, choices = to_paste(rows, "NVIDIA H100", "1a2b").partition("}\n")
    named: dict[str, Any] = {}
    exec(table + "}", named)  # it is Python
    assert named["FASTER_IN_CUDA"] == {
        "update_rows": "NVIDIA H100, A bfloat16: 2.000 ms, Triton 3.000; B bfloat16: 4.000 ms, Triton 8.000"
    }
    assert choices.splitlines() == [
        "# kernels/update_rows.py, encoder_choice:",
        "    # measured on NVIDIA H100 at 1a2b: A bfloat16: 9 tried; ROWS 4 -> 8; 3.000 -> 2.000 ms; "
        "U bfloat16: 7 tried; stays; 2.000 -> 2.000 ms",
    ]


def test_all_phases_fit_into_eight_minutes_and_the_first_result_into_four() -> None:
    names, phases = list(gpu.PHASES), gpu.PHASES
    assert gpu.BUDGET[False] < 480
    assert gpu.BUDGET[True] < 120
    assert sum(phases[name].seconds for name in names[: names.index(gpu.FIRST) + 1]) <= 225
    measured = sum(phases[name].seconds for name in names[: names.index("tests")])
    assert measured + 60 <= gpu.BUDGET[False]  # the tests' time, where everything before takes all it may
    assert sum(phase.seconds for phase in phases.values() if phase.quick) <= gpu.BUDGET[True] + 20
    assert list(dict.fromkeys(name.split("-")[0] for name in names)) == [
        "roofs", "small", "profile", "operators", "step", "rows", "rivals", "tests", "ranks", "sanitizer", "sweep"
    ]  # fmt: skip


def test_a_broken_phase_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(record: Record) -> None:
        raise RuntimeError("an illegal memory access was encountered\nand so on")

    monkeypatch.setattr(gpu, "PHASES", {"roofs": gpu.Phase(run, 1)})
    record = gpu.run_phase("roofs", STAND_IN, False, None, {"until": 0.0, "faster": []})
    assert record.rows[0].error == "RuntimeError: an illegal memory access was encountered"


def test_a_launch_choice_is_found_changed_and_put_back() -> None:
    functions = launch_sweep.choice_functions()
    assert {"decode_loss.choice", "update_rows.decoder_choice", "topk_rows.choice"} <= set(functions)
    choice = functions["topk_rows.choice"]
    own = choice(100)
    key = next(iter(own))
    with launch_sweep.changed(choice, {key: 3, "no such": 1}) as given:
        assert sys.modules[choice.__module__].choice(100) == {**own, key: 3}
    assert given == [{**own, key: 3}]
    assert sys.modules[choice.__module__].choice is choice


def test_neighbours_of_a_launch_choice_change_one_number() -> None:
    start = {"BLOCK": 1, "num_warps": 16, "num_stages": 2, "DOTS": True, "TYPE": None}
    assert list(launch_sweep.neighbours(start)) == [
        {**start, "BLOCK": 2},
        {**start, "num_warps": 8},
        {**start, "num_stages": 3},
        {**start, "num_stages": 1},
        {**start, "DOTS": False},
    ]
