"""Every operator once at small ragged shapes: what compute-sanitizer watches."""

from __future__ import annotations

import sys

import torch

from .cases import CALLS, NARROW_MOMENTS, TINY, Operands, Place, Shape
from .operators import Ours

RAGGED = Shape("ragged", N=37, L=500, k=9, d_streams=(130, 7, 65))


def main(device: str, backend: str) -> None:
    place = Place(torch.device(device), backend)
    ours = Ours(backend, place.device)
    for shape, dtype in ((RAGGED, torch.float32), (RAGGED, torch.bfloat16), (TINY, torch.float32)):
        o = Operands(shape, dtype, place.device)
        for name, call in (*CALLS.items(), *NARROW_MOMENTS.items()):
            if hasattr(ours, name):
                call(ours, o)()
    if device == "cuda":
        torch.cuda.synchronize()
    print("every operator ran")


if __name__ == "__main__":
    main(*sys.argv[1:3])
