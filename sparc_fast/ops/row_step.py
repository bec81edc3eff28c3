"""What a step of latents' rows is made of, as every backend's `update_rows`, `step_rows` and `replay_rows` take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """The rows of L latents, changed in place. What belongs to a matrix that stays as it is is None."""

    W_enc: Tensor | None
    W_dec: Tensor | None
    moments: Sequence[Tensor | None]
    """Adam's first and second of W_enc, then of W_dec, each [L, D]."""
    d_streams: Sequence[int]
    copies: Sequence[Tensor | None] | None = None
    """Of W_enc and W_dec in a narrower type, kept equal to them."""
    last_step: Tensor | None = None
    """int64 [L], for a lazy step: the last that each decoder row has made."""

    @property
    def weights(self) -> list[Tensor]:
        """Those that move."""
        return [W for W in (self.W_enc, self.W_dec) if W is not None]

    @property
    def their_moments(self) -> list[Tensor]:
        return [moment for moment in self.moments if moment is not None]

    @property
    def of_encoder(self) -> Rows:
        return self._replace(W_dec=None, moments=[*self.moments[:2], None, None], copies=self._copy(0), last_step=None)

    @property
    def of_decoder(self) -> Rows:
        return self._replace(W_enc=None, moments=[None, None, *self.moments[2:]], copies=self._copy(1))

    def block(self, latents: slice, columns: slice, d_streams: Sequence[int]) -> Rows:
        """Those of some latents in the columns of some streams, of these widths."""

        def some(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else rows[latents, columns]

        copies = self.copies and [some(copy) for copy in self.copies]
        last_step = None if self.last_step is None else self.last_step[latents]
        moments = [some(moment) for moment in self.moments]
        return Rows(some(self.W_enc), some(self.W_dec), moments, d_streams, copies, last_step)

    def _copy(self, matrix: int) -> Sequence[Tensor | None] | None:
        return self.copies and [copy if i == matrix else None for i, copy in enumerate(self.copies)]


class DecoderRows(NamedTuple):
    """The decoder's rows of L latents alone, some of them left behind; as in `Rows`."""

    W_dec: Tensor
    moments: Sequence[Tensor]
    """Adam's first and second."""
    d_streams: Sequence[int]
    last_step: Tensor
    copy: Tensor | None = None


class Bias(NamedTuple):
    """A bias of whatever shape, changed in place."""

    bias: Tensor
    gradients: Sequence[Tensor]
    """One or two, of which the gradient is the sum."""
    moments: Sequence[Tensor]
    """Adam's first and second."""
    copy: Tensor | None = None
    """In a narrower type, kept equal to it."""


class Samples(NamedTuple):
    """N samples of all streams, what flowed through them, and where each latent is: gradients are sums over them.

    Where only the decoder moves, values and grad_recons may be of other streams than the columns are.
    """

    x: Tensor
    pre_bias: Tensor
    values: Tensor
    grad_values: Tensor
    grad_recons: Tensor
    offsets: Tensor
    entries: Tensor


class Gradients(NamedTuple):
    """The gradients themselves, in the type of the sums; what belongs to a matrix that stays is not read."""

    W_enc: Tensor
    W_dec: Tensor
    used: Tensor
    """bool [L]: the latents that have an entry; a lazy step moves no other decoder row."""


class AdamStep(NamedTuple):
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    step: int | Tensor
    """From 1."""
    seed: int | None = None
    """Of the rounding of bfloat16 moments, which need one."""
