"""Bridge Score: which latents carry the likeness of two streams that share a space, such as CLIP's?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import CHUNK_BYTES, ByLatent, StreamCode, by_latent, check_codes, parts
from .dictionary import Dictionary, directions
from .registry import Given, Metric, Score, Sizes, details_by_pair, mean_over_pairs

__all__ = ["BRIDGE", "Bridge", "BridgePair", "bridge_pairs", "bridge_score"]


@dataclass(frozen=True, eq=False)
class Bridge:
    """Sums over the Bridge matrix B of two streams, float64: see `bridge_score`.

    own [L]: B[l, l]. of_a, of_b [L]: sums of row l and of column l. total: the sum of all. of_samples [2, N]: what each
    sample adds to the sum of own, and to the total, times N.
    """

    own: Tensor
    of_a: Tensor
    of_b: Tensor
    total: float
    of_samples: Tensor

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


@torch.no_grad()
def bridge_score(
    a: StreamCode, b: StreamCode, dictionary_a: Tensor | Dictionary, dictionary_b: Tensor | Dictionary
) -> Bridge:
    """Sums over B[l, m] = E[z_a[l] z_b[m]] d_a[l] . d_b[m], latents that fire together and point alike.

    E is over the samples that both codes are of, and d are rows of dictionaries [L, D] in one space, of norm 1. B is
    the Bridge Score of Papadimitriou et al. (arXiv 2504.11695), whose one dictionary both streams share. B is [L, L],
    but not its sums: those of rows are E[z_a[l] d_a[l] . x_b], with x_b = sum_m z_b[m] d_b[m], and so cost N k D.

    Rows of other norms count by their norms. Products are float32, or float64 where the dictionaries are.
    """
    L = _check(a, b, dictionary_a, dictionary_b)
    known = [d if isinstance(d, Dictionary) else Dictionary(d) for d in (dictionary_a, dictionary_b)]
    known = [d.to(torch.promote_types(d.rows.dtype, torch.float32)) for d in known]
    N, D, device, n_here = len(a[0]), known[0].shape[1], known[0].rows.device, len(known[0].rows)
    own, of_a, of_b = (torch.zeros(L, dtype=torch.float64, device=device) for _ in range(3))
    of_samples = torch.zeros(2, N, dtype=torch.float64, device=device)
    alike = torch.zeros(n_here, dtype=torch.float64, device=device)
    for some in parts(n_here, 32 * D):
        alike[some] = (known[0].rows[some].double() * known[1].rows[some].double()).sum(dim=1)
    alike = known[0].of_each(alike)
    for rows in parts(N, 8 * (a[0].shape[1] + b[0].shape[1] + 4) * (D + 16)):
        latents = [code[1][rows].long().clamp_min(0).contiguous() for code in (a, b)]
        z = [code[0][rows].double().relu() for code in (a, b)]
        x = [d.summed(l, w) for l, d, w in zip(latents, known, z, strict=True)]
        for mine, sums in ((0, of_a), (1, of_b)):
            along = known[mine].along(latents[mine], x[1 - mine]).double()
            sums.scatter_add_(0, latents[mine].flatten(), (z[mine] * along).flatten())
        bridged = z[0] * _at(latents[0], latents[1], z[1]) * alike[latents[0]]
        own.scatter_add_(0, latents[0].flatten(), bridged.flatten())
        of_samples[:, rows] = torch.stack([bridged.sum(dim=1), (x[0].double() * x[1].double()).sum(dim=1)])
    n = max(N, 1)
    return Bridge(own / n, of_a / n, of_b / n, float(of_samples[1].sum()) / n, of_samples)


@torch.no_grad()
def bridge_pairs(
    a: StreamCode, b: StreamCode, dictionary_a: Tensor, dictionary_b: Tensor, top: int = 100
) -> list[BridgePair]:
    """The pairs of latents of the largest Bridge Score, the best first; of equal ones those of lower latents.

    Exact. Only latents that fire together for some sample have one. It takes N k^2 products, some rows of B at a time,
    and directions of those pairs alone that fire together often enough.
    """
    L = _check(a, b, dictionary_a, dictionary_b)
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    N, device, k = len(a[0]), dictionary_a.device, b[0].shape[1]
    entries = by_latent(a, L)
    norms = [dictionary.double().norm(dim=1) for dictionary in (dictionary_a, dictionary_b)]
    best = torch.zeros(0, dtype=torch.float64, device=device)  # falling
    where = torch.zeros(0, dtype=torch.int64, device=device)  # l L + m of each
    for latents, some in entries.blocks(48 * k):
        lengths = entries.offsets[latents.start : latents.stop + 1].diff()
        latent = torch.repeat_interleave(torch.arange(latents.start, latents.stop, device=device), lengths)
        pairs, together = _together(latent * L, entries, some, b, slice(latents.start * L, latents.stop * L))
        most = together / max(N, 1) * norms[0][pairs // L] * norms[1][pairs % L]  # where they point alike
        order = most.argsort(descending=True)
        for run in torch.split(order, max(4096, top)) if len(order) else ():
            if len(best) == top and most[run[0]] < best[-1]:
                break
            found = together[run] / max(N, 1)
            for part in parts(len(run), 32 * dictionary_a.shape[1]):
                mine, other = dictionary_a[pairs[run[part]] // L], dictionary_b[pairs[run[part]] % L]
                found[part] *= (mine.double() * other.double()).sum(dim=1)
            where, place = torch.cat([where, pairs[run]]).sort()
            best, kept = torch.cat([best, found])[place].sort(descending=True, stable=True)
            best, where = best[:top], where[kept[:top]]
    return [BridgePair(w // L, w % L, score) for w, score in zip(where.tolist(), best.tolist(), strict=True)]


def _together(rows: Tensor, entries: ByLatent, some: slice, b: StreamCode, bounds: slice) -> tuple[Tensor, Tensor]:
    """Cells of the matrix, within these bounds, that are not 0, ascending, and the sum over samples of z_a z_b in each.

    rows: the first cell of each entry's row.
    """
    n_cells = bounds.stop - bounds.start
    k = b[0].shape[1]
    runs = list(parts(len(rows), 48 * k))
    is_dense = len(runs) > 1 or 2 * len(rows) * k > n_cells
    dense = torch.zeros(n_cells if is_dense else 0, dtype=torch.float64, device=rows.device)
    cells, products = rows.new_zeros(0), dense[:0]
    for run in runs:
        at = slice(some.start + run.start, some.start + run.stop)
        samples = entries.samples[at].long()
        products = (entries.values[at].double()[:, None] * b[0][samples].double().relu()).flatten()
        cells = (rows[run, None] + b[1][samples].long().clamp_min(0)).flatten()
        if is_dense:
            dense.scatter_add_(0, cells - bounds.start, products)
    if is_dense:
        cells = dense.nonzero()[:, 0]
        return cells + bounds.start, dense[cells]
    cells, place = torch.unique(cells[products > 0], return_inverse=True)
    sums = torch.zeros(len(cells), dtype=torch.float64, device=rows.device)
    return cells, sums.scatter_add_(0, place, products[products > 0])


def _at(latents: Tensor, others: Tensor, values: Tensor) -> Tensor:
    """Of each of a sample's latents [n, k], its value among the others [n, k'], 0 where it is not there."""
    if not others.shape[1]:
        return torch.zeros(latents.shape, dtype=values.dtype, device=values.device)
    ordered, order = others.masked_fill(values <= 0, -1).sort(dim=1)
    slots = torch.searchsorted(ordered, latents).clamp_max(others.shape[1] - 1)
    return values.gather(1, order).gather(1, slots).masked_fill(ordered.gather(1, slots) != latents, 0)


def _check(a: StreamCode, b: StreamCode, dictionary_a: Tensor | Dictionary, dictionary_b: Tensor | Dictionary) -> int:
    shape = tuple(dictionary_a.shape)
    if len(shape) != 2 or dictionary_b.shape != shape:
        raise ValueError(
            f"dictionary_a and dictionary_b must be of one shape [L, D], got {shape} and {tuple(dictionary_b.shape)}"
        )
    check_codes({"a": a, "b": b}, shape[0])
    return shape[0]


def _compute(given: Given) -> dict[tuple[str, str], Bridge]:
    """Of the pairs of streams of one width."""
    widths = given.model.d_streams
    pairs = [(a, b) for a, b in combinations(given.streams, 2) if widths[a] == widths[b]]
    known = {name: directions(given.model, name).to("cpu") for name in {name for pair in pairs for name in pair}}
    return {(a, b): bridge_score(given.single[a], given.single[b], known[a], known[b]) for a, b in pairs}


def _resample(given: Given, found: Mapping[tuple[str, str], Bridge]) -> Mapping[str, Tensor]:
    """Both sums are of the samples that are drawn."""
    resampling = given.draws
    if not found:
        return {}
    shared = resampling.zeros()
    for one in found.values():
        for some, weights in resampling.pieces(8 * resampling.n):
            own, total = one.of_samples @ weights.double()
            shared[some] += torch.where(total != 0, own / total.where(total != 0, 1), torch.nan) / len(found)
    return {"bridge_shared": shared}


def _work(sizes: Sizes) -> int:
    """Dictionaries, sums of latents and of samples, and a part of the samples."""
    pairs = sizes.S * (sizes.S - 1) // 2
    return 4 * sizes.L * sizes.D + 64 * sizes.L + 16 * sizes.N * pairs + 3 * CHUNK_BYTES


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
            value=mean_over_pairs("shared"),
        ),
    ),
    needs=frozenset({"single", "pairs"}),
    resample=_resample,
    details=details_by_pair("bridge", lambda one: {"shared": one.shared, "total": one.total}, arrow="-"),
    work=_work,
)
