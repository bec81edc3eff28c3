"""Gradients summed over the parts of a batch, which is then one batch to the optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparc_fast.objective import Terms
from sparc_fast.ops.backends import Backend
from sparc_fast.ops.layout import stream_slices
from sparc_fast.ops.row_step import AdamStep, Gradients, Rows, Samples

LATENTS_AT_ONCE = 1024
"""Rows of W_enc whose products are in memory at a time."""


class OneBatch(NamedTuple):
    """A batch given in one piece; not its `Flow`, whose gradients are in the samples already."""

    streams: tuple[str, ...]
    """Those given."""
    terms: dict[tuple[str, ...], Terms]
    """Streams -> the terms of the samples that have just these."""
    values: Tensor
    """Of the reconstruction, [N, S', k], and its support."""
    support: Tensor
    samples: Samples
    grad_pre_bias: Tensor
    """The decoder's part, of all streams, [D]."""

    def update(self, rows: Rows, adam: AdamStep, backend: Backend) -> tuple[Tensor, Tensor]:
        """A step of the rows by this batch; returns what a backend's `update_rows` does."""
        return backend.update_rows(rows, self.samples, adam)

    def count_silence(self, silence: Tensor, backend: Backend) -> None:
        backend.count_silence(silence, self.values, self.support)


class MicroBatches:
    """What `OneBatch` is, for one that is given in parts: its sums, with both weight gradients [L, D] in memory."""

    def __init__(self, d_streams: tuple[int, ...], silence: Tensor, backend: Backend, n_samples: int) -> None:
        self.d_streams, self.backend, self.n_samples = d_streams, backend, n_samples
        self._gradients: tuple[Tensor, Tensor, Tensor] | None = None
        self.terms: dict[tuple[str, ...], Terms] = {}
        self._silence = torch.zeros_like(silence)
        self._used = torch.zeros(len(silence), dtype=torch.bool, device=silence.device)

    def add(self, part: OneBatch) -> None:
        for streams, terms in part.terms.items():
            before = self.terms.get(streams)
            self.terms[streams] = terms._replace(loss=None) if before is None else before.plus(terms)
        self.streams = part.streams
        gradients = self.backend.weight_gradients(*part.samples, self.d_streams)
        if self._gradients is None:
            self._gradients, self.grad_pre_bias = gradients, part.grad_pre_bias
        else:
            for total, gradient in zip(self._gradients, gradients, strict=True):
                total += gradient
            self.grad_pre_bias = self.grad_pre_bias + part.grad_pre_bias
        part.count_silence(self._silence, self.backend)
        self._used |= part.samples.offsets.diff() > 0

    def update(self, rows: Rows, adam: AdamStep, backend: Backend) -> tuple[Tensor, Tensor]:
        """As `OneBatch.update`."""
        assert self._gradients is not None
        grad_W_enc, grad_W_dec, grad_latent_bias = self._gradients
        through_encoder = torch.zeros_like(self.grad_pre_bias)
        for first in range(0, len(rows.W_enc), LATENTS_AT_ONCE):
            some = slice(first, first + LATENTS_AT_ONCE)
            for s, columns in enumerate(stream_slices(self.d_streams)):
                # not a matrix product: its order of summation depends on the number of threads
                through_encoder[columns] -= (grad_latent_bias[s, some, None] * rows.W_enc[some, columns]).sum(0)
        backend.step_rows(rows, Gradients(grad_W_enc, grad_W_dec, self._used), adam)
        return grad_latent_bias, through_encoder

    def count_silence(self, silence: Tensor, backend: Backend) -> None:
        """As over one batch: a latent that fired in any part becomes 0, every other grows by all samples."""
        silence += self.n_samples
        silence.masked_fill_(self._silence < self.n_samples, 0)
