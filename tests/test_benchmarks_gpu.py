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

from sparc_fast.benchmarks import (
    gpu,
    gpu_build,
    gpu_checks,
    gpu_figures,
    gpu_steps,
    operators,
    processes,
)
from sparc_fast.benchmarks.cases import CALLS, TINY, Operands, Place
from sparc_fast.benchmarks.gpu_record import Record, Row, read_rows, write_atomically
from sparc_fast.benchmarks.timing import Clock, DeviceRoofs, Work, equal
from sparc_fast.ops import backends

CPU = torch.device("cpu")
REFERENCE = Place(CPU, "reference", "triton")


@pytest.fixture
def record() -> Record:
    return Record("phase", REFERENCE)


def named(rows: list[Row], *name: str) -> Row:
    return next(row for row in rows if (row.what, row.shape, row.contender, row.dtype) == name)


def test_every_operator_and_its_rivals_agree_and_are_timed(record: Record) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        operators.measure(record, Clock(REFERENCE), TINY, dtype, list(operators.OPERATORS), 0.0)
    assert not [row for row in record.rows if row.error]
    contenders = sum(1 + len(op.gpu) + len(op.gpu_yardsticks) for op in operators.OPERATORS.values())
    assert len(record.rows) == 2 * contenders
    assert all(row.value and len(row.seconds) >= 3 and row.work for row in record.rows)


def test_kernels_are_compiled_where_nvcc_is_and_nobody_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, target = tmp_path / "nvcc", tmp_path / "_cuda.so"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpu_build, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_build, "target", lambda: target)
    # notes what it was asked for, and leaves that as the module
    compiler.write_text(
        '#!/bin/sh\nprevious=\nfor a; do [ "$previous" = -o ] && out=$a; previous=$a; done\necho "$@" > "$out"\n'
    )
    compiler.chmod(0o755)
    row = gpu_build.Build((9, 0)).row()
    assert row.value == 1, row
    asked = target.read_text()
    assert "code=sm_90a" in asked
    assert "sm_80" not in asked
    assert "update_rows.cu" in asked
    assert "binding.cpp" in asked
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    compiler.write_text("#!/bin/sh\necho 'update_rows.cu(3): error: no' >&2; exit 1\n")
    row = gpu_build.Build((9, 0)).row()
    assert row.value is None
    assert "error: no" in row.error
    monkeypatch.setattr(gpu_build, "find_spec", lambda name: name)
    row = gpu_build.Build((9, 0)).row()
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


def test_every_operator_of_the_backends_can_be_called() -> None:
    vocabulary = {name for name in vars(backends.Backend) if not name.startswith("_")}
    assert set(CALLS) == vocabulary
    gpu_checks.run_every_operator("cpu", "reference")


