"""Compiles the CUDA C++ kernels for the GPU that is here, where nvcc is and nobody has compiled them."""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

import sparc_fast

from .gpu_record import Row
from .processes import ROOT, Process

WHAT = "sparc_fast._cuda"
ARCHS = {80: "80", 90: "90a", 100: "100"}
"""Compute capabilities that are compiled for exactly; others get what every build has."""


class Build:
    """A build under way beside whatever else this process does; `row` waits for it and says how it went."""

    def __init__(self, capability: tuple[int, int], most_seconds: float = 150) -> None:
        self._began, self._most = monotonic(), most_seconds
        self._process: Process | None = None
        script = ROOT / "csrc/cuda/build.py"
        if find_spec(WHAT) is not None:
            self._note = "was compiled before"
        elif not script.exists():
            self._note = "no sources here"
        else:
            self._note = ""
            environment = os.environ | {"SPARC_FAST_CUDA_ARCHS": archs(capability)}
            self._process = Process([sys.executable, str(script), str(target())], environment)

    def row(self) -> Row:
        if self._process is None:
            return Row("build", WHAT, value=float(find_spec(WHAT) is not None), unit="held", note=self._note)
        self._process.wait(self._most - (monotonic() - self._began))
        failed = self._process.status != 0
        printed, seconds = self._process.end(), monotonic() - self._began
        if failed:
            lines = printed.strip().splitlines() or [""]
            said = next((line for line in lines if "error" in line.lower()), lines[-1])
            return Row("build", WHAT, error=f"not compiled after {seconds:.0f} s: {said[:300]}")
        return Row("build", WHAT, value=1.0, unit="held", note=f"compiled within {seconds:.0f} s")


def archs(capability: tuple[int, int]) -> str:
    major, minor = capability
    return ARCHS.get(10 * major + minor, ";".join(ARCHS.values()))


def target() -> Path:
    """In the package that runs, which may be a folder of links into a checkout."""
    return Path(sparc_fast.__file__).parent / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
