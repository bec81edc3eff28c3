"""(grad_W_enc [L, D], grad_W_dec [L, D], grad_latent_bias [S, L]), written to memory, from one inverse index."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparc_fast.kernels.decoder_gradients import decoder_gradients
from sparc_fast.kernels.encoder_gradients import encoder_gradients


def weight_gradients(
    x: Tensor,
    pre_bias: Tensor,
    values: Tensor,
    grad_values: Tensor,
    grad_recons: Tensor,
    offsets: Tensor,
    entries: Tensor,
    d_streams: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_W_enc, grad_latent_bias = encoder_gradients(x, pre_bias, values, grad_values, offsets, entries, d_streams)
    return grad_W_enc, decoder_gradients(values, grad_recons, offsets, entries), grad_latent_bias
