"""A threshold that another model learned, as a BatchTopK model here stores its own."""

from __future__ import annotations

from torch import Tensor

from sparc_fast.selection.batch_topk import REMEMBERED, Thresholds

__all__ = ["LIKELY_K", "known_threshold"]

LIKELY_K = 64
"""The k of a model of which no more is known: training would aim at it, and codes do not depend on it."""


def known_threshold(threshold: float, n_streams: int = 1) -> dict[str, Tensor]:
    """The state of a model in which every set of streams has this one, learned often enough to be kept in training.

    Below 0 it is 0: what fires between them has no value.
    """
    values, counts = Thresholds.empty(n_streams, "cpu")
    values[1:], counts[1:] = max(threshold, 0.0), REMEMBERED
    return {"threshold": values, "threshold_count": counts}
