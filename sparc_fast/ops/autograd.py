"""What each operator keeps for backward, and which gradient goes where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparc_fast.ops.backends import Backend
from sparc_fast.ops.layout import by_group, wide
from sparc_fast.ops.reference import pre_bias_gradient, weighted_sum


def without_autocast(x: Tensor) -> torch.autocast:
    """The operators choose their own precision: narrow inputs, wide sums."""
    return torch.autocast(x.device.type, enabled=False)


class SupportValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        pre_bias: Tensor,
        latent_bias: Tensor,
        indices: Tensor,
        d_streams: Sequence[int],
        backend: Backend,
    ) -> Tensor:
        values = backend.support_values(x, W_enc, pre_bias, latent_bias, indices, d_streams)
        ctx.save_for_backward(x, W_enc, pre_bias, indices, values)
        ctx.d_streams, ctx.backend = d_streams, backend
        return values

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad_values):
            return SupportValues._gradients(ctx, grad_values)

    @staticmethod
    def _gradients(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, pre_bias, indices, values = ctx.saved_tensors
        grad_x = grad_W_enc = grad_latent_bias = grad_pre_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.backend.support_values_grad_x(grad_values, values, indices, W_enc, ctx.d_streams)
        if any(ctx.needs_input_grad[1:4]):
            inverse = ctx.backend.invert_indices(indices, len(W_enc))
            grad_W_enc, grad_latent_bias = ctx.backend.encoder_gradients(
                x, pre_bias, values, grad_values, *inverse, ctx.d_streams
            )
            grad_pre_bias = pre_bias_gradient(grad_latent_bias, W_enc, ctx.d_streams).to(pre_bias.dtype)
            grad_W_enc = grad_W_enc.to(W_enc.dtype)
            grad_latent_bias = grad_latent_bias.to(W_enc.dtype)
        return grad_x, grad_W_enc, grad_pre_bias, grad_latent_bias, None, None, None


class SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor, pre_bias: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        ctx.backend, ctx.pre_bias_dtype = backend, pre_bias.dtype
        return backend.sparse_decode(values, indices, W_dec, pre_bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_recons: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad_recons):
            return SparseDecode._gradients(ctx, grad_recons)

    @staticmethod
    def _gradients(ctx: Any, grad_recons: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W_dec = ctx.saved_tensors
        grad_recons = grad_recons.contiguous()
        grad_values = grad_W_dec = grad_pre_bias = None
        if ctx.needs_input_grad[0]:
            grad_values = ctx.backend.sparse_decode_grad_values(grad_recons, indices, W_dec)
        if ctx.needs_input_grad[2]:
            inverse = ctx.backend.invert_indices(indices, len(W_dec))
            grad_W_dec = ctx.backend.decoder_gradients(values, grad_recons, *inverse).to(W_dec.dtype)
        if ctx.needs_input_grad[3]:
            grad_pre_bias = wide(grad_recons).sum((0, 1)).to(ctx.pre_bias_dtype)
        return grad_values, None, grad_W_dec, grad_pre_bias, None


class Reconstruction(NamedTuple):
    """What a batch was reconstructed to on a support: the loss, and what it and its gradient are made of."""

    loss: Tensor | None
    """sum_{s, t} weights[s, t] nmse[s, t]: the one that carries a gradient; None where it was only measured."""
    nmse: Tensor
    """[S, S], source by target; of nested dictionaries, of the last, which is all latents."""
    values: Tensor
    """[N, S, k]"""
    grad_recons: Tensor
    """[N, S, D]; of nested dictionaries [P, N, S, D], what moves the latents that each adds."""
    grad_values: Tensor
    """[N, S, k]"""
    grad_pre_bias: Tensor
    """[D], the decoder's part; of no use where a residual was reconstructed."""
    prefixes: Tensor | None = None
    """[P], of each nested dictionary what the loss is the mean of; None where they are not nested."""
    activations: Tensor | None = None
    """[N, S, k], what values are where latents fire, of a support that has others too."""


