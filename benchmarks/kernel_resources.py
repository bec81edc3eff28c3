"""What the kernels take, for GPUs that need not be here: of Triton, of CUDA C++, of a step.

``python -m benchmarks.kernel_resources [--brief] [--target 90]`` prints registers, shared memory and spills of every
Triton kernel at its real launch choices (`tools.triton_resources`). With ``--cuda`` the same of the kernels in CUDA
C++, and how shared memory is reached (`tools.cuda_resources`). With ``--predict`` what a step takes
(`tools.predictions`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from .cases import CALLS
from .processes import joined
from .tools import cuda_resources, predictions, triton_resources
from .tools.triton_resources import TARGETS


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_resources", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--brief", action="store_true", help="float32 and all shapes but A and U for sm_90 alone")
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="only this one (all)")
    parser.add_argument("--operator", action="append", default=[], choices=CALLS, help="only this one (all)")
    parser.add_argument("--cuda", action="store_true", help="the kernels in CUDA C++; needs nvcc")
    parser.add_argument("--predict", action="store_true", help="predict a step's time; needs nvcc")
    parser.add_argument("--write", action="store_true", help="with --predict: also into docs/gpu.md")
    arguments = parser.parse_args(argv)
    status = joined("kernel_resources", argv)
    if status is not None:
        return status
    here = cuda_resources.nvcc() is not None and cuda_resources.SOURCES.exists()
    if (arguments.cuda or arguments.predict) and not here:
        parser.error("--cuda and --predict need nvcc on the PATH, and a checkout")
    if arguments.predict:
        print(predictions.main(arguments.write))
        return 0
    if arguments.cuda:
        compiled = cuda_resources.resources(arguments.target or list(TARGETS))
        print(json.dumps([asdict(r) for r in compiled]) if arguments.json else cuda_resources.table(compiled))
        return int(not all(r.fits for r in compiled))
    found = triton_resources.jobs(arguments.target or list(TARGETS), arguments.operator, arguments.brief)
    taken = triton_resources.resources(list(found))
    if arguments.json:
        lines = zip(found.values(), taken, strict=True)
        print(json.dumps([{"operator": name, **asdict(r), "fits": r.fits} for name, r in lines]))
    else:
        print(triton_resources.table(found, taken))
    return int(not all(r.fits for r in taken))


if __name__ == "__main__":
    sys.exit(main())
