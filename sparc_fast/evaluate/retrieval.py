"""Cross-stream retrieval: given a sample's code in one stream, find the same sample in another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .codes import CHUNK_ELEMENTS, StreamCode, check_code, firing_counts

try:
    from sparc_fast import _cpu
except ImportError:  # installed without the compiled module
    _cpu = None  # type: ignore[assignment]

__all__ = ["Found", "Retrieval", "retrieval_ranks", "retrieval_scores", "retrieval_seconds", "retrieve"]

TIE = 1e-6  # cosines closer than this are equal: float32 products of equal rows differ by rounding
# seconds on one core: for a product that is added up, for a pair that is compared, and for a product by plain PyTorch
ADDED, COMPARED, GATHERED = 0.8e-9, 0.1e-9, 0.3e-9


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

    @staticmethod
    def from_ranks(ranks: Tensor, n_candidates: int | None = None) -> Retrieval:
        """Of one rank a query; there are as many candidates unless another number is given."""
        n = len(ranks)
        n_candidates = n if n_candidates is None else n_candidates
        if n == 0:
            nan = float("nan")
            return Retrieval(0, nan, nan, nan, nan, nan, n_candidates)
        ranks = ranks.double().sort().values
        r1, r5, r10 = (float((ranks <= top).double().mean()) for top in (1, 5, 10))
        median = (ranks[(n - 1) // 2] + ranks[n // 2]) / 2
        return Retrieval(n, r1, r5, r10, float(median), float((1 / ranks).mean()), n_candidates)


def retrieval_scores(
    queries: Tensor | StreamCode,
    candidates: Tensor | StreamCode,
    n_latents: int | None = None,
    groups: Tensor | None = None,
    *,
    chunk: int = 64,
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
    return Retrieval.from_ranks(ranks[a.first_of_copies(groups)], int(b.first_of_copies(groups).sum()))


def retrieval_ranks(
    queries: Tensor | StreamCode,
    candidates: Tensor | StreamCode,
    n_latents: int | None = None,
    groups: Tensor | None = None,
    *,
    chunk: int = 64,
) -> Tensor:
    """Exact rank of candidate n for query n by cosine similarity among all N candidates, float64 [N].

    Both are dense [N, D], or both sparse codes over `n_latents`. The rank is 1 + the candidates more similar
    than the pair itself + half of those equally similar: the mean of the best and the worst rank that
    breaking ties could give. So constant codes rank (N+1)/2 and earn no R@1. A zero row matches nothing: its
    pair ranks inf, and it stands behind every other candidate.

    Sparse codes are compared through the latents they share: sum_l n_l m_l products where n_l queries and m_l
    candidates fire latent l, some N^2 k^2 / L, and one look at every pair, on the CPU in O(N k) memory.
    `retrieval_seconds` tells about how long that takes. Dense rows, and sparse ones where the compiled module is
    missing, are compared `chunk` queries at a time, in O(chunk (N + L)).

    groups: integers [N]; any candidate of query n's group is then right. The rank is that of the most similar of them
    among the candidates of other groups: five captions of an image are not in each other's way. Rows of a group that
    are equal are one candidate: an image that is repeated beside each of its captions takes one rank, not five.

    Use single codes. Joint codes share their support and give the pair away (R@1 near 1, untrained too).
    """
    return _ranks(*_pair(queries, candidates, n_latents, groups, chunk), chunk)


def retrieval_seconds(queries: StreamCode, candidates: StreamCode, n_latents: int) -> float:
    """About how long `retrieval_ranks` will take for sparse codes with the threads that torch has now."""
    N, M = len(queries[0]), len(candidates[0])
    if _cpu is None:
        return GATHERED * N * candidates[0].numel() / torch.get_num_threads()
    n, m = (firing_counts(code, n_latents).double() for code in (queries, candidates))
    added = float((n * m.clamp_max(M / 8)).sum())  # a latent of more is added in whole vectors
    return (ADDED * added + COMPARED * N * M) / torch.get_num_threads()


class Found(NamedTuple):
    """The candidates nearest to each query, nearest first, of equal ones the lower; -1 and 0 where none is similar."""

    candidates: Tensor
    """int64 [Q, top]"""
    cosines: Tensor
    """float32 [Q, top]"""


def retrieve(
    queries: Tensor | StreamCode,
    candidates: Tensor | StreamCode,
    n_latents: int | None = None,
    *,
    top: int = 10,
    chunk: int = 64,
) -> Found:
    """The candidates most similar to each query by cosine, such as the pictures of a text.

    Both are dense, [Q, D] and [M, D], or both sparse codes over `n_latents`. Memory is O(chunk (M + L)).
    """
    a, b = _same_kind(queries, candidates, n_latents, chunk)
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    device, M = a.values.device, len(b.values)
    found = torch.full((len(a.values), top), -1, dtype=torch.int64, device=device)
    cosines = torch.zeros(found.shape, dtype=torch.float32, device=device)
    for part in torch.split(torch.arange(len(found), device=device), chunk):
        near, order = b.dot(a.columns(part)).sort(dim=0, descending=True, stable=True)
        near, order = near[:top].T, order[:top].T
        some = near > 0
        found[part, : min(top, M)] = order.where(some, -1)
        cosines[part, : min(top, M)] = near.where(some, 0)
    return Found(found, cosines)


def _pair(
    queries: Tensor | StreamCode,
    candidates: Tensor | StreamCode,
    n_latents: int | None,
    groups: Tensor | None,
    chunk: int,
) -> tuple[_Rows, _Rows, Tensor | None]:
    """Query n beside its candidate n, checked."""
    a, b = _same_kind(queries, candidates, n_latents, chunk)
    if len(a.values) != len(b.values):
        raise ValueError(f"queries and candidates must have the same N, got {a}, {b}")
    if groups is not None:
        if groups.is_floating_point() or groups.is_complex() or groups.shape != a.values.shape[:1]:
            expected = f"integers [N={len(a.values)}]"
            raise ValueError(f"groups must be {expected}, got {groups.dtype} {list(groups.shape)}")
        groups = groups.to(a.values.device)
    return a, b, groups


def _same_kind(
    queries: Tensor | StreamCode, candidates: Tensor | StreamCode, n_latents: int | None, chunk: int
) -> tuple[_Rows, _Rows]:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    a, b = (_Rows(rows, n_latents, name) for rows, name in ((queries, "queries"), (candidates, "candidates")))
    if (a.indices is None) != (b.indices is None):
        raise ValueError(f"queries and candidates must be both dense or both sparse, got {a}, {b}")
    if a.indices is None and a.values.shape[1] != b.values.shape[1]:
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
    count = _count_by_chunks if a.indices is None or _cpu is None else _count_compiled
    higher, equal = count(a, b.rows(places), first, last, chunk)
    return torch.where(first < last, 1 + higher + equal.double() / 2, float("inf"))


def _count_compiled(a: _Rows, b: _Rows, first: Tensor, last: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    higher, equal = (torch.empty(len(first), dtype=torch.int64, device="cpu") for _ in range(2))
    own = torch.empty(len(first), dtype=torch.float32, device="cpu")
    places = (place.cpu().contiguous() for place in (first, last))
    _cpu.count_nearer(own, higher, equal, *a.entries(), *b.entries(), *places, a.width, TIE, torch.get_num_threads())
    return higher.to(first.device), equal.to(first.device)


def _count_by_chunks(a: _Rows, b: _Rows, first: Tensor, last: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """As the compiled function: candidates more similar than the best of first ... last - 1, and those equally so."""
    higher, equal = torch.zeros_like(first), torch.zeros_like(first)
    place = torch.arange(len(b.values), device=first.device)[:, None]
    for part in torch.split(torch.arange(len(first), device=first.device), chunk) if len(place) else ():
        cosines = b.dot(a.columns(part))
        mine = (first[part] <= place) & (place < last[part])
        own = cosines.masked_fill(~mine, -float("inf")).amax(dim=0)
        cosines.masked_fill_(mine, -float("inf"))
        higher[part] = (cosines > own + TIE).sum(dim=0)
        equal[part] = (cosines >= own - TIE).sum(dim=0) - higher[part]
    return higher, equal


class _Rows:
    """N unit rows, dense or sparse."""

    def __init__(self, rows: Tensor | StreamCode, n_latents: int | None, name: str) -> None:
        self.name = name
        self.indices: Tensor | None = None
        if isinstance(rows, Tensor):
            if rows.dim() != 2:
                raise ValueError(f"{name} must be [N, D], got {tuple(rows.shape)}")
            values = rows.float()
        else:
            if n_latents is None:
                raise ValueError(f"n_latents must be given where {name} are sparse codes, got None")
            check_code(rows, n_latents, name)
            values, self.indices = rows[0].float().relu(), rows[1]
        if not values.isfinite().all():
            raise ValueError(f"{name} must have finite values, got NaN or inf")
        self.width = values.shape[1] if n_latents is None else n_latents
        self.given = values
        self.zero = (values == 0).all(dim=1)
        # By the largest entry first, so that squares of tiny or huge values stay in range.
        values = values / values.abs().amax(dim=1, keepdim=True).where(~self.zero[:, None], 1)
        self.values: Tensor = values.div_(values.norm(dim=1, keepdim=True).where(~self.zero[:, None], 1))

    def __str__(self) -> str:
        return f"{self.name} {'dense' if self.indices is None else 'sparse'} {list(self.values.shape)}"

    def rows(self, places: Tensor) -> _Rows:
        """Some of them."""
        if len(places) == len(self.values) and torch.equal(places, torch.arange(len(places), device=places.device)):
            return self
        some = _Rows.__new__(_Rows)
        some.name, some.width, some.zero = self.name, self.width, self.zero[places]
        some.values, some.given = self.values[places], self.given[places]
        some.indices = None if self.indices is None else self.indices[places]
        return some

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of sparse rows, what is not 0, on the CPU: offsets int64 [N + 1], latents int32 and values float32."""
        assert self.indices is not None
        on = self.values > 0
        offsets = torch.zeros(len(on) + 1, dtype=torch.int64, device="cpu")
        offsets[1:] = on.sum(dim=1).cumsum(0)
        return offsets, self.indices[on].to("cpu", torch.int32), self.values[on].cpu()

    def first_of_copies(self, groups: Tensor) -> Tensor:
        """bool [N], False for a row that is equal to an earlier one of its group."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        columns = self.given.shape[1] * (1 if self.indices is None else 2)
        weights = torch.randint(-(2**62), 2**62, (columns,), generator=generator, device="cpu").to(groups.device)
        rows = torch.split(torch.arange(len(groups), device=groups.device), max(1, CHUNK_ELEMENTS // (8 * columns + 1)))
        key = torch.cat([(self._exact(part) * weights).sum(dim=1) for part in rows])
        order = key.argsort(stable=True)  # equal rows lie together ...
        order = order[groups[order].argsort(stable=True)]  # ... in their groups
        same = groups[order[1:]] == groups[order[:-1]]
        for part in torch.split(same.nonzero()[:, 0], len(rows[0])):
            same[part] = (self._exact(order[part + 1]) == self._exact(order[part])).all(dim=1)
        first = torch.ones(len(groups), dtype=torch.bool, device=groups.device)
        first[order[1:]] = ~same
        return first

    def columns(self, part: Tensor) -> Tensor:
        """The chosen rows as dense columns, [D or L, len(part)]."""
        if self.indices is None:
            return self.values[part].T
        dense = self.values.new_zeros(self.width, len(part))
        here = torch.arange(len(part), device=part.device)[:, None]
        return dense.index_put_((self.indices[part].long(), here), self.values[part], accumulate=True)

    def dot(self, columns: Tensor) -> Tensor:
        """Product of all rows with dense columns, [N, columns]."""
        if self.indices is None:
            return self.values @ columns
        return embedding_bag(self.indices, columns, per_sample_weights=self.values, mode="sum")

    def _exact(self, rows: Tensor) -> Tensor:
        """Integers that are equal where rows are, whatever the order of a code's entries."""
        given = self.given[rows]
        bits = (given + 0.0).view(torch.int32).long()  # -0 is 0
        if self.indices is None:
            return bits
        latents, order = self.indices[rows].long().masked_fill(given == 0, self.width).sort(dim=1)
        return torch.cat([latents, bits.gather(1, order)], dim=1)
