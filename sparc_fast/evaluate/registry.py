"""Metrics by name: what each needs, how it is computed, and the numbers and rows that it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from sparc_fast.codes import SparseLatents

from .codes import Codes, StreamCode, firing_counts

if TYPE_CHECKING:
    from sparc_fast.model import SPARC

    from .resampling import Resampling

__all__ = [
    "Batch", "Better", "Given", "Metric", "Need", "Row", "Score", "Sizes", "Watch", "choose", "details_by_pair",
    "mean_over_pairs", "rows_by_pair",
]  # fmt: skip

Better = Literal["higher", "lower", "neither"]

Need = Literal["single", "joint", "pairs", "labels", "hierarchy", "inputs", "train"]
"""What a metric is computed from: codes of each stream encoded alone; of all encoded together; two streams or more; the
concepts of each sample; their hierarchy; the samples themselves, once more (`Given.batches`); the training split
(`Given.train`)."""

ASKED_OF: Mapping[Need, str] = {"labels": "labels", "hierarchy": "a hierarchy", "train": "training samples"}


@dataclass(frozen=True)
class Score:
    """One number of a metric: what it is called, means, and how it is written."""

    key: str
    name: str
    meaning: str  # one sentence
    better: Better = "higher"
    format: str = ".3f"
    value: Callable[[Any], float | None] = float
    """Of what the metric's `compute` returns; None or nan where it is undefined."""
    highlight: bool = False  # also shown as a large figure at the top of a page


@dataclass(frozen=True)
class Row:
    """One line of a comparison. A column is a model's name."""

    name: str
    meaning: str  # one sentence
    better: Better
    cells: dict[str, str]  # column -> what is written there; a dash where the metric is undefined
    section: str = ""  # rows of one section stand together under its name
    highlight: bool = False  # also shown as a large figure at the top of a page
    key: str = ""  # of the score; "" where a cell holds several figures
    values: dict[str, float | None] = field(default_factory=dict)  # column -> the score, None where it is undefined
    intervals: dict[str, float | None] = field(default_factory=dict)  # column -> half the width of its 95 % interval


class Sizes(NamedTuple):
    """Of an evaluation: samples, streams, latents on, latents, labels, all widths together, and resamplings."""

    N: int
    S: int
    k: int
    L: int
    C: int
    D: int
    B: int


@dataclass(eq=False)
class Batch:
    """Some samples as they pass, on the model's device; encoded and decoded when that is first asked for."""

    model: SPARC
    inputs: dict[str, Tensor]
    """Of each stream, [n, D_s]."""
    rows: slice
    """Their places among the samples that are evaluated."""
    weights: Tensor | None = None
    """float32 [n, B]: how often each is drawn in each of B resamplings; None without."""

    @cached_property
    def alone(self) -> dict[str, SparseLatents]:
        """The codes of each stream encoded by itself."""
        return {name: self.model.encode({name: x}) for name, x in self.inputs.items()}

    @cached_property
    def together(self) -> SparseLatents:
        """The codes of all streams encoded together."""
        return self.model.encode(self.inputs)

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """The inputs in the units of reconstructions."""
        return self.model.normalized(self.inputs)

    def decoded(self, source: str, target: str) -> Tensor:
        """A stream as another's code, encoded alone, reconstructs it, [n, D_target]; computed anew each time."""
        return self.model.decode(self.alone[source], source=source, target=target)


class Watch(Protocol):
    """What looks at each batch as it passes, in order."""

    def see(self, batch: Batch) -> object: ...


