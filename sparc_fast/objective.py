"""The objective: how far reconstructions are from the inputs, and what dead latents make of what is left over (AuxK).

A batch flows through it once, whoever trains: `Objective.choose` finds the supports of its parts, `Part.measure` what
they reconstruct, with the gradient, `Objective.summarize` the loss. A batch whose samples all have the same streams is
one part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sparc_fast import selection
from sparc_fast.batch import AllStreams, Batch, columns_of, position, spread_of, stack
from sparc_fast.ops import backends
from sparc_fast.ops.autograd import Reconstruction, compare, reconstruct
from sparc_fast.ops.layout import stream_slices, wide
from sparc_fast.ops.reference import ZERO_ROW, loss_summary, nmse_scale, row_energy, weighted_sum
from sparc_fast.selection import LOCAL, Private, Selection, Thresholds
from sparc_fast.selection.jumprelu import Jump, JumpGradients, JumpReLU
from sparc_fast.sizes import is_integer
from sparc_fast.whole import WHOLE, Whole

Loss = Literal["nmse", "fvu"]

Summarize = Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]]
"""What has the operands and results of `loss_summary`."""


def nmse(recons: Tensor, x: Tensor) -> Tensor:
    """mean_n ||recons[n] - x[n]||^2 / ||x[n]||^2 over the last dimension; a zero row counts as a sample of error 0.

    The uncentred normalised error that TopK autoencoders are trained on (Gao et al., arXiv 2406.04093).
    """
    _check_same_shape(recons, x)
    return _nmse(recons, x, math.prod(x.shape[:-1]))


def _nmse(recons: Tensor, x: Tensor, n_samples: int) -> Tensor:
    """The same of some of so many samples: what they add to it."""
    error = (wide(recons) - wide(x)).square().sum(-1)
    energy = wide(x).square().sum(-1)
    counted = energy >= ZERO_ROW
    ratio = torch.where(counted, error / energy.where(counted, 1.0), 0.0)
    return ratio.sum() / max(n_samples, 1)


def fvu(recons: Tensor, x: Tensor) -> Tensor:
    """sum ||recons - x||^2 / sum ||x - mean(x)||^2 over all samples [..., D]: the fraction of variance unexplained.

    1 - R^2, variance-weighted: a near-constant coordinate cannot dominate it.
    """
    _check_same_shape(recons, x)
    x, recons = wide(x).reshape(-1, x.shape[-1]), wide(recons).reshape(-1, x.shape[-1])
    return (recons - x).square().sum() / (x - x.mean(0)).square().sum()


def _check_same_shape(recons: Tensor, x: Tensor) -> None:
    if recons.shape != x.shape or x.ndim == 0:
        raise ValueError(f"recons must have the shape of x, {list(x.shape)}, got {list(recons.shape)}")


def fvu_scale(spread: Sequence[Tensor], energy: Tensor, n_samples: int) -> Tensor:
    """scale[n, t] = 1 / (N spread[t]), and 0 where a stream does not vary: what makes squared errors FVU, as `energy`.

    N is `n_samples`, those of the whole batch, over which mean squared deviations are `spread`.
    """
    each = torch.stack(list(spread)).to(energy.device)
    scale = torch.where(each > 0, 1 / each.where(each > 0, 1.0) / max(n_samples, 1), 0.0)
    return scale.to(energy.dtype).expand(len(energy), -1).contiguous()


def nested_sizes(
    matryoshka: Sequence[int], n_latents: int, private: Mapping[str, int] | None = None
) -> tuple[int, ...]:
    """Sizes of nested dictionaries, of which all latents are the last, named or not; none for that one alone.

    Raises:
        ValueError: they do not ascend within the dictionary, or some latents are `private`.
    """
    sizes = tuple(matryoshka) if isinstance(matryoshka, Iterable) else (matryoshka,)
    whole = isinstance(matryoshka, Iterable) and all(map(is_integer, sizes))
    if not whole or any(a >= b for a, b in pairwise((0, *sizes))) or max(sizes, default=0) > n_latents:
        raise ValueError(f"matryoshka must be integers that ascend from 1 to n_latents={n_latents}, got {matryoshka}")
    sizes = tuple(map(int, sizes)) if n_latents in sizes else (*map(int, sizes), n_latents)
    if len(sizes) > 1 and private:
        raise ValueError(
            "matryoshka must be left out with private latents, which are the last and in no smaller dictionary, "
            f"got {sizes}"
        )
    return sizes if len(sizes) > 1 else ()


def pair_weights(n_streams: int, cross_loss_coef: float) -> tuple[float, ...]:
    """weights[s, s] = 1 / S and weights[s, t] = cross_loss_coef / (S (S - 1)), row-major source by target."""
    S = n_streams
    cross = cross_loss_coef / (S * (S - 1)) if S > 1 else 0.0
    return tuple(1 / S if s == t else cross for s in range(S) for t in range(S))


def self_weights(n_streams: int, coef: float) -> tuple[float, ...]:
    """weights[s, s] = coef / S, and 0 elsewhere."""
    return tuple(coef / n_streams if s == t else 0.0 for s in range(n_streams) for t in range(n_streams))


def self_residual(grad_recons: Tensor, scale: Tensor, d_streams: Sequence[int]) -> Tensor:
    """residual[n, d] = x[n, d] - recons[n, s(d), d], what a stream's own reconstruction left over, [N, D].

    Read off grad_recons of a loss with `pair_weights`: it is -2 / S scale residual there. 0 where scale is 0.
    """
    S = len(d_streams)
    parts = []
    for s, cols in enumerate(stream_slices(d_streams)):
        factor = -2 / S * scale[:, s, None]
        parts.append(torch.where(factor != 0, wide(grad_recons[:, s, cols]) / factor, 0.0))
    return torch.cat(parts, dim=1).to(grad_recons.dtype)


class SparcLoss(NamedTuple):
    """The objective and its parts; only `total` carries a gradient."""

    total: Tensor
    """self + cross_loss_coef * cross + auxk_coef * auxk, a scalar; with the mean of `prefixes`, if any, and
    the sparsity penalty under JumpReLU."""
    self: Tensor
    """Mean NMSE of each stream reconstructed from itself; FVU here and below where that is the model's loss."""
    cross: Tensor | None
    """Mean NMSE over ordered pairs of streams; None when its coefficient is 0 or one stream is present."""
    auxk: Tensor | None
    """Mean NMSE of the residuals reconstructed by dead latents; None when none is dead, or 0 where the host was not to
    wait to hear it."""
    nmse: Tensor
    """[S, S], source by target, over the samples that have both; 0 where a pair was not computed."""
    zero_rows: Tensor
    """[S], samples whose input was all zero: in NMSE they count as error 0."""
    prefixes: Tensor | None = None
    """[P], self + cross_loss_coef * cross of each of nested dictionaries, whose mean is in `total`; the parts above are
    those of the last, which is all latents. None where they are not nested."""
    l0: Tensor | None = None
    """Under JumpReLU, how many latents fire a sample (and stream, if each chooses by itself) on average; else None."""


