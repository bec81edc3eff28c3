"""What a rank receives in a training step, before it is begun."""

from __future__ import annotations

from collections.abc import Sequence


def exchanged_bytes(
    n_samples: int,
    d_streams: Sequence[int],
    k: int,
    ranks: int,
    *,
    weight: int = 4,
    auxk: int = 0,
    on_gpu: bool = False,
    counts: int | None = None,
) -> dict[str, float]:
    """What -> bytes that each rank receives in a step; nothing of it grows with the number of latents.

    Args:
        weight: bytes of a weight, which inputs and gradients have too; sums take 4 at least.
        auxk: latents a sample uses for AuxK, 0 where none is dead: candidates, reconstructions and their gradient then
            come once more, of each stream from itself.
        on_gpu: where all candidates are scored at once, and bounds of their scores are not exchanged before.
        counts: of a sample, which it has for candidates where latents do not fire by each other: 2 with BatchTopK, of
            its scores above the last that fires, and at it; 0 with JumpReLU.
    """
    N, S, D, others = n_samples, len(d_streams), sum(d_streams), ranks - 1
    wide, rows = max(weight, 4), S + (1 if auxk else 0)
    candidate = wide + (0 if on_gpu else 4)
    return {
        "x": N * D * weight * others / ranks,
        "candidates": N * ((k * candidate if counts is None else 4 * counts) + auxk * candidate) * others,
        "reconstructions": N * rows * D * wide * others / ranks,
        "G": N * rows * D * weight * others / ranks,
    }


def received_bytes(n_samples: int, d_streams: Sequence[int], k: int, ranks: int, *, weight: int = 4) -> float:
    """All of `exchanged_bytes`, without AuxK."""
    return sum(exchanged_bytes(n_samples, d_streams, k, ranks, weight=weight).values())
