"""The CUDA backend: prepares tensors for the compiled kernels of csrc/cuda, which know nothing of torch.

Kernels are started on the current stream of the tensors' device. Their workspace comes from torch's allocator, nothing
waits for the device, and nothing depends on what is in a tensor: a step can be captured in a CUDA graph. What the
kernels do not do (float64, k above 2048, 2^31 positions and more) the Triton kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["global_topk", "invert_indices", "local_topk", "topk_rows"]

_cuda: Any = import_module("sparc_fast._cuda")
_SCORES = {
    torch.float32: _cuda.Scores.float32,
    torch.bfloat16: _cuda.Scores.bfloat16,
    torch.float16: _cuda.Scores.float16,
}


def topk_rows(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, int32 [N, k], ascending; ties to the lower column, NaN ranks with +inf."""
    (N, L), device = scores.shape, scores.device
    if scores.dtype not in _SCORES or k > _cuda.most_k or max(N, L) >= 2**31:
        result: Tensor = _in_triton("topk_rows", scores, k)
        return result
    scores = scores.detach()
    scores = scores if scores.stride(1) == 1 or L == 1 else scores.contiguous()
    indices = torch.empty(N, k, dtype=torch.int32, device=device)
    plan = _cuda.TopkPlan(N, L, k, _multiprocessors(device))
    workspace = _bytes(_cuda.topk_rows_workspace(plan, N, k), device)
    with _on(device):
        _cuda.topk_rows(
            plan, indices.data_ptr(), scores.data_ptr(), _SCORES[scores.dtype], scores.stride(0), N, L, k,
            workspace.data_ptr(), _stream(device),
        )  # fmt: skip
    return indices


def global_topk(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, screening: str = "auto"
) -> Tensor:
    """int32 [N, k]: Triton's global_topk, with the scores filtered and the supports settled by CUDA kernels."""
    triton = import_module("sparc_fast.kernels.global_topk")
    support: Tensor = triton.select(x, W_enc, pre_bias, latent_bias, k, screening, _selection(triton, k))
    return support


def local_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    d_streams: Sequence[int],
    screening: str = "auto",
) -> Tensor:
    """int32 [N, S, k]: a support for each stream."""
    selection = _selection(import_module("sparc_fast.kernels.global_topk"), k)
    supports: Tensor = import_module("sparc_fast.kernels.local_topk").select_in_streams(
        x, W_enc, pre_bias, latent_bias, k, d_streams, screening, selection
    )
    return supports


def _selection(triton: Any, k: int) -> Any:
    return triton.Selection(_take_in, _settle) if k <= _cuda.most_k else triton.TRITON


def _take_in(
    product: Tensor, first: int, chunk: int, bias: Tensor, of_w: Tensor, of_x: Tensor, candidates: Any, k: int,
    bounds: tuple[float, float, float],
) -> None:  # fmt: skip
    (N, m), device = product.shape, product.device
    numbers = [bias[first:], *(row[first:] for row in of_w)]
    latents = [number.data_ptr() for number in numbers] + [0, 0] * (len(of_w) == 1)
    samples = [row.data_ptr() for row in of_x]
    with _on(device):
        _cuda.filter_scores(
            _cuda.FilterPlan(m, k, candidates.capacity), _state(candidates), product.data_ptr(), N, first, m, latents,
            samples, k, bounds, _stream(device),
        )  # fmt: skip


def _settle(
    x: Tensor, pre_bias: Tensor, W: Tensor, bias: Tensor, first_row: int, N: int, x_norm: Tensor, w_norm: Tensor,
    candidates: Any, k: int, rounding: float, slack: float, indices: Tensor, given_up: Tensor, total: Tensor,
) -> None:  # fmt: skip
    with _on(x.device):
        _cuda.settle_supports(
            _state(candidates), _numbers(x), x.stride(0), _numbers(pre_bias), _numbers(W), W.stride(0), bias.data_ptr(),
            x.shape[1], first_row, N, x_norm.data_ptr(), w_norm.data_ptr(), k, rounding, slack, indices.data_ptr(),
            given_up.data_ptr(), total.data_ptr(), _stream(x.device),
        )  # fmt: skip


def _state(candidates: Any) -> Any:
    return _cuda.Candidates([tensor.data_ptr() for tensor in candidates[:6]], candidates.capacity)


def _numbers(tensor: Tensor) -> Any:
    return _cuda.Numbers(tensor.data_ptr(), _SCORES[tensor.dtype])


def invert_indices(indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    n, device = indices.numel(), indices.device
    if max(n, n_latents + 1) >= 2**31:
        offsets, entries = _in_triton("invert_indices", indices, n_latents)
        return offsets, entries
    if indices.dtype != torch.int32:  # clamped first, so that none wraps into range
        indices = indices.clamp(-1, n_latents).to(torch.int32)
    indices = indices.contiguous()
    offsets = torch.empty(n_latents + 1, dtype=torch.int64, device=device)
    entries = torch.empty(n, dtype=torch.int64, device=device)
    workspace = _bytes(_cuda.invert_indices_workspace(n, n_latents), device)
    with _on(device):
        _cuda.invert_indices(
            offsets.data_ptr(), entries.data_ptr(), indices.data_ptr(), n, n_latents, workspace.data_ptr(),
            _stream(device),
        )  # fmt: skip
    return offsets, entries


def __getattr__(name: str) -> Any:
    """An operator that has no CUDA kernel is Triton's."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("sparc_fast.kernels"), name)


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
