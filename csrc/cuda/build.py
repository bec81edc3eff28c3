"""Compiles sparc_fast._cuda: ``python csrc/cuda/build.py TARGET [--include FOLDER]``.

Needs nvcc and pybind11's headers: those of FOLDER, of the installed package, or the ones that torch brings along.
SPARC_FAST_CUDA_ARCHS="80;90a;100" chooses the GPUs; the last is also compiled to PTX, which later GPUs translate.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ["-O3", "-std=c++17", "--Werror", "all-warnings", "--threads", "0", "-Xcompiler"]
FLAGS += ["-fPIC,-fvisibility=hidden,-Wall,-Wextra"]


def nvcc() -> str | None:
    """On the PATH, or where CUDA is installed."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home))


def pybind11_headers() -> Path:
    for package in ("pybind11", "torch"):
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / "include/pybind11/pybind11.h").exists():
                return Path(place) / "include"
    raise SystemExit("no headers of pybind11 found: pip install pybind11")


def command(compiler: str, target: Path, headers: Path) -> list[str]:
    archs = os.environ.get("SPARC_FAST_CUDA_ARCHS", "80;90a;100").split(";")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    includes = [f"-I{headers}", f"-I{sysconfig.get_paths()['include']}"]
    sources = sorted(map(str, [*HERE.glob("*.cu"), *HERE.glob("*.cpp"), *HERE.parent.glob("arguments/*.cpp")]))
    return [compiler, "--shared", *FLAGS, *codes, *includes, "-o", str(target), *sources]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--include", type=Path)
    arguments = parser.parse_args()
    compiler = nvcc()
    if compiler is None:
        raise SystemExit("no nvcc found")
    partial = arguments.target.with_name(f".{os.getpid()}{arguments.target.name}")
    status = subprocess.run(command(compiler, partial, arguments.include or pybind11_headers()), check=False).returncode
    if status == 0:
        partial.replace(arguments.target)
    partial.unlink(missing_ok=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
