"""The emulation of CUDA finds the faults it is there to find; sanitizers find none in the kernels."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_emulation import build

pytestmark = [pytest.mark.compilers, pytest.mark.skipif(build.COMPILER is None, reason="no g++")]
# what is left out, in which build that is noticed, and what is said then
FAULTS = [
    ("barrier", "thread", "data race"),
    ("barrier", "plain", "wrong result"),
    ("warp barrier", "thread", "data race"),
    ("blocks", "thread", "data race"),
    ("compact", "thread", "data race"),
    ("clear", "plain", "wrong result"),
    ("overflow", "plain", "wrong result"),
    ("half barrier", "plain", "threads wait for others that never come: thread 0 at faults.cu:"),
    ("two barriers", "plain", "threads of a block wait at different barriers, faults.cu:"),
    ("half vote", "plain", "threads wait for others that never come"),
    ("other mask", "plain", "a mask without the lane itself at faults.cu:"),
    ("shared end", "address", "use-after-poison"),
    ("tensor end", "address", "heap-buffer-overflow"),
    ("aligned", "plain", ""),
    ("aligned store", "plain", ""),
    ("swap", "plain", "a mask without the lane itself at faults.cu:"),
    ("fence", "plain", "a bulk copy to a barrier before any fence at faults.cu:"),
    ("phase", "plain", "more arrivals than a barrier counts at faults.cu:"),
    ("empty", "plain", "wrong result"),
    ("bytes", "plain", "threads wait for others that never come: thread 0 at faults.cu:"),
    ("tile fence", "plain", "a tile to a barrier before any fence at faults.cu:"),
    ("tile phase", "plain", "more arrivals than a barrier counts at faults.cu:"),
    ("tile bytes", "plain", "threads wait for others that never come: thread 0 at faults.cu:"),
    ("tile edge", "address", "a tile beyond its matrix or its place at faults.cu:"),
    ("swizzle", "plain", "wrong result"),
    ("sums fence", "plain", "a product of sums that no fence precedes at faults.cu:"),
    ("sums early", "plain", "wrong result"),
    ("tile early", "plain", "wrong result"),
]


Program = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def program(made_once: Callable[..., Path], emulated_kernels: Callable[[str], list[Path]]) -> Program:
    """By its name and its sanitizer."""

    def built(name: str, sanitizer: str) -> Path:
        kernels = emulated_kernels(sanitizer)
        sources = {"faults": build.HERE / "faults.cu", "operators": build.HERE / "operators.cpp"}

        def fill(folder: Path) -> None:
            build.compile_all(folder, [sources[name]], build.SANITIZERS[sanitizer])
            runtime = [path for path in kernels if path.stem == build.RUNTIME.stem]
            objects = runtime if name == "faults" else kernels
            build.link(folder / name, [*folder.glob("*.o"), *objects], sanitizer)

        return made_once(f"{name} {sanitizer}", fill) / name

    return built


def run(path: Path, *arguments: str, schedule: int = 0) -> subprocess.CompletedProcess[str]:
    # a race is told with few of the steps that led to it: thousands of fibres each keep their own
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "atexit_sleep_ms=0:history_size=0"}
    environment = {**os.environ, **options, "CUDA_EMULATION_SCHEDULE": str(schedule)}
    return subprocess.run([path, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("fault", "sanitizer", "message"), FAULTS)
def test_a_planted_fault_is_found(fault: str, sanitizer: str, message: str, program: Program) -> None:
    done = run(program("faults", sanitizer), fault)
    assert done.returncode not in (0, 2), "not found"
    assert message in done.stderr


@pytest.mark.parametrize("sanitizer", list(build.SANITIZERS))
def test_sound_kernels_pass_in_any_order_of_threads(sanitizer: str, program: Program) -> None:
    for schedule in range(4):
        done = run(program("faults", sanitizer), schedule=schedule)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_sanitizer_finds_nothing_in_the_kernels(sanitizer: str, program: Program) -> None:
    # first to last, all that is counted comes sorted already, so that sorting moves nothing; to see races any order will do
    for schedule in (2,) if sanitizer == "thread" else (0, 2):
        done = run(program("operators", sanitizer), schedule=schedule)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
