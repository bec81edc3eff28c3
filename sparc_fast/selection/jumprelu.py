"""JumpReLU: latents fire above thresholds of their own, which are trained (Rajamanoharan et al., arXiv 2407.14435).

A latent fires where its score is above the sum of its thresholds in the streams that choose, and above a number that
these streams have for all latents: their first batch sets it so that k fire, and the thresholds begin at 0. Where each
stream chooses by itself, score and thresholds are its own.

Whether a latent fires has no gradient by its threshold. In its place stands that of a step as wide as a band around the
threshold: 1 / bandwidth within it. So samples within the band move the threshold, by what the latent's value would do
for the reconstruction (the paper has the threshold for the value there: within the band they are about equal, but in
several streams values differ), and by the sparsity penalty. That is (L0 / k - 1)^2, L0 of the batch, as the trainer of
dictionary_learning has it in place of the paper's L0: it holds k latents a sample on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from sparc_fast.batch import Batch
from sparc_fast.ops import backends, functional
from sparc_fast.ops.autograd import Reconstruction, without_autocast
from sparc_fast.ops.backends import Backend
from sparc_fast.ops.layout import wide
from sparc_fast.ops.pooled_topk import nothing
from sparc_fast.whole import Whole

from .batch_topk import EVERY, Thresholds, sets_of

Rule = Literal["jumprelu", "local_jumprelu"]

SPARSITY_COEF = 4.0
BANDWIDTH = 0.05


class Offsets(Thresholds):
    """What is stored beside the latents' thresholds: of each set of streams the number that all its latents have more.

    Which streams choose in training is what thresholds are trained for, so that theirs stays as the first batch set it.
    Those of the other sets follow the thresholds.
    """

    def learn(self, batch: Batch, k: int, backend: str | Backend) -> None:
        """For every set that has none yet, and in one of some steps for that learned the fewest times."""
        sets = list(sets_of(batch.streams))
        counts = self.counts[[self._place(some) for some in sets]]
        self.counts[0] += 1  # the place of no stream counts the steps
        for some, count in zip(sets, counts.tolist(), strict=True):
            if not count:
                self._learn(batch.of_streams(some), k, backend)
        if len(sets) > 1 and int(self.counts[0]) % EVERY == 0:
            self._learn(batch.of_streams(sets[1 + int(counts[1:].argmin())]), k, backend)


class StreamOffsets(Thresholds):
    """The same where each stream chooses by itself: of each stream one, float32 [S] and int64 [S]."""

    @staticmethod
    def empty(n_streams: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        values = torch.zeros(n_streams, dtype=torch.float32, device=device)
        return values, torch.zeros(n_streams, dtype=torch.int64, device=device)

    def learn(self, batch: Batch, k: int, backend: str | Backend) -> None:
        """For every stream that has none yet."""
        for name in batch.streams:
            if not self.counts[self._place((name,))]:
                self._learn(batch.of_streams((name,)), k, backend)

    def _sets(self, streams: Sequence[str]) -> Iterator[tuple[str, ...]]:
        return ((name,) for name in streams)

    def _place(self, streams: Sequence[str]) -> int:
        (name,) = streams
        return self.streams.index(name)


class Jump(NamedTuple):
    """The latents that fire, and those within the band below, whose values are 0, but move thresholds."""

    indices: Tensor
    """[N, W], or [N, S, W] where each stream chooses by itself."""
    fires: Tensor
    """bool, as indices."""
    slope: Tensor
    """1 / bandwidth within the band, 0 elsewhere, as indices."""
    choosers: Sequence[int]
    """Positions in the batch of the streams whose thresholds these are."""
    n_by_threshold: int | None = None
    """Slots of latents that have thresholds, the first; None of all."""

    def beside(self, indices: Tensor) -> Jump:
        """The same in a support with further slots, whose latents fire anyway."""
        more = indices[..., self.indices.shape[-1] :]
        fires = torch.cat([self.fires, more >= 0], dim=-1)
        slope = torch.cat([self.slope, self.slope.new_zeros(more.shape)], dim=-1)
        return self._replace(indices=indices, fires=fires, slope=slope, n_by_threshold=self.indices.shape[-1])

    def gradients(self, of: Reconstruction, n_latents: int, shards: Whole) -> JumpGradients:
        """What thresholds [S, L] get from what was reconstructed, of all replicas' samples."""
        assert of.activations is not None
        through, n_streams = self._through_values(of.activations, of.grad_values), of.activations.shape[1]
        indices, slope, of_values = shards.of_replicas(self.indices, self.slope, through)
        through_values, through_count = self._by_latent((of_values, slope), indices, slope > 0, n_streams, n_latents)
        fires = self.fires[..., : self.n_by_threshold]
        fired = fires.sum((0, -1)) if fires.ndim == 3 else fires.sum()[None]
        return JumpGradients(shards.sum(fired).to(self.slope.dtype), -through_values, -through_count)

    def carried(
        self,
        recons: Sequence[Tensor],
        fired: Tensor,
        batch: Batch,
        rows: tuple[Tensor, Sequence[int]] | None,
        W_dec: Tensor,
        sizes: Sequence[int],
        backend: Backend,
    ) -> tuple[list[Tensor], Tensor]:
        """Reconstructions [N, S, D] by dictionaries of these sizes, and how many latents fired in this batch,
        differentiable by its thresholds. `rows` are its samples and streams among the N and S; None of all.
        """
        assert batch.latent_threshold is not None
        thresholds, W_dec = batch.latent_threshold, W_dec.detach()
        operands = batch.x, batch.W_enc, batch.pre_bias, batch.latent_bias, self.indices, batch.d_streams
        with torch.no_grad(), without_autocast(batch.x):
            activations = backend.support_values(*operands)
            of_fired = -self._by_latent((self.slope,), self.indices, self.slope > 0, *thresholds.shape)[0]

        def through(size: int, grad_recons: Tensor) -> Tensor:
            if rows is not None:
                grad_recons = grad_recons[rows[0]][:, rows[1]]
            indices = torch.where(self.indices < size, self.indices, -1)
            grad_values = backend.sparse_decode_grad_values(grad_recons.contiguous(), indices, W_dec)
            by_value = self._through_values(activations, grad_values)
            return -self._by_latent((by_value,), self.indices, self.slope > 0, *thresholds.shape)[0]

        carry: Any = _ThroughFires.apply
        found = [carry(one, thresholds, partial(through, size)) for one, size in zip(recons, sizes, strict=True)]
        return found, _WithGradient.apply(fired, thresholds, of_fired)  # type: ignore[no-untyped-call]

    def _through_values(self, activations: Tensor, grad_values: Tensor) -> Tensor:
        """What moves thresholds, as indices: how the loss changes with what fires, within the band."""
        grad_fires = wide(activations) * grad_values
        return self.slope * (grad_fires.sum(1) if self.indices.ndim == 2 else grad_fires)

    def _by_latent(
        self, terms: Sequence[Tensor], indices: Tensor, where: Tensor, n_streams: int, n_latents: int
    ) -> Tensor:
        """The sums of each latent's terms within the band, [T, S, L] of T tensors of terms."""
        total = terms[0].new_zeros(len(terms), n_streams, n_latents)
        if indices.ndim == 2:
            total[:, list(self.choosers)] = _sums(terms, indices, where, n_latents)[:, None]
        else:
            for row, s in enumerate(self.choosers):
                of_row = [one[:, row] for one in terms]
                total[:, s] = _sums(of_row, indices[:, row], where[:, row], n_latents)
        return total


