"""Squared norms of the gradients of latents' rows: the kernels that write gradients write these instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparc_fast.kernels.decoder_gradients import decoder_sums_of
from sparc_fast.kernels.encoder_gradients import encoder_sums_of
from sparc_fast.kernels.segment_sums import Entries
from sparc_fast.ops.row_step import Samples


def gradient_squares(
    samples: Samples, d_streams: Sequence[int], encoder: bool = True, decoder: bool = True
) -> tuple[Tensor, Tensor]:
    x, pre_bias, values, grad_values, grad_recons, offsets, entries = samples
    batch = Entries.of(values, grad_values if encoder else None, offsets, entries, decoder)
    squares = torch.zeros(batch.n_latents, dtype=torch.float64, device=values.device)
    grad_latent_bias = values.new_empty(0)
    if encoder:
        of_columns, grad_latent_bias = encoder_sums_of(x, pre_bias, batch, d_streams, squares=True)
        squares += of_columns.sum(0)
    if decoder:
        squares += decoder_sums_of(grad_recons, batch, squares=True).sum(0)
    return squares, grad_latent_bias
