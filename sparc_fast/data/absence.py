"""Samples that lack a stream, and zero rows, which stand for it: an image not read, a row never written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparc_fast.ops.layout import stream_slices

__all__ = ["mark_zero_rows", "without_empty_samples"]

PROBES = 8  # numbers of a row that tell most rows from zero rows


def mark_zero_rows(
    x: Tensor, present: Tensor | None, d_streams: Mapping[str, int]
) -> tuple[Tensor | None, Tensor | None]:
    """(`present`, bool [N, S], with False also where a stream's row of x, [N, D], is 0 throughout; where that is).

    None and None where every stream of every sample is there.
    """
    zero = torch.stack([_is_zero(x[:, cols]) for cols in stream_slices(tuple(d_streams.values()))], dim=1)
    if present is not None:
        zero &= present
    if not zero.any():
        return present, None
    return ~zero if present is None else present & ~zero, zero


def without_empty_samples(x: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(x, present) of the samples that have a stream."""
    if present is None or (some := present.any(1)).all():
        return x, present
    return x[some], present[some]


def _is_zero(rows: Tensor) -> Tensor:
    zero = (rows[:, :: -(-rows.shape[1] // PROBES)] == 0).all(1)
    if len(maybe := zero.nonzero()[:, 0]):
        zero[maybe] = (rows[maybe] == 0).all(1)
    return zero
