"""The baseline without a model: how well the inputs themselves retrieve each other, where streams share a space."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor

from .evaluation import Evaluation
from .labels import PerSample, as_groups
from .resampling import RESAMPLES, Resampling
from .retrieval import RETRIEVAL, drawn_retrieval, retrieval_scores

__all__ = ["evaluate_raw"]


@torch.no_grad()
def evaluate_raw(
    inputs: Mapping[str, Tensor], *, groups: PerSample | None = None, resamples: int = RESAMPLES
) -> Evaluation:
    """Retrieval by cosine of the inputs, {stream: [N, D_s]}, between all streams of one width; no other metric.

    It says something of streams in one space alone, such as CLIP's pictures and texts. It compares all pairs, in
    O(N² D) time.

    Raises:
        ValueError: no two streams have the same width.
    """
    widths = {name: x.shape[1] for name, x in inputs.items()}
    pairs = [(a, b) for a, b in permutations(inputs, 2) if widths[a] == widths[b]]
    if not pairs:
        raise ValueError(f"inputs must have two streams of one width, got {widths}")
    N = len(next(iter(inputs.values())))
    group_of = None if groups is None else as_groups(groups, (N,))
    found = {(a, b): retrieval_scores(inputs[a], inputs[b], groups=group_of) for a, b in pairs}
    resampled: Mapping[str, Tensor] = {}
    if resamples and N:
        resampled = drawn_retrieval(found, Resampling(N, resamples, group_of))
    return Evaluation(
        tuple(inputs), N, 0, (RETRIEVAL,), {"retrieval": found}, {}, resampled,
        "samples" if groups is None else "groups",
    )  # fmt: skip
