"""What the GPU command does with phases, failures, figures and time; its phases run at a tiny shape without a GPU."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest
import torch

from sparc_fast.benchmarks import checks, figures, gpu, main, memory, operators, processes, steps
from sparc_fast.benchmarks.cases import TINY, Operands, Place
from sparc_fast.benchmarks.record import Record, Row, read_rows
from sparc_fast.benchmarks.table import figures_table, rows_table
from sparc_fast.benchmarks.timing import equal
from sparc_fast.planning.roofline import Cost, Roofline

CPU = torch.device("cpu")
REFERENCE = Place(CPU, {"triton": "reference"}, stands_in=True)


@pytest.fixture
def record() -> Record:
    return Record("phase", REFERENCE)


def named(rows: list[Row], *name: str) -> Row:
    return next(row for row in rows if (row.what, row.shape, row.contender, row.dtype) == name)


def test_every_operator_and_its_rivals_agree_and_are_timed(record: Record) -> None:
    for dtype in ("float32", "bfloat16"):
        operators.measure(record, TINY, dtype, list(operators.OPERATORS), 0.0)
    assert not [row for row in record.rows if row.error]
    contenders = sum(1 + len(op.gpu) + len(op.gpu_yardsticks) for op in operators.OPERATORS.values())
    assert len(record.rows) == 2 * contenders
    assert all(row.value and len(row.seconds) >= 3 and row.work for row in record.rows)


def test_kernels_are_compiled_where_nvcc_is_and_nobody_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, target = tmp_path / "nvcc", tmp_path / "_cuda.so"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    monkeypatch.setattr(checks, "target", lambda: target)
    # notes what it was asked for, and leaves that as the module
    compiler.write_text(
        '#!/bin/sh\nprevious=\nfor a; do [ "$previous" = -o ] && out=$a; previous=$a; done\necho "$@" > "$out"\n'
    )
    compiler.chmod(0o755)
    row = checks.Build((9, 0)).row()
    assert row.value == 1, row
    asked = target.read_text()
    assert "code=sm_90a" in asked
    assert "sm_80" not in asked
    assert "update_rows.cu" in asked
    assert "binding.cpp" in asked
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    compiler.write_text("#!/bin/sh\necho 'update_rows.cu(3): error: no' >&2; exit 1\n")
    row = checks.Build((9, 0)).row()
    assert row.value is None
    assert "error: no" in row.error
    monkeypatch.setattr(checks, "find_spec", lambda name: name)
    row = checks.Build((9, 0)).row()
    assert (row.value, row.note) == (1, "was compiled before")


def test_headers_that_torch_brings_along_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(processes.ROOT / "csrc/cuda/build.py"))
    find = script["find_spec"]
    monkeypatch.setitem(
        script["pybind11_headers"].__globals__, "find_spec", lambda name: find(name) if name == "torch" else None
    )
    headers = script["pybind11_headers"]()
    assert headers.parent.name == "torch"
    assert {"pybind11.h", "stl.h"} <= {path.name for path in (headers / "pybind11").iterdir()}


def test_a_wrong_or_failing_contender_becomes_a_row_and_the_others_are_timed(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(o: Operands) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    rivals = {"a tenth more": lambda o: lambda: o.x[:, None] * 1.1, "too large": fails}
    broken = operators.Operator(lambda o: Cost(1.0), cpu={}, gpu=rivals)
    monkeypatch.setitem(operators.OPERATORS, "sparse_decode", broken)
    operators.measure(record, TINY, "float32", ["sparse_decode", "no such"], 0.0)
    errors = {row.contender: row.error for row in record.rows if row.error}
    assert errors["a tenth more"].startswith("WRONG, not timed: shape")
    assert errors["too large"] == "does not fit: CUDA out of memory."
    assert errors["triton"] == "KeyError: 'no such'"
    assert named(record.rows, "sparse_decode", "tiny", "triton", "float32").value


def test_every_case_of_a_gpu_runs_on_a_stand_in(record: Record) -> None:
    on_gpu = {name: case for name, case in main.CASES.items() if case.gpu_shapes}
    for case in on_gpu.values():
        case.run(record, TINY, "bfloat16", 0.0)
    assert {row.what for row in record.rows} == set(on_gpu)
    assert {row.error for row in record.rows} <= {"", "only a GPU counts its memory"}


def test_all_trainers_take_the_same_step_and_are_timed(record: Record) -> None:
    wanted = steps.contenders(REFERENCE, ["bfloat16", "float32"])
    steps.compare(record, TINY, wanted, 0.0)
    assert not [row for row in record.rows if row.error]
    assert [(row.contender, row.dtype) for row in record.rows] == wanted


def test_a_trainer_whose_losses_differ_or_do_not_fall_is_not_timed() -> None:
    right = {("triton", "float32"): [1.0, 0.9, 0.8], ("Dense", "float32"): [1.03125, 0.93125, 0.83125]}
    assert steps.disagreements(right) == {}
    assert steps.disagreements({**right, ("Lean", "bfloat16"): [1.0, 0.9, 0.81]}) == {}
    found = steps.disagreements({**right, ("Lean", "float32"): [1.0, 0.9, 0.81], ("Lean", "bfloat16"): [0.8] * 3})
    assert list(found) == [("Lean", "float32"), ("Lean", "bfloat16")]
    assert "does not fall" in found["Lean", "bfloat16"]


def test_what_does_not_fit_is_said(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "free_bytes", lambda self: 10**9)
    steps.compare(record, TINY, [("Dense", "float32")], 0.0)
    assert record.rows[0].error == "not run: needs about 2 GB of 1 free"


def test_repeatability_is_held_and_what_needs_a_gpu_says_so(record: Record) -> None:
    steps.repeat(record, TINY, "bfloat16", steps=3)
    memory.measure(record, TINY, [("triton", "float32")])
    steps.graph(record, TINY, "float32", 0.0)
    held, *errors = record.rows
    assert held.value == 1
    assert all("a GPU" in row.error for row in errors)


def test_equal_means_bits() -> None:
    x = torch.tensor([0.0, float("nan")])
    assert equal(x, x.clone())
    assert not equal(x, -x)
    assert not equal(x, x.double())


def test_no_time_left_is_a_row(record: Record) -> None:
    record.until = monotonic() - 1
    steps.compare(record, TINY, [("triton", "float32")], 1.0)
    operators.measure(record, TINY, "float32", ["topk_rows"], 1.0)
    assert [row.error for row in record.rows] == ["no time left"] * 2


def test_rows_survive_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    record = Record("phase", REFERENCE, path=path)
    record.times("step", "A", "triton", "float32", taken=[1.0, 3.0, 2.0], work=[Cost(1.0), Cost(2.0)])
    record.add("extra", value=1.0, unit="B")
    with path.open("a") as file:
        file.write('{"phase": "cut sh')
    assert read_rows(path) == record.rows
    assert record.rows[0].value == 2.0


def test_a_line_says_what_share_of_the_floor_was_reached() -> None:
    roofs = Roofline(copy=10.0, gather=20.0, bfloat16=100.0, float32=10.0)
    row = Row("A", "step", "A", "triton", "float32", 4.0, work=(Cost(10.0), Cost(0, 10.0)), role="ours")
    assert "50% of roof" in rows_table([row], roofs)


def test_figures_are_read_off_rows_and_judged() -> None:
    def row(what: str, shape: str, contender: str, dtype: str, value: float, unit: str = "s") -> Row:
        role = "ours" if contender == "triton" else ""
        return Row(shape, what, shape, contender, dtype, value, unit, role=role)

    rows = [
        row("step", "A", "triton", "bfloat16", 4e-3),
        row("step", "A", "Lean, dense products", "bfloat16", 12e-3),
        row("step", "A", "Lean", "bfloat16", 30e-3),
        row("step", "U", "triton", "bfloat16", 1e-3),
        row("step", "U", "Dense", "float32", 9e-3),
        row("memory", "A", "triton", "bfloat16", 399e6, "B"),
        row(figures.REPEATED, "U", "triton", "bfloat16", 0.0, "held"),
        Row("tests", figures.TESTS, value=1.0, unit="held"),
    ]
    found = {figure.what: figure for figure in figures.reached(rows, figures.ON_GPU)}
    judged = lambda what: (found[what].reached, found[what].held)  # noqa: E731
    assert judged("whole step, bfloat16, A") == ("4.00 ms", "yes")
    assert judged("Lean bfloat16 ÷ ours bfloat16, A") == ("3.00×", "NO")
    assert judged("Dense float32 ÷ ours bfloat16, U") == ("9.00×", "aim")
    assert judged("extra memory of a step, A") == ("399.00 MB", "yes")
    assert judged("20 steps twice, bitwise equal, bfloat16") == ("no", "NO")
    assert judged("operator tests on the device finds nothing wrong") == ("yes", "yes")
    assert judged("whole step, bfloat16, B") == ("–", "not measured")
    table = figures_table(list(found.values()))
    assert table.splitlines()[0].split() == ["figure", "must", "aim", "reached", "held"]
    assert "≤ 4.5 ms" in table


def test_a_whole_report_is_json_with_floors_and_figures() -> None:
    roofs = {"copy": 1e9, "gather": 1e9, "bfloat16": 1e9, "tf32": 1e9, "float32": 1e9}
    rows = [Row("roofs", "roof", contender=name, value=rate, unit="/s") for name, rate in roofs.items()]
    rows.append(Row("A", "step", "A", "triton", "bfloat16", 1.0, work=(Cost(5e8),)))
    pytest.importorskip("triton")
    where = main.environment(REFERENCE)
    report = json.loads(json.dumps(gpu.whole_report(where, rows)))
    assert roofs.items() > report["roofs"].items()
    assert report["rows"][-1]["floor"] == 0.5
    assert len(report["figures"]) == len(figures.ON_GPU)
    assert gpu.result_name({**where, "gpu": "NVIDIA H200", "commit": "1a2b+"}).startswith("NVIDIA-H200-1a2b+-20")
    assert torch.__version__ in main.heading(where)


def test_without_a_gpu_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--quick"]) == 2
    assert capsys.readouterr().out.count("\n") == 1


def test_a_checkout_that_is_not_installed_is_joined(tmp_path: Path) -> None:
    processes.join(tmp_path / "sparc_fast", processes.ROOT)
    code = "import sparc_fast.kernels, sparc_fast.benchmarks.processes as link; print(sparc_fast.kernels.__file__, link.ROOT)"
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    printed = processes.run_until(60, [sys.executable, "-c", code], environment)
    assert printed.split() == [str(tmp_path / "sparc_fast/kernels/__init__.py"), str(processes.ROOT)]


def test_outcomes_of_tests_are_counted(record: Record) -> None:
    printed = (
        "tests/test_a.py::test_x[few samples-a b] PASSED [ 33%]\n"
        "tests/test_a.py::test_y FAILED                  [ 66%]\n"
        "tests/test_a.py::test_z SKIPPED (no)            [ 99%]\n"
    )
    checks.report_tests(record, 4, dict(checks.OUTCOME.findall(printed)))
    assert record.rows[0].value == 0
    assert record.rows[0].note == "1 passed, 1 failed, 1 skipped, 1 not run of 4"
    assert record.rows[1].contender == "tests/test_a.py::test_y"


@pytest.mark.interpreter
def test_the_tests_run_in_processes_of_their_own(record: Record) -> None:
    record.until = monotonic() + 1000
    checks.run_tests(record, ["tests/test_support_values.py"], workers=1)
    (row,) = record.rows
    assert row.value == 1, row
    assert " 0 failed" in row.note
    assert "tests/test_every_operator.py" in checks.test_files()


def test_a_sanitizers_report_is_read(record: Record) -> None:
    ran = "every operator ran\n"
    checks.report_sanitizer(record, "memcheck", ran + "========= ERROR SUMMARY: 0 errors\n")
    checks.report_sanitizer(
        record, "racecheck",
        ran + "========= Error: Race reported between\n========= RACECHECK SUMMARY: 2 hazards displayed (1 errors)\n",
    )  # fmt: skip
    checks.report_sanitizer(record, "memcheck", "Device not supported")
    clean, racy, unfinished = record.rows
    assert (clean.value, clean.error) == (1, "")
    assert racy.value == 0
    assert "Race reported" in racy.error
    assert unfinished.value is None
    assert unfinished.error == "did not finish: Device not supported"
