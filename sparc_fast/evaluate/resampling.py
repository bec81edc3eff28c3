"""Bootstrap: samples drawn again and again with replacement, as weights, so that no metric runs again.

Each sum of a metric is resampled exactly: a resampled score is the score of the drawn samples, each as often as drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sparc_fast.ops.huge_pages import give_back_freed

from .codes import CHUNK_BYTES, StreamCode, firing_counts, parts, runs

__all__ = ["RESAMPLES", "Bags", "Resampling", "Z", "drawn_firings", "drawn_sums", "firing_entries", "latent_blocks"]

RESAMPLES = 200  # by default; the width of an interval is then known to 5 %
Z = 1.96  # normal quantile of the 95 % interval


class Resampling:
    """How often each of N samples is drawn in each of B resamplings: multinomial, of samples or of whole groups.

    The draws depend on N, the groups and the seed alone. So all models on the same samples have the same, and what two
    models' scores differ by in each resampling is the paired bootstrap of their difference. B bytes a sample are held;
    work with them is done in pieces of `chunk_bytes`.
    """

    def __init__(
        self,
        n: int,
        n_resamples: int = RESAMPLES,
        groups: Tensor | None = None,
        seed: int = 0,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        if n_resamples < 2:
            raise ValueError(f"resamples must be at least 2, or 0 for no intervals, got {n_resamples}")
        if groups is not None and groups.shape != (n,):
            raise ValueError(f"groups must be of the samples, [N={n}], got {list(groups.shape)}")
        self.n, self.n_resamples, self.chunk_bytes = n, n_resamples, chunk_bytes
        self._unit = None if groups is None else _in_order(groups)
        units = n if self._unit is None else (int(self._unit.max()) + 1 if n else 0)
        self._drawn = torch.zeros(units, n_resamples, dtype=torch.uint8, device="cpu")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        step = max(1, chunk_bytes // (32 * max(1, units)))
        for start in range(0, n_resamples if units else 0, step):  # side by side, as columns are slow to write
            size = (min(step, n_resamples - start), units)
            drawn = torch.randint(units, size, generator=generator, device="cpu")
            drawn += units * torch.arange(size[0], device="cpu")[:, None]
            counts = torch.bincount(drawn.flatten(), minlength=size[0] * units).clamp_max_(255)
            self._drawn[:, start : start + size[0]] = counts.view(size).T

    @property
    def units(self) -> int:
        """How many groups, or samples, are drawn."""
        return len(self._drawn)

    def __getitem__(self, kept: Tensor) -> Resampling:
        """Of some samples, bool [N] or their places."""
        some = object.__new__(Resampling)
        places = torch.arange(self.n, device="cpu")[kept]
        some._unit = places if self._unit is None else self._unit[places]
        some.n, some.n_resamples, some._drawn = len(places), self.n_resamples, self._drawn
        some.chunk_bytes = self.chunk_bytes
        return some

    def weights(self, rows: slice | Tensor, resamples: slice = slice(None)) -> Tensor:
        """float32 [rows, B] of these samples, and of some of the B."""
        drawn = self._drawn if self._unit is None else self._drawn[self._unit[rows]]
        return (drawn[rows] if self._unit is None else drawn)[:, resamples].float()

    def pieces(self, row_bytes: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Some resamplings after others, and their weights [N, b]: so many that b `row_bytes` stay within a chunk."""
        step = max(1, self.chunk_bytes // max(1, 4 * self.n, row_bytes))
        for start in range(0, self.n_resamples, step):
            some = slice(start, min(start + step, self.n_resamples))
            yield some, self.weights(slice(None), some)

    def zeros(self) -> Tensor:
        """A number for each resampling, float64 [B]."""
        return torch.zeros(self.n_resamples, dtype=torch.float64, device="cpu")

    def means(self, values: Tensor, rows: Tensor | None = None) -> Tensor:
        """Of a value of each sample, [n], or of each of some, their mean in each resampling, float64 [B]."""
        total, n = self.zeros(), self.zeros()
        for some, weights in self.pieces():
            weights = weights if rows is None else weights[rows]
            total[some] = (values.float() @ weights).double()
            n[some] = weights.sum(dim=0, dtype=torch.float64)
        return total / n


def _in_order(groups: Tensor) -> Tensor:
    """A number for each sample's group, in the order in which they appear, whatever they are called."""
    names, number = torch.unique(groups, return_inverse=True)
    first = torch.full((len(names),), len(groups), dtype=torch.int64, device="cpu")
    first.scatter_reduce_(0, number, torch.arange(len(groups), device="cpu"), "amin")
    place = torch.empty_like(first)
    place[first.argsort()] = torch.arange(len(names), device="cpu")
    return place[number]


def latent_blocks(
    codes: Sequence[StreamCode], n_latents: int, resampling: Resampling, times: int = 1
) -> Iterator[slice]:
    """Some latents after others, so few that their firings, and their sums in some resamplings, are within a chunk.

    times: into how many entries each firing is made.
    """
    fired = torch.stack([firing_counts(code, n_latents) for code in codes]).sum(dim=0)
    taken = (48 * max(1, times) * fired + 64 * len(codes) ** 2).cumsum(0)
    for latents in runs(taken.tolist(), resampling.chunk_bytes):
        give_back_freed()  # the allocator would hold back several times what a block takes
        yield latents


def firing_entries(
    code: StreamCode, latents: slice, chunk_bytes: int, *carried: Tensor, order: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(latent - first) * N + sample of all firings of some latents, ascending, int64; order: the sample each row is.

    In the same order float32 of what each firing carries, [N, k] each, such as its activation.
    """
    values, indices = code
    N = len(values)
    found = [torch.zeros(0, dtype=torch.int64, device="cpu")]
    of_firings = [[torch.zeros(0, dtype=torch.float32, device="cpu")] for _ in carried]
    for rows in parts(N, 64 * values.shape[1], chunk_bytes):
        some = indices[rows]
        mine = (values[rows] > 0) & (some >= latents.start) & (some < latents.stop)
        samples, slots = mine.nonzero(as_tuple=True)
        latent = some[samples, slots].long() - latents.start
        samples += rows.start
        for kept, each in zip(of_firings, carried, strict=True):
            kept.append(each[samples, slots].float())
        found.append(latent * N + (samples if order is None else order[samples]))
    keys, place = torch.cat(found).sort()
    return keys, tuple(torch.cat(kept)[place] for kept in of_firings)


def drawn_sums(samples: Tensor, offsets: Tensor, weights: Tensor, each: Tensor | None = None) -> Tensor:
    """How often samples[offsets[i] : offsets[i + 1]] are drawn together, float32 [bags, b], exact up to 2^24.

    each, float32 of the samples: they count by it.
    """
    if not len(samples) or not len(weights):
        return weights.new_zeros(len(offsets), weights.shape[1])
    return embedding_bag(samples, weights, offsets, per_sample_weights=each, mode="sum")


class Bags(NamedTuple):
    """The samples of each of some latents, those of latent i from offsets[i] on."""

    samples: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, keys: Tensor, latents: slice, N: int) -> Bags:
        """Of keys by `firing_entries`."""
        first = torch.arange(latents.stop - latents.start, device="cpu") * N
        return cls(keys % max(N, 1), torch.searchsorted(keys, first))

    def drawn(self, weights: Tensor, each: Tensor | None = None) -> Tensor:
        """`drawn_sums` of them."""
        return drawn_sums(self.samples, self.offsets, weights, each)


def drawn_firings(
    codes: Sequence[StreamCode], n_latents: int, resampling: Resampling, pairs: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (some resamplings, [S, l, b]), of all latents in turn: how often samples that fire each are drawn.

    Behind the streams stand pairs of them, [S + pairs, l, b]: samples that fire the latent in both.
    """
    for latents in latent_blocks(codes, n_latents, resampling):
        keys = [firing_entries(code, latents, resampling.chunk_bytes)[0] for code in codes]
        keys += [keys[s][torch.isin(keys[s], keys[t], assume_unique=True)] for s, t in pairs]
        bags = [Bags.of(some_keys, latents, resampling.n) for some_keys in keys]
        for some, weights in resampling.pieces(4 * len(keys) * (latents.stop - latents.start)):
            yield some, torch.stack([of_keys.drawn(weights) for of_keys in bags])
