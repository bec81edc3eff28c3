"""How every kernel of this package is started, and what they share in laying out rows and cutting columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, enable_fp_fusion: bool = True, **choice: Any) -> None:
    """kernel[grid](*args, **choice) on the device of the first tensor; an empty grid starts nothing.

    A product and the sum it meets may be one instruction, whatever this version of Triton does unless it is told.
    """
    if 0 in grid:
        return
    choice["enable_fp_fusion"] = enable_fp_fusion
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **choice)
    else:
        kernel[grid](*args, **choice)


@cache
def column_blocks(d_streams: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """int32 [blocks, 3]: (first column, last column + 1, stream) of blocks of at most `width` columns, none across
    two streams.

    Kept for good, as a captured CUDA graph goes on reading it: some KB for every way a model's columns are ever cut.
    """
    blocks = []
    offset = 0
    for s, d in enumerate(d_streams):
        blocks += [(offset + c, offset + min(c + width, d), s) for c in range(0, d, width)]
        offset += d
    return torch.tensor(blocks, dtype=torch.int32, device=device).view(-1, 3)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def widths(d_streams: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(d) for d in d_streams)


def dense_rows(x: Tensor) -> Tensor:
    """x with its columns side by side in memory; rows may lie apart, but by less than kernels multiply in 32 bits."""
    x = x.detach()
    return x if x.stride(-1) == 1 and x.stride(0) < 2**31 else x.contiguous()