class AmongDead(NamedTuple):
    """AuxK's support of dead latents (Gao et al., arXiv 2406.04093)."""

    positions: Tensor
    """[N, k'] or [N, S, k'], in `latents`."""
    latents: Tensor | None
    """int64 [n_dead]; None where positions are among all latents."""
    latent_bias: Tensor
    any_dead: Tensor | None
    """bool scalar, or None where the answer is known to be yes."""

    @property
    def indices(self) -> Tensor:
        if self.latents is None:
            return self.positions
        numbers = torch.nn.functional.pad(self.latents.int(), (0, 1), value=-1)  # an empty slot's is the last
        return numbers[self.positions.long()]

    def before(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch before the dictionary that AuxK decodes with, and the support there."""
        if self.latents is not None and torch.is_grad_enabled():
            dead = batch.encoder_of_latents(self.latents)._replace(W_dec=batch.W_dec[self.latents])
            return dead, self.positions  # sums of gradients are over the dead alone
        return batch._replace(latent_bias=self.latent_bias), self.indices


class Supports(NamedTuple):
    """The latents each sample uses: [N, k] or [N, S, k], and AuxK's."""

    indices: Tensor
    dead: AmongDead | None
    jump: Jump | None = None
    """Under JumpReLU, which of the indices fire."""
    activations: Tensor | None = None
    """[N, S, k], where they came with the indices."""

    def used(self) -> list[Tensor]:
        return [self.indices] if self.dead is None else [self.indices, self.dead.indices]


class Terms(NamedTuple):
    """What some samples, which all have the same S' streams, add to the objective."""

    nmse: Tensor
    """[S', S'], in sums over the samples divided by the number of samples in the batch."""
    auxk: Tensor | None
    energy: Tensor
    """[N, S'], the squared norms of the inputs."""
    loss: Tensor | None = None
    """What nmse adds up to, where that is known or carries the gradient."""
    prefixes: Tensor | None = None
    """[P], of each nested dictionary what its nmse adds up to."""
    fired: Tensor | None = None
    """Under JumpReLU, how many latents did, [1] or of each stream, [S']."""

    def plus(self, other: Terms) -> Terms:
        """Those of both."""
        energy = torch.cat([self.energy, other.energy])
        fired = _sum(*(None if some.fired is None else some.fired.detach() for some in (self, other)))
        return Terms(
            self.nmse + other.nmse, _sum(self.auxk, other.auxk), energy, prefixes=_sum(self.prefixes, other.prefixes),
            fired=fired,
        )  # fmt: skip


def of_all_replicas(
    terms: dict[tuple[str, ...], Terms], shards: Whole, device: torch.device
) -> dict[tuple[str, ...], Terms]:
    """By streams, with the terms of all replicas' samples, on this device."""
    if not shards.has_replicas:
        return terms
    here = {
        streams: [None if part is None else part.detach().cpu().numpy() for part in some]
        for streams, some in terms.items()
    }
    merged: dict[tuple[str, ...], Terms] = {}
    for of_replica in shards.told_by_replicas(here):
        for streams, parts in of_replica.items():
            some = Terms._make(None if part is None else torch.from_numpy(part) for part in parts)
            before = merged.get(streams)
            merged[streams] = some._replace(loss=None) if before is None else before.plus(some)
    return {
        streams: Terms._make(None if part is None else part.to(device) for part in some)
        for streams, some in merged.items()
    }


def _sum(*terms: Tensor | None) -> Tensor | None:
    """Of those there are."""
    some = [term for term in terms if term is not None]
    return sum(some[1:], some[0]) if some else None


class Flow(NamedTuple):
    """What flowed through a part of a batch: the terms of the objective, and what moves the weights."""

    reconstruction: Reconstruction
    auxk: Reconstruction | None
    energy: Tensor
    jump: JumpGradients | None = None
    latent_threshold: Tensor | None = None

    def passes(self) -> list[Reconstruction]:
        return [self.reconstruction] if self.auxk is None else [self.reconstruction, self.auxk]

    def terms(self) -> Terms:
        auxk, first = None if self.auxk is None else self.auxk.loss, self.reconstruction
        loss, fired = first.loss, None
        if loss is not None and self.jump is not None and self.latent_threshold is not None:
            loss, fired = self.jump.carried(loss, self.latent_threshold)
        return Terms(first.nmse, auxk, self.energy, loss, first.prefixes, fired)


class Part(NamedTuple):
    """The samples of a batch that have the same streams, the latents they use, and what they are measured by."""

    batch: Batch
    supports: Supports
    objective: Objective

    def measure(self, n_samples: int) -> Flow:
        """Encode, decode and compare: the loss of each part, differentiable, and what its gradient is made of.

        `n_samples` are those of the whole batch.
        """
        batch, supports, objective = self
        S, widths, sizes = len(batch.streams), batch.d_streams, objective.sizes
        backend = objective._backend(batch.x)
        energy, scale = backend.sample_scale(batch.x, widths, n_samples)
        if objective.spread is not None:
            scale = objective._scale(batch, energy, n_samples)
        weights = pair_weights(S, objective.cross_loss_coef)
        jumped = supports.jump
        fires = None if jumped is None else jumped.fires
        operands = *batch.operands(), supports.indices, None, scale, weights, widths, backend
        if sizes or jumped is not None or torch.is_grad_enabled():
            first = reconstruct(*operands, sizes, fires, supports.activations)
        else:
            first = compare(*operands, activations=supports.activations)
        gradients = None if jumped is None else jumped.gradients(first, len(batch.W_enc), objective.shards)
        if supports.dead is None:
            return Flow(first, None, energy, gradients, batch.latent_threshold)
        if sizes:  # what all latents leave over
            residual = self_residual(first.grad_recons[-1], scale / len(sizes), widths)
        else:
            residual = self_residual(first.grad_recons, scale, widths)
        if objective.spread is None:
            _, scale = backend.sample_scale(residual, widths, n_samples)
        if supports.dead.any_dead is not None:
            scale = scale * supports.dead.any_dead
        weights = self_weights(S, objective.auxk_coef)
        before, indices = supports.dead.before(batch)
        through = reconstruct if torch.is_grad_enabled() else compare
        auxk = through(*before.operands(), indices, residual, scale, weights, widths, backend)
        if auxk.loss is None:
            auxk = auxk._replace(loss=weighted_sum(auxk.nmse, weights))
        return Flow(first, auxk, energy, gradients, batch.latent_threshold)


def fired(
    parts: Sequence[Part], flows: Sequence[Flow], d_streams: Mapping[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """(values [N, S', k], supports) of a whole batch, for its dead latents to be counted; S' of these streams, or of
    those that some sample has."""
    values = [flow.reconstruction.values for flow in flows]
    indices = [part.supports.indices for part in parts]
    if len(parts) > 1 or d_streams is not None:
        some = {n: d for part in parts for n, d in zip(part.batch.streams, part.batch.d_streams, strict=True)}
        among = [AllStreams(d_streams or some, part.batch) for part in parts]
        values, indices = ([a.streams(one) for a, one in zip(among, of, strict=True)] for of in (values, indices))
    return stack(values), stack(indices)


@dataclass(frozen=True)
class Objective:
    """mean_s NMSE(s, s) + cross_loss_coef mean_{s != t} NMSE(s, t) + auxk_coef AuxK, on supports of a rule's choice.

    Or the same with FVU over the batch in place of NMSE, by which AuxK's error is told, too: by how far the inputs
    deviate, not what is left over of them, which is known of a part of a batch at a time.
    """

    selection: Selection
    k: int
    backend: str
    cross_loss_coef: float = 1.0
    support_from: Sequence[str] | None = None
    auxk: int = 0
    """Latents a sample may use for AuxK, at most."""
    auxk_coef: float = 0.0
    dead: Tensor | None = None
    """For AuxK, which None turns off: int64 [n_dead], one at least, and it chooses by a GEMM over their rows alone; or
    bool [L], where the host must not wait to hear how many are dead."""
    loss: Loss = "nmse"
    spread: Mapping[str, Tensor] | None = None
    """For FVU, what `over` finds."""
    thresholds: Thresholds | None = None
    """What latents fire by, where it is not each other."""
    jumprelu: JumpReLU | None = None
    """How thresholds are trained, where latents have their own."""
    n_dead: int = 0
    """Where `dead` are numbers, how many there are, with those that are in other processes."""
    shards: Whole = WHOLE
    """Of the latents, where processes share them."""
    sizes: Sequence[int] = ()
    """Of nested dictionaries, up to all latents: the loss is the mean of theirs."""
    private: Private | None = None
    """Latents of one stream each. AuxK looks at all alike: in other streams these have no values."""

    def over(self, batches: Iterable[Batch]) -> Objective:
        """The same for a batch, given whole or in parts; NMSE does not look at it, being each sample's own."""
        return self if self.loss == "nmse" else replace(self, spread=spread_of(batches, self.shards.moments))

    def choose(self, batch: Batch) -> list[Part]:
        """The parts of a batch, with their supports; reads no row of the decoder.

        A sample that has none of the streams of `support_from` chooses by all it has.
        """
        for name in self.support_from or ():
            position(name, batch.streams, "support_from")
        return [self._of(part.streams)._part(part) for _, part in batch.by_presence()]

    def _of(self, streams: Sequence[str]) -> Objective:
        if self.support_from is None or set(self.support_from) <= set(streams):
            return self
        return replace(self, support_from=[name for name in self.support_from if name in streams] or None)

    def _part(self, batch: Batch) -> Part:
        dead = None if self.dead is None else self._among(self.dead, batch)
        if self.jumprelu is not None:
            jumped = self._jump(self.jumprelu, batch)
            return Part(batch, Supports(jumped.indices, dead, jumped), self)
        indices, activations = selection.encode(
            self.selection, batch, self.k, support_from=self.support_from, thresholds=self.thresholds,
            private=self.private, backend=self.shards.backend(self.backend, batch.x.device),
        )  # fmt: skip
        return Part(batch, Supports(self.shards.compact(indices), dead, activations=activations), self)

    def _jump(self, settings: JumpReLU, batch: Batch) -> Jump:
        assert self.thresholds is not None
        if self.support_from is not None:
            selection.check_support_from(self.selection)
        if self.private is None:
            return settings.jump(batch, self.k, self.thresholds, self.support_from, self.backend)
        shared = settings.jump(self.private.shared(batch), self.k, self.thresholds, self.support_from, self.backend)
        return shared.beside(self.private.beside(shared.indices, batch, self._backend(batch.x)))

    def through_thresholds(
        self, recons: list[Tensor], batch: Batch, indices: Tensor, W_dec: Tensor
    ) -> tuple[list[Tensor], dict[tuple[str, ...], Tensor]]:
        """Under JumpReLU: given reconstructions from codes of this support, and by streams how many latents fired for
        samples that have these, all differentiable by thresholds as well."""
        assert self.jumprelu is not None
        fires, sizes, found = indices >= 0, (self.sizes or [len(W_dec)])[-len(recons) :], {}
        if self.private is not None:
            fires &= indices < self.private.n_shared
        for rows, part in batch.by_presence():
            here = [batch.streams.index(name) for name in part.streams]
            on = fires if rows is None else fires[rows]
            fired = (on.sum()[None] if on.ndim == 2 else on[:, here].sum((0, 2))).to(wide(part.x[:0]).dtype)
            thresholds = part.latent_threshold
            if torch.is_grad_enabled() and thresholds is not None and thresholds.requires_grad:
                at = None if rows is None else (rows, here)
                jump = self._jump(self.jumprelu, part)
                recons, fired = jump.carried(recons, fired, part, at, W_dec, sizes, self._backend(part.x))
            found[part.streams] = fired
        return recons, found

    def compare(
        self, recons: Sequence[Tensor], batch: Batch, fired: Mapping[tuple[str, ...], Tensor] | None = None
    ) -> SparcLoss:
        """The loss of given reconstructions [N, S, D], those of each nested dictionary or one, differentiable by them,
        without AuxK. What is there of streams that a sample lacks does not count. `fired` is of `through_thresholds`.
        """
        terms = [self._terms(one, batch) for one in recons]
        *_, loss = losses = [self._over_samples(some, batch.streams) for some in terms]
        if self.sizes:
            prefixes = torch.stack([one.total for one in losses])
            loss = loss._replace(total=prefixes.mean(), prefixes=prefixes.detach())
        if fired is not None:
            terms[-1] = {streams: some._replace(fired=fired[streams]) for streams, some in terms[-1].items()}
        return self._completed(loss, terms[-1], batch.streams, batch.zero_rows)

    def _terms(self, recons: Tensor, batch: Batch) -> dict[tuple[str, ...], Terms]:
        """By streams, of the samples that have these."""
        widths, terms = dict(zip(batch.streams, batch.d_streams, strict=True)), {}
        for rows, part in batch.by_presence():
            of_part = recons
            if rows is not None:
                here = [batch.streams.index(name) for name in part.streams]
                of_part = columns_of(recons[rows][:, here], part.streams, widths)
            terms[part.streams] = self._compare(of_part, part, batch.n_samples)
        return terms

    def _compare(self, recons: Tensor, batch: Batch, n_samples: int) -> Terms:
        S, columns = len(batch.streams), stream_slices(batch.d_streams)
        energy = row_energy(batch.x, batch.d_streams)
        if self.spread is None:
            pairs = [_nmse(recons[:, s, cols], batch.x[:, cols], n_samples) for s in range(S) for cols in columns]
        else:
            scale, error = self._scale(batch, energy, n_samples), wide(recons) - wide(batch.x)[:, None]
            squares = [row_energy(error[:, s], batch.d_streams) for s in range(S)]
            pairs = [(scale * of_source).sum(0) for of_source in squares]
        return Terms(torch.stack(pairs).view(S, S), None, energy)

    def _scale(self, batch: Batch, energy: Tensor, n_samples: int) -> Tensor:
        """What makes squared errors of each sample and stream the loss, [N, S']."""
        if self.spread is None:
            return nmse_scale(energy, n_samples)
        return fvu_scale([self.spread[name] for name in batch.streams], energy, n_samples)

    def summarize(
        self,
        terms: Mapping[tuple[str, ...], Terms],
        streams: tuple[str, ...],
        zero_rows: Tensor | None = None,
        by: Summarize | None = None,
    ) -> SparcLoss:
        """The loss of a batch of these streams, from the terms of its samples that have the same ones.

        A sample's loss is that of the streams it has; the batch's is the mean over samples. `zero_rows` are those that
        were found to be absent. `by` is called in place of `loss_summary`, once where all samples have all streams.
        """
        return self._completed(self._over_samples(terms, streams, by), terms, streams, zero_rows)

    def _completed(
        self,
        loss: SparcLoss,
        terms: Mapping[tuple[str, ...], Terms],
        streams: tuple[str, ...],
        zero_rows: Tensor | None,
    ) -> SparcLoss:
        """With what reconstructions do not tell: the penalty of what fired, and the rows that were found absent."""
        if self.jumprelu is not None:
            l0, penalty = self.jumprelu.penalty(*self.fired(terms, streams), self.k)
            loss = loss._replace(total=loss.total + penalty, l0=l0)
        return loss if zero_rows is None else loss._replace(zero_rows=loss.zero_rows + zero_rows)

    def fired(self, terms: Mapping[tuple[str, ...], Terms], streams: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(how many latents fired, in how many samples), each [1] or, where each stream chooses by itself, [S]."""
        first = next(iter(terms.values()))
        is_local = self.selection in LOCAL
        fired, samples = first.energy.new_zeros(2, len(streams) if is_local else 1)
        for names, some in terms.items():
            assert some.fired is not None
            at = [streams.index(name) for name in names] if is_local else [0]
            fired = fired.index_add(0, torch.tensor(at, dtype=torch.int64, device=fired.device), some.fired)
            samples[at] += len(some.energy)
        return fired, samples

    def _over_samples(
        self, terms: Mapping[tuple[str, ...], Terms], streams: tuple[str, ...], by: Summarize | None = None
    ) -> SparcLoss:
        if tuple(terms) == (streams,):
            return self._summary(terms[streams], by)
        whole = {name: s for s, name in enumerate(streams)}
        first = next(iter(terms.values())).nmse.detach()
        nmse, counts = first.new_zeros(2, len(streams), len(streams))
        zero_rows = torch.zeros(len(streams), dtype=torch.int64, device=first.device)
        losses = []
        for names, some in terms.items():
            losses.append(loss := self._summary(some))
            at = torch.tensor([whole[name] for name in names], device=first.device)
            nmse[at[:, None], at] += loss.nmse
            counts[at[:, None], at] += len(some.energy)
            zero_rows[at] += loss.zero_rows
        n_samples = sum(len(some.energy) for some in terms.values())
        cross, auxk = ([part for part in parts if part is not None] for parts in
                       ([loss.cross for loss in losses], [loss.auxk for loss in losses]))  # fmt: skip
        return SparcLoss(
            total=sum(loss.total for loss in losses[1:]) + losses[0].total,
            self=torch.stack([loss.self for loss in losses]).sum(),
            cross=torch.stack(cross).sum() if cross else None,
            auxk=torch.stack(auxk).sum() if auxk else None,
            nmse=nmse * (n_samples / counts.clamp(min=1)),
            zero_rows=zero_rows,
            prefixes=_sum(*[loss.prefixes for loss in losses]),
        )

    def _summary(self, terms: Terms, by: Summarize | None = None) -> SparcLoss:
        nmse, auxk, energy, total, prefixes, _ = terms
        summarize = by or (loss_summary if torch.is_grad_enabled() else self._backend(nmse).loss_summary)
        weights = pair_weights(len(nmse), self.cross_loss_coef)
        loss = SparcLoss(*summarize(nmse, auxk, energy, weights, self.auxk_coef), prefixes)
        if total is None and prefixes is not None:
            total = prefixes.mean()
        if total is not None:  # that of all weights alone carries the gradient
            loss = loss._replace(total=total if auxk is None else total + auxk)
        return loss

    def _backend(self, of: Tensor) -> backends.Backend:
        return backends.resolve(self.shards.backend(self.backend, of.device), of.device)

    def _among(self, dead: Tensor, batch: Batch) -> AmongDead:
        """Of each sample or, under local selection, each stream of it."""
        rule: Selection = "local" if self.selection in LOCAL else "global"
        backend = self.shards.backend(self.backend, batch.x.device)
        latents, any_dead = (dead, None) if dead.dtype == torch.int64 else (None, dead.any())
        if latents is not None:
            before = batch.encoder_of_latents(latents)
            found = selection.select(rule, before, min(self.auxk, self.n_dead), backend=backend)
        else:  # with empty slots where fewer are dead
            found = selection.select(rule, batch, min(self.auxk, len(dead)), among=dead, backend=backend)
        return AmongDead(self.shards.compact(found), latents, batch.latent_bias, any_dead)
