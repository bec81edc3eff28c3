"""Cross-stream retrieval: given a sample's code in one stream, find the same sample in another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .codes import StreamCode, check_code

__all__ = ["Retrieval", "retrieval_ranks"]

TIE = 1e-6  # cosines closer than this are equal: float32 products of equal rows differ by rounding


@dataclass(frozen=True)
class Retrieval:
    """Summary of ranks. A random ranking of N candidates scores R@K = K/N and median rank about N/2 (above it
    for sparse codes that seldom overlap, as most pairs then tie at cosine 0, behind those that do).

    r1, r5, r10: fraction of queries whose pair is among the first 1, 5, 10 (higher is better); median_rank
    (lower is better; inf if most pairs match nothing); mrr: mean of 1 / rank (higher is better). All are nan
    without queries.
    """

    n: int
    r1: float
    r5: float
    r10: float
    median_rank: float
    mrr: float

    @staticmethod
    def from_ranks(ranks: Tensor) -> Retrieval:
        n = len(ranks)
        if n == 0:
            nan = float("nan")
            return Retrieval(0, nan, nan, nan, nan, nan)
        ranks = ranks.double().sort().values
        r1, r5, r10 = (float((ranks <= top).double().mean()) for top in (1, 5, 10))
        median = (ranks[(n - 1) // 2] + ranks[n // 2]) / 2
        return Retrieval(n, r1, r5, r10, float(median), float((1 / ranks).mean()))


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
    pair ranks inf, and it stands behind every other candidate. Memory is O(chunk * (N + L)).

    groups: integers [N]; any candidate of query n's group is then right. The rank is that of the most similar of them
    among the candidates of other groups: five captions of an image are not in each other's way.

    Use single codes. Joint codes share their support and give the pair away (R@1 near 1, untrained too).
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    a, b = (_Rows(rows, n_latents, name) for rows, name in ((queries, "queries"), (candidates, "candidates")))
    if (a.indices is None) != (b.indices is None) or a.values.shape[0] != b.values.shape[0]:
        raise ValueError(f"queries and candidates must have the same N and be both dense or both sparse, got {a}, {b}")
    if a.indices is None and a.values.shape[1] != b.values.shape[1]:
        raise ValueError(f"queries and candidates must have the same D, got {a}, {b}")
    if groups is not None:
        if groups.is_floating_point() or groups.is_complex() or groups.shape != a.values.shape[:1]:
            expected = f"integers [N={len(a.values)}]"
            raise ValueError(f"groups must be {expected}, got {groups.dtype} {list(groups.shape)}")
        groups = groups.to(a.values.device)
    ranks = torch.full((len(a.values),), float("inf"), dtype=torch.float64, device=a.values.device)
    found = ~(a.zero | b.zero)
    for start in range(0, len(ranks), chunk):
        part = torch.arange(start, min(start + chunk, len(ranks)), device=ranks.device)
        cosines = b.dot(a.columns(part))
        cosines[b.zero] = -float("inf")
        if groups is None:
            own, n_own, right = cosines[part, part - start], 1, found[part]
        else:
            same = groups[:, None] == groups[part]
            own, n_own = cosines.masked_fill(~same, -float("inf")).amax(dim=0), 0
            right = ~a.zero[part] & own.isfinite()
            cosines.masked_fill_(same, -float("inf"))
        higher = (cosines > own + TIE).sum(dim=0)
        equal = (cosines >= own - TIE).sum(dim=0) - higher - n_own
        ranks[part] = torch.where(right, 1 + higher + equal.double() / 2, ranks[part])
    return ranks


class _Rows:
    """N unit rows, dense or sparse, with the two products that a similarity needs."""

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
        self.zero = (values == 0).all(dim=1)
        # By the largest entry first, so that squares of tiny or huge values stay in range.
        values = values / values.abs().amax(dim=1, keepdim=True).where(~self.zero[:, None], 1)
        self.values: Tensor = values / values.norm(dim=1, keepdim=True).where(~self.zero[:, None], 1)

    def __str__(self) -> str:
        return f"{self.name} {'dense' if self.indices is None else 'sparse'} {list(self.values.shape)}"

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
