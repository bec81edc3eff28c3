"""Everything that needs a GPU, in one command: proves the kernels there, measures them, and says which figures hold.

``python -m benchmarks.gpu [--quick] [--out FILE]`` takes less than 8 minutes (2 with --quick) and needs nothing but
torch, triton, numpy, pytest and hypothesis; where nvcc is, it compiles the CUDA C++ kernels if nobody has. Each phase
is a process of its own with its own share of the time: one that hangs, or breaks the GPU's context, costs itself and no
other. A profile and whole steps at shape A come first, within 4 minutes; then other shapes, PyTorch's ways, the tests,
the sanitizers and the search for launch choices. After each phase its rows are printed, and everything measured so far
is in one JSON file under benchmarks/results and at --out. The table of figures comes last, with what they justify as
text to paste. Without a GPU the exit status is 2; with --stand-in every phase runs at a tiny shape on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .processes import joined


def main(argv: Sequence[str] | None = None) -> int:
    status = joined("gpu", argv)
    if status is not None:
        return status
    from . import gpu_main

    return gpu_main.main(argv)


if __name__ == "__main__":
    sys.exit(main())
