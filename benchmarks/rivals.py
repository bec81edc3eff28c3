"""The training steps that ours is measured against, all in plain PyTorch: Dense, Lean, Tuned and EagerSAE."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparc_fast import SPARC, nmse
from sparc_fast.objective import pair_weights
from sparc_fast.ops.layout import stream_slices
from sparc_fast.ops.reference import nmse_scale, row_energy


class Dense(nn.Module):
    """The research code's training step in plain PyTorch, written from the paper's equations.

    Every stream forms all logits [N, L] and dense codes [N, L]; S * S decodes are dense products; AuxK runs in every
    step, per stream, over logits that are set to 0 where a latent is alive. Weights are stored as nn.Linear stores
    them, and the decoder is renormalised before the optimizer step, not after it. Logging is left out.

    Starts from a model's weights. ``auxk_coef=0`` leaves AuxK out; `autocast` has bfloat16 as a PyTorch user has it.
    """

    def __init__(
        self, model: SPARC, lr: float = 1e-4, auxk_coef: float = 1 / 32, dead_after_steps: int = 1000,
        autocast: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.autocast = autocast
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
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
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
        own = sum(mean_nmse(recons[s][s], inputs[s]) for s in range(S))
        cross = sum(mean_nmse(recons[s][t], inputs[t]) for s in range(S) for t in range(S) if s != t)
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
        return mean_nmse(F.linear(codes, self.W_dec[s], self.pre_bias[s]), target)

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


def mean_nmse(recons: Tensor, x: Tensor) -> Tensor:
    return ((recons - x).square().sum(1) / x.square().sum(1)).mean()


def _parameters(tensors: object) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(t.detach().clone(memory_format=torch.contiguous_format)) for t in tensors)


class Lean(torch.nn.Module):
    """A training step as a careful PyTorch user writes it. No AuxK.

    Nothing dense behind TopK: values are gathered, decodes are embedding_bags, the encoder's gradient touches only
    selected latents (one index_add_ a stream). Autograd does the rest, and Adam is fused.

    Starts from a model's weights.
    """

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
        with torch.no_grad():
            project_gradients(self.W_dec.grad, self.W_dec, self.columns)
            self.adam.step()
            normalize_rows(self.W_dec, self.columns)
        return loss.detach()

    def loss(self, x: Tensor) -> Tensor:
        S = len(self.columns)
        values, indices = EncodeStreams.apply(x, self.W_enc, self.pre_bias, self.latent_bias, self.k, self.columns)
        loss = x.new_zeros(())
        for s in range(S):
            recons = F.embedding_bag(indices, self.W_dec, per_sample_weights=values[s], mode="sum") + self.pre_bias
            for t, cols in enumerate(self.columns):
                weight = 1 / S if s == t else 1 / (S * (S - 1))
                loss = loss + weight * nmse(recons[:, cols], x[:, cols])
        return loss

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.W_enc.detach(), self.W_dec.detach()


class EncodeStreams(torch.autograd.Function):
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


class LeanDense(Lean):
    """A careful step by dense products: one product a stream, TopK, scattered codes, autograd, fused Adam. No AuxK.

    With `compute=torch.bfloat16` products run in it, over float32 weights and moments, as under autocast.
    """

    def __init__(self, model: SPARC, lr: float = 1e-4, compute: torch.dtype = torch.float32) -> None:
        super().__init__(model, lr)
        self.compute = compute

    def loss(self, x: Tensor) -> Tensor:
        S, compute = len(self.columns), self.compute
        x = x.float()
        centred, W_enc, W_dec = (t.to(compute) for t in (x - self.pre_bias, self.W_enc, self.W_dec))
        logits = [
            torch.addmm(bias, centred[:, cols], W_enc[:, cols].T)
            for bias, cols in zip(self.latent_bias.to(compute), self.columns, strict=True)
        ]
        with torch.no_grad():
            support = sum(logits[1:], logits[0]).topk(self.k, sorted=False).indices
        codes = [torch.zeros_like(h).scatter(1, support, h.gather(1, support).relu()) for h in logits]
        recons = torch.stack([z @ W_dec for z in codes], dim=1).float() + self.pre_bias
        loss = x.new_zeros(())
        for t, cols in enumerate(self.columns):
            target = x[:, cols]
            nmse = (recons[:, :, cols] - target[:, None]).square().sum(2) / target.square().sum(1)[:, None]
            for s, mean in enumerate(nmse.mean(0)):
                loss = loss + mean * (1 / S if s == t else 1 / (S * (S - 1)))
        return loss


class Tuned:
    """The fastest training step we could write in plain PyTorch, with no code of ours below it. No AuxK.

    What made it faster than Lean: logits, their sum and the weight gradients live in buffers that are kept (fresh
    pages cost as much as the arithmetic); a sample's S bags stand next to each other, so that embedding_bag finds its
    rows in cache; both weight gradients are sparse CSR products, not embedding_bag's own backward nor index_add_ of
    [N k, D] contributions. Autograd does the loss and the decode's gradient for the values.

    Starts from a model's weights.
    """

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
        nmse, grad_recons, grad_values = decode_and_compare(
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
        return (nmse * nmse.new_tensor(pair_weights(len(self.columns), 1.0)).view_as(nmse)).sum()

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
    """nmse [S, S], and the loss's gradients for the reconstructions [N, S, D] and for values [N, S, k]."""
    (N, S, k), D = values.shape, W_dec.shape[1]
    z = values.detach().requires_grad_()
    bags = F.embedding_bag(indices.repeat_interleave(S, 0), W_dec, per_sample_weights=z.view(N * S, k), mode="sum")
    error = bags.view(N, S, D) + (pre_bias - x)[:, None]
    error.retain_grad()
    norms = torch.stack([part.norm(dim=2) for part in error.split(list(d_streams), dim=2)], dim=2)
    weights = norms.new_tensor(pair_weights(S, 1.0)).view(S, S)
    nmse = (norms.square() * nmse_scale(row_energy(x, d_streams))[:, None]).sum(0)
    (nmse * weights).sum().backward()
    return nmse.detach(), error.grad, z.grad


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


class EagerSAE(torch.nn.Module):
    """A single-stream TopK autoencoder, forward and backward in eager PyTorch with nothing dense behind TopK.

    The decode is an embedding_bag, and the encoder's gradient touches only the selected latents: the algorithm of the
    best single-stream rival on a CPU, with the ReLU's gradient done right.

    Starts from a model of one stream.
    """

    def __init__(self, model: SPARC) -> None:
        super().__init__()
        self.k = model.k
        self.W_enc, self.W_dec, self.pre_bias, self.latent_bias = (
            torch.nn.Parameter(p.detach().clone())
            for p in (model.W_enc, model.W_dec, model.pre_bias, model.latent_bias[0])
        )

    def loss(self, x: Tensor) -> Tensor:
        values, indices = EncodeOne.apply(x - self.pre_bias, self.W_enc, self.latent_bias, self.k)
        bags = F.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return nmse(bags + self.pre_bias, x)


class EncodeOne(torch.autograd.Function):
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
