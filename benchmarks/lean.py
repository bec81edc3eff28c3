"""Lean: a training step as a careful PyTorch user writes it. No AuxK.

Nothing dense behind TopK: values are gathered, decodes are embedding_bags, the encoder's gradient touches only
selected latents (one index_add_ a stream). Autograd does the rest, and Adam is fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc_fast import SPARC, nmse
from sparc_fast.reference import stream_slices


class Lean(torch.nn.Module):
    """Starts from a model's weights."""

    def __init__(self, model: SPARC, lr: float = 1e-4) -> None:
        super().__init__()
        self.k, self.columns = model.k, stream_slices(tuple(model.d_streams.values()))
        self.W_enc, self.W_dec, self.pre_bias, self.latent_bias = (
            torch.nn.Parameter(p.detach().clone())
            for p in (model.W_enc, model.W_dec, model.pre_bias, model.latent_bias)
        )
        self.adam = torch.optim.Adam(self.parameters(), lr, fused=True)

    def step(self, x: Tensor) -> Tensor:
        """One training step on x [N, D], all streams side by side; the loss before it."""
        self.adam.zero_grad()
        loss = self.loss(x)
        loss.backward()
        self.project_gradients()
        self.adam.step()
        self.normalize_decoder()
        return loss.detach()

    def loss(self, x: Tensor) -> Tensor:
        S = len(self.columns)
        values, indices = SparseEncode.apply(x, self.W_enc, self.pre_bias, self.latent_bias, self.k, self.columns)
        loss = x.new_zeros(())
        for s in range(S):
            recons = F.embedding_bag(indices, self.W_dec, per_sample_weights=values[s], mode="sum") + self.pre_bias
            for t, cols in enumerate(self.columns):
                weight = 1 / S if s == t else 1 / (S * (S - 1))
                loss = loss + weight * nmse(recons[:, cols], x[:, cols])
        return loss

    @torch.no_grad()
    def project_gradients(self) -> None:
        for cols in self.columns:
            g, w = self.W_dec.grad[:, cols], self.W_dec[:, cols]
            g -= (g * w).sum(1, keepdim=True) * w

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        for cols in self.columns:
            self.W_dec[:, cols] /= self.W_dec[:, cols].norm(dim=1, keepdim=True)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.W_enc.detach(), self.W_dec.detach()


class SparseEncode(torch.autograd.Function):
    """values [S, N, k] and indices [N, k]; one product a stream, which together are the one aggregated product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, columns: Sequence[slice]
    ) -> tuple[Tensor, Tensor]:
        centred = x - pre_bias
        logits = [
            torch.addmm(bias, centred[:, cols], W_enc[:, cols].T)
            for bias, cols in zip(latent_bias, columns, strict=True)
        ]
        indices = sum(logits[1:], logits[0]).topk(k, sorted=False).indices
        values = torch.stack([h.gather(1, indices) for h in logits]).relu_()
        ctx.save_for_backward(centred, W_enc, values, indices)
        ctx.columns = columns
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc, values, indices = ctx.saved_tensors
        grad_z, flat = grad_values * (values > 0), indices.flatten()
        grad_W_enc = torch.zeros_like(W_enc)
        grad_bias = W_enc.new_zeros(len(grad_z), len(W_enc))
        for s, cols in enumerate(ctx.columns):
            contributions = grad_z[s, :, :, None] * centred[:, None, cols]
            grad_W_enc[:, cols].index_add_(0, flat, contributions.flatten(0, 1))
            grad_bias[s].index_add_(0, flat, grad_z[s].flatten())
        grad_pre_bias = -torch.cat([grad_bias[s] @ W_enc[:, cols] for s, cols in enumerate(ctx.columns)])
        return None, grad_W_enc, grad_pre_bias, grad_bias, None, None