@dataclass(eq=False)
class Given:
    """What metrics are computed from, on the CPU; what none of those chosen needs is not there."""

    model: SPARC
    n_samples: int
    batches: Callable[[], Iterator[Batch]]
    """All samples once more, a batch at a time: each call reads and encodes anew."""
    single: Codes = field(default_factory=dict)
    joint: Codes = field(default_factory=dict)
    labels: Tensor | None = None
    """bool [N, C]"""
    groups: Tensor | None = None
    """int64 [N]"""
    hierarchy: Any = None
    train: Given | None = None
    """The training split, with what the metrics need of it; its own `train` is None."""
    resampling: Resampling | None = None
    watched: dict[str, Any] = field(default_factory=dict)
    """By the metric's key, what its `watch` made, when all batches have passed."""
    say: Callable[[str], object] = print
    """Takes a sentence for the user, such as that this will be long."""
    first_latents: int | None = None
    """How many of the model's latents the codes are of, where that is not all."""

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self.model.streams)

    @property
    def n_latents(self) -> int:
        return self.model.n_latents if self.first_latents is None else self.first_latents

    @property
    def concepts(self) -> Tensor:
        """`labels`, of a metric that needs them."""
        assert self.labels is not None
        return self.labels

    @property
    def draws(self) -> Resampling:
        """`resampling`, where there is one."""
        assert self.resampling is not None
        return self.resampling

    @cached_property
    def fired(self) -> Tensor:
        """How many samples fire each latent in each stream encoded alone, int64 [S, L]."""
        return torch.stack([firing_counts(code, self.n_latents) for code in self.single.values()])

    @property
    def alive(self) -> Tensor:
        """Which of them fire in any stream, bool [L]."""
        return (self.fired > 0).any(dim=0)

    @cached_property
    def of_shared(self) -> Given:
        """The same of the latents that streams share; itself, where these are all."""
        n = self.model.n_shared
        if n == self.n_latents:
            return self
        codes = [{name: _below(n, *code) for name, code in of.items()} for of in (self.single, self.joint)]
        return replace(self, single=codes[0], joint=codes[1], first_latents=n)


def _below(n: int, values: Tensor, indices: Tensor) -> StreamCode:
    """A code without its latents from n on: empty slots."""
    beyond = indices >= n
    return values.masked_fill(beyond, 0), indices.masked_fill(beyond, -1)


@dataclass(frozen=True)
class Metric:
    """One metric: it costs nothing where it is not asked for.

    To make one of your own: `Metric("mine", "What it tells.", compute, needs={"single"})`, given to
    `evaluate(..., metrics=("agreement", mine))`. A variant of one that is there is `dataclasses.replace` of it.
    """

    key: str
    meaning: str  # one sentence
    compute: Callable[[Given], Any]
    """The result, with tensors on the CPU; None where it is undefined."""
    scores: tuple[Score, ...] = ()
    needs: frozenset[Need] = frozenset()
    of_shared: bool = False  # whether it compares streams by their latents: private ones are then none of these
    default: bool = False  # whether `evaluate` computes it unasked; what it needs may then be missing
    watch: Callable[[Given], Watch] | None = None
    """Sees all samples as they pass, once, so that it need not hold them; is told of no codes and no results."""
    resample: Callable[[Given, Any], Mapping[str, Tensor]] | None = None
    """Score's key -> its value in each resampling of the samples, float64 [B]."""
    details: Callable[[Any], Mapping[str, Any]] | None = None
    """More than scores for the JSON, plain; NaN and infinity become null."""
    rows: Callable[[Mapping[str, Any]], Iterable[Row]] | None = None
    """More rows of a table, of each model's result, each in a section of its own."""
    kept: Callable[[Sizes], int] | None = None
    """Bytes that `watch` holds."""
    work: Callable[[Sizes], int] | None = None
    """Bytes that `compute` takes beside what is given."""


def choose(
    metrics: Sequence[str | Metric] | None, known: Sequence[Metric], there: Mapping[Need, bool]
) -> tuple[Metric, ...]:
    """The metrics of these names, each once; by default the default ones; "all": those whose needs are there.

    Raises:
        ValueError: a name that nobody has, with those that are near; or one whose needs are not `there`.
    """
    if metrics is None:
        return tuple(metric for metric in known if metric.default)
    if metrics == "all":
        return tuple(metric for metric in known if all(there.get(need, True) for need in metric.needs))
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a sequence of names, such as ({metrics!r},), got the text {metrics!r}")
    if not isinstance(metrics, Iterable):
        raise ValueError(f"metrics must be a sequence of names, got {metrics!r}")
    by_key = {metric.key: metric for metric in known}
    chosen: dict[str, Metric] = {}
    for asked in metrics:
        if not isinstance(asked, Metric):
            if asked not in by_key:
                near = get_close_matches(str(asked), by_key, cutoff=0.4)
                hint = f" (near: {', '.join(near)})" if near else ""
                raise ValueError(f"metrics must be of {', '.join(by_key)}, got {asked!r}{hint}")
            asked = by_key[asked]
        for need, what in ASKED_OF.items():
            if need in asked.needs and not there.get(need, True):
                raise ValueError(f"metric {asked.key!r} must be given {what}, got none")
        if asked.key in chosen and chosen[asked.key] is not asked:
            raise ValueError(f"metrics must have keys of their own, got two of {asked.key!r}")
        chosen[asked.key] = asked
    return tuple(chosen.values())


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
