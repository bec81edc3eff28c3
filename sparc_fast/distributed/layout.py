"""Which latents, and which groups of nested dictionaries, a rank has."""

from __future__ import annotations

from collections.abc import Sequence


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
