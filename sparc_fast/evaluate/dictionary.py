"""What latents add to a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparc_fast.codes import SparseLatents

if TYPE_CHECKING:
    from sparc_fast.model import SPARC

__all__ = ["dictionary_of"]


@torch.no_grad()
def dictionary_of(model: SPARC, stream: str) -> Tensor:
    """What a unit of each latent adds to a stream as `model.decode` gives it, [L, D], on the model's device."""
    L, device, dtype = model.n_latents, model.W_dec.device, model.W_dec.dtype
    latents = torch.arange(L, dtype=torch.int32, device=device)[:, None]
    added, nothing = (
        SparseLatents(fill(L, 1, 1, dtype=dtype, device=device), latents, (stream,), L)
        for fill in (torch.ones, torch.zeros)
    )
    return model.decode(added, stream, stream) - model.decode(nothing[:1], stream, stream)
