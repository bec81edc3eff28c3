"""Private latents: the last of the dictionary, of one stream each, beside those that all streams share.

Each stream fires the best of its own by itself. A private latent has weights of its stream alone: those of the others
are zeros, and stay zeros, so it has no value in another stream, and whatever decodes it adds nothing there. One support
of shared and private latents is thus reconstructed in one walk; its errors are exactly those of shared latents alone
between streams, and of both within one. What a step must not do is to move the zeros: `decoder` keeps
the gradient out of them, and `SparcAdam` leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc_fast.batch import Batch
from sparc_fast.ops import functional
from sparc_fast.ops.layout import stream_slices
from sparc_fast.sizes import is_integer

if TYPE_CHECKING:
    from sparc_fast.ops.backends import Backend

__all__ = ["Private"]


class Private:
    """Which latents belong to which streams, and how many of them fire.

    Latents 0 ... n_shared - 1 are those of all streams; behind them come those of each, in the order of the streams.

    Args:
        d_streams: name -> width of each stream of the model.
        n_latents: L, shared and private.
        counts: name -> private latents of that stream; of the others there are none.
        quotas: name -> how many of them fire for a sample.
    """

    def __init__(
        self, d_streams: Mapping[str, int], n_latents: int, counts: Mapping[str, int], quotas: Mapping[str, int]
    ) -> None:
        self.counts = {name: int(counts[name]) for name in d_streams if name in counts}
        self.quotas = {name: int(quotas[name]) for name in self.counts}
        self.n_latents, self.n_shared = n_latents, n_latents - sum(self.counts.values())
        self.latents: dict[str, slice] = {}
        """name -> its private latents."""
        first = self.n_shared
        for name, count in self.counts.items():
            self.latents[name] = slice(first, first + count)
            first += count
        columns = stream_slices(tuple(d_streams.values()))
        self.columns = dict(zip(d_streams, columns, strict=True))

    @classmethod
    def of(
        cls, d_streams: Mapping[str, int], n_latents: int, k: int, counts: Any, quotas: int | Mapping[str, int] | None
    ) -> Private | None:
        """None where there are none; ValueError says what `private` and `private_k` must be."""
        streams = tuple(d_streams)
        if not counts:
            if counts is not None and not isinstance(counts, Mapping):
                raise ValueError(f"private must map streams to numbers of latents, got {counts!r}")
            if quotas:
                raise ValueError(f"private_k must be left out without private latents, got {quotas}")
            return None
        if not isinstance(counts, Mapping) or not all(is_integer(n) and n >= 1 for n in counts.values()):
            raise ValueError(f"private must map streams to numbers of latents >= 1, got {counts!r}")
        for name in counts:
            if name not in streams:
                raise ValueError(f"private must name streams of {streams}, got {name!r}")
        given: dict[str, Any] = dict(quotas) if isinstance(quotas, Mapping) else dict.fromkeys(counts, quotas)
        if set(given) != set(counts):
            raise ValueError(f"private_k must be one number, or one of each of {tuple(counts)}, got {quotas!r}")
        for name, q in given.items():
            if not is_integer(q) or not 1 <= q <= counts[name]:
                raise ValueError(f"private_k must be between 1 and private[{name!r}]={counts[name]}, got {q!r}")
        if sum(counts.values()) > n_latents - k:
            raise ValueError(
                f"private must leave at least k={k} of n_latents={n_latents} to be shared, got {dict(counts)}"
            )
        return cls(d_streams, n_latents, counts, given)

    def within(self, rows: slice) -> Private:
        """The same where just these latents are: none of those of all streams may be among them, or of one."""

        first, n = int(rows.start), int(rows.stop - rows.start)

        def place(latent: int) -> int:
            return min(max(latent - first, 0), n)

        here = copy(self)
        here.n_latents, here.n_shared = n, place(self.n_shared)
        here.latents = {name: slice(place(own.start), place(own.stop)) for name, own in self.latents.items()}
        return here

    @property
    def _elsewhere(self) -> list[tuple[slice, slice, int]]:
        """(private latents, columns of a stream that is not theirs, its place)"""
        return [
            (own, cols, s)
            for name, own in self.latents.items()
            for s, (other, cols) in enumerate(self.columns.items())
            if other != name
        ]

    def shared(self, batch: Batch) -> Batch:
        """The batch before the encoder of the latents that streams share."""
        some = slice(0, self.n_shared)
        threshold = None if batch.latent_threshold is None else batch.latent_threshold[:, some]
        bias = batch.latent_bias[:, some].contiguous()
        return batch._replace(W_enc=batch.W_enc[some], latent_bias=bias, latent_threshold=threshold)

    def slots(self, streams: Sequence[str], apart: bool) -> int:
        """In a support that these streams share, or, `apart`, in one of each."""
        return (max if apart else sum)([0, *(q for name, q in self.quotas.items() if name in streams)])

    def beside(self, shared: Tensor, batch: Batch, backend: str | Backend) -> Tensor:
        """A support of shared latents, [N, k] or [N, S, k], and in further slots each stream's best private ones."""
        best = {
            name: self._best(name, batch.of_streams([name]), backend) for name in self.quotas if name in batch.streams
        }
        if not best:
            return shared
        if shared.ndim == 2:
            return torch.cat([shared, *best.values()], dim=1)
        width = self.slots(batch.streams, apart=True)
        none = shared.new_full((len(shared), width), -1)
        filled = [pad(best[s], (0, width - best[s].shape[1]), value=-1) if s in best else none for s in batch.streams]
        return torch.cat([shared, torch.stack(filled, dim=1)], dim=2)

    def _best(self, name: str, own: Batch, backend: str | Backend) -> Tensor:
        some = self.latents[name]
        bias = own.latent_bias[:, some].contiguous()
        found = functional.global_topk(own.x, own.W_enc[some], own.pre_bias, bias, self.quotas[name], backend=backend)
        return torch.where(found < 0, -1, found + some.start)  # where processes share the latents, others have them

    def heard(self, values: Tensor, indices: Tensor, source: str) -> Tensor:
        """Values of a stream's code without those of other streams' latents, which are not its to have."""
        own = self.latents.get(source, slice(self.n_latents, self.n_latents))
        return values.masked_fill((indices >= self.n_shared) & ((indices < own.start) | (indices >= own.stop)), 0)

    def decoder(self, W_dec: Tensor) -> Tensor:
        """All of the decoder, whose gradient is 0 where a latent is not of a column's stream."""
        if not (torch.is_grad_enabled() and W_dec.requires_grad):
            return W_dec
        masked: Tensor = _OwnColumns.apply(W_dec, self._elsewhere)  # type: ignore[no-untyped-call]
        return masked

    @torch.no_grad()
    def clear(self, W_enc: Tensor, W_dec: Tensor, latent_bias: Tensor) -> None:
        """Weights of private latents in other streams become 0, in place."""
        for rows, cols, s in self._elsewhere:
            W_enc[rows, cols] = 0
            W_dec[rows, cols] = 0
            latent_bias[s, rows] = 0


class _OwnColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, elsewhere: Sequence[tuple[slice, slice, int]]) -> Tensor:
        ctx.elsewhere = elsewhere
        return W.view_as(W)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()  # somebody else's
        for rows, cols, _ in ctx.elsewhere:
            grad[rows, cols] = 0
        return grad, None
