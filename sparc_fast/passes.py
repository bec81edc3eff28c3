"""Several passes over one batch, put together as one batch of more samples over all streams of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc_fast import reference
from sparc_fast.backends import Backend
from sparc_fast.sae import SPARC, Packed


class Update(NamedTuple):
    """A step of the rows and their moments: a backend's `update_rows`, but for the batch."""

    W_enc: Tensor
    W_dec: Tensor
    moments: list[Tensor]
    pre_bias: Tensor
    d_streams: tuple[int, ...]
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    step: int | Tensor
    """From 1."""
    copies: list[Tensor] | None
    last_step: Tensor | None
    seed: int


class Pass(NamedTuple):
    """What flowed through N samples on a support: [N, S, k], [N, S, k] and [N, S, D]."""

    values: Tensor
    grad_values: Tensor
    grad_recons: Tensor


class Flow(NamedTuple):
    """All passes over a batch: what it did to the loss, and what moves the model's rows."""

    x: Tensor
    """Once a pass, [passes * N, D]."""
    passes: Pass
    inverse: tuple[Tensor, Tensor]
    grad_pre_bias: Tensor
    """The decoder's part, [D]."""
    values: Tensor
    """Of the first pass and the streams given, [N, S', k]."""
    support: Tensor
    nmse: Tensor
    auxk: Tensor | None
    """Its part of the loss."""
    energy: Tensor

    def update_rows(self, backend: Backend, update: Update) -> tuple[Tensor, Tensor]:
        """By this batch; returns what a backend's `update_rows` does."""
        u = update
        return backend.update_rows(
            u.W_enc, u.W_dec, u.moments, self.x, u.pre_bias, *self.passes, *self.inverse, u.d_streams, u.lr, u.betas,
            u.eps, u.step, u.copies, u.last_step, u.seed,
        )  # fmt: skip

    def count_silence(self, model: SPARC) -> None:
        model.count_silence(self.values, self.support)


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Samples below samples. Narrower supports are filled up: with values of 0, at latents they have already."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[-1] for part in parts)
    return torch.cat([_filled(part, width) for part in parts])


def _filled(part: Tensor, width: int) -> Tensor:
    missing = width - part.shape[-1]
    if not missing:
        return part
    if part.is_floating_point():
        return pad(part, (0, missing))
    return torch.cat([part, part[..., :1].expand(*part.shape[:-1], missing)], dim=-1)


class AllStreams:
    """Puts what was computed for some streams among zeros for all: an absent stream is one without gradient."""

    def __init__(self, model: SPARC, packed: Packed) -> None:
        columns = reference.stream_slices(tuple(model.d_streams.values()))
        self.S, self.D = len(columns), columns[-1].stop
        self.complete = packed.streams == model.streams
        self.present = [model.streams.index(name) for name in packed.streams]
        self.present_columns = torch.cat(
            [torch.arange(columns[s].start, columns[s].stop, device=packed.x.device) for s in self.present]
        )

    def columns(self, of_present: Tensor) -> Tensor:
        """[..., D'] -> [..., D]"""
        if self.complete:
            return of_present
        out = of_present.new_zeros(*of_present.shape[:-1], self.D)
        out[..., self.present_columns] = of_present
        return out

    def streams(self, of_present: Tensor) -> Tensor:
        """[N, S', j] -> [N, S, j]"""
        if self.complete:
            return of_present
        out = of_present.new_zeros(len(of_present), self.S, of_present.shape[2])
        out[:, self.present] = of_present
        return out

    def support(self, indices: Tensor) -> Tensor:
        """[N, k] stays, [N, S', k] -> [N, S, k]"""
        return indices if indices.ndim == 2 else self.streams(indices)

    def all_streams(self, one: Pass) -> Pass:
        grad_recons = self.columns(self.streams(one.grad_recons))
        return Pass(self.streams(one.values), self.streams(one.grad_values), grad_recons)
