"""BatchTopK: k latents a sample on average, where the batch has them (Bussmann et al., arXiv 2412.06410).

In training the k N largest scores of a batch of N samples fire, whosesoever they are. Where it is used, a sample must
not depend on others, so outside training latents fire whose score is above a threshold, learned as the smallest that
fires. A score is a sum over the streams that choose: every set of streams has a threshold of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc_fast.batch import Batch
from sparc_fast.ops import backends, functional
from sparc_fast.ops.backends import Backend
from sparc_fast.ops.layout import wide_type
from sparc_fast.whole import WHOLE, Whole

MOST_STREAMS = 8  # 255 sets of them
MEASURED = 64  # samples of a batch from which a threshold is learned
EVERY = 4  # steps that a threshold is learned once in
REMEMBERED = 4  # times that a threshold was learned, over which it is a mean, about


class Thresholds:
    """What is stored with the model: of each set of its streams a threshold, and how often it was learned."""

    def __init__(self, values: Tensor, counts: Tensor, streams: Sequence[str], shards: Whole = WHOLE) -> None:
        self.values, self.counts, self.streams, self.shards = values, counts, tuple(streams), shards

    @staticmethod
    def empty(n_streams: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        """Zeros, float32 [2^S] and int64 [2^S]; the place of a set of streams has their bits."""
        if n_streams > MOST_STREAMS:
            raise ValueError(
                f'selection must not be "batch" or "jumprelu" with more than {MOST_STREAMS} streams, got {n_streams}'
            )
        values = torch.zeros(2**n_streams, dtype=torch.float32, device=device)
        return values, torch.zeros(2**n_streams, dtype=torch.int64, device=device)

    def of(self, streams: Sequence[str]) -> float:
        """The threshold where these streams choose together.

        Raises:
            ValueError: it was never learned.
        """
        at = self._place(streams)
        if not self.counts[at]:
            raise ValueError(
                f"the model must know a threshold for the streams {tuple(streams)} to be used outside training: "
                "training or model.learn_thresholds(inputs) learns those of all sets of the streams it is given"
            )
        return float(self.values[at])

    def learn(self, batch: Batch, k: int, backend: str | Backend) -> None:
        """First for every set of the batch's streams, then, in one of some steps, for that learned the fewest times."""
        sets = list(self._sets(batch.streams))
        counts = self.counts[[self._place(some) for some in sets]]
        self.counts[0] += 1  # the place of no stream counts the steps
        if not counts.all():
            self.learn_all(batch, k, backend)
        elif int(self.counts[0]) % EVERY == 0:
            self._learn(batch.of_streams(sets[int(counts.argmin())]), k, backend)

    def learn_all(self, batch: Batch, k: int, backend: str | Backend) -> None:
        """Once more for every set of the batch's streams."""
        for some in self._sets(batch.streams):
            self._learn(batch.of_streams(some), k, backend)

    def take_over(self, other: Thresholds) -> None:
        """Those of the sets of streams that both know."""
        for some in self._sets([name for name in self.streams if name in other.streams]):
            at, there = self._place(some), other._place(some)
            self.values[at], self.counts[at] = other.values[there], other.counts[there]

    @torch.no_grad()
    def _learn(self, batch: Batch, k: int, backend: str | Backend) -> None:
        if not (n_samples := self.shards.of_all_replicas(len(batch.x))):
            return
        found, at = self._smallest_that_fires(batch, k, backend).to(self.values), self._place(batch.streams)
        self.counts[at] += 1
        before = torch.where(self.counts[at] == 1, found, self.values[at])
        weight = min(n_samples / MEASURED, 1)  # few samples tell little
        self.values[at] = before + weight * (found - before) / self.counts[at].clamp(max=REMEMBERED)

    def _sets(self, streams: Sequence[str]) -> Iterator[tuple[str, ...]]:
        return sets_of(streams)

    def _smallest_that_fires(self, batch: Batch, k: int, backend: str | Backend) -> Tensor:
        """In some samples of a batch; 0 where it is negative, for what fires then has no value.

        Where latents have thresholds, the smallest that a score is above its latent's, which may be any number.
        """
        every, W_enc, pre_bias, bias = batch.scored_by
        x = self.shards.first_samples(every, MEASURED)
        operands = x, W_enc, pre_bias, bias
        support = functional.batch_topk(*operands, k, backend=backend)
        fires = torch.empty(0, dtype=wide_type(x.dtype), device=x.device)
        if len(W_enc):
            scores = backends.resolve(backend, x.device).support_scores(*operands, support.clamp(min=0))
            fires = scores.masked_fill(support < 0, torch.inf).flatten()
        smallest = self.shards.each(pad(fires, (0, 1), value=torch.inf).amin()).amin()
        return smallest.clamp(min=0) if batch.latent_threshold is None else smallest

    def _place(self, streams: Sequence[str]) -> int:
        return sum(1 << self.streams.index(name) for name in streams)


def sets_of(streams: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All of the streams, then each by itself, then the others, which are asked for least."""
    sizes = dict.fromkeys((len(streams), 1, *range(2, len(streams)))) if streams else ()
    return (some for size in sizes for some in combinations(streams, size))
