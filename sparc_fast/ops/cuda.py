"""The CUDA backend: prepares tensors for the compiled kernels of csrc/cuda, which know nothing of torch.

A tensor is passed as it is: csrc/cuda/binding.cpp says what it must be, and it is checked before its address is used.

Kernels are started on the current stream of the tensors' device. Their workspace comes from torch's allocator, nothing
waits for the device, and nothing depends on what is in a tensor: a step can be captured in a CUDA graph. What the
kernels do not do (float64, moments narrower than float32, k above 2048, more than 64 streams, 2^31 positions and more)
the Triton kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# operators without a CUDA kernel are Triton's
from sparc_fast.kernels import (
    batch_topk,
    count_silence,
    decode_loss,
    decoder_gradients,
    encoder_gradients,
    finish_step,
    gradient_squares,
    latents_above,
    loss_summary,
    nested_decode_loss,
    sample_scale,
    sparse_decode,
    sparse_decode_grad_values,
    step_biases,
    support_scores,
    support_values_grad_x,
    weight_gradients,
)
from sparc_fast.kernels.gather import gathers_whole_rows
from sparc_fast.ops.row_step import AdamStep, DecoderRows, Gradients, Rows, Samples

OWN = ("global_topk", "invert_indices", "replay_rows", "step_rows", "support_values", "topk_rows", "update_rows")
__all__ = [
    "batch_topk",
    "count_silence",
    "decode_loss",
    "decoder_gradients",
    "encode_topk",
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

_cuda: Any = import_module("sparc_fast._cuda")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FEW = 2**15
"""The most positions, and latents, that are inverted in one launch. Estimated, not measured: all blocks work at once,
and each reads the positions in 4 µs, less than five more launches take."""


def topk_rows(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, int32 [N, k], ascending; ties to the lower column, NaN ranks with +inf."""
    (N, L), device = scores.shape, scores.device
    if scores.dtype not in _FLOATS or k > _cuda.most_k or max(N, L) >= 2**31:
        result: Tensor = _in_triton("topk_rows", scores, k)
        return result
    scores = scores.detach()
    scores = scores if scores.stride(1) == 1 or L == 1 else scores.contiguous()
    indices = torch.empty(N, k, dtype=torch.int32, device=device)
    plan = _cuda.TopkPlan(N, L, k, _multiprocessors(device))
    workspace = _bytes(_cuda.topk_rows_workspace(plan, N, k), device)
    with _on(device):
        _cuda.topk_rows(plan, indices, scores, workspace, _stream(device))
    return indices


def global_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    screening: str = "auto",
    among: Tensor | None = None,
) -> Tensor:
    """int32 [N, k]: Triton's global_topk, with the scores filtered and the supports settled by CUDA kernels."""
    triton = import_module("sparc_fast.kernels.global_topk")
    support: Tensor = triton.select(x, W_enc, pre_bias, latent_bias, k, screening, _selection(triton, k), among)
    return support


def _selection(triton: Any, k: int) -> Any:
    return triton.Selection(_take_in, _settle, _screen) if k <= _cuda.most_k else triton.TRITON


def _take_in(
    product: Tensor, first: int, chunk: int, bias: Tensor, of_w: Tensor, of_x: Tensor, candidates: Any, k: int,
    bounds: tuple[float, float, float],
) -> None:  # fmt: skip
    (N, m), device, capacity = product.shape, product.device, candidates.capacity
    latents = [row[first : first + m] for row in (bias, *of_w)] + [None, None] * (len(of_w) == 1)
    samples = [row[:N] for row in of_x]
    with _on(device):
        _cuda.filter_scores(
            _cuda.FilterPlan(m, k, capacity), candidates[:6], capacity, product, first, latents, samples, k, bounds,
            _stream(device),
        )  # fmt: skip


