"""What a rank receives in a training step, before it is begun, and in what pieces."""

from __future__ import annotations

from collections.abc import Sequence

PIECES, LEAST, MOST = 4, 256, 1024


def piece_size(n_samples: int) -> int:
    """Of how many samples the reconstructions are exchanged together: a quarter, but 256 to 1024."""
    return min(max(-(-n_samples // PIECES), LEAST), MOST, max(n_samples, 1))


def exchanged_bytes(
    n_samples: int,
    d_streams: Sequence[int],
    k: int,
    ranks: int,
    *,
    weight: int = 4,
    auxk: int = 0,
    on_gpu: bool = False,
    over_batch: bool = False,
) -> dict[str, float]:
    """What -> bytes that each rank receives in a step; nothing of it grows with the number of latents.

    Args:
        weight: bytes of a weight, which inputs and gradients have too; sums take 4 at least.
        auxk: latents a sample uses for AuxK, 0 where none is dead: candidates, reconstructions and their gradient then
            come once more, of each stream from itself.
        on_gpu: where all candidates are scored at once, and bounds of their scores are not exchanged before.
        over_batch: with BatchTopK, candidates are counts: of a sample's scores above the last that fires, and at it.
    """
    N, S, D, others = n_samples, len(d_streams), sum(d_streams), ranks - 1
    wide, rows = max(weight, 4), S + (1 if auxk else 0)
    candidate = wide + (0 if on_gpu else 4)
    return {
        "x": N * D * weight * others / ranks,
        "candidates": N * ((2 * 4 if over_batch else k * candidate) + auxk * candidate) * others,
        "reconstructions": N * rows * D * wide * others / ranks,
        "G": N * rows * D * weight * others / ranks,
    }


def received_bytes(n_samples: int, d_streams: Sequence[int], k: int, ranks: int, *, weight: int = 4) -> float:
    """All of `exchanged_bytes`, without AuxK."""
    return sum(exchanged_bytes(n_samples, d_streams, k, ranks, weight=weight).values())
