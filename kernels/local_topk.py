"""indices[n, s] = global_topk of stream s alone: its columns of x and W_enc and its own bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparc_fast.kernels.global_topk import TRITON, Selection, select
from sparc_fast.reference import stream_slices


def local_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    d_streams: Sequence[int],
    screening: str = "auto",
) -> Tensor:
    """int32 [N, S, k]: a support for each stream."""
    return select_in_streams(x, W_enc, pre_bias, latent_bias, k, d_streams, screening, TRITON)


def select_in_streams(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, d_streams: Sequence[int], screening: str,
    selection: Selection,
) -> Tensor:  # fmt: skip
    """local_topk by these kernels."""
    supports = [
        select(x[:, cols], W_enc[:, cols], pre_bias[cols], latent_bias[s : s + 1], k, screening, selection)
        for s, cols in enumerate(stream_slices(d_streams))
    ]
    return torch.stack(supports, dim=1)
