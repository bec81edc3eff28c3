"""Bridge Score: which latents carry the likeness of two streams that share a space, such as CLIP's?"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .codes import CHUNK_BYTES, StreamCode, by_latent, check_codes, parts
from .dictionary import dictionary_of
from .registry import Given, Metric, Score, Sizes

__all__ = ["BRIDGE", "Bridge", "BridgePair", "bridge_pairs", "bridge_score"]


@dataclass(frozen=True, eq=False)
class Bridge:
    """Sums over the Bridge matrix B of two streams, float64: see `bridge_score`.

    own [L]: B[l, l]. of_a, of_b [L]: sums of row l and of column l. total: the sum of all.
    """

    own: Tensor
    of_a: Tensor
    of_b: Tensor
    total: float

    @property
    def shared(self) -> float:
        """The part of the likeness of two reconstructions that latents carry by themselves: sum of own / total.

        1: each latent bridges to itself alone; 0: it takes pairs of different ones. Terms may be below 0, and so this
        may leave [0, 1]. nan where the reconstructions are not alike at all.
        """
        return float(self.own.sum()) / self.total if self.total else float("nan")


class BridgePair(NamedTuple):
    """Latent `a` of the one stream with latent `b` of the other."""

    a: int
    b: int
    score: float


def bridge_score(a: StreamCode, b: StreamCode, dictionary_a: Tensor, dictionary_b: Tensor) -> Bridge:
    """Sums over B[l, m] = E[z_a[l] z_b[m]] d_a[l] . d_b[m], latents that fire together and point alike.

    E is over the samples that both codes are of, and d are rows of dictionaries [L, D] in one space, of norm 1. B is
    the Bridge Score of Papadimitriou et al. (arXiv 2504.11695), whose one dictionary both streams share. B is [L, L],
    but not its sums: those of rows are E[z_a[l] d_a[l] . x_b], with x_b = sum_m z_b[m] d_b[m], and so cost N k D.

    Divide by the norms where dictionaries have others, and by the scales where the model scales its inputs.
    """
    L = _check(a, b, dictionary_a, dictionary_b)
    N, D, device = len(a[0]), dictionary_a.shape[1], dictionary_a.device
    own, of_a, of_b = (torch.zeros(L, dtype=torch.float64, device=device) for _ in range(3))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for rows in parts(N, 24 * (a[0].shape[1] + b[0].shape[1] + 2) * D):
        (latents_a, z_a, each_a), (latents_b, z_b, each_b) = (
            _directions(code, rows, dictionary) for code, dictionary in ((a, dictionary_a), (b, dictionary_b))
        )
        x_a, x_b = (torch.einsum("nk,nkd->nd", z, each) for z, each in ((z_a, each_a), (z_b, each_b)))
        of_a.scatter_add_(0, latents_a.flatten(), (z_a * torch.einsum("nkd,nd->nk", each_a, x_b)).flatten())
        of_b.scatter_add_(0, latents_b.flatten(), (z_b * torch.einsum("nkd,nd->nk", each_b, x_a)).flatten())
        total += (x_a * x_b).sum()
        order = latents_b.argsort(dim=1)
        sorted_b = latents_b.gather(1, order).contiguous()
        slots = torch.searchsorted(sorted_b, latents_a).clamp_max(max(sorted_b.shape[1] - 1, 0))
        if sorted_b.shape[1]:
            same = sorted_b.gather(1, slots) == latents_a
            partner = order.gather(1, slots)
            cosines = (each_a * each_b.gather(1, partner[..., None].expand(-1, -1, D))).sum(dim=2)
            terms = (z_a * z_b.gather(1, partner) * cosines).masked_fill(~same, 0)
            own.scatter_add_(0, latents_a.flatten(), terms.flatten())
    n = max(N, 1)
    return Bridge(own / n, of_a / n, of_b / n, float(total) / n)


def bridge_pairs(
    a: StreamCode, b: StreamCode, dictionary_a: Tensor, dictionary_b: Tensor, top: int = 100
) -> list[BridgePair]:
    """The pairs of latents of the largest Bridge Score, the best first; of equal ones those of lower latents.

    Exact. Only latents that fire together for some sample have one. It takes N k^2 products, some rows of B at a time.
    """
    L = _check(a, b, dictionary_a, dictionary_b)
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    N, device, k = len(a[0]), dictionary_a.device, b[0].shape[1]
    entries = by_latent(a, L)
    best: list[tuple[float, int, int]] = []  # a heap, the least in front
    for latents, some in entries.blocks(max(8 * L, 48 * k)):
        rows = latents.stop - latents.start
        lengths = entries.offsets[latents.start : latents.stop + 1].diff()
        latent = torch.repeat_interleave(torch.arange(rows, device=device), lengths)
        together = torch.zeros(rows * L, dtype=torch.float64, device=device)
        for run in parts(len(latent), 48 * k):
            at = slice(some.start + run.start, some.start + run.stop)
            samples = entries.samples[at].long()
            products = entries.values[at].double()[:, None] * b[0][samples].double().relu()
            cells = latent[run, None] * L + b[1][samples].long()
            together.scatter_add_(0, cells.flatten(), products.flatten())
        pairs = together.nonzero()[:, 0]
        scores = together[pairs] / max(N, 1)
        for run in parts(len(pairs), 32 * dictionary_a.shape[1]):
            mine, other = dictionary_a[latents.start + pairs[run] // L], dictionary_b[pairs[run] % L]
            scores[run] *= (mine.double() * other.double()).sum(dim=1)
        order = scores.argsort(descending=True, stable=True)[:top]
        for place, score in zip(pairs[order].tolist(), scores[order].tolist(), strict=True):
            pair = (score, -(latents.start + place // L), -(place % L))
            if len(best) < top:
                heapq.heappush(best, pair)
            elif pair > best[0]:
                heapq.heapreplace(best, pair)
    return [BridgePair(-l, -m, score) for score, l, m in sorted(best, reverse=True)]


def _directions(code: StreamCode, rows: slice, dictionary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [n, k], activations and dictionary rows [n, k, D] of some samples."""
    latents = code[1][rows].long().contiguous()
    return latents, code[0][rows].double().relu(), dictionary[latents].double()


