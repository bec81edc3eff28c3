"""What is found of each pair of streams, (source, target): its mean, its part of the JSON, its rows in a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, TypeVar

from .registry import Better, Row

__all__ = ["details_by_pair", "mean_over_pairs", "rows_by_pair"]

T = TypeVar("T")
Pairs = Mapping[tuple[str, str], T]


def mean_over_pairs(value: str | Callable[[T], float], own: bool | None = None) -> Callable[[Pairs[T]], float]:
    """Of an attribute, or of a function: over all pairs, over those of a stream with itself (`own`), or of two."""
    of_pair: Callable[[T], float] = attrgetter(value) if isinstance(value, str) else value

    def mean(found: Pairs[T]) -> float:
        values = [of_pair(one) for (source, target), one in found.items() if own in (None, source == target)]
        return sum(values) / len(values) if values else math.nan

    return mean


def details_by_pair(
    key: str, figures: Callable[[T], Mapping[str, float]], arrow: str = "->"
) -> Callable[[Pairs[T]], Mapping[str, Any]]:
    """A metric's `details`, under one key."""
    return lambda found: {key: {f"{source} {arrow} {target}": figures(one) for (source, target), one in found.items()}}


def rows_by_pair(
    section: str, meaning: str, cell: Callable[[T], str], better: Better = "higher"
) -> Callable[[Mapping[str, Pairs[T]]], Iterator[Row]]:
    """A metric's `rows`; the meaning may name {source}, {target} and what the first model has of the pair, {one}."""

    def rows(models: Mapping[str, Pairs[T]]) -> Iterator[Row]:
        for (source, target), one in next(iter(models.values())).items():
            cells = {name: cell(found[source, target]) for name, found in models.items() if (source, target) in found}
            words = meaning.format(source=source, target=target, one=one)
            yield Row(f"{source} → {target}", words, better, cells, section)

    return rows
