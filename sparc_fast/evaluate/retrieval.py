"""Cross-stream retrieval: given a sample's code in one stream, find the same sample in another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from . import codes as chunks
from .codes import StreamCode, check_code, firing_counts, parts, runs
from .registry import Given, Metric, Score, Sizes, details_by_pair, mean_over_pairs, rows_by_pair
from .resampling import Resampling

try:
    from sparc_fast import _cpu
except ImportError:  # installed without the compiled module
    _cpu = None  # type: ignore[assignment]

__all__ = [
    "RETRIEVAL",
    "Found",
    "Retrieval",
    "RowSource",
    "drawn_retrieval",
    "retrieval_ranks",
    "retrieval_scores",
    "retrieval_seconds",
    "retrieve",
]

FIGURES = "n", "r1", "r5", "r10", "median_rank", "mrr", "n_candidates"
LONG = 10  # seconds of retrieval that are announced
TIE = 1e-6  # cosines closer than this are equal: float32 products of equal rows differ by rounding
# seconds on one core: for a product that is added up, for a pair that is compared, and for a product by plain PyTorch;
# of dense rows, for a product and for a pair
ADDED, COMPARED, GATHERED = 0.8e-9, 0.1e-9, 0.3e-9
MULTIPLIED, COUNTED = 0.06e-9, 3e-9
CELL = "R@1 / R@5 / R@10 · median rank · MRR"
BLOCK, QUERIES = 2048, 512  # dense candidates, and dense queries, that are compared at a time


class RowSource(Protocol):
    """Dense rows [N, D] that need not be in memory: any of them are made when they are asked for."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor | slice, /) -> Tensor: ...


Rows = Tensor | RowSource | StreamCode