def _screen(
    X: Tensor, W: Tensor, chunk: int, scores: Tensor, bias: Tensor, of_w: Tensor, of_x: Tensor, candidates: Any, k: int,
    bounds: tuple[float, float, float],
) -> bool:  # fmt: skip
    """Where the device multiplies tiles, takes in all scores, those of every 2^i-th latent first; else does nothing."""
    (N, D), L, device, capacity = X.shape, len(W), X.device, candidates.capacity
    in_vectors = D % 8 == 0 and W.stride(0) % 8 == 0 and (X.data_ptr() | W.data_ptr()) % 16 == 0
    apart = 1
    while -(-L // apart) > chunk:
        apart *= 2
    fits = 1 < apart < L and L + 512 * apart < 2**31 and X.dtype == W.dtype != torch.float32
    with _on(device):
        if not (fits and in_vectors and _cuda.screens_scores()):
            return False
    sampled = W[::apart]
    product = scores[: N * len(sampled)].view(N, len(sampled))
    import_module("sparc_fast.kernels.global_topk").multiply(X, sampled, product)
    of_sampled = of_w[:, ::apart].contiguous()
    _take_in(product, 0, chunk, bias[::apart].contiguous(), of_sampled, of_x, candidates, k, bounds)
    with _on(device):
        _cuda.screen_scores(
            candidates[:6], capacity, X, W, bias, of_w[0], [row[:N] for row in of_x], apart, k, bounds,
            _multiprocessors(device), _bytes(_cuda.screen_scores_workspace(N), device), _stream(device),
        )  # fmt: skip
    return True


def _settle(
    x: Tensor, pre_bias: Tensor, W: Tensor, bias: Tensor, first_row: int, N: int, x_norm: Tensor, w_norm: Tensor,
    candidates: Any, k: int, rounding: float, slack: float, indices: Tensor, given_up: Tensor, total: Tensor,
    d_streams: Sequence[int] = (), values: Sequence[Tensor | None] = (None, None),
) -> None:  # fmt: skip
    """`values`: latent_bias, and where the values of the supports go, too."""
    streams = _cuda.Streams(list(map(int, d_streams)) or [x.shape[1]])
    with _on(x.device):
        _cuda.settle_supports(
            candidates[:6], candidates.capacity, x, pre_bias, W, bias, first_row, x_norm[:N], w_norm, rounding, slack,
            indices, given_up, total, values, streams, _stream(x.device),
        )  # fmt: skip


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    d_streams: Sequence[int],
    screening: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(indices, values): `global_topk`, and `support_values` there, for which rows summed by the choice are not read
    again."""
    encoder = W_enc, pre_bias, latent_bias
    if k > _cuda.most_k or not _gathers(x, *encoder, d_streams):
        indices = global_topk(x, *encoder, k, screening)
        return indices, support_values(x, *encoder, indices, d_streams)
    triton = import_module("sparc_fast.kernels.global_topk")
    latent_bias = _dense(latent_bias)
    values = torch.empty(len(x), len(d_streams), k, dtype=x.dtype, device=x.device)

    settle_values: Any = partial(_settle, d_streams=d_streams, values=(latent_bias, values))

    def settle(*operands: Any) -> None:
        settle_values(*operands)
        settled[:] = operands[0], operands[2], operands[1], *operands[-2:]

    settled: list[Tensor] = []
    selection = triton.Selection(_take_in, settle, _screen)
    indices = triton.select(x, *encoder, k, screening, selection, None)
    if settled:  # those given up, whose supports are known now
        rows, W, bias, given_up, total = settled
        _values(rows, W, bias, latent_bias, values, indices, d_streams, given_up, total)
    return indices, values


def support_values(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, indices: Tensor, d_streams: Sequence[int]
) -> Tensor:
    if not _gathers(x, W_enc, pre_bias, latent_bias, d_streams):
        found: Tensor = _in_triton("support_values", x, W_enc, pre_bias, latent_bias, indices, d_streams)
        return found
    (N, k), L = (len(x), indices.shape[-1]), len(W_enc)
    values = torch.empty(N, len(d_streams), k, dtype=x.dtype, device=x.device)
    operands = _dense(x), _dense(W_enc), pre_bias.detach().contiguous(), _dense(latent_bias), values
    if values.numel():
        _values(*operands, _narrow(indices, L).contiguous(), d_streams)
    return values


def _values(
    x: Tensor, W: Tensor, pre_bias: Tensor, latent_bias: Tensor, values: Tensor, indices: Tensor,
    d_streams: Sequence[int], listed: Tensor | None = None, count: Tensor | None = None,
) -> None:  # fmt: skip
    """The values of all samples, or of as many as `count` says of those listed."""
    streams = _cuda.Streams(list(map(int, d_streams)))
    with _on(x.device):
        _cuda.support_values(
            x, pre_bias, W, latent_bias, values, indices.view(-1), listed, count, streams, _stream(x.device)
        )


def _gathers(x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, d_streams: Sequence[int]) -> bool:
    """Whether values are summed here, from whole rows of W_enc. One answer for both operators, and for any number of
    samples: values must not depend on what found them.

    Elsewhere Triton's kernel gathers columns chunk by chunk, of all latents what the L2 cache keeps.
    """
    L, D = W_enc.shape
    narrow = all(tensor.dtype in _FLOATS for tensor in (x, W_enc, pre_bias, latent_bias))
    fits = len(d_streams) <= _cuda.most_streams and max(L, D) < 2**31 - 1
    return narrow and fits and gathers_whole_rows(L, D, W_enc.element_size())


def invert_indices(indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    n, device = indices.numel(), indices.device
    if max(n, n_latents + 1) >= 2**31:
        offsets, entries = _in_triton("invert_indices", indices, n_latents)
        return offsets, entries
    indices = _narrow(indices, n_latents).flatten()
    offsets = torch.empty(n_latents + 1, dtype=torch.int64, device=device)
    entries = torch.empty(n, dtype=torch.int64, device=device)
    workspace = _bytes(_cuda.invert_indices_workspace(n, n_latents), device)
    with _on(device):
        _cuda.invert_indices(offsets, entries, indices, workspace, max(n, n_latents) <= FEW, _stream(device))
    return offsets, entries


def _narrow(indices: Tensor, n_latents: int) -> Tensor:
    """int32; clamped first, so that none wraps into range."""
    return indices if indices.dtype == torch.int32 else indices.clamp(-1, n_latents).to(torch.int32)


def update_rows(rows: Rows, samples: Samples, adam: AdamStep) -> tuple[Tensor, Tensor]:
    x, pre_bias, values, grad_values, grad_recons, offsets, entries = samples
    (N, S, k), L, device = values.shape, len(rows.weights[0]), x.device
    if not _moves_both(rows) or x.dtype not in _FLOATS or N * S >= 2**32:
        grads: tuple[Tensor, Tensor] = _in_triton("update_rows", rows, samples, adam)
        return grads
    if x.dtype != grad_recons.dtype and (x.dtype, grad_recons.dtype) != (torch.float16, torch.float32):
        x, grad_recons = x.float(), grad_recons.float()
    given = [_dense(x), _dense(grad_recons.flatten(0, 1))]
    given += [tensor.detach().contiguous() for tensor in (pre_bias, values, grad_values, offsets, entries)]
    per_stream = len(entries) != N * k
    plan = _cuda.UpdatePlan(_streams(rows), per_stream, _multiprocessors(device))
    grad_latent_bias = torch.empty(S, L, dtype=torch.float32, device=device)
    grad_pre_bias = torch.empty(x.shape[1], dtype=torch.float32, device=device)
    with _moving(rows, adam, plan, len(entries)) as (encoder, decoder, *step):
        _cuda.update_rows(plan, grad_latent_bias, grad_pre_bias, encoder, decoder, given, *step)
    return grad_latent_bias, grad_pre_bias


def step_rows(rows: Rows, gradients: Gradients, adam: AdamStep) -> None:
    if not _moves_both(rows):
        _in_triton("step_rows", rows, gradients, adam)
        return
    given = [*(_dense(gradient.float()) for gradient in gradients[:2]), gradients.used.contiguous()]
    plan = _cuda.UpdatePlan(_streams(rows), False, _multiprocessors(gradients.used.device))
    with _moving(rows, adam, plan, 0) as (encoder, decoder, *step):
        _cuda.step_rows(plan, encoder, decoder, given, *step)


@contextmanager
def _moving(rows: Rows, adam: AdamStep, plan: Any, count: int) -> Iterator[tuple[Any, ...]]:
    """(encoder, decoder, numbers, those on the device, last_step, workspace, streams, stream), for `count` entries."""
    device, streams = rows.weights[0].device, _streams(rows)
    (lr, lr_there), (step, step_there) = _number(adam.lr, device), _number(adam.step, device)
    numbers, there = (lr, *adam.betas, adam.eps, step), (lr_there, step_there)
    workspace = _bytes(_cuda.update_rows_workspace(plan, count, len(rows.weights[0]), streams), device)
    of_encoder, of_decoder = rows.copies or (None, None)
    with (
        _in_place(rows.W_enc, *rows.moments[:2], of_encoder) as encoder,
        _in_place(rows.W_dec, *rows.moments[2:], of_decoder) as decoder,
        _on(device),
    ):
        yield encoder, decoder, numbers, there, rows.last_step, workspace, streams, _stream(device)
    if rows.last_step is not None:
        torch.autograd.graph.increment_version([rows.last_step])


def replay_rows(rows: DecoderRows, latents: Tensor, history: Tensor, seed: int | None = None) -> None:
    W_dec, moments, d_streams, last_step, copy = rows
    device = W_dec.device
    if not _moves(W_dec, moments, d_streams):
        _in_triton("replay_rows", rows, latents, history, seed)
        return
    latents, history = latents.contiguous(), history.contiguous()
    workspace = _bytes(_cuda.replay_rows_workspace(len(history)), device)
    with _in_place(W_dec, *moments, copy) as decoder, _on(device):
        _cuda.replay_rows(decoder, latents, last_step, history, workspace, _streams(rows), _stream(device))
    torch.autograd.graph.increment_version([last_step])


def _moves_both(rows: Rows) -> bool:
    """Whether the kernels move such rows. Where one matrix stays, Triton's do."""
    if rows.W_enc is not None and rows.W_dec is not None:
        return _moves(rows.W_dec, rows.their_moments, rows.d_streams)
    if rows.last_step is not None and _moves(rows.weights[0], rows.their_moments, rows.d_streams):
        raise ValueError('backend must be another than "cuda" where decoder rows are left behind and the encoder stays')
    return False


def _moves(W_dec: Tensor, moments: Sequence[Tensor], d_streams: Sequence[int]) -> bool:
    """Whether the kernels move such rows. One answer for every operator: a missed step must be replayed bit for bit."""
    fits = len(d_streams) <= _cuda.most_streams and len(W_dec) * len(d_streams) < 2**31
    return fits and {W_dec.dtype, *(m.dtype for m in moments)} == {torch.float32}


def _streams(rows: Rows | DecoderRows) -> Any:
    return _cuda.Streams([int(d) for d in rows.d_streams])


def _dense(x: Tensor) -> Tensor:
    """x with its columns side by side in memory; rows may lie apart."""
    x = x.detach()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@contextmanager
def _in_place(*tensors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """Weights, their moments and their copy, to be changed in place; through dense ones where columns lie apart."""
    dense = [None if t is None else _dense(t) for t in tensors]
    yield dense
    for tensor, written in zip(tensors, dense, strict=True):
        if tensor is not None and written is not None and written.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(written)
    torch.autograd.graph.increment_version([t for t in tensors if t is not None])


def _number(value: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """The number itself, or where the device has it."""
    if not isinstance(value, Tensor) or value.device != device:
        return float(value), None
    return 0.0, value.detach().to(torch.float64).reshape(1)


def _in_triton(operator: str, *operands: Any) -> Any:
    return getattr(import_module("sparc_fast.kernels"), operator)(*operands)


def _bytes(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


# Tensors of the CPU are for kernels that are emulated there, as the tests do.


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
