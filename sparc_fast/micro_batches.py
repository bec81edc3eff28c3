"""Gradients summed over the parts of a batch, which is then one batch to the optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparc_fast.backends import Backend
from sparc_fast.objective import Flow
from sparc_fast.reference import stream_slices

LATENTS_AT_ONCE = 1024
"""Rows that one call updates: what it takes beside them stays small."""


class Rows(NamedTuple):
    """What moves the rows of latents: N samples of all streams, what flowed through them, and where each latent is."""

    x: Tensor
    pre_bias: Tensor
    values: Tensor
    grad_values: Tensor
    grad_recons: Tensor
    offsets: Tensor
    entries: Tensor


class Update(NamedTuple):
    """A step of the rows and their moments: a backend's `update_rows`, but for the batch."""

    W_enc: Tensor
    W_dec: Tensor
    moments: list[Tensor]
    d_streams: tuple[int, ...]
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    step: int | Tensor
    """From 1."""
    copies: list[Tensor] | None
    last_step: Tensor | None
    seed: int

    def by(self, rows: Rows, backend: Backend) -> tuple[Tensor, Tensor]:
        """Make it; returns what a backend's `update_rows` does."""
        return backend.update_rows(
            self.W_enc, self.W_dec, self.moments, *rows, self.d_streams, self.lr, self.betas, self.eps, self.step,
            self.copies, self.last_step, self.seed,
        )  # fmt: skip

    def of(self, latents: slice) -> Update:
        """The same step of some rows, as if they were all."""
        return self._replace(
            W_enc=self.W_enc[latents],
            W_dec=self.W_dec[latents],
            moments=[moment[latents] for moment in self.moments],
            copies=None if self.copies is None else [copy[latents] for copy in self.copies],
            last_step=None if self.last_step is None else self.last_step[latents],
            seed=self.seed + latents.start,  # rounding counts latents from the first of the call
        )


class OneBatch(NamedTuple):
    """A batch given in one piece."""

    flow: Flow
    support: Tensor
    rows: Rows
    grad_pre_bias: Tensor
    """The decoder's part, of all streams, [D]."""

    def terms(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return self.flow.terms()

    def update(self, update: Update, backend: Backend) -> tuple[Tensor, Tensor]:
        """Make it by this batch; returns what a backend's `update_rows` does."""
        return update.by(self.rows, backend)

    def count_silence(self, silence: Tensor, backend: Backend) -> None:
        backend.count_silence(silence, self.flow.reconstruction.values, self.support)


class MicroBatches:
    """What `OneBatch` is, for one that is given in parts: its sums, with both weight gradients [L, D] in memory."""

    def __init__(self, d_streams: tuple[int, ...], silence: Tensor, backend: Backend, n_samples: int) -> None:
        self.d_streams, self.backend, self.n_samples = d_streams, backend, n_samples
        self._gradients: tuple[Tensor, ...] = ()
        self._energies: list[Tensor] = []
        self._silence = torch.zeros_like(silence)
        self._used = torch.zeros(len(silence), dtype=torch.bool, device=silence.device)

    def add(self, part: OneBatch) -> None:
        nmse, auxk, energy, _ = part.terms()
        gradients = self.backend.weight_gradients(*part.rows, self.d_streams)
        if not self._gradients:
            self._gradients = gradients
            self._nmse, self._auxk, self.grad_pre_bias = nmse, auxk, part.grad_pre_bias
        else:
            for total, gradient in zip(self._gradients, gradients, strict=True):
                total += gradient
            self._nmse = self._nmse + nmse
            self.grad_pre_bias = self.grad_pre_bias + part.grad_pre_bias
            if auxk is not None:
                self._auxk = auxk if self._auxk is None else self._auxk + auxk
        self._energies.append(energy)
        part.count_silence(self._silence, self.backend)
        self._used |= part.rows.offsets.diff() > 0

    def terms(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return self._nmse, self._auxk, torch.cat(self._energies), None

    def update(self, update: Update, backend: Backend) -> tuple[Tensor, Tensor]:
        """As `OneBatch.update`: a gradient is that of a batch whose sample l uses latent l, and no other."""
        W_enc, lazy = update.W_enc, update.last_step is not None
        grad_latent_bias = self._gradients[2]
        through_encoder = torch.zeros_like(self._gradients[0][0])
        nothing = torch.zeros_like(through_encoder)
        room = nothing.new_zeros(min(LATENTS_AT_ONCE, len(W_enc)), len(self.d_streams), len(nothing))
        for first in range(0, len(W_enc), LATENTS_AT_ONCE):
            latents = slice(first, first + LATENTS_AT_ONCE)
            for s, columns in enumerate(stream_slices(self.d_streams)):
                # not a matrix product: its order of summation depends on the number of threads
                through_encoder[columns] -= (grad_latent_bias[s, latents, None] * W_enc[latents, columns]).sum(0)
            update.of(latents).by(self._as_rows(latents, nothing, room, lazy), backend)
        return grad_latent_bias, through_encoder

    def _as_rows(self, latents: slice, nothing: Tensor, room: Tensor, lazy: bool) -> Rows:
        """The batch whose gradients are those of these latents; lazily, those that no part used are left out."""
        x, grad_W_dec = self._gradients[0][latents], self._gradients[1][latents]
        offsets = torch.arange(len(x) + 1, device=x.device)
        if lazy:
            used = self._used[latents]
            x, grad_W_dec = x[used], grad_W_dec[used]
            offsets[1:] = used.cumsum(0)
        once = x.new_ones(len(x), room.shape[1], 1)
        grad_recons = room[: len(x)]
        grad_recons[:, 0] = grad_W_dec  # the sum over streams: all of it in the first
        return Rows(x, nothing, once, once, grad_recons, offsets, torch.arange(len(x), device=x.device))

    def count_silence(self, silence: Tensor, backend: Backend) -> None:
        """As over one batch: a latent that fired in any part becomes 0, every other grows by all samples."""
        silence += self.n_samples
        silence.masked_fill_(self._silence < self.n_samples, 0)
