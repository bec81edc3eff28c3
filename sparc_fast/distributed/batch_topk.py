"""BatchTopK over latents that ranks share, and over the samples of all replicas: the pairs that one process chooses.

No rank is told another's scores. How many of all ranks' scores begin with the same bits is, some bits at a time, from
which all know the last score that fires; and how many of its own a sample has above that, and at it.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from sparc_fast.ops.backends import Backend
from sparc_fast.ops.pooled_topk import Best, nothing
from sparc_fast.whole import Whole

from .exchange import Exchange

DIGIT = 11  # bits of a score that are told apart at a time
WIDER, TIES = 7, 8  # calls, as ranks tell them apart


def batch_topk(
    backend: Backend, exchange: Exchange, everybody: Exchange, replicas: Whole, x: Tensor, W_enc: Tensor,
    pre_bias: Tensor, latent_bias: Tensor, k: int, screening: str = "auto",
) -> Tensor:  # fmt: skip
    """`reference.batch_topk` of all ranks' rows and all replicas' samples, [N, W] of the samples here.

    The rows here are in the slots that they have in one process, and -1 in those of other ranks' rows.
    """
    count = k * replicas.of_all_replicas(len(x))
    if not count:
        return torch.full((len(x), 1), -1, dtype=torch.int32, device=x.device)
    best = Best(backend.global_topk, backend.support_scores, (W_enc, pre_bias, latent_bias), screening)
    indices, scores, last = best.reaching(
        x, 2 * -(-k // exchange.ranks), lambda found: kth_largest(found, count, everybody),
        lambda here: any(there for (there,) in everybody.numbers(WIDER, here)),
    )  # fmt: skip
    larger, equal = scores > last, (scores == last) & (indices >= 0)
    here = torch.stack([larger.sum(1), equal.sum(1)]).int()
    n_larger, n_equal = exchange.gather(here[None], [1] * exchange.ranks, "candidates").movedim(0, -1)  # [N, P] each
    # of equal scores those of earlier samples, then of lower latents, which are those of earlier ranks
    left = count - replicas.of_all_replicas(int(n_larger.sum())) - replicas.in_replicas_before(int(n_equal.sum()), TIES)
    before = n_equal.flatten().cumsum(0).view_as(n_equal) - n_equal
    n_equal = torch.minimum(n_equal, (left - before).clamp(min=0))
    chosen = larger | (equal & (equal.cumsum(1) <= n_equal[:, exchange.rank, None]))
    return _beside(indices, chosen, n_larger + n_equal, exchange.rank)


def latents_above(
    backend: Backend, exchange: Exchange, x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor,
    threshold: float, k: int, screening: str = "auto", sure: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.latents_above` of all ranks' rows, laid out as `batch_topk`."""
    operands, n = (x, W_enc, pre_bias, latent_bias), len(W_enc)
    own, scores = backend.latents_above(*operands, threshold, min(k, n), screening, sure) if n else nothing(x)
    counts = exchange.gather((own >= 0).sum(1).int()[None], [1] * exchange.ranks, "candidates").T
    support = _beside(own, own >= 0, counts, exchange.rank)
    return support, _beside(scores, own >= 0, counts, exchange.rank, -torch.inf)


def kth_largest(scores: Tensor, k: int, exchange: Exchange) -> Tensor:
    """The k-th largest of all ranks' scores, which are float32 or float64 as `support_scores` ranks them.

    Each rank tells as many counts as there are digits, whatever the number of scores.
    """
    bits = 8 * scores.itemsize
    kind = torch.int32 if bits == 32 else torch.int64
    ordered = _flip(scores.flatten().view(kind), bits)
    found = 0
    for first in reversed(range(0, bits, DIGIT)):
        width = min(DIGIT, bits - first)
        digits = (ordered >> first) & (2**width - 1)
        if first + width == bits:
            digits = digits ^ 2 ** (width - 1)  # the sign: negative numbers come first
        counts = exchange.sum(torch.bincount(digits, minlength=2**width).int())
        from_top = counts.flip(0).cumsum(0).tolist()
        place = bisect_left(from_top, k)
        k -= from_top[place - 1] if place else 0
        digit = 2**width - 1 - place
        ordered, found = ordered[digits == digit], found | digit << first
    value = torch.tensor(found - 2 ** (bits - 1), dtype=kind, device=scores.device)
    return _flip(value, bits).view(scores.dtype)


def _flip(numbers: Tensor, bits: int) -> Tensor:
    """The bits of floats as integers in the same order, and back."""
    flipped: Tensor = numbers ^ ((numbers >> (bits - 1)) & (2 ** (bits - 1) - 1))
    return flipped


def _beside(indices: Tensor, chosen: Tensor, counts: Tensor, rank: int, nothing: float = -1) -> Tensor:
    """What was chosen of the latents here, behind those of earlier ranks; counts [N, P] are how many each rank has."""
    width = max(1, int(counts.sum(1).max())) if len(counts) else 1
    support = indices.new_full((len(indices), width), nothing)
    samples, slots = chosen.nonzero(as_tuple=True)
    places = counts[:, :rank].sum(1, keepdim=True) + chosen.cumsum(1) - 1
    support[samples, places[samples, slots]] = indices[samples, slots]
    return support
