"""A stream of a model as plain weights: what computes its codes and reconstructions from inputs as they come."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparc_fast.batch import position
from sparc_fast.model import SPARC

__all__ = ["StreamWeights", "stream_weights"]


class StreamWeights(NamedTuple):
    """Codes are relu(W_enc (x - pre_bias) + latent_bias) on the support, reconstructions codes W_dec + pre_bias."""

    W_enc: Tensor
    """[L, D_s]"""
    W_dec: Tensor
    """[L, D_s]"""
    pre_bias: Tensor
    """[D_s]"""
    latent_bias: Tensor
    """[L]"""


def stream_weights(model: SPARC, stream: str, *, unit: float = 1.0, dtype: torch.dtype | None = None) -> StreamWeights:
    """Of one stream, on the CPU, its calibration put into the weights; bit for bit where there is none.

    Args:
        unit: x is `unit` times what the model takes.
        dtype: by default the model's own.
    """
    s, dtype = position(stream, model.streams, "stream"), dtype or model.W_enc.dtype
    cols = model._columns()[s]
    W_enc, W_dec, pre_bias = model.W_enc[:, cols], model.W_dec[:, cols], model.pre_bias[cols]
    if model.is_calibrated or unit != 1:
        # W_enc ((x - mean) / rms - b) = (W_enc / rms) (x - (mean + rms b)),  rms (W_dec z + b) + mean
        mean, rms = unit * model.input_mean[cols].double(), unit * model._scales()[s].double()
        W_enc, W_dec, pre_bias = W_enc / rms, W_dec * rms, mean + rms * pre_bias
    parts = (W_enc, W_dec, pre_bias, model.latent_bias[s])
    return StreamWeights(*(part.detach().to("cpu", dtype) for part in parts))
