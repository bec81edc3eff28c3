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
import torch

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests/cuda_emulation"
COMPILER = shutil.which("g++")
KERNELS = sorted(ROOT.glob("csrc/cuda/*.cu"))
RUNTIME = HERE / "runtime.cpp"
# code whose memory is watched takes longer to optimise than to run; threads are watched at every access that is left
SANITIZERS = {
    "plain": ["-O1"],
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-DSPARC_FAST_EMULATE_CUDA"]
INCLUDES = [f"-I{HERE}", f"-I{ROOT / 'csrc/cuda'}"]


def _compiler(*arguments: object) -> None:
    done = subprocess.run([str(COMPILER), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]


def compile_all(folder: Path, sources: Sequence[Path], flags: Sequence[str]) -> None:
    """An object of each CUDA or C++ source in the folder."""

    def compile_one(source: Path) -> None:
        _compiler(*FLAGS, *INCLUDES, *flags, "-x", "c++", "-c", source, "-o", folder / f"{source.stem}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))


def compile_kernels(folder: Path, sanitizer: str) -> None:
    compile_all(folder, KERNELS, SANITIZERS[sanitizer])


def compile_runtime(folder: Path) -> None:
    """No sanitizer looks into the emulation itself."""
    compile_all(folder, [RUNTIME], ["-O2", "-g1"])


def link(target: Path, objects: Sequence[Path], sanitizer: str, *flags: str) -> None:
    _compiler(*objects, *SANITIZERS[sanitizer], *flags, "-o", target)


def emulated_module(folder: Path, kernels: Sequence[Path], sanitizer: str = "plain") -> None:
    """`_cuda.so` in the folder: what sparc_fast._cuda is, with kernels that run on the host."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    compile_all(folder, [*ROOT.glob("csrc/arguments/*.cpp")], SANITIZERS[sanitizer])
    # most of it is pybind11's, where only memory is watched
    watched = ["-fsanitize=address"] if sanitizer == "address" else []
    compile_all(folder, [ROOT / "csrc/cuda/binding.cpp"], ["-O0", "-g1", *watched, *includes])
    link(folder / "_cuda.so", [*folder.glob("*.o"), *kernels], sanitizer, "-shared")


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


def between_interpreted() -> list[pytest.MarkDecorator]:
    """Marks of a module whose kernels run between those of Triton's interpreter; with a GPU it is skipped."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton is not interpreted: tests/test_cuda_device.py", allow_module_level=True)
    # infinite and NaN intervals are part of the method; the interpreter computes them with numpy
    as_numbers = pytest.mark.filterwarnings("ignore::RuntimeWarning")
    return [pytest.mark.interpreter, pytest.mark.skipif(COMPILER is None, reason="no g++"), as_numbers]


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
