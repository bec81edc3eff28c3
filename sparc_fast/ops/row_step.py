"""What a step of latents' rows is made of, as every backend's `update_rows` and `step_rows` take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The rows of L latents, changed in place."""

    W_enc: Tensor
    W_dec: Tensor
    moments: Sequence[Tensor]
    """Adam's first and second of W_enc, then of W_dec, each [L, D]."""
    d_streams: Sequence[int]
    copies: Sequence[Tensor] | None = None
    """Of W_enc and W_dec in a narrower type, kept equal to them."""
    last_step: Tensor | None = None
    """int64 [L], for a lazy step: the last that each decoder row has made."""

    def of(self, latents: slice) -> Rows:
        """Some of the rows, as if they were all."""
        return Rows(
            self.W_enc[latents],
            self.W_dec[latents],
            [moment[latents] for moment in self.moments],
            self.d_streams,
            None if self.copies is None else [copy[latents] for copy in self.copies],
            None if self.last_step is None else self.last_step[latents],
        )


class Samples(NamedTuple):
    """N samples of all streams, what flowed through them, and where each latent is: gradients are sums over them."""

    x: Tensor
    pre_bias: Tensor
    values: Tensor
    grad_values: Tensor
    grad_recons: Tensor
    offsets: Tensor
    entries: Tensor


class Gradients(NamedTuple):
    """The gradients themselves, in the type of the sums."""

    W_enc: Tensor
    W_dec: Tensor
    latent_bias: Tensor
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


LATENTS_AT_ONCE = 1024  # what `step_as_samples` takes beside the rows stays small


def step_as_samples(
    update: Callable[[Rows, Samples, AdamStep, int], tuple[Tensor, Tensor]],
    rows: Rows,
    gradients: Gradients,
    adam: AdamStep,
) -> Tensor:
    """`step_rows` by kernels that know samples alone: a gradient is that of a sample that uses one latent, no other.

    ``update`` is given the number of the first latent besides, which roundings depend on.
    """
    D, S = rows.W_enc.shape[1], len(rows.d_streams)
    nothing = gradients.W_enc.new_zeros(D)
    grad_pre_bias = torch.zeros_like(nothing)
    room = nothing.new_zeros(min(LATENTS_AT_ONCE, len(rows.W_enc)), S, D)
    for first in range(0, len(rows.W_enc), LATENTS_AT_ONCE):
        latents = slice(first, first + LATENTS_AT_ONCE)
        grad_W_enc, grad_W_dec = gradients.W_enc[latents], gradients.W_dec[latents]
        offset = 0
        for s, width in enumerate(rows.d_streams):
            columns = slice(offset, offset := offset + width)
            # not a matrix product: its order of summation depends on the number of threads
            through = gradients.latent_bias[s, latents, None] * rows.W_enc[latents, columns]
            grad_pre_bias[columns] -= through.sum(0)
        offsets = torch.arange(len(grad_W_enc) + 1, device=nothing.device)
        if rows.last_step is not None:
            used = gradients.used[latents]
            grad_W_enc, grad_W_dec = grad_W_enc[used], grad_W_dec[used]
            offsets[1:] = used.cumsum(0)
        once = grad_W_enc.new_ones(len(grad_W_enc), S, 1)
        grad_recons = room[: len(grad_W_enc)]
        grad_recons[:, 0] = grad_W_dec  # the sum over streams: all of it in the first
        entries = torch.arange(len(grad_W_enc), device=nothing.device)
        samples = Samples(grad_W_enc, nothing, once, once, grad_recons, offsets, entries)
        update(rows.of(latents), samples, adam, first)
    return grad_pre_bias
