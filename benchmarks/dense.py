"""Dense: the research code's training step in plain PyTorch, written from the paper's equations.

Every stream forms all logits [N, L] and dense codes [N, L]; S * S decodes are dense products; AuxK runs in every
step, per stream, over logits that are set to 0 where a latent is alive. Weights are stored as nn.Linear stores
them, and the decoder is renormalised before the optimizer step, not after it. Logging is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparc_fast import SPARC


class Dense(nn.Module):
    """Starts from a model's weights. ``auxk_coef=0`` leaves AuxK out."""

    def __init__(self, model: SPARC, lr: float = 1e-4, auxk_coef: float = 1 / 32, dead_after_steps: int = 1000) -> None:
        super().__init__()
        self.d_streams = list(model.d_streams.values())
        self.k, self.auxk = model.k, min(64, model.n_latents)
        self.auxk_coef, self.dead_after_steps = auxk_coef, dead_after_steps
        self.W_enc = _parameters(model.W_enc.split(self.d_streams, dim=1))  # [L, D_s]
        self.W_dec = _parameters(W.T for W in model.W_dec.split(self.d_streams, dim=1))  # [D_s, L]
        self.pre_bias = _parameters(model.pre_bias.split(self.d_streams))
        self.latent_bias = _parameters(model.latent_bias)
        self.steps_since_fired = torch.zeros_like(model.latent_bias, dtype=torch.int64)
        self.adam = torch.optim.Adam(self.parameters(), lr)

    def step(self, x: Tensor) -> Tensor:
        """One training step on x [N, D], all streams side by side; the loss before it."""
        self.adam.zero_grad()
        loss = self.loss(list(x.split(self.d_streams, dim=1)))
        loss.backward()
        self.normalize_decoder()
        self.project_gradients()
        self.adam.step()
        return loss.detach()

    def loss(self, inputs: list[Tensor]) -> Tensor:
        S = len(inputs)
        logits = [
            F.linear(x - b, W) + c
            for x, W, b, c in zip(inputs, self.W_enc, self.pre_bias, self.latent_bias, strict=True)
        ]
        support = torch.topk(sum(logits), self.k).indices
        codes = [torch.zeros_like(h).scatter(1, support, h.gather(1, support).relu()) for h in logits]
        self.count_steps(codes)
        recons = [[F.linear(z, W, b) for W, b in zip(self.W_dec, self.pre_bias, strict=True)] for z in codes]
        own = sum(nmse(recons[s][s], inputs[s]) for s in range(S))
        cross = sum(nmse(recons[s][t], inputs[t]) for s in range(S) for t in range(S) if s != t)
        loss = own / S + cross / max(S * (S - 1), 1)
        if self.auxk_coef:
            auxk = sum(self.auxk_loss(s, inputs[s], logits[s], recons[s][s]) for s in range(S))
            loss = loss + self.auxk_coef * auxk / S
        return loss

    def auxk_loss(self, s: int, x: Tensor, logits: Tensor, recons: Tensor) -> Tensor:
        dead = self.steps_since_fired[s] > self.dead_after_steps
        top = torch.topk(logits * dead, self.auxk)
        codes = torch.zeros_like(logits).scatter(1, top.indices, top.values.relu())
        target = x - recons.detach() + self.pre_bias[s].detach()
        return nmse(F.linear(codes, self.W_dec[s], self.pre_bias[s]), target)

    @torch.no_grad()
    def count_steps(self, codes: list[Tensor]) -> None:
        fired = torch.stack([(z > 1e-3).any(0) for z in codes])
        self.steps_since_fired.mul_(~fired).add_(1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        for W in self.W_dec:
            W /= W.norm(dim=0) + 1e-8

    @torch.no_grad()
    def project_gradients(self) -> None:
        for W in self.W_dec:
            W.grad -= (W * W.grad).sum(0) * W

    @torch.no_grad()
    def weights(self) -> tuple[Tensor, Tensor]:
        """(W_enc, W_dec) as `SPARC` holds them; the decoder as the next step would renormalise it."""
        return torch.cat(list(self.W_enc), 1), torch.cat([(W / W.norm(dim=0)).T for W in self.W_dec], 1)


def nmse(recons: Tensor, x: Tensor) -> Tensor:
    return ((recons - x).square().sum(1) / x.square().sum(1)).mean()


def _parameters(tensors: object) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(t.detach().clone(memory_format=torch.contiguous_format)) for t in tensors)
