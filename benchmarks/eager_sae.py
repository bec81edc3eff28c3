"""EagerSAE: a single-stream TopK autoencoder, forward and backward in eager PyTorch with nothing dense behind TopK.

The decode is an embedding_bag, and the encoder's gradient touches only the selected latents: the algorithm of the
best single-stream rival on a CPU, with the ReLU's gradient done right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc_fast import SPARC, nmse

from .tuned import invert, sum_rows


class EagerSAE(torch.nn.Module):
    """Starts from a model of one stream."""

    def __init__(self, model: SPARC) -> None:
        super().__init__()
        self.k = model.k
        self.W_enc, self.W_dec, self.pre_bias, self.latent_bias = (
            torch.nn.Parameter(p.detach().clone())
            for p in (model.W_enc, model.W_dec, model.pre_bias, model.latent_bias[0])
        )

    def loss(self, x: Tensor) -> Tensor:
        values, indices = SparseEncode.apply(x - self.pre_bias, self.W_enc, self.latent_bias, self.k)
        bags = F.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return nmse(bags + self.pre_bias, x)


class SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = torch.addmm(bias, x, W_enc.T).topk(k, sorted=False)
        values = values.relu_()
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, W_enc, values, indices = ctx.saved_tensors
        grad_z = grad_values * (values > 0)
        grad_W_enc = sum_rows(invert(indices, len(W_enc)), grad_z, x, out=torch.zeros_like(W_enc))
        grad_bias = W_enc.new_zeros(len(W_enc)).index_add_(0, indices.flatten(), grad_z.flatten())
        grad_x = F.embedding_bag(indices, W_enc, per_sample_weights=grad_z, mode="sum")
        return grad_x, grad_W_enc, grad_bias, None