def compare(
    x: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    indices: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    weights: Sequence[float],
    d_streams: Sequence[int],
    backend: Backend,
    sizes: Sequence[int] = (),
    fires: Tensor | None = None,
    *,
    activations: Tensor | None = None,
    with_loss: bool = False,
) -> Reconstruction:
    """What `reconstruct` finds, of which nothing is to be differentiated; the loss where it is asked for, or nested."""
    if activations is None:
        activations = backend.support_values(x, W_enc, pre_bias, latent_bias, indices, d_streams)
    values = activations if fires is None else activations * (fires[:, None] if fires.ndim == 2 else fires)
    target, decoder_bias = (x, pre_bias) if residual is None else (residual, torch.zeros_like(pre_bias))
    operands = values, indices, W_dec, decoder_bias, target, scale, weights, d_streams
    loss = prefixes = None
    if sizes:
        of_prefixes, grad_recons, grad_values, grad_pre_bias = backend.nested_decode_loss(*operands, sizes)
        nmse = of_prefixes[-1].clone()  # no view of another's
        prefixes = torch.stack([weighted_sum(one, weights) for one in of_prefixes])
        loss = prefixes.mean()
    else:
        nmse, grad_recons, grad_values, grad_pre_bias = backend.decode_loss(*operands)
        loss = weighted_sum(nmse, weights) if with_loss else None
    parts = values, grad_recons, grad_values, grad_pre_bias, prefixes, None if fires is None else activations
    return Reconstruction(loss, nmse, *parts)


class ReconstructionLoss(torch.autograd.Function):
    """Encode on a given support, decode to every stream, compare: the loss, and what it was made of.

    The gradient with respect to the reconstructions is known as soon as the loss is, so it is computed in
    forward, from the same gather of decoder rows; backward only reduces it onto the weights.
    """

    @staticmethod
    def forward(ctx: Any, activations: Sequence[Tensor | None], *operands: Any) -> Reconstruction:
        found = compare(*operands, activations=activations[0], with_loss=True)
        x, W_enc, _, pre_bias, _, indices, residual, _, _, ctx.d_streams, ctx.backend, ctx.sizes, _ = operands
        gradients = found.grad_recons, found.grad_values, found.grad_pre_bias
        ctx.save_for_backward(x, W_enc, pre_bias, indices, found.values, *gradients)
        ctx.decodes_pre_bias = residual is None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(part for part in found[1:] if part is not None))
        return found

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 14
        with without_autocast(grad_loss):
            return ReconstructionLoss._gradients(ctx, grad_loss)

    @staticmethod
    def _gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, pre_bias, indices, values, grad_recons, grad_values, through_decoder = ctx.saved_tensors
        inverse = ctx.backend.invert_indices(indices, len(W_enc))
        of_encoder = x, pre_bias, values, grad_values
        if ctx.sizes:
            grad_W_enc, grad_latent_bias = ctx.backend.encoder_gradients(*of_encoder, *inverse, ctx.d_streams)
            inverse = ctx.backend.invert_indices(by_group(indices, ctx.sizes), len(W_enc))
            of_groups = values.repeat(len(ctx.sizes), 1, 1), grad_recons.flatten(0, 1)
            grad_W_dec = ctx.backend.decoder_gradients(*of_groups, *inverse)
        else:
            grad_W_enc, grad_W_dec, grad_latent_bias = ctx.backend.weight_gradients(
                *of_encoder, grad_recons, *inverse, ctx.d_streams
            )
        grad_pre_bias = pre_bias_gradient(grad_latent_bias, W_enc, ctx.d_streams)
        if ctx.decodes_pre_bias:
            grad_pre_bias = grad_pre_bias + through_decoder
        grads = (grad_W_enc, grad_W_dec, grad_pre_bias, grad_latent_bias)
        scaled = (grad.mul_(grad_loss).to(x.dtype) for grad in grads)
        return None, None, *scaled, *(None,) * 8


def reconstruct(
    x: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    indices: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    weights: Sequence[float],
    d_streams: Sequence[int],
    backend: Backend,
    sizes: Sequence[int] = (),
    fires: Tensor | None = None,
    activations: Tensor | None = None,
) -> Reconstruction:
    """`ReconstructionLoss` by the names of its results; a residual is reconstructed without the pre-bias.

    With ``sizes``, the loss is the mean over nested dictionaries, `nested_decode_loss`. Where `fires`, of the shape of
    the support, is False, values are 0, as in an empty slot; grad_values are told. Activations are found if not given.
    """
    for name, data in (("x", x), ("scale", scale), ("residual", residual)):
        if data is not None and data.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require a gradient here: it is data; decode and compare to differentiate by it"
            )
    operands = x, W_enc, W_dec, pre_bias, latent_bias, indices, residual, scale
    with without_autocast(x):
        settings = tuple(weights), tuple(d_streams), backend, tuple(sizes), fires
        # in a tuple autograd does not look for the values it returns among its arguments
        found = ReconstructionLoss.apply((activations,), *operands, *settings)  # type: ignore[no-untyped-call]
        return Reconstruction(*found)
