"""What a device needs beside the benchmarks: kernels compiled, the operators' tests, and compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

import torch

import sparc_fast
from sparc_fast.ops import backends

from .cases import CALLS, NARROW_MOMENTS, TINY, Operands, Shape
from .figures import SANITIZER, SMALL, TESTS
from .processes import ROOT, Process, run_until
from .record import Record, Row

RAGGED = Shape("ragged", N=37, L=500, k=9, d_streams=(130, 7, 65))
MODULE = "sparc_fast._cuda"
ARCHS = {80: "80", 90: "90a", 100: "100"}
"""Compute capabilities that are compiled for exactly; others get what every build has."""
OUTCOME = re.compile(r"^(tests/\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE)


class Build:
    """A build under way beside whatever else this process does; `row` waits for it and says how it went."""

    def __init__(self, capability: tuple[int, int], most_seconds: float = 150) -> None:
        self._began, self._most = monotonic(), most_seconds
        self._process: Process | None = None
        script = ROOT / "csrc/cuda/build.py"
        if find_spec(MODULE) is not None:
            self._note = "was compiled before"
        elif not script.exists():
            self._note = "no sources here"
        else:
            self._note = ""
            environment = os.environ | {"SPARC_FAST_CUDA_ARCHS": archs(capability)}
            self._process = Process([sys.executable, str(script), str(target())], environment)

    def row(self) -> Row:
        if self._process is None:
            return Row("build", MODULE, value=float(find_spec(MODULE) is not None), unit="held", note=self._note)
        self._process.wait(self._most - (monotonic() - self._began))
        failed = self._process.status != 0
        printed, seconds = self._process.end(), monotonic() - self._began
        if failed:
            lines = printed.strip().splitlines() or [""]
            said = next((line for line in lines if "error" in line.lower()), lines[-1])
            return Row("build", MODULE, error=f"not compiled after {seconds:.0f} s: {said[:300]}")
        return Row("build", MODULE, value=1.0, unit="held", note=f"compiled within {seconds:.0f} s")


def archs(capability: tuple[int, int]) -> str:
    major, minor = capability
    return ARCHS.get(10 * major + minor, ";".join(ARCHS.values()))


def target() -> Path:
    """In the package that runs, which may be a folder of links into a checkout."""
    return Path(sparc_fast.__file__).parent / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_files() -> list[str]:
    """The files whose tests run on every backend, and those of single kernels."""
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
    parts = dealt(tests, workers)

    def run(part: Sequence[str]) -> str:
        return run_until(record.left(), [*pytest, "-v", "--tb=line", "-rfE", *part], environment)

    with ThreadPoolExecutor(len(parts)) as pool:
        printed = list(pool.map(run, parts))
    outcomes = dict(match for text in printed for match in OUTCOME.findall(text))
    report_tests(record, len(tests), outcomes)
    broken = [text.strip()[-1500:] for text, part in zip(printed, parts, strict=True) if not OUTCOME.search(text)]
    for text in broken[:3]:
        record.add(TESTS, error=f"a process ran no test: {text}")


def dealt(tests: Sequence[str], workers: int) -> list[list[str]]:
    """Tests in turn to each worker: those of a file, which compile alike, do not all wait for one."""
    return [part for part in (list(tests[at::workers]) for at in range(workers)) if part]


def report_tests(record: Record, expected: int, outcomes: dict[str, str]) -> None:
    count = Counter(outcomes.values())
    failed = count["FAILED"] + count["ERROR"]
    missing = expected - len(outcomes)
    note = f"{count['PASSED']} passed, {failed} failed, {count['SKIPPED']} skipped, {missing} not run of {expected}"
    record.add(TESTS, value=float(failed == 0 and missing == 0), unit="held", note=note)
    for name in [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")][:30]:
        record.add(TESTS, contender=name, error="failed")


def sanitizer() -> str | None:
    """compute-sanitizer on the PATH or beside CUDA's compiler."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def small_program(device: str, backend: str) -> list[str]:
    """`run_every_operator` in a process of its own: what compute-sanitizer watches."""
    return [sys.executable, "-m", f"{__package__}.checks", device, backend]


def run_small(record: Record, backends: Mapping[str, str]) -> None:
    """The small program on the backend of each role at once: does every operator run at all?"""
    commands = [small_program(record.place.device.type, backend) for backend in backends.values()]
    with ThreadPoolExecutor(len(commands)) as pool:
        for role, printed in zip(backends, pool.map(lambda c: run_until(record.left(), c), commands), strict=True):
            ran = "every operator ran" in printed
            error = "" if ran else f"failed: {printed.strip()[-300:]}"
            record.add(SMALL, contender=role, value=float(ran), unit="held", error=error)


def kernel_names() -> list[str]:
    """Of every kernel of ours, Triton's and those in CUDA C++."""
    jitted = "".join(path.read_text() for path in sorted((ROOT / "kernels").glob("*.py")))
    written = "".join(path.read_text() for path in sorted((ROOT / "csrc/cuda").glob("*.cu*")))
    names = re.findall(r"@triton\.jit.*\ndef (_\w+)\(", jitted) + re.findall(r"\b(\w+_kernel)\(", written)
    return sorted(set(names))


def run_sanitizer(record: Record) -> None:
    """memcheck and racecheck over every kernel of ours, at once; Triton's cache holds them if they ran before."""
    tool = sanitizer()
    if not record.place.is_gpu or tool is None:
        record.add(SANITIZER, error="not found" if record.place.is_gpu else "needs a GPU")
        return
    # every tensor an allocation of its own, so that reading past its end is seen
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # watching PyTorch's own kernels and cuBLAS takes minutes
    ours = [argument for name in kernel_names() for argument in ("--kernel-name", f"kns={name}")]
    program = small_program(record.place.device.type, record.place.backend)

    def run(check: str) -> str:
        return run_until(
            record.left(), [str(tool), "--tool", check, "--print-limit", "5", *ours, *program], environment
        )

    checks = ("memcheck", "racecheck")
    with ThreadPoolExecutor(len(checks)) as pool:
        for check, printed in zip(checks, pool.map(run, checks), strict=True):
            report_sanitizer(record, check, printed)


def report_sanitizer(record: Record, check: str, printed: str) -> None:
    what = f"{SANITIZER} {check}"
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", printed)
    if summary is None or "every operator ran" not in printed:
        record.add(what, error=f"did not finish: {printed.strip()[-300:]}")
        return
    found = int(summary.group(1))
    lines = [line for line in printed.splitlines() if line.startswith("=========") and line.strip("= ")]
    record.add(
        what, value=float(found == 0), unit="held", note=f"{found} found", error=" | ".join(lines[:6]) * (found > 0)
    )


def run_every_operator(device: str, backend: str) -> None:
    """Once, at small ragged shapes."""
    ours = backends.resolve(backend, torch.device(device))
    for shape, dtype in ((RAGGED, torch.float32), (RAGGED, torch.bfloat16), (TINY, torch.float32)):
        o = Operands(shape, dtype, torch.device(device))
        for name, call in (*CALLS.items(), *NARROW_MOMENTS.items()):
            if hasattr(ours, name):
                call(ours, o)()
    if device == "cuda":
        torch.cuda.synchronize()
    print("every operator ran")


if __name__ == "__main__":
    run_every_operator(*sys.argv[1:3])