class JumpGradients(NamedTuple):
    """How many latents fired in some samples, and how thresholds move that and the rest of the loss."""

    fired: Tensor
    """[1], or [S] where each stream chooses by itself."""
    of_loss: Tensor
    """[S, L], the gradient of the reconstruction's loss."""
    of_fired: Tensor
    """[S, L], of `fired`."""

    def carried(self, loss: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """(the loss, `fired`), differentiable by thresholds."""
        carry: Any = _WithGradient.apply
        return carry(loss[None], thresholds, self.of_loss)[0], carry(self.fired, thresholds, self.of_fired)

    @property
    def both(self) -> Tensor:
        """[2, S, L]"""
        return torch.stack([self.of_loss, self.of_fired])


def fire(rule: Rule, batch: Batch, k: int, thresholds: Thresholds, backend: str | Backend) -> Tensor:
    """The support: those above their thresholds, [N, W] or [N, S, W]; -1 behind the latents of the others."""
    return _side_by_side(
        [
            functional.latents_above(*part.scored_by, offset, k=k, backend=backend)
            for part, offset in _choices(rule, batch, thresholds)
        ],
        rule,
    )


class JumpReLU(NamedTuple):
    """How thresholds are trained."""

    rule: Rule
    bandwidth: float
    """Of the mean threshold, how much the band is wide."""
    sparsity_coef: float

    @torch.no_grad()
    def jump(
        self, batch: Batch, k: int, thresholds: Thresholds, streams: Sequence[str] | None, backend: str | Backend
    ) -> Jump:
        """What fires of the streams that choose together, which `streams` may name, or of each by itself.

        Of the latents that are here, by a backend that knows of no others: no latent's score depends on them.
        """
        choosing = batch if streams is None else batch.of_streams(streams)
        choices = _choices(self.rule, choosing, thresholds)
        means = means_of_latents([_thresholds_of(part) for part, _ in choices], thresholds.shards)
        found = [self._near(*choice, mean, k, backend) for choice, mean in zip(choices, means, strict=True)]
        indices, fires, slope = (_side_by_side(list(of_sets), self.rule) for of_sets in zip(*found, strict=True))
        return Jump(indices, fires, slope, [batch.streams.index(name) for name in choosing.streams])

    def _near(
        self, batch: Batch, offset: float, mean: float, k: int, backend: str | Backend
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = max(self.bandwidth * abs(mean + offset), NARROWEST)
        operator = backends.resolve(backend, batch.x.device).latents_above
        least, sure = offset - width / 2, offset + width / 2
        n = len(batch.W_enc)
        indices, scores = operator(*batch.scored_by, least, min(k, n), sure=sure) if n else nothing(batch.x)
        is_near = (scores - offset).abs() < width / 2
        return indices, scores > offset, is_near.to(scores.dtype) / width

    def penalty(self, fired: Tensor, samples: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(mean L0, sparsity_coef (L0 / k - 1)^2), of all streams together or a mean over streams that are there."""
        has = samples > 0
        l0 = fired / samples.clamp(min=1)
        count = has.sum().clamp(min=1)
        return (l0.detach() * has).sum() / count, self.sparsity_coef * ((l0 / k - 1).square() * has).sum() / count

    def gradient(self, both: Tensor, fired: Tensor, samples: Tensor, k: int) -> Tensor:
        """That of the loss and the penalty by thresholds, [S, L], from the sums of `JumpGradients.both`."""
        has = samples > 0
        l0 = fired / samples.clamp(min=1)
        by_fired = 2 * self.sparsity_coef / k * (l0 / k - 1) * has / has.sum().clamp(min=1) / samples.clamp(min=1)
        return both[0] + by_fired[:, None] * both[1]


NARROWEST = 1e-12


def _choices(rule: Rule, batch: Batch, thresholds: Thresholds) -> list[tuple[Batch, float]]:
    """The streams that choose together, and their offset, which none is where there is no sample to choose for."""
    sets = [batch.streams] if rule == "jumprelu" else [(name,) for name in batch.streams]
    n_samples = thresholds.shards.of_all_replicas(len(batch.x))
    return [(batch.of_streams(some), thresholds.of(some) if n_samples else 0.0) for some in sets]


def _thresholds_of(batch: Batch) -> Tensor:
    assert batch.latent_threshold is not None
    return batch.latent_threshold


def means_of_latents(several: Sequence[Tensor], shards: Whole) -> list[float]:
    """Of each [S, L] the mean over latents of the sum over streams; the same bits however processes share the latents.

    All are exchanged together: first how large they are, then their sums.
    """
    numbers = torch.stack([_sum_of_streams(of_streams.double()) for of_streams in several])
    largest = pad(numbers.abs(), (0, 1)).amax(1)
    told = shards.of_ranks(torch.cat([torch.full_like(largest[:1], numbers.shape[1]), largest]))
    n, bounds = int(told[:, 0].sum()), told[:, 1:].amax(0).tolist()
    # a sum of integers has no order
    units = [
        math.ldexp(1.0, math.frexp(bound)[1] + n.bit_length() - 62) if _has_mean(bound) else 1.0 for bound in bounds
    ]
    integers = (numbers / numbers.new_tensor(units)[:, None]).round().long().sum(1)
    sums = shards.sum(integers).tolist()
    return [
        total * unit / n if _has_mean(bound) else bound for total, unit, bound in zip(sums, units, bounds, strict=True)
    ]


def _has_mean(bound: float) -> bool:
    return bound != 0 and math.isfinite(bound)


def _sum_of_streams(numbers: Tensor) -> Tensor:
    first, *others = numbers.unbind()
    return sum(others, first)


def _side_by_side(of_sets: list[Tensor], rule: Rule) -> Tensor:
    if rule == "jumprelu":
        return of_sets[0]
    width, nothing = max(one.shape[1] for one in of_sets), -1 if of_sets[0].dtype == torch.int32 else 0
    return torch.stack([pad(one, (0, width - one.shape[1]), value=nothing) for one in of_sets], dim=1)


def _sums(terms: Sequence[Tensor], indices: Tensor, where: Tensor, n_latents: int) -> Tensor:
    """[T, L], in the same order of summation every time."""
    places = where.reshape(-1).nonzero()[:, 0]
    latents, total = indices.reshape(-1)[places].long(), terms[0].new_zeros(len(terms), n_latents)
    for of_latents, one in zip(total, terms, strict=True):
        if total.device.type == "cpu":
            of_latents.index_add_(0, latents, one.reshape(-1)[places])
        else:  # sorts there, where index_add_ is atomic
            of_latents.index_put_((latents,), one.reshape(-1)[places], accumulate=True)
    return total


class _ThroughFires(torch.autograd.Function):
    """Reconstructions [N, S, D] that thresholds [S', L] move by what fires: `through` tells the gradient."""

    @staticmethod
    def forward(ctx: Any, recons: Tensor, thresholds: Tensor, through: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.through, ctx.dtype = through, thresholds.dtype
        return recons.view_as(recons)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_recons: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad_recons):
            return grad_recons, ctx.through(grad_recons).to(ctx.dtype), None


class _WithGradient(torch.autograd.Function):
    """Numbers [1] or [S] whose gradients by thresholds [S, L] are known, beside what gradients they have."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, thresholds: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = thresholds.dtype
        return numbers.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_numbers: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad_numbers, (grad_numbers[:, None] * gradient).to(ctx.dtype), None
