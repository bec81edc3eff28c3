"""Sparse codes as the metrics take them, and the counting they share.

One stream's code is `(values [N, k], indices [N, k])`; the latents of one row are distinct, -1 where a slot holds none
(its value is then 0). A latent is
*active* (it *fires*) for a sample when its value is > 0: one that was selected but whose ReLU is 0 is not.
`Codes` maps stream names to codes of the same N samples. Which protocol is measured depends only on how
the codes were made: *joint* (all streams encoded together, so that they share one support) or *single*
(each stream encoded alone). Nothing here is of size N x L.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["ByLatent", "Codes", "StreamCode", "by_latent", "firing_counts", "firings", "label_counts", "parts", "runs"]

StreamCode = tuple[Tensor, Tensor]
Codes = Mapping[str, StreamCode]

CHUNK_BYTES = 2**26  # that a chunk of work may hold at once


def check_code(code: StreamCode, n_latents: int, name: str = "code") -> None:
    if not isinstance(code, Sequence) or len(code) != 2:
        raise ValueError(f"{name} must be (values, indices), as code.stream(name) gives it, got {type(code).__name__}")
    values, indices = code
    if values.dim() != 2 or indices.shape != values.shape:
        raise ValueError(
            f"{name} must have values and indices of one shape [N, k], "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must have int32 or int64 indices, got {indices.dtype}")
    if not indices.numel():
        return
    least, greatest = int(indices.min()), int(indices.max())
    if least < -1 or greatest >= n_latents or (least < 0 and bool((values > 0)[indices < 0].any())):
        raise ValueError(f"{name} must have indices in [0, n_latents={n_latents}), got {least} to {greatest}")


def check_codes(codes: Codes, n_latents: int) -> int:
    """Check every stream's code; return the number of samples they share."""
    if not isinstance(codes, Mapping):
        raise ValueError(
            "codes must map streams to (values, indices), as {name: code.stream(name) for name in code.streams}, got "
            f"{type(codes).__name__}"
        )
    if not codes:
        raise ValueError("codes must hold at least one stream, got none")
    for name, code in codes.items():
        check_code(code, n_latents, f"codes[{name!r}]")
    sizes = {name: len(values) for name, (values, _) in codes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"codes must have the same number of samples in every stream, got {sizes}")
    return next(iter(sizes.values()))


def check_labels(labels: Tensor, n_samples: int) -> None:
    if labels.dtype != torch.bool or labels.dim() != 2 or len(labels) != n_samples:
        raise ValueError(f"labels must be bool [N={n_samples}, C], got {labels.dtype} {tuple(labels.shape)}")


def firings(code: StreamCode) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, latents and values of all active entries, in ascending order of sample."""
    values, indices = code
    samples, slots = (values > 0).nonzero(as_tuple=True)
    return samples, indices[samples, slots].long(), values[samples, slots]


def parts(n: int, row_bytes: int, chunk_bytes: int | None = None) -> Iterator[slice]:
    """All of n rows in order, so many at a time that work of so many bytes a row stays within a chunk."""
    step = max(1, (chunk_bytes or CHUNK_BYTES) // max(1, row_bytes))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def runs(ends: Sequence[int], most: int) -> Iterator[slice]:
    """Of items whose sizes add up to `ends`, runs of at most so much together; a larger item is a run by itself."""
    start = 0
    while start < len(ends):
        stop = max(start + 1, bisect_right(ends, (ends[start - 1] if start else 0) + most, start))
        yield slice(start, stop)
        start = stop


def firing_counts(code: StreamCode, n_latents: int) -> Tensor:
    """Number of samples that fire each latent, [L]."""
    values, indices = code
    counts = torch.zeros(n_latents, dtype=torch.int64, device=values.device)
    for rows in parts(len(values), 32 * values.shape[1]):
        counts += torch.bincount(indices[rows][values[rows] > 0], minlength=n_latents)
    return counts


class ByLatent(NamedTuple):
    """The active entries of a code, latent after latent; those of latent l are offsets[l] ... offsets[l + 1] - 1."""

    offsets: Tensor
    """int64 [L + 1]"""
    samples: Tensor
    """int32, ascending within a latent"""
    values: Tensor

    def blocks(self, row_bytes: int) -> Iterator[tuple[slice, slice]]:
        """Runs of latents, and of their entries, each of so few that work of row_bytes for all stays in a chunk.

        A latent of more entries is a run by itself.
        """
        bounds = self.offsets.tolist()
        both = [n_latents + n_entries for n_latents, n_entries in enumerate(bounds)]
        for latents in runs(both[1:], max(1, CHUNK_BYTES // max(1, row_bytes))):
            yield latents, slice(bounds[latents.start], bounds[latents.stop])


@torch.no_grad()
def by_latent(code: StreamCode, n_latents: int) -> ByLatent:
    """A code the other way round, in memory of about its own size."""
    values, indices = code
    offsets = pad(firing_counts(code, n_latents).cumsum(0), (1, 0))
    samples = torch.empty(int(offsets[-1]), dtype=torch.int32, device=values.device)
    ordered = values.new_empty(len(samples))
    at = offsets[:-1].clone()
    for rows in parts(len(values), 96 * values.shape[1]):
        n, latents, active = firings((values[rows], indices[rows]))
        order = latents.argsort(stable=True)
        latents = latents[order]
        places = at[latents] + torch.arange(len(order), device=order.device) - torch.searchsorted(latents, latents)
        samples[places], ordered[places] = (n[order] + rows.start).int(), active[order]
        at += torch.bincount(latents, minlength=n_latents)
    return ByLatent(offsets, samples, ordered)


def label_counts(
    codes: Codes, labels: Tensor, n_latents: int, orders: Sequence[Tensor] | None = None, *, weighted: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first label y, c int32 [S, L, some labels]), c[s, l, y] = samples of label y that fire l in s.

    Some labels after others, so that [S, L, C] never exists at once. Time is linear in the pairs of a sample's labels
    and latents. labels are bool [N, C], or integers: how often a sample of the label counts. orders[s][n], where given,
    is the row of stream s's code that counts as sample n's. weighted: c, in float64, sums activations instead.
    """
    kind = torch.float64 if weighted else torch.int32
    n_labels = max(1, CHUNK_BYTES // (kind.itemsize * len(codes) * n_latents + 1))
    for start in range(0, labels.shape[1], n_labels):
        some = labels[:, start : start + n_labels]
        counts = torch.zeros(len(codes), n_latents * some.shape[1], dtype=kind, device=labels.device)
        for rows in parts(len(some), 24 * some.shape[1]):
            samples, carried = some[rows].nonzero(as_tuple=True)
            times = None if labels.dtype == torch.bool else some[rows][samples, carried].to(kind)
            samples += rows.start
            for s, (values, indices) in enumerate(codes.values()):
                for pairs in parts(len(samples), 64 * values.shape[1]):
                    n = samples[pairs] if orders is None else orders[s][samples[pairs]]
                    cells = indices[n].long() * some.shape[1] + carried[pairs, None]
                    on = values[n] > 0
                    cells = cells[on]
                    each = values[n][on].detach().to(kind) if weighted else torch.ones_like(cells, dtype=kind)
                    if times is not None:
                        each *= times[pairs, None].expand(on.shape)[on]
                    counts[s].scatter_add_(0, cells, each)
        yield start, counts.view(len(codes), n_latents, -1)
