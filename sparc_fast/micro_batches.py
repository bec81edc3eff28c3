"""Gradients summed over the parts of a batch, which is then one batch to the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparc_fast.backends import Backend
from sparc_fast.passes import Flow, Pass, Update
from sparc_fast.reference import stream_slices
from sparc_fast.sae import SPARC

LATENTS_AT_ONCE = 1024
"""Rows that one call updates: what it takes beside them stays small."""


class MicroBatches:
    """What `Flow` is, for a batch that is given in parts: its sums, with both weight gradients [L, D] in memory."""

    nmse: Tensor
    auxk: Tensor | None = None
    grad_pre_bias: Tensor

    def __init__(self, model: SPARC, backend: Backend, n_samples: int) -> None:
        self.model, self.backend, self.n_samples = model, backend, n_samples
        self.d_streams = tuple(model.d_streams.values())
        self._gradients: tuple[Tensor, ...] = ()
        self._energies: list[Tensor] = []
        self._silence = torch.zeros_like(model.silence)
        self._used = torch.zeros(model.n_latents, dtype=torch.bool, device=model.silence.device)

    @property
    def energy(self) -> Tensor:
        return torch.cat(self._energies)

    def add(self, part: Flow) -> None:
        gradients = self.backend.weight_gradients(
            part.x, self.model.pre_bias, *part.passes, *part.inverse, self.d_streams
        )
        if not self._gradients:
            self._gradients = gradients
            self.nmse, self.auxk, self.grad_pre_bias = part.nmse, part.auxk, part.grad_pre_bias
        else:
            for total, gradient in zip(self._gradients, gradients, strict=True):
                total += gradient
            self.nmse = self.nmse + part.nmse
            self.grad_pre_bias = self.grad_pre_bias + part.grad_pre_bias
            if part.auxk is not None:
                self.auxk = part.auxk if self.auxk is None else self.auxk + part.auxk
        self._energies.append(part.energy)
        self.backend.count_silence(self._silence, part.values, part.support)
        self._used |= part.inverse[0].diff() > 0

    def update_rows(self, backend: Backend, update: Update) -> tuple[Tensor, Tensor]:
        """As `Flow.update_rows`: a gradient is that of a batch whose sample l uses latent l, and no other."""
        W_enc, d_streams, last_step = update.W_enc, update.d_streams, update.last_step
        grad_latent_bias = self._gradients[2]
        through_encoder = torch.zeros_like(self._gradients[0][0])
        nothing = torch.zeros_like(through_encoder)
        room = nothing.new_zeros(min(LATENTS_AT_ONCE, len(W_enc)), len(d_streams), len(nothing))
        for first in range(0, len(W_enc), LATENTS_AT_ONCE):
            rows = slice(first, first + LATENTS_AT_ONCE)
            for s, columns in enumerate(stream_slices(d_streams)):
                # not a matrix product: its order of summation depends on the number of threads
                through_encoder[columns] -= (grad_latent_bias[s, rows, None] * W_enc[rows, columns]).sum(0)
            x, passes, inverse = self._as_batch(rows, room, last_step is not None)
            backend.update_rows(
                W_enc[rows], update.W_dec[rows], [moment[rows] for moment in update.moments], x, nothing, *passes,
                *inverse, d_streams, update.lr, update.betas, update.eps, update.step,
                None if update.copies is None else [copy[rows] for copy in update.copies],
                None if last_step is None else last_step[rows],
                update.seed + first,  # rounding counts latents from the first of the call
            )  # fmt: skip
        return grad_latent_bias, through_encoder

    def _as_batch(self, rows: slice, room: Tensor, lazy: bool) -> tuple[Tensor, Pass, tuple[Tensor, Tensor]]:
        """The batch whose gradients are those of these rows; lazily, rows that no part used are left out."""
        x, grad_W_dec = self._gradients[0][rows], self._gradients[1][rows]
        offsets = torch.arange(len(x) + 1, device=x.device)
        if lazy:
            used = self._used[rows]
            x, grad_W_dec = x[used], grad_W_dec[used]
            offsets[1:] = used.cumsum(0)
        once = x.new_ones(len(x), room.shape[1], 1)
        grad_recons = room[: len(x)]
        grad_recons[:, 0] = grad_W_dec  # the sum over streams: all of it in the first
        return x, Pass(once, once, grad_recons), (offsets, torch.arange(len(x), device=x.device))

    def count_silence(self, model: SPARC) -> None:
        """As over one batch: a latent that fired in any part becomes 0, every other grows by all samples."""
        silence = model.silence + self.n_samples
        model.silence.copy_(silence.masked_fill_(self._silence < self.n_samples, 0))