def _check(a: StreamCode, b: StreamCode, dictionary_a: Tensor, dictionary_b: Tensor) -> int:
    shape = tuple(dictionary_a.shape)
    if dictionary_a.dim() != 2 or dictionary_b.shape != shape:
        raise ValueError(
            f"dictionary_a and dictionary_b must be of one shape [L, D], got {shape} and {tuple(dictionary_b.shape)}"
        )
    check_codes({"a": a, "b": b}, shape[0])
    return shape[0]


def _compute(given: Given) -> dict[tuple[str, str], Bridge]:
    """Of the pairs of streams of one width."""
    widths = given.model.d_streams
    pairs = [(a, b) for a, b in combinations(given.streams, 2) if widths[a] == widths[b]]
    known = {name: dictionary_of(given.model, name).cpu() for name in {name for pair in pairs for name in pair}}
    return {(a, b): bridge_score(given.single[a], given.single[b], known[a], known[b]) for a, b in pairs}


def _details(found: Mapping[tuple[str, str], Bridge]) -> Mapping[str, Any]:
    return {
        "bridge": {
            f"{a} - {b}": {"shared": one.shared if math.isfinite(one.shared) else None, "total": one.total}
            for (a, b), one in found.items()
        }
    }


def _work(sizes: Sizes) -> int:
    """Dictionaries, sums, and a part of the samples."""
    return 4 * sizes.L * sizes.D + 64 * sizes.L + 3 * CHUNK_BYTES


BRIDGE = Metric(
    "bridge",
    "Bridge Score: what carries the likeness of two streams of one space, such as CLIP's images and texts.",
    _compute,
    (
        Score(
            "bridge_shared",
            "Likeness carried by shared latents",
            "The part of the dot products of two streams' reconstructions, each from its own code, that each latent "
            "contributes with itself; of pairs of streams of one width, which must be of one space.",
            "higher",
            ".3f",
            lambda found: sum(one.shared for one in found.values()) / len(found) if found else None,
        ),
    ),
    needs=frozenset({"single"}),
    details=_details,
    work=_work,
)
