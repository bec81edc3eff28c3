"""What formats share: tensors of other people's files, models of them, and streams of ours as plain weights."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparc_fast.batch import position
from sparc_fast.model import SPARC
from sparc_fast.selection.batch_topk import REMEMBERED, Thresholds

__all__ = ["LIKELY_K", "StreamWeights", "known_threshold", "load_tensors", "model_of", "stream_weights"]

LIKELY_K = 64
"""The k of a model of which no more is known: training would aim at it, and codes do not depend on it."""


def load_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; of a pickle nothing else is read, and nothing in it runs.

    Args:
        expected: what messages begin with, such as "path must be a state_dict of the research code".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or foreign, or holds anything but tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{expected}, but there is no file {path}")
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that are refused anyhow
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = str(error.__context__ or error).partition(". ")[0]  # without the advice how to trust it
            raise ValueError(
                f"path must hold tensors alone, but {path} is no checkpoint, or holds other pickled objects; "
                f"loading those could run code, and is refused: {refused}"
            ) from error
        except Exception as error:  # a foreign file can raise anything
            raise ValueError(f"{expected}, but {path} is truncated or foreign: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        kind = "other objects beside tensors" if isinstance(tensors, dict) else type(tensors).__name__
        raise ValueError(f"{expected}, but {path} holds {kind}")
    return tensors


def model_of(state: Mapping[str, Tensor], d_streams: Mapping[str, int], L: int, k: int, **settings: Any) -> SPARC:
    """The model whose weights and buffers these are; others are as they are at first."""
    with torch.random.fork_rng(devices=[]):  # the first weights are thrown away: draw nothing for them
        model = SPARC(d_streams, L, k, **settings)
    model.load_state_dict({**model.state_dict(), **state})
    return model


def known_threshold(threshold: float, n_streams: int = 1) -> dict[str, Tensor]:
    """The state of a BatchTopK model in which every set of streams has a threshold that another model learned.

    It counts as learned often enough to be kept in training. Below 0 it is 0: what fires between them has no value.
    """
    values, counts = Thresholds.empty(n_streams, "cpu")
    values[1:], counts[1:] = max(threshold, 0.0), REMEMBERED
    return {"threshold": values, "threshold_count": counts}


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
