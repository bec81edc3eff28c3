"""What latents add to a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparc_fast.codes import SparseLatents

if TYPE_CHECKING:
    from sparc_fast.model import SPARC

__all__ = ["along_rows", "dictionary_of"]


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


def along_rows(dictionary: Tensor, latents: Tensor, x: Tensor) -> Tensor:
    """dictionary[latents[n, j]] . x[n] of latents [n, k] and x [n, D], [n, k]; float32, or a dictionary's float64."""
    kind = torch.promote_types(dictionary.dtype, torch.float32)
    return torch.bmm(dictionary[latents].to(kind), x.to(kind)[..., None])[..., 0]
