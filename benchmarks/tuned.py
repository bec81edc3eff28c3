"""Tuned: the fastest training step we could write in plain PyTorch, with no code of ours below it. No AuxK.

What made it faster than Lean: logits, their sum and the weight gradients live in buffers that are kept (fresh
pages cost as much as the arithmetic); a sample's S bags stand next to each other, so that embedding_bag finds its
rows in cache; both weight gradients are sparse CSR products, not embedding_bag's own backward nor index_add_ of
[N k, D] contributions. Autograd does the loss and the decode's gradient for the values.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc_fast import SPARC
from sparc_fast.objective import nmse_scale, pair_weights, row_energy
from sparc_fast.reference import stream_slices


class Tuned:
    """Starts from a model's weights."""

    def __init__(self, model: SPARC, lr: float = 1e-4) -> None:
        self.k, self.d_streams = model.k, tuple(model.d_streams.values())
        self.columns = stream_slices(self.d_streams)
        self.W_enc, self.W_dec, self.pre_bias, self.latent_bias = parameters = [
            p.detach().clone() for p in (model.W_enc, model.W_dec, model.pre_bias, model.latent_bias)
        ]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        self.adam = torch.optim.Adam(parameters, lr, fused=True)
        self.logits = self.W_enc.new_empty(0)

    def step(self, x: Tensor) -> Tensor:
        """One training step on x [N, D], all streams side by side; the loss before it."""
        centred = x - self.pre_bias
        indices, values = self.encode(centred)
        loss, grad_values, grad_recons = decode_and_compare(
            values, indices, self.W_dec, self.pre_bias, x, self.d_streams
        )
        grad_z = grad_values * (values > 0)
        weight_gradients(centred, indices, values, grad_z, grad_recons, self.columns, self.W_enc.grad, self.W_dec.grad)
        for s, cols in enumerate(self.columns):
            grad_bias = self.latent_bias.grad[s].zero_().index_add_(0, indices.flatten(), grad_z[:, s].flatten())
            self.pre_bias.grad[cols] = grad_recons[:, :, cols].sum((0, 1)) - grad_bias @ self.W_enc[:, cols]
        project_gradients(self.W_dec.grad, self.W_dec, self.columns)
        self.adam.step()
        normalize_rows(self.W_dec, self.columns)
        return loss

    def encode(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """indices [N, k] and values [N, S, k]: one product a stream, which together are the one aggregated product."""
        N, S, L = len(centred), len(self.columns), len(self.W_enc)
        if self.logits.shape != (S + 1, N, L):
            self.logits = centred.new_empty(S + 1, N, L)
        *logits, aggregated = self.logits
        for h, bias, cols in zip(logits, self.latent_bias, self.columns, strict=True):
            torch.addmm(bias, centred[:, cols], self.W_enc[:, cols].T, out=h)
        torch.sum(self.logits[:S], dim=0, out=aggregated)
        indices = aggregated.topk(self.k, sorted=False).indices
        values = torch.stack([h.gather(1, indices) for h in logits], dim=1)
        return indices, values.relu_()

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.W_enc, self.W_dec


def decode_and_compare(
    values: Tensor, indices: Tensor, W_dec: Tensor, pre_bias: Tensor, x: Tensor, d_streams: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients for values [N, S, k] and for the reconstructions [N, S, D]."""
    (N, S, k), D = values.shape, W_dec.shape[1]
    z = values.detach().requires_grad_()
    bags = F.embedding_bag(indices.repeat_interleave(S, 0), W_dec, per_sample_weights=z.view(N * S, k), mode="sum")
    error = bags.view(N, S, D) + (pre_bias - x)[:, None]
    error.retain_grad()
    norms = torch.stack([part.norm(dim=2) for part in error.split(list(d_streams), dim=2)], dim=2)
    weights = norms.new_tensor(pair_weights(S, 1.0)).view(S, S)
    loss = (norms.square() * nmse_scale(row_energy(x, d_streams))[:, None] * weights).sum()
    loss.backward()
    return loss.detach(), z.grad, error.grad


def weight_gradients(
    centred: Tensor, indices: Tensor, values: Tensor, grad_z: Tensor, grad_recons: Tensor, columns: Sequence[slice],
    grad_W_enc: Tensor, grad_W_dec: Tensor,
) -> None:  # fmt: skip
    """The gradients of both weight matrices, into the tensors given."""
    S, L = len(columns), len(grad_W_enc)
    inverse = invert(indices, L)
    for s, cols in enumerate(columns):
        sum_rows(inverse, grad_z[:, s], centred[:, cols], out=grad_W_enc[:, cols])
    every_stream = invert(indices.repeat_interleave(S, 0), L)
    sum_rows(every_stream, values.flatten(0, 1), grad_recons.flatten(0, 1), out=grad_W_dec)


class Inverse(NamedTuple):
    """Where each latent occurs: its entries are ``order[starts[l] : starts[l + 1]]``."""

    starts: Tensor
    order: Tensor


def invert(indices: Tensor, n_latents: int) -> Inverse:
    flat = indices.flatten()
    starts = torch.zeros(n_latents + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(flat, minlength=n_latents).cumsum(0)
    return Inverse(starts, flat.argsort(stable=True))


def sum_rows(inverse: Inverse, coefficients: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """out[l] = sum_{(n, j): indices[n, j] = l} coefficients[n, j] rows[n]:  sparse [L, N] times dense [N, D]."""
    k = coefficients.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR")
        transposed_codes = torch.sparse_csr_tensor(
            inverse.starts, (inverse.order // k).int(), coefficients.flatten()[inverse.order],
            (len(out), len(rows)), check_invariants=False,
        )  # fmt: skip
    return torch.addmm(out, transposed_codes, rows, beta=0, out=out)


def project_gradients(grad: Tensor, W_dec: Tensor, columns: Sequence[slice]) -> None:
    """Take out what lies along each (unit) row, in place."""
    for cols in columns:
        g, w = grad[:, cols], W_dec[:, cols]
        g.addcmul_(torch.einsum("ld,ld->l", g, w)[:, None], w, value=-1)


def normalize_rows(W_dec: Tensor, columns: Sequence[slice]) -> None:
    for cols in columns:
        W_dec[:, cols].div_(W_dec[:, cols].norm(dim=1, keepdim=True))
