"""How operands lie: the columns of streams, the groups of nested dictionaries, the types of sums and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def stream_slices(d_streams: Sequence[int]) -> list[slice]:
    """The columns of each stream: ``[slice(0, D_0), slice(D_0, D_0 + D_1), …]``."""
    ends = list(accumulate(d_streams))
    return [slice(end - width, end) for end, width in zip(ends, d_streams, strict=True)]


def wide(x: Tensor) -> Tensor:
    """x in the type its sums are taken in."""
    return x.to(wide_type(x.dtype))


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type that sums of numbers of this type are taken in."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def gradient_dtype(values: Tensor) -> torch.dtype:
    """What gradients of one sample are stored in: float16 cannot hold them, 1 / N underflows before any loss scale."""
    return torch.float32 if values.dtype == torch.float16 else values.dtype


def by_group(indices: Tensor, sizes: Sequence[int]) -> Tensor:
    """The support of each group of latents, ``sizes[g - 1] <= l < sizes[g]``, below that of the group before.

    [N, k] or [N, S, k] -> [P * N, ...]: row ``g * N + n`` has the slots of sample n that are of group g, where they
    were; the others are empty.
    """
    begins = (0, *sizes[:-1])
    return torch.cat(
        [torch.where((indices >= a) & (indices < b), indices, -1) for a, b in zip(begins, sizes, strict=True)]
    )