def test_a_wrong_or_failing_contender_becomes_a_row_and_the_others_are_timed(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(o: Operands) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    rivals = {"a tenth more": lambda o: lambda: o.x[:, None] * 1.1, "too large": fails}
    broken = operators.Operator(lambda o: Work(1.0), cpu={}, gpu=rivals)
    monkeypatch.setitem(operators.OPERATORS, "sparse_decode", broken)
    operators.measure(record, Clock(REFERENCE), TINY, torch.float32, ["sparse_decode", "no such"], 0.0)
    errors = {row.contender: row.error for row in record.rows if row.error}
    assert errors["a tenth more"].startswith("wrong, not timed: shape")
    assert errors["too large"] == "does not fit: CUDA out of memory."
    assert errors["triton"] == "KeyError: 'no such'"
    assert named(record.rows, "sparse_decode", "tiny", "triton", "float32").value


def test_all_trainers_take_the_same_step_and_are_timed(record: Record) -> None:
    wanted = list(gpu_steps.trainers(TINY, REFERENCE))
    gpu_steps.compare(record, Clock(REFERENCE), TINY, wanted, 0.0)
    assert not [row for row in record.rows if row.error]
    assert [(row.contender, row.dtype) for row in record.rows] == wanted


def test_a_trainer_whose_losses_differ_or_do_not_fall_is_not_timed() -> None:
    right = {("triton", "float32"): [1.0, 0.9, 0.8], ("Dense", "float32"): [1.03125, 0.93125, 0.83125]}
    assert gpu_steps.disagreements(right) == {}
    assert gpu_steps.disagreements({**right, ("Lean", "bfloat16"): [1.0, 0.9, 0.81]}) == {}
    found = gpu_steps.disagreements({**right, ("Lean", "float32"): [1.0, 0.9, 0.81], ("Lean", "bfloat16"): [0.8] * 3})
    assert list(found) == [("Lean", "float32"), ("Lean", "bfloat16")]
    assert "does not fall" in found["Lean", "bfloat16"]


def test_what_does_not_fit_is_said(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "free_bytes", lambda self: 10**9)
    gpu_steps.compare(record, Clock(REFERENCE), TINY, [("Dense", "float32")], 0.0)
    assert record.rows[0].error == "does not fit: needs about 2 GB"


def test_repeatability_is_held_and_what_needs_a_gpu_says_so(record: Record) -> None:
    gpu_steps.repeat(record, TINY, "bfloat16", steps=3)
    gpu_steps.memory(record, TINY, [("triton", "float32")])
    gpu_steps.graph(record, Clock(REFERENCE), TINY, "float32", 0.0)
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
    gpu_steps.compare(record, Clock(REFERENCE), TINY, [("triton", "float32")], 1.0)
    operators.measure(record, Clock(REFERENCE), TINY, torch.float32, ["topk_rows"], 1.0)
    assert [row.error for row in record.rows] == ["no time left"] * 2


def test_rows_survive_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    record = Record("phase", REFERENCE, path=path)
    record.times("step", "A", "triton", "float32", [1.0, 3.0, 2.0], Work(1.0), Work(2.0))
    record.add("extra", value=1.0, unit="B")
    with path.open("a") as file:
        file.write('{"phase": "cut sh')
    assert read_rows(path) == record.rows
    assert record.rows[0].value == 2.0


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results" / "run.json"
    write_atomically(path, "{}")
    write_atomically(path, "[]")
    assert path.read_text() == "[]"
    assert list(path.parent.iterdir()) == [path]


def test_the_floor_is_the_slowest_resource_of_each_phase() -> None:
    roofs = DeviceRoofs(copy=10.0, gather=20.0, bfloat16=100.0, tf32=50.0, float32=10.0)
    assert roofs.floor(Work(flops=200, bytes=10, gathered=10), "bfloat16") == 2
    assert roofs.floor(Work(flops=20, bytes=100, gathered=10), "bfloat16") == 10
    assert roofs.floor(Work(flops=0, bytes=0, gathered=100), "bfloat16") == 5
    row = Row("A", "step", "A", "triton", "float32", 4.0, work=({"flops": 10.0}, {"bytes": 10.0}))
    assert gpu_figures.floor_of(row, roofs) == 2
    assert "50%" in gpu_figures.rows_table([row], roofs)


def test_figures_are_read_off_rows_and_judged() -> None:
    step = lambda shape, contender, dtype, value: Row("A", "step", shape, contender, dtype, value)  # noqa: E731
    rows = [
        step("A", "triton", "bfloat16", 4e-3),
        step("A", "Lean, dense products", "bfloat16", 12e-3),
        step("A", "Lean, embedding_bag", "bfloat16", 30e-3),
        step("U", "triton", "bfloat16", 1e-3),
        step("U", "Dense", "float32", 9e-3),
        Row("A", gpu_steps.MEMORY, "A", "triton", "bfloat16", 399e6, "B"),
        Row("U", "20 steps twice, bitwise equal", "U", "triton", "bfloat16", 0.0, "held"),
        Row("tests", gpu_checks.TESTS, value=1.0, unit="held"),
    ]
    found = {figure.what: figure for figure in gpu_figures.reached(rows)}
    judged = lambda what: (found[what].measured, found[what].held)  # noqa: E731
    assert judged("whole step, bfloat16, A") == ("4 ms", "yes")
    assert judged("Lean bfloat16 ÷ ours bfloat16, A") == ("3×", "NO")
    assert judged("Dense float32 ÷ ours bfloat16, U") == ("9×", "aim")
    assert judged("extra memory of a step, A") == ("399 MB", "yes")
    assert judged("20 steps twice, bitwise equal, bfloat16") == ("no", "NO")
    assert judged("operator tests on the device finds nothing wrong") == ("yes", "yes")
    assert judged("whole step, bfloat16, B") == ("–", "not measured")
    table = gpu_figures.figures_table(list(found.values()))
    assert table.splitlines()[0].split() == ["figure", "must", "aim", "measured", "held"]
    assert "≤ 4.5 ms" in table


def test_a_whole_report_is_json_with_floors_and_figures() -> None:
    main = pytest.importorskip("sparc_fast.benchmarks.gpu_main")
    roofs = {"copy": 1e9, "gather": 1e9, "bfloat16": 1e9, "tf32": 1e9, "float32": 1e9}
    rows = [Row("roofs", "roof", contender=name, value=rate, unit="/s") for name, rate in roofs.items()]
    rows.append(Row("A", "step", "A", "triton", "bfloat16", 1.0, work=({"flops": 5e8},)))
    where = main.environment(REFERENCE)
    report = json.loads(json.dumps(main.whole_report(where, rows)))
    assert report["roofs"] == roofs
    assert report["rows"][-1]["floor"] == 0.5
    assert len(report["figures"]) == len(gpu_figures.FIGURES)
    assert main.result_name({**where, "gpu": "NVIDIA H200", "commit": "1a2b+"}).startswith("NVIDIA-H200-1a2b+-20")
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
    gpu_checks.report_tests(record, 4, dict(gpu_checks.OUTCOME.findall(printed)))
    assert record.rows[0].value == 0
    assert record.rows[0].note == "1 passed, 1 failed, 1 skipped, 1 not run of 4"
    assert record.rows[1].contender == "tests/test_a.py::test_y"


@pytest.mark.interpreter
def test_the_tests_run_in_processes_of_their_own(record: Record) -> None:
    record.until = monotonic() + 100
    gpu_checks.run_tests(record, ["tests/test_support_values.py"], workers=1)
    (row,) = record.rows
    assert row.value == 1, row
    assert " 0 failed" in row.note
    assert "tests/test_every_operator.py" in gpu_checks.test_files()


def test_a_sanitizers_report_is_read(record: Record) -> None:
    ran = "every operator ran\n"
    gpu_checks.report_sanitizer(record, "memcheck", ran + "========= ERROR SUMMARY: 0 errors\n")
    gpu_checks.report_sanitizer(
        record, "racecheck",
        ran + "========= Error: Race reported between\n========= RACECHECK SUMMARY: 2 hazards displayed (1 errors)\n",
    )  # fmt: skip
    gpu_checks.report_sanitizer(record, "memcheck", "Device not supported")
    clean, racy, unfinished = record.rows
    assert (clean.value, clean.error) == (1, "")
    assert racy.value == 0
    assert "Race reported" in racy.error
    assert unfinished.value is None
    assert unfinished.error == "did not finish: Device not supported"


def test_a_launch_choice_is_found_changed_and_put_back() -> None:
    pytest.importorskip("triton")
    from sparc_fast.benchmarks import launch_sweep

    functions = launch_sweep.choice_functions()
    assert {"decode_loss.choice", "update_rows.decoder_choice", "topk_rows.choice"} <= set(functions)
    choice = functions["invert_indices.choice"]
    own = choice(100)
    key = next(iter(own))
    with launch_sweep.changed(choice, {key: 3, "no such": 1}) as given:
        assert sys.modules[choice.__module__].choice(100) == {**own, key: 3}
    assert given == [{**own, key: 3}]
    assert sys.modules[choice.__module__].choice is choice


def test_neighbours_of_a_launch_choice_change_one_number() -> None:
    pytest.importorskip("triton")
    from sparc_fast.benchmarks import launch_sweep

    found = list(launch_sweep.neighbours({"BLOCK": 1, "num_warps": 16, "num_stages": 2, "DOTS": True, "TYPE": None}))
    start = {"BLOCK": 1, "num_warps": 16, "num_stages": 2, "DOTS": True, "TYPE": None}
    assert found == [
        {**start, "BLOCK": 2},
        {**start, "num_warps": 8},
        {**start, "num_stages": 3},
        {**start, "num_stages": 1},
        {**start, "DOTS": False},
    ]


def test_a_sweep_without_kernels_says_so(record: Record) -> None:
    pytest.importorskip("triton")
    from sparc_fast.benchmarks import launch_sweep

    launch_sweep.sweep(record, Clock(REFERENCE))
    assert record.rows[0].error == "the backend 'reference' has none"
