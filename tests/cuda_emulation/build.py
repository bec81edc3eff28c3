"""Compiles the CUDA kernels for the host: as a module like sparc_fast._cuda, or as a program under a sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests/cuda_emulation"
COMPILER = shutil.which("g++")
KERNELS = sorted(ROOT.glob("csrc/cuda/*.cu"))
FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DSPARC_FAST_EMULATE_CUDA"]
INCLUDES = [f"-I{HERE}", f"-I{ROOT / 'csrc/cuda'}"]


def build(target: Path, sources: Sequence[Path], flags: Sequence[str] = (), link: Sequence[str] = ()) -> Path:
    """The target, linked from CUDA or C++ sources and the emulation, which no sanitizer looks into."""

    def run(*arguments: object) -> None:
        done = subprocess.run([str(COMPILER), *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]

    def compiled(source: Path) -> Path:
        result = target.with_name(f"{target.stem}-{source.stem}.o")
        special = ["-O2", "-g1"] if source.name == "runtime.cpp" else flags
        run(*FLAGS, *INCLUDES, *special, "-x", "c++", "-c", source, "-o", result)
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*sources, HERE / "runtime.cpp"]))
    run(*objects, *flags, *link, "-o", target)
    return target


def emulated_module(folder: Path, *sanitizer: str) -> None:
    """`_cuda.so` in the folder: what sparc_fast._cuda is, with kernels that run on the host."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sources = [*KERNELS, ROOT / "csrc/cuda/binding.cpp", *ROOT.glob("csrc/arguments/*.cpp")]
    build(folder / "_cuda.so", sources, ["-O1", "-fvisibility=hidden", *sanitizer, *includes], ["-shared"])


def emulated_backend(folder: Path) -> ModuleType:
    """sparc_fast.ops.cuda on top of the folder's module; its operators take tensors of the CPU."""
    name = "sparc_fast._cuda"
    compiled = sys.modules.get(name)
    sys.modules[name] = _loaded("_cuda", folder / "_cuda.so")
    try:
        return _loaded("emulated_native_cuda", ROOT / "sparc_fast/ops/cuda.py")
    finally:
        del sys.modules[name]
        if compiled is not None:
            sys.modules[name] = compiled


def planned(cuda: ModuleType, patch: pytest.MonkeyPatch, plan: str, **choices: int) -> None:
    """Plans of this name make these choices instead of their own."""
    original = getattr(cuda._cuda, plan)

    def chosen(*arguments: object) -> object:
        made = original(*arguments)
        for name, value in choices.items():
            setattr(made, name, value)
        return made

    patch.setattr(cuda._cuda, plan, chosen)


def _loaded(name: str, path: Path) -> ModuleType:
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
