"""The CPU backend: prepares tensors for the compiled operators of csrc/cpu, which know nothing of torch.

float32, bfloat16 and float64 are computed as they are stored; float16 is widened to float32 first. Sums, values
and gradients of weights are float32, or float64 for float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparc_fast import _cpu
from sparc_fast.ops import reference
from sparc_fast.ops.cpu_topk import (
    batch_topk,
    best_rows,
    dense_rows,
    global_topk,
    latents_above,
    support_scores,
    topk_rows,
)
from sparc_fast.ops.huge_pages import lent
from sparc_fast.ops.layout import gradient_dtype, wide, wide_type
from sparc_fast.ops.reference import loss_summary, sample_scale, step_biases
from sparc_fast.ops.row_step import AdamStep, DecoderRows, Gradients, Rows, Samples

__all__ = [
    "batch_topk",
    "best_rows",
    "count_silence",
    "decode_loss",
    "decoder_gradients",
    "encoder_gradients",
    "finish_step",
    "global_topk",
    "gradient_squares",
    "invert_indices",
    "latents_above",
    "loss_summary",
    "nested_decode_loss",
    "replay_rows",
    "sample_scale",
    "sparse_decode",
    "sparse_decode_grad_values",
    "step_biases",
    "step_rows",
    "support_scores",
    "support_values",
    "support_values_grad_x",
    "topk_rows",
    "update_rows",
    "weight_gradients",
]


def support_values(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, indices: Tensor, d_streams: Sequence[int]
) -> Tensor:
    indices = _indices(indices)
    values = _sums(x, len(x), len(d_streams), indices.shape[-1])
    operands = *_stored(x, W_enc), _summed(pre_bias), _summed(latent_bias), indices
    _cpu.support_values(values, *operands, d_streams, torch.get_num_threads())
    return _as(values, x.dtype)


def support_values_grad_x(
    grad_values: Tensor, values: Tensor, indices: Tensor, W_enc: Tensor, d_streams: Sequence[int]
) -> Tensor:
    (rows,) = _stored(W_enc)
    grad_x = lent(len(values), W_enc.shape[1], dtype=rows.dtype)
    operands = _summed(grad_values), _summed(values), _indices(indices), rows
    _cpu.support_values_grad_x(grad_x, *operands, d_streams, torch.get_num_threads())
    return _as(grad_x, W_enc.dtype)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, pre_bias: Tensor) -> Tensor:
    (rows,) = _stored(W_dec)
    dtype = values.dtype if values.dtype == torch.bfloat16 else wide_type(rows.dtype)
    recons = lent(*values.shape[:2], W_dec.shape[1], dtype=dtype)
    operands = _summed(values), _indices(indices), rows, _summed(pre_bias)
    _cpu.sparse_decode(recons, *operands, torch.get_num_threads())
    return _as(recons, values.dtype)


def sparse_decode_grad_values(grad_recons: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    indices = _indices(indices)
    grad_values = _sums(grad_recons, *grad_recons.shape[:2], indices.shape[-1])
    grad, rows = _stored(grad_recons, W_dec)
    _cpu.sparse_decode_grad_values(grad_values, grad, indices, rows, torch.get_num_threads())
    return _as(grad_values, grad_recons.dtype)


def decode_loss(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    pre_bias: Tensor,
    target: Tensor,
    scale: Tensor,
    weights: Sequence[float],
    d_streams: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = values, indices, W_dec, pre_bias, target, scale, weights, d_streams
    nmse, grad_recons, grad_values, grad_pre_bias = _losses(_cpu.decode_loss, *operands, 1)
    return nmse[0], grad_recons[0], grad_values, grad_pre_bias


def nested_decode_loss(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    pre_bias: Tensor,
    target: Tensor,
    scale: Tensor,
    weights: Sequence[float],
    d_streams: Sequence[int],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = values, indices, W_dec, pre_bias, target, scale, weights, d_streams
    return _losses(_cpu.nested_decode_loss, *operands, len(sizes), torch.tensor(sizes, dtype=torch.int64, device="cpu"))


def _losses(
    operator: Any, values: Tensor, indices: Tensor, W_dec: Tensor, pre_bias: Tensor, target: Tensor, scale: Tensor,
    weights: Sequence[float], d_streams: Sequence[int], P: int, *sizes: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """nmse [P, S, S], grad_recons [P, N, S, D], grad_values and grad_pre_bias of P dictionaries."""
    (rows, target), coefficients = _stored(W_dec, target), _summed(values)
    (N, S, _), D = values.shape, W_dec.shape[1]
    nmse, grad_recons = coefficients.new_empty(P * S, S), lent(P * N, S, D, dtype=rows.dtype)
    grad_values, grad_pre_bias = _sums(coefficients, *coefficients.shape), coefficients.new_empty(D)
    operands = coefficients, _indices(indices), rows, _summed(pre_bias), target, _summed(scale), weights, d_streams
    operator(nmse, grad_recons, grad_values, grad_pre_bias, *operands, *sizes, torch.get_num_threads())
    dtype = gradient_dtype(values)
    grad_recons = _as(grad_recons, dtype).view(P, N, S, D)
    return nmse.view(P, S, S), grad_recons, _as(grad_values, dtype), grad_pre_bias


def invert_indices(indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    indices = _indices(indices)
    offsets = torch.empty(n_latents + 1, dtype=torch.int64, device="cpu")
    entries = lent(indices.numel(), dtype=torch.int64)
    _cpu.invert_indices(offsets, entries, indices, n_latents)
    return offsets, entries


def encoder_gradients(
    x: Tensor,
    pre_bias: Tensor,
    values: Tensor,
    grad_values: Tensor,
    offsets: Tensor,
    entries: Tensor,
    d_streams: Sequence[int],
) -> tuple[Tensor, Tensor]:
    operands = *_stored(x), _summed(pre_bias), _summed(values), _summed(grad_values), None, offsets, entries
    grad_W_enc, grad_latent_bias = _gradients_like(x, offsets, x.shape[1], len(d_streams))
    batch = _cpu.Batch(*operands, d_streams)
    _cpu.weight_gradients(grad_W_enc, None, grad_latent_bias, batch, torch.get_num_threads())
    return grad_W_enc, grad_latent_bias


def decoder_gradients(values: Tensor, grad_recons: Tensor, offsets: Tensor, entries: Tensor) -> Tensor:
    D = grad_recons.shape[2]
    operands = None, None, _summed(values), None, *_stored(grad_recons), offsets, entries
    grad_W_dec, _ = _gradients_like(grad_recons, offsets, D, 0)
    _cpu.weight_gradients(None, grad_W_dec, None, _cpu.Batch(*operands, [D]), torch.get_num_threads())
    return grad_W_dec


def weight_gradients(
    x: Tensor,
    pre_bias: Tensor,
    values: Tensor,
    grad_values: Tensor,
    grad_recons: Tensor,
    offsets: Tensor,
    entries: Tensor,
    d_streams: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    operands = _batch(x, pre_bias, values, grad_values, grad_recons, offsets, entries)
    grad_W_enc, grad_latent_bias = _gradients_like(x, offsets, x.shape[1], len(d_streams))
    grad_W_dec = lent(*grad_W_enc.shape, dtype=grad_W_enc.dtype)
    batch = _cpu.Batch(*operands, d_streams)
    _cpu.weight_gradients(grad_W_enc, grad_W_dec, grad_latent_bias, batch, torch.get_num_threads())
    return grad_W_enc, grad_W_dec, grad_latent_bias


def gradient_squares(
    samples: Samples, d_streams: Sequence[int], encoder: bool = True, decoder: bool = True
) -> tuple[Tensor, Tensor]:
    x, pre_bias, values, grad_values, grad_recons, *inverse = _batch(*samples)
    L = len(samples.offsets) - 1
    squares = torch.zeros(L, dtype=torch.float64, device="cpu")
    grad_latent_bias = _sums(samples.x, len(d_streams), L)
    of_encoder = (x, pre_bias, values, grad_values) if encoder else (None, None, values, None)
    batch = _cpu.Batch(*of_encoder, grad_recons if decoder else None, *inverse, d_streams)
    _cpu.gradient_squares(squares, grad_latent_bias if encoder else None, batch, torch.get_num_threads())
    return squares, grad_latent_bias


def update_rows(rows: Rows, samples: Samples, adam: AdamStep) -> tuple[Tensor, Tensor]:
    operands = _batch(*samples)
    if not _are_compiled(rows.weights, rows.their_moments, operands[1].dtype, adam.seed):
        return reference.update_rows(rows, samples, adam)
    given: tuple[Tensor | None, ...] = operands
    if rows.W_enc is None:  # columns need not be those of the values' streams
        given = None, None, operands[2], None, *operands[4:]
    elif rows.W_dec is None:
        given = *operands[:4], None, *operands[5:]
    grad_latent_bias = _sums(samples.x, len(rows.d_streams), len(rows.weights[0]))
    grad_pre_bias = _sums(samples.x, sum(rows.d_streams))
    sums = (None, None) if rows.W_enc is None else (grad_latent_bias, grad_pre_bias)
    with _in_place(rows) as (updated, copies):
        _cpu.update_rows(
            *sums, *updated, copies, rows.last_step, _cpu.Batch(*given, rows.d_streams), _adam(rows, adam),
            torch.get_num_threads(),
        )  # fmt: skip
    return grad_latent_bias, grad_pre_bias


def step_rows(rows: Rows, gradients: Gradients, adam: AdamStep) -> None:
    matrices = list(zip((rows.W_enc, rows.W_dec), gradients[:2], strict=True))
    sums = next(gradient.dtype for W, gradient in matrices if W is not None)
    if not _are_compiled(rows.weights, rows.their_moments, sums, adam.seed):
        reference.step_rows(rows, gradients, adam)
        return
    given = (None if W is None else dense_rows(gradient) for W, gradient in matrices)
    operands = _cpu.Gradients(*given, gradients.used.contiguous(), rows.d_streams)
    with _in_place(rows) as (updated, copies):
        _cpu.step_rows(
            *updated, copies, rows.last_step, operands, _adam(rows, adam),
            torch.get_num_threads(),
        )  # fmt: skip


def _are_compiled(weights: Sequence[Tensor], moments: Sequence[Tensor], sums: torch.dtype, seed: int | None) -> bool:
    """Whether the compiled operators move such rows, by sums of this type."""
    rounded = reference.rounding_seed(weights[0], moments, seed) is not None
    exact = weights if rounded else [*weights, *moments]
    updated = [*weights, *moments]
    return (
        sums in (torch.float32, torch.float64)
        and all(tensor.dtype == sums for tensor in exact)
        and all(tensor.stride(1) == 1 for tensor in updated)
    )


def _adam(rows: Rows, adam: AdamStep) -> Any:
    lr, betas, eps, step, seed = adam
    rounding = reference.rounding_seed(rows.weights[0], rows.their_moments, seed)
    return _cpu.AdamStep(float(lr), *betas, eps, int(step), _unsigned(rounding))


@contextmanager
def _in_place(rows: Rows) -> Iterator[tuple[tuple[Any, ...], list[Tensor | None]]]:
    """(W_enc, W_dec, moments), to be changed in place, and the copies that are written with them."""
    copies = rows.copies or (None, None)
    narrow = [None if copy is None else _bfloat16(copy) for copy in copies]
    yield (rows.W_enc, rows.W_dec, list(rows.moments)), narrow
    for copy, written, exact in zip(copies, narrow, (rows.W_enc, rows.W_dec), strict=True):
        if copy is not None and exact is not None and written is None:
            copy.copy_(exact)
    written_to = [*rows.weights, *rows.their_moments, *(copy for copy in copies if copy is not None)]
    torch.autograd.graph.increment_version(written_to)


def replay_rows(rows: DecoderRows, latents: Tensor, history: Tensor, seed: int | None = None) -> None:
    W_dec, moments, d_streams, last_step, copy = rows
    if not _are_compiled((W_dec,), moments, W_dec.dtype, seed):
        reference.replay_rows(rows, latents, history, seed)
        return
    latents, steps = latents.contiguous(), history.contiguous()
    rounding = _unsigned(reference.rounding_seed(W_dec, moments, seed))
    narrow = _bfloat16(copy) if copy is not None else None
    _cpu.replay_rows(W_dec, moments, narrow, latents, last_step, steps, d_streams, rounding, torch.get_num_threads())
    if copy is not None and narrow is None:
        copy[latents] = W_dec[latents].to(copy.dtype)
    torch.autograd.graph.increment_version([W_dec, *moments] if copy is None else [W_dec, *moments, copy])


def count_silence(silence: Tensor, values: Tensor, indices: Tensor) -> None:
    active = _summed(values), _indices(indices)
    _cpu.count_silence(silence, *active)
    torch.autograd.graph.increment_version([silence])


finish_step = partial(reference.finish_step, count=count_silence)


def _batch(
    x: Tensor,
    pre_bias: Tensor,
    values: Tensor,
    grad_values: Tensor,
    grad_recons: Tensor,
    offsets: Tensor,
    entries: Tensor,
) -> tuple[Tensor, ...]:
    """The operands of _cpu.Batch."""
    x, grad_recons = _stored(x, grad_recons)
    return x, _summed(pre_bias), _summed(values), _summed(grad_values), grad_recons, offsets, entries


def _gradients_like(x: Tensor, offsets: Tensor, D: int, S: int) -> tuple[Tensor, Tensor]:
    """Room for the gradients of [L, D] weights and an [S, L] bias."""
    L = len(offsets) - 1
    bias = _sums(x, S, L)
    return lent(L, D, dtype=bias.dtype), bias


def _sums(like: Tensor, *shape: int) -> Tensor:
    return lent(*shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _stored(*tensors: Tensor) -> list[Tensor]:
    """Large operands in the widest type they are stored in; rows may lie apart, the numbers in a row may not."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return [dense_rows(_as(tensor, dtype)) for tensor in tensors]


def _summed(tensor: Tensor) -> Tensor:
    """A small operand in the type of the sums, contiguous."""
    return wide(tensor).contiguous()


def _bfloat16(copy: Tensor) -> Tensor | None:
    """A narrow copy of rows, if it is one that the compiled operators write."""
    return copy if copy.dtype == torch.bfloat16 and copy.stride(1) == 1 else None


def _unsigned(seed: int | None) -> int:
    """The 64 bits of a seed; none is as good as any where nothing is rounded."""
    return (seed or 0) % 2**64


def _indices(indices: Tensor) -> Tensor:
    return _as(indices, torch.int32).contiguous()


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), which takes long to find out that nothing is to do when its code is not in cache."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
