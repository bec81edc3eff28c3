"""A hierarchy of concepts: a cat is a mammal is an animal. Labels at any depth of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Hierarchy"]

OPEN_IMAGES = "LabelName"  # the key of every node of the Open Images hierarchy


@dataclass(frozen=True)
class Hierarchy:
    """Concepts by name, and the one above each. A root has depth 0."""

    names: tuple[str, ...]
    parents: tuple[int, ...]
    """The node above each, -1 for a root."""

    def __post_init__(self) -> None:
        n = len(self.names)
        if len(set(self.names)) != n:
            twice = next(name for i, name in enumerate(self.names) if name in self.names[:i])
            raise ValueError(f"names must be distinct, got {twice!r} twice")
        if len(self.parents) != n or any(not -1 <= p < n for p in self.parents):
            raise ValueError(f"parents must be one of -1 ... {n - 1} for each of {n} names, got {self.parents}")
        try:
            _ = self.depths
        except CycleError as error:
            name = self.names[error.args[1][0]]
            raise ValueError(f"parents must lead to a root, got a cycle through {name!r}") from None

    @classmethod
    def from_parents(cls, parents: Mapping[str, str | None]) -> Hierarchy:
        """Of the name above each, None or "" for a root: {"cat": "mammal", "mammal": "animal", "animal": None}.

        A name that is only above others is a root.
        """
        names = list(dict.fromkeys([*parents, *(p for p in parents.values() if p)]))
        place = {name: node for node, name in enumerate(names)}
        above = (parents.get(name) for name in names)
        return cls(tuple(names), tuple(place[p] if p else -1 for p in above))

    @classmethod
    def from_open_images(cls, tree: Mapping[str, Any], display: Mapping[str, str] | None = None) -> Hierarchy:
        """Of the content of bbox_labels_600_hierarchy.json: nodes {"LabelName": "/m/0bl9f", "Subcategory": [...]}.

        A class that stands in several places has the deepest, the first of several; parts ("Part") are no
        subclasses. display: the name to call each label by, as oidv7-class-descriptions-boxable.csv has them.
        """
        deepest: dict[str, tuple[int, str | None]] = {}
        for label, above, depth in _nodes(tree):
            if label not in deepest or depth > deepest[label][0]:
                deepest[label] = depth, above
        named = display or {}
        called = {label: named.get(label, label) for label in deepest}
        return cls.from_parents({called[label]: above and called[above] for label, (_, above) in deepest.items()})

    @classmethod
    def read(cls, path: str | Path, descriptions: str | Path | None = None) -> Hierarchy:
        """From a JSON file: the Open Images hierarchy, or {name: the name above it, or null}.

        descriptions: a CSV of LabelName and DisplayName, by which Open Images' labels are then called.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is neither.
        """
        with Path(path).open(encoding="utf-8") as file:
            try:
                tree = json.load(file)
            except ValueError as error:
                raise ValueError(f"path must be a hierarchy in JSON, but {path} is not: {error}") from None
        if isinstance(tree, dict) and OPEN_IMAGES in tree:
            return cls.from_open_images(tree, None if descriptions is None else _display_names(Path(descriptions)))
        if not isinstance(tree, dict) or not all(p is None or isinstance(p, str) for p in tree.values()):
            expected = 'the Open Images hierarchy, or {"name": "the name above it" or null}'
            raise ValueError(f"path must be a hierarchy, {expected}, but {path} is neither")
        return cls.from_parents(tree)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Steps from each node up to its root."""
        depths = {-1: -1}
        for node in TopologicalSorter({node: [above] for node, above in enumerate(self.parents)}).static_order():
            if node >= 0:
                depths[node] = depths[self.parents[node]] + 1
        return tuple(depths[node] for node in range(len(self)))

    @property
    def max_depth(self) -> int:
        """That of the deepest node; 0 of none."""
        return max(self.depths, default=0)

    def nodes(self, concepts: Sequence[str]) -> tuple[int, ...]:
        """The node of each concept, by its name, whatever their order."""
        place = {name: node for node, name in enumerate(self.names)}
        if lacking := [name for name in concepts if name not in place]:
            raise ValueError(
                f"concepts must be in the hierarchy, but {len(lacking)} of {len(concepts)} are not: {lacking[:3]}"
            )
        return tuple(place[name] for name in concepts)

    def lifted(self, node: int, depth: int) -> int:
        """The node itself where it is no deeper than `depth`, or else the one above it that is so deep."""
        for _ in range(self.depths[node] - depth):
            node = self.parents[node]
        return node

    def at_depth(self, labels: Tensor, concepts: Sequence[str], depth: int) -> tuple[Tensor, tuple[str, ...]]:
        """Labels bool [N, C] of these concepts lifted to `depth`: bool [N, B], and the names of the B columns.

        A concept deeper than that counts as the one above it that is so deep, once however many of its kinds a sample
        carries; one less deep stays as it is. At depth 0 only the roots are left.
        """
        if depth < 0:
            raise ValueError(f"depth must be at least 0, got {depth}")
        columns = enumerate(self._columns(labels, concepts))
        return self._any_of(labels, [(column, self.lifted(node, depth)) for column, node in columns])

    def closed(self, labels: Tensor, concepts: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
        """Labels bool [N, C] with all above each carried too: bool [N, B], and the names of the B columns."""
        depths = range(self.max_depth + 1)
        columns = enumerate(self._columns(labels, concepts))
        return self._any_of(
            labels, [(column, self.lifted(node, depth)) for column, node in columns for depth in depths]
        )

    def _columns(self, labels: Tensor, concepts: Sequence[str]) -> tuple[int, ...]:
        if labels.dtype != torch.bool or labels.dim() != 2 or labels.shape[1] != len(concepts):
            raise ValueError(f"labels must be bool [N, C={len(concepts)}], got {labels.dtype} {list(labels.shape)}")
        return self.nodes(concepts)

    def _any_of(self, labels: Tensor, carried: list[tuple[int, int]]) -> tuple[Tensor, tuple[str, ...]]:
        """Whether a sample carries any column of each node, of pairs (column, node); and the nodes' names."""
        kept = sorted({node for _, node in carried})
        place = {node: column for column, node in enumerate(kept)}
        lifted = torch.zeros(len(labels), len(kept), dtype=torch.bool, device=labels.device)
        for column, node in carried:
            lifted[:, place[node]] |= labels[:, column]
        return lifted, tuple(self.names[node] for node in kept)


def _nodes(tree: Mapping[str, Any]) -> Iterator[tuple[str, str | None, int]]:
    """(label, the one above, depth) of each place, those above first, in the order of the file."""
    left: list[tuple[Any, str | None, int]] = [(tree, None, 0)]
    while left:
        node, above, depth = left.pop()
        if not isinstance(node, Mapping) or not isinstance(node.get(OPEN_IMAGES), str):
            raise ValueError(f'tree must have nodes {{"{OPEN_IMAGES}": text, "Subcategory": [...]}}, got {node!r:.60}')
        yield node[OPEN_IMAGES], above, depth
        left += [(child, node[OPEN_IMAGES], depth + 1) for child in reversed(node.get("Subcategory", []))]


def _display_names(path: Path) -> dict[str, str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if not {OPEN_IMAGES, "DisplayName"} <= set(rows.fieldnames or ()):
            raise ValueError(f"descriptions must have columns LabelName and DisplayName, got {rows.fieldnames}")
        return {row[OPEN_IMAGES]: row["DisplayName"] for row in rows}
