"""Compiles the operators of the CPU with operators.cpp, or as a module, under a sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
PROGRAM = ROOT / "tests/native/operators.cpp"
SOURCES = sorted(
    path for path in [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/arguments/*.cpp")] if path.name != "binding.cpp"
)
# one instruction set, unoptimised, to compile in seconds
FLAGS = ["-std=c++17", "-O0", "-g1", "-Wno-psabi", "-DSPARC_FAST_BASELINE_ONLY", "-pthread", "-fPIC"]


def compiler(sanitizer: str, *arguments: object) -> None:
    watched = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc/cpu'}"]
    watched += ["-DSPARC_FAST_FLOAT32_ONLY"] * (sanitizer == "thread")
    subprocess.run([str(COMPILER), *FLAGS, *watched, *map(str, arguments)], check=True)


def compile_module(folder: Path, objects: list[Path], sanitizer: str) -> None:
    """`_cpu.so` in the folder: what sparc_fast._cpu is, of these objects."""
    import pybind11  # which tests of other people's packages go without

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    binding = folder / "binding.o"
    # most of it is pybind11's, where only memory is watched
    compiler("address", *includes, "-c", ROOT / "csrc/cpu/binding.cpp", "-o", binding)
    compiler(sanitizer, "-shared", binding, *objects, "-o", folder / "_cpu.so")


def compile_operators(folder: Path, sanitizer: str) -> None:
    """An object of each source in the folder."""

    def compile_one(source: Path) -> None:
        compiler(sanitizer, "-c", source, "-o", folder / f"{source.parent.name}-{source.stem}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, SOURCES))


def run_program(folder: Path, objects: list[Path], sanitizer: str) -> None:
    """`printed` in the folder: all that operators.cpp says; `status`: how it ended."""
    # every access of its own loops, too, is a call to what watches threads
    optimised = ["-O1"] if sanitizer == "thread" else []
    compiler(sanitizer, *optimised, PROGRAM, *objects, "-o", folder / "operators")
    done = subprocess.run([folder / "operators"], capture_output=True, text=True, timeout=600, check=False)
    (folder / "printed").write_text(done.stdout + done.stderr)
    (folder / "status").write_text(str(done.returncode))
