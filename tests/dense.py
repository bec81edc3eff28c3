"""SPARC's equations, written down densely from the paper and differentiated by autograd: the truth of the tests.

Nothing here shares code with the package: every latent of every sample is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Weights:
    W_enc: list[Tensor]  # per stream [L, D_s]
    W_dec: list[Tensor]
    pre_bias: list[Tensor]
    latent_bias: list[Tensor]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Weights:
        """Float64 copies of a model's weights, stream by stream, that require gradients."""
        widths = list(model.d_streams.values())
        split = [
            [part.detach().double().clone().requires_grad_() for part in tensor.split(widths, dim=-1)]
            for tensor in (model.W_enc, model.W_dec, model.pre_bias)
        ]
        bias = [row.detach().double().clone().requires_grad_() for row in model.latent_bias]
        return cls(*split, bias)

    def gradients(self) -> dict[str, Tensor]:
        def grad(parts: list[Tensor]) -> list[Tensor]:
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]

        return {
            "W_enc": torch.cat(grad(self.W_enc), dim=1),
            "W_dec": torch.cat(grad(self.W_dec), dim=1),
            "pre_bias": torch.cat(grad(self.pre_bias)),
            "latent_bias": torch.stack(grad(self.latent_bias)),
        }


def logits(weights: Weights, inputs: list[Tensor]) -> list[Tensor]:
    """h_s = (x_s - b_s) W_s^T + c_s"""
    return [
        (x - b) @ W.T + c
        for x, W, b, c in zip(inputs, weights.W_enc, weights.pre_bias, weights.latent_bias, strict=True)
    ]


def masks(h: list[Tensor], k: int, selection: str, allowed: Tensor | None = None) -> list[Tensor]:
    """1 at the k largest of each row, of the sum over streams or of each stream; a stable sort breaks ties.

    Under "batch" at the k N largest of all N rows.
    """
    if selection == "batch":
        score = sum(h).detach().float()
        order = score.flatten().sort(descending=True, stable=True).indices[: k * len(score)]
        return [torch.zeros_like(score).flatten().scatter(0, order, 1.0).view_as(score).to(h[0].dtype)] * len(h)
    scores = h if selection == "local" else [sum(h)] * len(h)
    if allowed is not None:
        scores = [score.masked_fill(~allowed, -torch.inf) for score in scores]
    order = [score.detach().float().sort(dim=1, descending=True, stable=True).indices[:, :k] for score in scores]
    return [torch.zeros_like(score).scatter(1, top, 1.0) for score, top in zip(scores, order, strict=True)]


def nmse(recon: Tensor, x: Tensor) -> Tensor:
    energy = (x**2).sum(1)
    ratio = ((recon - x) ** 2).sum(1) / torch.where(energy > 0, energy, 1.0)
    return torch.where(energy > 0, ratio, 0.0).mean()


def objective(
    weights: Weights,
    inputs: list[Tensor],
    k: int,
    selection: str,
    cross_loss_coef: float,
    dead: Tensor | None = None,
    auxk: int = 0,
    auxk_coef: float = 0.0,
    private: dict[int, tuple[slice, int]] | None = None,
    sizes: Sequence[int] = (),
) -> Tensor:
    """`private`: position of a stream -> its own latents, behind those of all, and how many of them it fires.

    `sizes`: of nested dictionaries, each of which decodes by itself, with the bias; AuxK, what all latents leave over.
    """
    S, private = len(inputs), private or {}
    h = logits(weights, inputs)
    n_shared = min((own.start for own, _ in private.values()), default=h[0].shape[1])
    shared = masks([a[:, :n_shared] for a in h], k, selection)
    z = [torch.relu(a[:, :n_shared]) * mask for a, mask in zip(h, shared, strict=True)]
    totals = []
    for m in sizes or (n_shared,):
        recons = [[z[s][:, :m] @ weights.W_dec[t][:m] + weights.pre_bias[t] for t in range(S)] for s in range(S)]
        for s, (own, q) in private.items():
            code = torch.relu(h[s][:, own]) * masks([h[s][:, own]], q, "local")[0]
            recons[s][s] = recons[s][s] + code @ weights.W_dec[s][own]
        terms = [[nmse(recons[s][t], inputs[t]) for t in range(S)] for s in range(S)]
        totals.append(sum(terms[s][s] for s in range(S)) / S)
        if S > 1:
            cross = sum(terms[s][t] for s in range(S) for t in range(S) if s != t)
            totals[-1] = totals[-1] + cross_loss_coef * cross / (S * (S - 1))
    total = sum(totals) / len(totals)
    if dead is not None and dead.any() and auxk_coef:
        rule = "local" if selection == "local" else "global"
        chosen = masks(h, min(auxk, int(dead.sum())), rule, allowed=dead)
        for s in range(S):
            residual = (inputs[s] - recons[s][s]).detach()
            code = torch.relu(h[s]) * chosen[s]
            total = total + auxk_coef / S * nmse(code @ weights.W_dec[s], residual)
    return total
