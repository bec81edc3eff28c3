"""Compiles the modules that need no torch to build: pybind11 over raw pointers."""

import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CompileError, ExecError

cpu = Pybind11Extension(
    "sparc_fast._cpu",
    sorted(glob("csrc/cpu/*.cpp") + glob("csrc/arguments/*.cpp")),
    depends=sorted(glob("csrc/cpu/*.h") + glob("csrc/arguments/*.h")),
    cxx_std=17,
    # no trap and no errno: square roots become vector instructions. Wide vectors never cross a call, so no ABI note.
    extra_compile_args=["-O3", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"],
    extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
)
cuda = Extension(
    "sparc_fast._cuda",
    sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp") + glob("csrc/arguments/*.cpp")),
    depends=sorted(
        [*glob("csrc/cuda/*.h"), *glob("csrc/cuda/*.cuh"), *glob("csrc/arguments/*.h"), "csrc/cuda/build.py"]
    ),
    optional=True,
)
nvcc = shutil.which("nvcc")


class BuildExt(build_ext):
    """Where a module cannot be compiled because its compiler is not there, everything else is installed without it."""

    def build_extension(self, ext: Extension) -> None:
        if ext is cuda:
            self.compile_cuda(ext)
        elif self.has_compiler():
            super().build_extension(ext)
        else:
            ext.optional = True
            leave_out(ext, "there is no C++ compiler that works. PyTorch will compute, many times slower")

    def has_compiler(self) -> bool:
        with TemporaryDirectory() as folder:
            source = Path(folder, "tried.cpp")
            source.write_text("#include <vector>\nint main() { return int(std::vector<int>().size()); }\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder)
            except (CompileError, ExecError):
                return False
        return True

    def compile_cuda(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "csrc/cuda/build.py", target, "--include", pybind11.get_include()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
            leave_out(ext, f"nvcc failed: {lines[0] if lines else done.returncode}")


def leave_out(ext: Extension, why: str) -> None:
    print(f"warning: {ext.name} is left out: {why}", file=sys.stderr)


ParallelCompile().install()
setup(ext_modules=[cpu, *([cuda] if nvcc else [])], cmdclass={"build_ext": BuildExt})
