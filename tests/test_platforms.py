"""The CPU module elsewhere: on Arm, by clang, and for macOS. Where .ci/run has installed the compilers, none may lack."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pybind11
import pytest
from native import build as native

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/arguments/*.cpp")])
# as setup.py compiles
FLAGS = ["-std=c++17", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
pytestmark = [pytest.mark.compilers, pytest.mark.skipif(not SOURCES, reason="no sources")]


def tool(name: str, command: list[str] | None) -> list[str]:
    if command is None and os.environ.get("SPARC_FAST_TEST_COMPILERS") == "all":
        pytest.fail(f"{name} must be here")
    return command or pytest.skip(f"no {name}")


def on_path(name: str) -> list[str]:
    found = shutil.which(name)
    return tool(name, found and [found])


@pytest.mark.skipif(os.environ.get("SPARC_FAST_TEST_COMPILERS") != "all", reason="there may be no compiler")
def test_where_there_is_a_compiler_the_module_is_installed() -> None:
    assert find_spec("sparc_fast._cpu") is not None


def compile_all(compiler: list[str], sources: list[Path], folder: Path, *flags: str) -> list[Path]:
    objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        command = [*compiler, *FLAGS, f"-I{ROOT / 'csrc/cpu'}", *flags, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    return objects


def test_arm_computes_to_the_last_bit_what_the_baseline_does(
    native_results: Callable[[str], tuple[int, str]], tmp_path: Path
) -> None:
    """What native/operators.cpp finds of all operators, at the instruction set that every platform has."""
    arm, emulator = on_path("aarch64-linux-gnu-g++"), on_path("qemu-aarch64")
    on_path("g++")
    # a product and a sum rounded together, where Arm could, would be another result
    flags = "-ffp-contract=off", "-DSPARC_FAST_BASELINE_ONLY"
    objects = compile_all(arm, native.SOURCES, tmp_path, "-O0", *flags)
    objects += compile_all(arm, [native.PROGRAM], tmp_path, "-O1", *flags)  # most of what is emulated are its loops
    program = tmp_path / "operators"
    subprocess.run([*arm, "-static", "-pthread", *map(str, objects), "-o", str(program)], check=True)
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # a build under a sanitizer computes what any other does, and there is one
    assert (0, done.stdout) == native_results("address,undefined")


def headers() -> list[str]:
    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-fvisibility=hidden"]


def test_clang_has_nothing_to_warn_of(tmp_path: Path) -> None:
    compile_all(on_path("clang++"), SOURCES, tmp_path, "-O3", "-fsyntax-only", *headers())


def test_macos_compiles_it_against_headers_of_its_own(tmp_path: Path) -> None:
    zig = tool("zig", [sys.executable, "-m", "ziglang", "c++"] if find_spec("ziglang") else None)
    compile_all(zig, SOURCES, tmp_path, "-target", "aarch64-macos.11.0", "-O0", *headers())