@dataclass(frozen=True)
class Retrieval:
    """Summary of ranks. A random ranking of N candidates scores R@K = K/N and median rank about N/2 (above it
    for sparse codes that seldom overlap, as most pairs then tie at cosine 0, behind those that do).

    r1, r5, r10: fraction of queries whose pair is among the first 1, 5, 10 (higher is better); median_rank
    (lower is better; inf if most pairs match nothing); mrr: mean of 1 / rank (higher is better). All are nan
    without queries. n counts the queries, n_candidates what each is compared with.
    """

    n: int
    r1: float
    r5: float
    r10: float
    median_rank: float
    mrr: float
    n_candidates: int
    ranks: Tensor | None = field(default=None, repr=False, compare=False)
    """float64 [n]"""
    queries: Tensor | None = field(default=None, repr=False, compare=False)
    """Which samples they are of, int64 [n]; None: all."""

    def figures(self) -> dict[str, float]:
        """For the JSON."""
        return {key: getattr(self, key) for key in FIGURES}

    @property
    def cell(self) -> str:
        """In a table, under CELL."""
        return f"{self.r1:.3f} / {self.r5:.3f} / {self.r10:.3f} · {self.median_rank:.0f} · {self.mrr:.3f}"

    @staticmethod
    def from_ranks(ranks: Tensor, n_candidates: int | None = None, queries: Tensor | None = None) -> Retrieval:
        """Of one rank a query; there are as many candidates unless another number is given."""
        n = len(ranks)
        n_candidates = n if n_candidates is None else n_candidates
        if n == 0:
            nan = float("nan")
            return Retrieval(0, nan, nan, nan, nan, nan, n_candidates)
        given, ranks = ranks, ranks.double().sort().values
        r1, r5, r10 = (float((ranks <= top).double().mean()) for top in (1, 5, 10))
        median = (ranks[(n - 1) // 2] + ranks[n // 2]) / 2
        return Retrieval(n, r1, r5, r10, float(median), float((1 / ranks).mean()), n_candidates, given, queries)


@torch.no_grad()
def retrieval_scores(
    queries: Rows, candidates: Rows, n_latents: int | None = None, groups: Tensor | None = None, *, chunk: int = 64
) -> Retrieval:
    """The ranks of `retrieval_ranks`, summarised.

    With groups, rows of a group that are equal are one query, as they are one candidate: an image that stands beside
    each of its five captions is asked for once. This is the protocol of COCO and Flickr30k: among all captions the rank
    of the best right one, and among all images that of the one right image.
    """
    a, b, groups = _pair(queries, candidates, n_latents, groups, chunk)
    ranks = _ranks(a, b, groups, chunk)
    if groups is None:
        return Retrieval.from_ranks(ranks)
    queries = a.first_of_copies(groups).nonzero()[:, 0]
    return Retrieval.from_ranks(ranks[queries], int(b.first_of_copies(groups).sum()), queries)


@torch.no_grad()
def retrieval_ranks(
    queries: Rows, candidates: Rows, n_latents: int | None = None, groups: Tensor | None = None, *, chunk: int = 64
) -> Tensor:
    """Exact rank of candidate n for query n by cosine similarity among all N candidates, float64 [N].

    Both are dense [N, D], tensors or a `RowSource`, or both sparse codes over `n_latents`. The rank is 1 + the
    candidates more similar than the pair itself + half of those equally similar: the mean of the best and the worst
    rank that breaking ties could give. So constant codes rank (N+1)/2 and earn no R@1. A zero row matches nothing: its
    pair ranks inf, and it stands behind every other candidate.

    Sparse codes are compared through the latents they share: sum_l n_l m_l products where n_l queries and m_l
    candidates fire latent l, some N^2 k^2 / L, and one look at every pair, on the CPU in O(N k) memory.
    `retrieval_seconds` tells about how long that takes. Dense rows are compared some with some: N^2 D products, in O(N)
    memory beside them. Sparse ones, where the compiled module is missing, are compared `chunk` queries at a time, in
    O(chunk (N + L)).

    groups: integers [N]; any candidate of query n's group is then right. The rank is that of the most similar of them
    among the candidates of other groups: five captions of an image are not in each other's way. Rows of a group that
    are equal are one candidate: an image that is repeated beside each of its captions takes one rank, not five.

    Use single codes. Joint codes share their support and give the pair away (R@1 near 1, untrained too).
    """
    return _ranks(*_pair(queries, candidates, n_latents, groups, chunk), chunk)


def retrieval_seconds(queries: Rows, candidates: Rows, n_latents: int | None = None) -> float:
    """About how long `retrieval_ranks` will take on the CPU with the threads that torch has now."""
    if not isinstance(queries, tuple) or not isinstance(candidates, tuple):
        N, M, D = len(queries), len(candidates), queries.shape[1] if not isinstance(queries, tuple) else 0
        return N * M * (MULTIPLIED * D + COUNTED) / torch.get_num_threads()
    assert n_latents is not None  # of sparse codes
    N, M = len(queries[0]), len(candidates[0])
    if _cpu is None:
        return GATHERED * N * candidates[0].numel() / torch.get_num_threads()
    n, m = (firing_counts(code, n_latents).double() for code in (queries, candidates))
    added = float((n * m.clamp_max(M / 16)).sum())  # a latent of more is added in whole vectors
    return (ADDED * added + COMPARED * N * M) / torch.get_num_threads()


class Found(NamedTuple):
    """The candidates nearest to each query, nearest first, of equal ones the lower; -1 and 0 where none is similar."""

    candidates: Tensor
    """int64 [Q, top]"""
    cosines: Tensor
    """float32 [Q, top]"""


@torch.no_grad()
def retrieve(queries: Rows, candidates: Rows, n_latents: int | None = None, *, top: int = 10, chunk: int = 64) -> Found:
    """The candidates most similar to each query by cosine, such as the pictures of a text.

    Both are dense, [Q, D] and [M, D], or both sparse codes over `n_latents`. Found exactly, among all: sparse codes as
    `retrieval_ranks` compares them, in O((Q + M) k + Q top) memory and about half of its time; dense rows, and sparse
    ones where the compiled module is missing, `chunk` queries at a time in O(chunk (M + L)).
    """
    a, b = _same_kind(queries, candidates, n_latents, chunk)
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    device = a.given.device
    found = torch.full((len(a), top), -1, dtype=torch.int64, device=device)
    cosines = torch.zeros(found.shape, dtype=torch.float32, device=device)
    if a.indices is None or _cpu is None:
        _find_by_chunks(found, cosines, a, b, chunk)
        return Found(found, cosines)
    found, cosines = found.cpu(), cosines.cpu()
    sparse = [rows.entries(torch.arange(len(rows), device=device)) for rows in (a, b)]
    _cpu.find_nearest(found, cosines, *sparse[0], *sparse[1], a.width, torch.get_num_threads())
    return Found(found.to(device), cosines.to(device))


def _find_by_chunks(found: Tensor, cosines: Tensor, a: _Rows, b: _Rows, chunk: int) -> None:
    """As the compiled function."""
    device, top = found.device, found.shape[1]
    multiply = b.products(torch.arange(len(b), device=device))
    for part in torch.split(torch.arange(len(found), device=device), chunk):
        near = multiply(a.columns(part)).T
        least = near.topk(min(top, len(b)), dim=1).values[:, -1:]
        query, candidate = ((near >= least) & (near > 0)).nonzero(as_tuple=True)  # with all that equal the last
        order = near[query, candidate].argsort(descending=True, stable=True)
        order = order[query[order].argsort(stable=True)]
        query, candidate = query[order], candidate[order]
        place = torch.arange(len(query), device=device) - torch.searchsorted(query, query)
        query, candidate, place = (x[place < top] for x in (query, candidate, place))
        found[part[query], place], cosines[part[query], place] = candidate, near[query, candidate]


def _pair(
    queries: Rows, candidates: Rows, n_latents: int | None, groups: Tensor | None, chunk: int
) -> tuple[_Rows, _Rows, Tensor | None]:
    """Query n beside its candidate n, checked."""
    a, b = _same_kind(queries, candidates, n_latents, chunk)
    if len(a) != len(b):
        raise ValueError(f"queries and candidates must have the same N, got {a}, {b}")
    if groups is not None:
        if groups.is_floating_point() or groups.is_complex() or groups.shape != a.given.shape[:1]:
            raise ValueError(f"groups must be integers [N={len(a)}], got {groups.dtype} {list(groups.shape)}")
        groups = groups.to(a.given.device)
    return a, b, groups


def _same_kind(queries: Rows, candidates: Rows, n_latents: int | None, chunk: int) -> tuple[_Rows, _Rows]:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    a, b = (_Rows(rows, n_latents, name) for rows, name in ((queries, "queries"), (candidates, "candidates")))
    if (a.indices is None) != (b.indices is None):
        raise ValueError(f"queries and candidates must be both dense or both sparse, got {a}, {b}")
    if a.indices is None and a.width != b.width:
        raise ValueError(f"queries and candidates must have the same D, got {a}, {b}")
    return a, b


def _ranks(a: _Rows, b: _Rows, groups: Tensor | None, chunk: int) -> Tensor:
    counted = ~b.zero if groups is None else ~b.zero & b.first_of_copies(groups)
    places = counted.nonzero()[:, 0]
    if groups is None:
        last = counted.long().cumsum(0)
        first = last - counted.long()
    else:  # candidates of a group lie together
        places = places[groups[places].argsort(stable=True)]
        first, last = (torch.searchsorted(groups[places], groups, right=right) for right in (False, True))
    last = torch.where(a.zero, first, last)
    count = _count_dense if a.indices is None else _count_by_chunks if _cpu is None else _count_compiled
    higher, equal = count(a, b, places, first, last, chunk)
    return torch.where(first < last, 1 + higher + equal.double() / 2, float("inf"))


def _count_compiled(
    a: _Rows, b: _Rows, places: Tensor, first: Tensor, last: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    higher, equal = (torch.empty(len(first), dtype=torch.int64, device="cpu") for _ in range(2))
    own = torch.empty(len(first), dtype=torch.float32, device="cpu")
    sparse = *a.entries(torch.arange(len(a), device=places.device)), *b.entries(places)
    mine = (place.cpu().contiguous() for place in (first, last))
    _cpu.count_nearer(own, higher, equal, *sparse, *mine, a.width, TIE, torch.get_num_threads())
    return higher.to(first.device), equal.to(first.device)


def _count_dense(a: _Rows, b: _Rows, places: Tensor, first: Tensor, last: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """As the compiled function, of dense rows, of which some are there at a time."""
    higher, equal = torch.zeros_like(first), torch.zeros_like(first)
    own = torch.full(first.shape, -float("inf"), dtype=torch.float32, device=first.device)
    counts = last - first
    for run in runs(counts.cumsum(0).tolist(), chunks.CHUNK_BYTES // 64):  # pairs of a query and what is right for it
        query = torch.repeat_interleave(torch.arange(run.start, run.stop, device=first.device), counts[run])
        ends = counts[run].cumsum(0)
        within = torch.arange(len(query), device=first.device) - (ends - counts[run])[query - run.start]
        for pairs in parts(len(query), 32 * a.width):
            right = places[first[query[pairs]] + within[pairs]]
            cosines = (a.unit(query[pairs]) * b.unit(right)).sum(dim=1)
            own.scatter_reduce_(0, query[pairs], cosines, "amax")
    for part in torch.split(torch.arange(len(first), device=first.device), max(chunk, QUERIES)):
        columns = a.columns(part)
        for block in torch.split(torch.arange(len(places), device=first.device), BLOCK) if len(places) else ():
            cosines = b.unit(places[block]) @ columns
            mine = (first[part] <= block[:, None]) & (block[:, None] < last[part])
            cosines.masked_fill_(mine, -float("inf"))
            higher[part] += (cosines > own[part] + TIE).sum(dim=0)
            equal[part] += (cosines >= own[part] - TIE).sum(dim=0)
    return higher, equal - higher


def _count_by_chunks(
    a: _Rows, b: _Rows, places: Tensor, first: Tensor, last: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """As the compiled function: candidates more similar than the best of first ... last - 1, and those equally so."""
    higher, equal = torch.zeros_like(first), torch.zeros_like(first)
    place = torch.arange(len(places), device=first.device)[:, None]
    multiply = b.products(places)
    for part in torch.split(torch.arange(len(first), device=first.device), chunk) if len(place) else ():
        cosines = multiply(a.columns(part))
        mine = (first[part] <= place) & (place < last[part])
        own = cosines.masked_fill(~mine, -float("inf")).amax(dim=0)
        cosines.masked_fill_(mine, -float("inf"))
        higher[part] = (cosines > own + TIE).sum(dim=0)
        equal[part] = (cosines >= own - TIE).sum(dim=0) - higher[part]
    return higher, equal


class _Rows:
    """N rows, dense or sparse, that are compared by their directions."""

    def __init__(self, rows: Rows, n_latents: int | None, name: str) -> None:
        self.name = name
        self.given: Tensor | RowSource
        self.indices: Tensor | None
        if not isinstance(rows, tuple):
            if len(rows.shape) != 2:
                raise ValueError(f"{name} must be [N, D], got {tuple(rows.shape)}")
            self.given, self.indices = rows, None
            self.width = rows.shape[1]
        else:
            if n_latents is None:
                raise ValueError(f"n_latents must be given where {name} are sparse codes, got None")
            check_code(rows, n_latents, name)
            self.given, self.indices = rows
            self.width = n_latents
        N, device = len(self.given), self.given.device
        largest, norm = (torch.ones(N, 1, dtype=torch.float32, device=device) for _ in range(2))
        self.zero = torch.zeros(N, dtype=torch.bool, device=device)
        for part in parts(N, 24 * self.given.shape[1]):
            values = self.plain(part)
            if not values.isfinite().all():
                raise ValueError(f"{name} must have finite values, got NaN or inf")
            self.zero[part] = zero = (values == 0).all(dim=1)
            # By the largest entry first, so that squares of tiny or huge values stay in range.
            largest[part] = values.abs().amax(dim=1, keepdim=True).where(~zero[:, None], 1)
            norm[part] = (values / largest[part]).norm(dim=1, keepdim=True).where(~zero[:, None], 1)
        self._largest, self._norm = largest, norm

    def __str__(self) -> str:
        return f"{self.name} {'dense' if self.indices is None else 'sparse'} {list(self.given.shape)}"

    def __len__(self) -> int:
        return len(self.given)

    def plain(self, rows: Tensor | slice) -> Tensor:
        """Some of them as they are in float32; of a code what is active."""
        values = self.given[rows].float()
        return values if self.indices is None else values.relu()

    def unit(self, rows: Tensor | slice) -> Tensor:
        """Some of them at norm 1."""
        return self.plain(rows) / self._largest[rows] / self._norm[rows]

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is not 0 in some of sparse rows, on the CPU: offsets int64 [rows + 1], latents int32, values float32."""
        assert self.indices is not None
        some = [rows[part] for part in parts(len(rows), 48 * self.given.shape[1])]
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device="cpu")
        if some:
            offsets[1:] = torch.cat([(self.plain(part) > 0).sum(dim=1) for part in some]).cumsum(0)
        latents = torch.empty(int(offsets[-1]), dtype=torch.int32, device="cpu")
        values = torch.empty(len(latents), dtype=torch.float32, device="cpu")
        start = 0
        for part in some:
            unit, on = self.unit(part), self.plain(part) > 0
            stop = start + int(on.sum())
            latents[start:stop], values[start:stop] = self.indices[part][on], unit[on]
            start = stop
        return offsets, latents, values

    def columns(self, part: Tensor) -> Tensor:
        """The chosen rows as dense columns, [D or L, len(part)]."""
        unit = self.unit(part)
        if self.indices is None:
            return unit.T
        dense = unit.new_zeros(self.width, len(part))
        here = torch.arange(len(part), device=part.device)[:, None]
        return dense.index_put_((self.indices[part].long().clamp_min(0), here), unit, accumulate=True)

    def products(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """What multiplies some of them with dense columns: [D or L, columns] -> [rows, columns]."""
        unit = self.unit(rows)
        if self.indices is None:
            return lambda columns: unit @ columns
        indices = self.indices[rows].clamp_min(0)
        return lambda columns: embedding_bag(indices, columns, per_sample_weights=unit, mode="sum")

    def first_of_copies(self, groups: Tensor) -> Tensor:
        """bool [N], False for a row that is equal to an earlier one of its group."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        columns = self.given.shape[1] * (1 if self.indices is None else 2)
        weights = torch.randint(-(2**62), 2**62, (columns,), generator=generator, device="cpu").to(groups.device)
        key = torch.zeros(len(self), dtype=torch.int64, device=groups.device)
        for part in parts(len(self), 48 * columns):
            key[part] = (self._exact(part) * weights).sum(dim=1)
        order = key.argsort(stable=True)  # equal rows lie together ...
        order = order[groups[order].argsort(stable=True)]  # ... in their groups
        same = (groups[order[1:]] == groups[order[:-1]]) & (key[order[1:]] == key[order[:-1]])
        maybe = same.nonzero()[:, 0]
        for part in parts(len(maybe), 64 * columns):
            one = maybe[part]
            same[one] = (self._exact(order[one + 1]) == self._exact(order[one])).all(dim=1)
        first = torch.ones(len(self), dtype=torch.bool, device=groups.device)
        first[order[1:]] = ~same
        return first

    def _exact(self, rows: Tensor | slice) -> Tensor:
        """Integers that are equal where rows are, whatever the order of a code's entries."""
        values = self.plain(rows)
        bits = (values + 0.0).view(torch.int32).long()  # -0 is 0
        if self.indices is None:
            return bits
        latents, order = self.indices[rows].long().masked_fill(values == 0, self.width).sort(dim=1)
        return torch.cat([latents, bits.gather(1, order)], dim=1)


def _compute(given: Given) -> dict[tuple[str, str], Retrieval]:
    """By (query stream, candidate stream)."""
    codes, n_latents = given.single, given.n_latents
    pairs = list(permutations(codes, 2))
    seconds = sum(retrieval_seconds(codes[a], codes[b], n_latents) for a, b in pairs)
    if seconds > LONG:
        n = given.n_samples
        given.say(f"retrieval compares {n:,} codes with as many, {len(pairs)} times: about {seconds:,.0f} seconds")
    return {(a, b): retrieval_scores(codes[a], codes[b], n_latents, given.groups) for a, b in pairs}


def drawn_retrieval(found: Mapping[Any, Retrieval], resampling: Resampling) -> Mapping[str, Tensor]:
    """Scores of several retrievals together, each [B]. Queries are drawn; what each is compared with stays."""
    drawn = {key: resampling.zeros() for key in ("r1", "r5", "r10", "median_rank", "mrr")}
    for one in found.values():
        if one.ranks is None:
            return {}
        ranks, order = one.ranks.cpu().double().sort()
        queries = order if one.queries is None else one.queries.cpu()[order]
        top = torch.stack([*((ranks <= K).double() for K in (1, 5, 10)), 1 / ranks])
        for some, all_weights in resampling.pieces(40 * len(ranks)):
            weights = all_weights[queries].double()
            upto = weights.cumsum(0)
            n = upto[-1]
            for key, total in zip(("r1", "r5", "r10", "mrr"), top @ weights, strict=True):
                drawn[key][some] += total / n
            middle = torch.stack([((n - 1) / 2).floor(), (n / 2).floor()], dim=1)
            places = torch.searchsorted(upto.T.contiguous(), middle, right=True).clamp_max(len(ranks) - 1)
            drawn["median_rank"][some] += ranks[places].mean(dim=1)
    return {key: values / len(found) for key, values in drawn.items()} if found else {}


def _work(sizes: Sizes) -> int:
    """Two streams' entries, scales and places."""
    return sizes.N * (16 * sizes.k + 80) if sizes.S > 1 else 0


RETRIEVAL = Metric(
    "retrieval",
    "Finding a sample's code in one stream by its code in another, among those of all samples.",
    _compute,
    (
        Score(
            "r1",
            "Retrieval R@1",
            "How often a sample's code in one stream is nearest to its own code in another, over all pairs.",
            value=mean_over_pairs("r1"),
            highlight=True,
        ),
        Score("r5", "Retrieval R@5", "How often it is among the 5 nearest.", value=mean_over_pairs("r5")),
        Score("r10", "Retrieval R@10", "How often it is among the 10 nearest.", value=mean_over_pairs("r10")),
        Score(
            "median_rank",
            "Retrieval median rank",
            "The rank at which half of the samples are found; 1 is best.",
            better="lower",
            format=",.1f",
            value=mean_over_pairs("median_rank"),
        ),
        Score("mrr", "Retrieval MRR", "Mean of 1 / rank.", value=mean_over_pairs("mrr")),
    ),
    needs=frozenset({"single", "pairs"}),
    of_shared=True,
    default=True,
    resample=lambda given, found: drawn_retrieval(found, given.draws),
    details=details_by_pair("retrieval", Retrieval.figures),
    rows=rows_by_pair(
        f"Retrieval: {CELL}",
        "Finding a sample's {target} code from its {source} code, among {one.n_candidates} candidates.",
        lambda one: one.cell,
    ),
    work=_work,
)
