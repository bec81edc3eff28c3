"""Supports of as many latents as a sample has, from global_topk and support_scores."""

from __future__ import annotations

from torch import Tensor

from sparc_fast.kernels.global_topk import global_topk
from sparc_fast.kernels.support_scores import support_scores
from sparc_fast.ops import pooled_topk


def batch_topk(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, screening: str = "auto"
) -> Tensor:
    encoder = W_enc, pre_bias, latent_bias
    return pooled_topk.batch_topk(global_topk, support_scores, x.detach(), *encoder, k, screening)


def latents_above(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, threshold: float, k: int, screening: str = "auto",
    sure: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    encoder = W_enc, pre_bias, latent_bias
    return pooled_topk.latents_above(global_topk, support_scores, x.detach(), *encoder, threshold, k, screening, sure)
