"""What is checked on a device beside the benchmarks: the operators' tests, and compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .gpu_record import Record

ROOT = Path(__file__).resolve().parents[1]
TESTS = "operator tests on the device"
OUTCOME = re.compile(r"^(tests/\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE)


def test_files(quick: bool) -> list[str]:
    """The files whose tests run on every backend, and those of single kernels."""
    if quick:
        return ["tests/test_every_operator.py"]
    chosen = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        of_backends = re.search(r"\bbackend: str\b", path.read_text()) is not None
        of_kernels = path.name.startswith("test_kernel_") or path.name == "test_cuda_device.py"
        if (of_backends or of_kernels) and not path.name.startswith("test_benchmarks"):
            chosen.append(f"tests/{path.name}")
    return chosen


def run_tests(record: Record, files: Sequence[str], workers: int | None = None) -> None:
    """The files' tests in several processes, with SPARC_FAST_TEST_DEVICE set; what did not finish is counted."""
    environment = os.environ | {"SPARC_FAST_TEST_DEVICE": record.place.device.type, "OMP_NUM_THREADS": "1"}
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-W", "default"]
    command = [*pytest, "--collect-only", "-q", *files]
    collected = run_until(record.left(), command, environment)
    tests = [line for line in collected.splitlines() if line.startswith("tests/") and "::" in line]
    if not tests:
        record.add(TESTS, error=f"no tests collected: {collected.strip()[-300:]}")
        return
    workers = workers or max(1, (os.cpu_count() or 2) - 2)
    share = -(-len(tests) // workers)
    parts = [tests[at : at + share] for at in range(0, len(tests), share)]

    def run(part: Sequence[str]) -> str:
        return run_until(record.left(), [*pytest, "-v", "--tb=line", "-rfE", *part], environment)

    with ThreadPoolExecutor(len(parts) + 1) as pool:
        small = pool.submit(lambda: run_until(record.left(), small_program(record)))
        printed = list(pool.map(run, parts))
    if "every operator ran" not in small.result():
        record.add("every operator at small shapes", error=f"failed: {small.result().strip()[-300:]}")
    outcomes = dict(match for text in printed for match in OUTCOME.findall(text))
    report_tests(record, len(tests), outcomes)
    broken = [text.strip()[-1500:] for text, part in zip(printed, parts, strict=True) if not OUTCOME.search(text)]
    for text in broken[:3]:
        record.add(TESTS, error=f"a process ran no test: {text}")


def report_tests(record: Record, expected: int, outcomes: dict[str, str]) -> None:
    count = Counter(outcomes.values())
    failed = count["FAILED"] + count["ERROR"]
    missing = expected - len(outcomes)
    note = f"{count['PASSED']} passed, {failed} failed, {count['SKIPPED']} skipped, {missing} not run of {expected}"
    record.add(TESTS, value=float(failed == 0 and missing == 0), unit="held", note=note)
    for name in [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")][:30]:
        record.add(TESTS, contender=name, error="failed")


def start(command: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def run_until(seconds: float, command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """What a command prints, stopped with all its children after so many seconds."""
    return printed_until(seconds, start(command, environment))


def printed_until(seconds: float, process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=max(seconds, 0.1))[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        return process.communicate()[0]


def sanitizer() -> str | None:
    """compute-sanitizer on the PATH or beside CUDA's compiler."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def small_program(record: Record) -> list[str]:
    """Every operator at ragged shapes."""
    return [sys.executable, "-m", f"{__package__}.gpu_small", record.place.device.type, record.place.backend]


def run_sanitizer(record: Record) -> None:
    """memcheck and racecheck over every operator, at once; Triton's cache holds the kernels if they ran before."""
    tool = sanitizer()
    if not record.place.is_gpu or tool is None:
        record.add("compute-sanitizer", error="not found" if record.place.is_gpu else "needs a GPU")
        return
    # every tensor an allocation of its own, so that reading past its end is seen
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def run(check: str) -> str:
        command = [str(tool), "--tool", check, "--print-limit", "5", *small_program(record)]
        return run_until(record.left(), command, environment)

    checks = ("memcheck", "racecheck")
    with ThreadPoolExecutor(len(checks)) as pool:
        for check, printed in zip(checks, pool.map(run, checks), strict=True):
            report_sanitizer(record, check, printed)


def report_sanitizer(record: Record, check: str, printed: str) -> None:
    what = f"compute-sanitizer {check}"
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", printed)
    if summary is None or "every operator ran" not in printed:
        record.add(what, error=f"did not finish: {printed.strip()[-300:]}")
        return
    found = int(summary.group(1))
    lines = [line for line in printed.splitlines() if line.startswith("=========") and line.strip("= ")]
    record.add(
        what, value=float(found == 0), unit="held", note=f"{found} found", error=" | ".join(lines[:6]) * (found > 0)
    )
