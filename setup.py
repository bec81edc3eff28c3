"""Compiles the modules that need no torch to build: pybind11 over raw pointers."""

import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup

openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # without it: threads of the C++ library
cpu = Pybind11Extension(
    "sparc_fast._cpu",
    sorted(glob("csrc/cpu/*.cpp")),
    depends=sorted(glob("csrc/cpu/*.h")),
    cxx_std=17,
    # no trap and no errno: square roots become vector instructions. Wide vectors never cross a call, so no ABI note.
    extra_compile_args=["-O3", *openmp, "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"],
    extra_link_args=openmp,
)
cuda = Extension(
    "sparc_fast._cuda",
    sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp")),
    depends=sorted(glob("csrc/cuda/*.h") + glob("csrc/cuda/*.cuh")),
    optional=True,
)
nvcc = shutil.which("nvcc")
# the last is also compiled to PTX, which later GPUs translate
archs = os.environ.get("SPARC_FAST_CUDA_ARCHS", "80;90a;100").split(";")


class BuildExt(build_ext):
    """nvcc compiles and links the CUDA module; where it cannot, everything else is installed without it."""

    def build_extension(self, ext: Extension) -> None:
        if ext is not cuda:
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++17", "--Werror", "all-warnings", "--threads", "0", "-Xcompiler"]
        flags += ["-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        flags += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        command = [nvcc, "--shared", *flags, *includes, "-o", target, *ext.sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
            print(f"warning: sparc_fast._cuda is left out, nvcc failed: {lines[0] if lines else done.returncode}")


ParallelCompile().install()
setup(ext_modules=[cpu, *([cuda] if nvcc else [])], cmdclass={"build_ext": BuildExt})
