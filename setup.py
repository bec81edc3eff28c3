"""Compiles the modules that need no torch to build: pybind11 over raw pointers."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

cpu = Pybind11Extension(
    "sparc_fast._cpu",
    sorted(glob("csrc/cpu/*.cpp")),
    depends=sorted(glob("csrc/cpu/*.h")),
    cxx_std=17,
    # no trap and no errno: square roots become vector instructions. Wide vectors never cross a call, so no ABI note.
    extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
)

ParallelCompile().install()
setup(ext_modules=[cpu], cmdclass={"build_ext": build_ext})
