"""Which latents, and groups of nested dictionaries, a rank has; what it receives in a training step, in what pieces."""

from __future__ import annotations

from collections.abc import Sequence

TOGETHER = 1024
"""Samples whose reconstructions are exchanged together, at most; fewer would cost more than they hide."""


def rows_of(n_latents: int, rank: int, ranks: int) -> slice:
    """The latents of a rank: equal shares of ceil(L / P), of which the last may be smaller."""
    share = -(-n_latents // ranks)
    return slice(rank * share, min((rank + 1) * share, n_latents))


def groups_of(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """[rank] -> the groups that it has latents of, where dictionaries of these sizes are shared between ranks."""
    begins, found = (0, *sizes[:-1]), []
    for rank in range(ranks):
        rows = rows_of(sizes[-1], rank, ranks)
        found.append(
            [g for g, (a, b) in enumerate(zip(begins, sizes, strict=True)) if a < rows.stop and b > rows.start]
        )
    return found


def told_groups(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """[rank] -> those whose gradients it is told: also the last, by which AuxK knows what all latents leave over."""
    last = len(sizes) - 1
    return [own if own[-1] == last else [*own, last] for own in groups_of(sizes, ranks)]


def sizes_here(sizes: Sequence[int], rank: int, ranks: int) -> tuple[int, ...]:
    """Of the groups that a rank is told of, where they end among its own rows."""
    rows = rows_of(sizes[-1], rank, ranks)
    return tuple(min(sizes[g], rows.stop) - rows.start for g in told_groups(sizes, ranks)[rank])


def piece_size(n_samples: int) -> int:
    return min(TOGETHER, max(n_samples, 1))


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
    private_k: int = 0,
    sizes: Sequence[int] = (),
) -> dict[str, float]:
    """What -> bytes that each rank receives in a step; nothing of it grows with the number of latents.

    Args:
        weight: bytes of a weight, which inputs and gradients have too; sums take 4 at least.
        auxk: latents a sample uses for AuxK, 0 where none is dead: candidates, reconstructions and their gradient then
            come once more, of each stream from itself.
        on_gpu: where all candidates are scored at once, and bounds of their scores are not exchanged before.
        counts: of a sample, which it has for candidates where latents do not fire by each other: 2 with BatchTopK, of
            its scores above the last that fires, and at it; 0 with JumpReLU.
        private_k: latents of their own that all streams fire for a sample together, each chosen like the k.
        sizes: of nested dictionaries, the last of all latents. A rank is sent the parts of others in every group of
            latents that they have some of, and the gradients of the groups that it has some of, and of the last; the
            bytes are those of the rank that receives most.
    """
    N, S, D, others = n_samples, len(d_streams), sum(d_streams), ranks - 1
    wide, of_auxk = max(weight, 4), 1 if auxk else 0
    parts, gradients = others, 1
    if sizes:
        n_groups = [len(some) for some in groups_of(sizes, ranks)]
        parts, gradients = sum(n_groups) - min(n_groups), max(map(len, told_groups(sizes, ranks)))
    candidate = wide + (0 if on_gpu else 4)
    chosen = k * candidate if counts is None else 4 * counts
    return {
        "x": N * D * weight * others / ranks,
        "candidates": N * (chosen + (auxk + private_k) * candidate) * others,
        "reconstructions": N * (S * parts + of_auxk * others) * D * wide / ranks,
        "G": N * (S * gradients + of_auxk) * D * weight * others / ranks,
    }


def received_bytes(n_samples: int, d_streams: Sequence[int], k: int, ranks: int, *, weight: int = 4) -> float:
    """All of `exchanged_bytes`, without AuxK."""
    return sum(exchanged_bytes(n_samples, d_streams, k, ranks, weight=weight).values())
