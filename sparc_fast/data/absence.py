"""Samples that lack a stream, and zero rows, which stand for it: an image not read, a row never written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparc_fast.batch import zero_rows

__all__ = ["mark_zero_rows", "present_of", "without_empty_samples"]


def mark_zero_rows(
    x: Tensor, present: Tensor | None, d_streams: Mapping[str, int]
) -> tuple[Tensor | None, Tensor | None]:
    """(`present`, bool [N, S], with False also where a stream's row of x, [N, D], is 0 throughout; where that is).

    None and None where every stream of every sample is there.
    """
    zero = zero_rows(x, tuple(d_streams.values()))
    if present is not None:
        zero &= present
    if not zero.any():
        return present, None
    return ~zero if present is None else present & ~zero, zero


def present_of(
    x: Tensor, present: Tensor | None, d_streams: Mapping[str, int], zero_rows: str
) -> tuple[Tensor | None, Tensor | None]:
    """As `mark_zero_rows` where rows of zeros are "absent"; with "keep" they are said to be there."""
    if zero_rows == "absent":
        return mark_zero_rows(x, present, d_streams)
    return x.new_ones(len(x), len(d_streams), dtype=torch.bool) if present is None else present, None


def without_empty_samples(x: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(x, present) of the samples that have a stream."""
    if present is None or (some := present.any(1)).all():
        return x, present
    return x[some], present[some]
