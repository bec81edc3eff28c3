"""The best plain PyTorch we could write for each operator, on a CPU and on a GPU.

On a GPU a dense product is often faster than a gather: every operator has both, and the faster one counts.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc_fast.ops.layout import wide

from .cases import ADAM, Operands, Trained
from .rivals import decode_and_compare, normalize_rows, project_gradients, weight_gradients
from .timing import Run

CHUNK = 256  # samples whose rows are gathered at a time: [CHUNK, k, D] is 84 MB in bfloat16


def dense_codes(values: Tensor, indices: Tensor, n_latents: int) -> Tensor:
    """Codes of every stream of every sample, [N S, L]."""
    N, S, k = values.shape
    codes = values.new_zeros(N * S, n_latents)
    return codes.scatter_(1, indices.long().repeat_interleave(S, 0), values.reshape(N * S, k))


def torch_topk(o: Operands) -> Run:
    return lambda: o.scores.topk(o.k, dim=1).indices


def product_and_topk(o: Operands) -> Run:
    bias = o.latent_bias.sum(0)
    return lambda: torch.addmm(bias, o.x - o.pre_bias, o.W_enc.T).topk(o.k, dim=1, sorted=False).indices


def logits_and_gather(o: Operands) -> Run:
    indices = o.indices.long()

    def run() -> Tensor:
        centred = o.x - o.pre_bias
        values = [
            torch.addmm(o.latent_bias[s], centred[:, cols], o.W_enc[:, cols].T).gather(1, indices)
            for s, cols in enumerate(o.columns)
        ]
        return torch.stack(values, dim=1).relu_()

    return run


def rows_on_cpu(W: Tensor, indices: Tensor) -> Tensor:
    return W.index_select(0, indices.flatten()).view(*indices.shape, -1)


def gather_and_dot(o: Operands, chunk: int = CHUNK, rows_of: Callable[..., Tensor] = Tensor.__getitem__) -> Run:
    """`chunk` samples at a time: on a CPU few, whose rows stay in cache."""
    indices = o.indices.long()

    def run() -> Tensor:
        centred = o.x - o.pre_bias
        values = o.x.new_empty(o.shape.N, o.shape.S, o.k)
        for n in range(0, o.shape.N, chunk):
            rows = rows_of(o.W_enc, indices[n : n + chunk])
            for s, cols in enumerate(o.columns):
                values[n : n + chunk, s] = (rows[:, :, cols] @ centred[n : n + chunk, cols, None]).squeeze(2)
        return values.add_(o.latent_bias[:, indices].transpose(0, 1)).relu_()

    return run


def bags(o: Operands) -> Run:
    indices, values = o.indices.long().repeat_interleave(o.shape.S, 0), o.values.flatten(0, 1)
    shape = (o.shape.N, o.shape.S, o.shape.D)
    return lambda: F.embedding_bag(indices, o.W_dec, per_sample_weights=values, mode="sum").add_(o.pre_bias).view(shape)


def bags_alone(o: Operands) -> Callable[[], list[Tensor]]:
    indices, values = o.indices.long(), o.values.transpose(0, 1).contiguous()
    return lambda: [F.embedding_bag(indices, o.W_dec, per_sample_weights=z, mode="sum") for z in values]


def three_bags(o: Operands) -> Run:
    bags_of = bags_alone(o)
    return lambda: torch.stack([bag.add_(o.pre_bias) for bag in bags_of()], dim=1)


def dense_decode(o: Operands) -> Run:
    shape = (o.shape.N, o.shape.S, o.shape.D)
    return lambda: torch.addmm(o.pre_bias, dense_codes(o.values, o.indices, o.shape.L), o.W_dec).view(shape)


def _compare(o: Operands, recons: Tensor) -> tuple[Tensor, Tensor]:
    """nmse [S, S] and the gradient for the reconstructions, in the type of the operands."""
    S = o.shape.S
    weights = torch.tensor(o.weights, device=recons.device).view(S, S)
    nmse, grads = [], []
    for t, cols in enumerate(o.columns):
        error = recons[:, :, cols].float() - o.x[:, None, cols].float()
        nmse.append((error.square().sum(2) * o.scale[:, t, None]).sum(0))
        grads.append((error * (2 * weights[:, t] * o.scale[:, t, None])[:, :, None]).to(recons.dtype))
    return torch.stack(nmse, dim=1), torch.cat(grads, dim=2)


def decode_by_bags(o: Operands) -> Run:
    indices, recons_of = o.indices.long(), bags(o)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        nmse, grad = _compare(o, recons_of())
        grad_values = torch.empty_like(o.values)
        for n in range(0, o.shape.N, CHUNK):
            grad_values[n : n + CHUNK] = grad[n : n + CHUNK] @ o.W_dec[indices[n : n + CHUNK]].transpose(1, 2)
        return nmse, grad, grad_values

    return run


def decode_by_products(o: Operands) -> Run:
    indices, recons_of = o.indices.long().repeat_interleave(o.shape.S, 0), dense_decode(o)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        nmse, grad = _compare(o, recons_of())
        return nmse, grad, (grad.flatten(0, 1) @ o.W_dec.T).gather(1, indices).view_as(o.values)

    return run


def decode_by_autograd(o: Operands) -> Run:
    indices = o.indices.long()
    return lambda: decode_and_compare(o.values, indices, o.W_dec, o.pre_bias, o.x, o.d_streams)


def every_dictionary(decode: Callable[[Operands], Run]) -> Callable[[Operands], Run]:
    """Nested dictionaries one by one, of each the values that are in it; their gradients added up."""

    def prepare(o: Operands) -> Run:
        parts = []
        for size in o.sizes:
            part, inside = copy(o), (o.indices < size)[:, None]
            vars(part)["values"] = o.values * inside
            parts.append((decode(part), inside))

        def run() -> tuple[Tensor, Tensor, Tensor]:
            found = [one() for one, _ in parts]
            grads = torch.stack([grad for _, grad, _ in found]).div_(len(parts))
            for p in range(len(parts) - 1, 0, -1):
                grads[p - 1] += grads[p]
            of_values = [back * inside for (_, _, back), (_, inside) in zip(found, parts, strict=True)]
            return torch.stack([nmse for nmse, _, _ in found]), grads, torch.stack(of_values).mean(0)

        return run

    return prepare


def sort_and_search(o: Operands) -> Run:
    every = torch.arange(o.shape.L + 1, device=o.device, dtype=o.indices.dtype)

    def run() -> tuple[Tensor, Tensor]:
        ordered, entries = torch.sort(o.indices.flatten(), stable=True)
        return torch.searchsorted(ordered, every), entries

    return run


def gradients_by_products(o: Operands) -> Callable[[], tuple[Tensor, Tensor]]:
    """Both weight gradients as dense products, in the type of the operands."""

    def run() -> tuple[Tensor, Tensor]:
        L, S = o.shape.L, o.shape.S
        centred = o.x - o.pre_bias
        of_z = dense_codes(o.grad_values * (o.values > 0), o.indices, L).view(-1, S, L)
        grad_W_enc = torch.cat([of_z[:, s].T @ centred[:, cols] for s, cols in enumerate(o.columns)], dim=1)
        del of_z
        return grad_W_enc, dense_codes(o.values, o.indices, L).T @ o.grad_recons.flatten(0, 1)

    return run


def gradients_by_index_add(o: Operands) -> Callable[[], tuple[Tensor, Tensor]]:
    """Both weight gradients in float32, added up sample by sample (in no fixed order)."""

    def run() -> tuple[Tensor, Tensor]:
        centred, grad_z = wide(o.x) - wide(o.pre_bias), wide(o.grad_values) * (o.values > 0)
        grads = tuple(torch.zeros(o.shape.L, o.shape.D, device=o.device) for _ in range(2))
        for n in range(0, o.shape.N, CHUNK):
            flat = o.indices[n : n + CHUNK].flatten()
            for s, cols in enumerate(o.columns):
                add = grad_z[n : n + CHUNK, s, :, None] * centred[n : n + CHUNK, None, cols]
                grads[0][:, cols].index_add_(0, flat, add.flatten(0, 1))
            add = wide(o.values[n : n + CHUNK]).transpose(1, 2) @ wide(o.grad_recons[n : n + CHUNK])
            grads[1].index_add_(0, flat, add.flatten(0, 1))
        return grads

    return run


def gradients_by_csr(o: Operands) -> Callable[[], tuple[Tensor, Tensor]]:
    """Both weight gradients as sparse products, into tensors that are kept."""
    indices = o.indices.long()
    grads = torch.zeros_like(o.W_enc), torch.zeros_like(o.W_dec)

    def run() -> tuple[Tensor, Tensor]:
        grad_z = o.grad_values * (o.values > 0)
        weight_gradients(o.x - o.pre_bias, indices, o.values, grad_z, o.grad_recons, o.columns, *grads)
        return grads

    return run


def update_by(gradients: Callable[[Operands], Any]) -> Callable[[Operands], Run]:
    """Weight gradients, projection, torch's fused Adam, unit norm, and narrow copies where there are."""

    def prepare(o: Operands) -> Run:
        own, gradients_of = Trained(o), gradients(o)
        parameters = [own.W_enc, own.W_dec]
        adam = torch.optim.Adam(parameters, **ADAM, fused=True)
        for p, m, v in zip(parameters, own.moments[::2], own.moments[1::2], strict=True):
            adam.state[p] = {"step": torch.tensor(999.0, device=o.device), "exp_avg": m, "exp_avg_sq": v}

        def run() -> Trained:
            for p, grad in zip(parameters, gradients_of(), strict=True):
                p.grad = wide(grad)
            project_gradients(own.W_dec.grad, own.W_dec, o.columns)
            adam.step()
            normalize_rows(own.W_dec, o.columns)
            for narrow, p in zip(own.copies or (), parameters, strict=False):
                narrow.copy_(p)
            for p in parameters:
                p.grad = None
            return own

        return run

    return prepare
