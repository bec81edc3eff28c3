"""What of a step is left when its rows have moved: biases, counters of silence, the loss, the number of the step.

None of it waits for another, but that all counters grow before those of latents that fired become 0: two launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.count_silence import end_silence
from sparc_fast.kernels.launching import launch
from sparc_fast.kernels.loss_summary import Summary, summarize, summary_of
from sparc_fast.kernels.loss_summary import choice as summary_choice
from sparc_fast.kernels.step_biases import are_dense, step_biases, step_pair
from sparc_fast.ops.row_step import AdamStep, Bias


@triton.jit(do_not_specialize=["positions", "N"])
def _finish_step_kernel(
    silence, stride, values, indices, positions, L, k, step, zero_rows, told, nmse, auxk, energy, weights, N,
    SOURCES: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        summarize(zero_rows, told, nmse, auxk, energy, weights, N, S, P, BLOCK_N)
        if step is not None:
            tl.store(step, tl.load(step) + 1)
    else:
        end_silence(tl.program_id(0) - 1, silence, stride, values, indices, positions, L, k, SOURCES, BLOCK)


def choice(S: int) -> dict[str, int]:
    # estimated, not measured: the one program of the loss is waited for
    return {"BLOCK": 2048, **summary_choice(S)}


def finish_step(
    biases: Sequence[Bias], adam: AdamStep, silence: Tensor, values: Tensor, indices: Tensor, counted: Tensor | None,
    nmse: Tensor, auxk: Tensor | None, energy: Tensor, weights: Sequence[float], auxk_coef: float,
) -> Summary:  # fmt: skip
    values, indices = values.detach().contiguous(), indices.contiguous()
    N, S, k = values.shape
    if biases and are_dense(biases):
        step_biases(biases[:-2], adam)
        step_pair(biases[-2:], adam, silence, N)
    else:
        step_biases(biases, adam)
        silence.add_(N)
    operands, summary = summary_of(nmse, auxk, energy, weights, auxk_coef)
    chosen, positions = choice(len(nmse)), indices.numel()
    sources = S if indices.ndim == 2 else 1  # streams that share an index
    programs = 1 + triton.cdiv(positions, chosen["BLOCK"])
    launch(
        _finish_step_kernel, (programs,), silence, silence.stride(0), values, indices, positions, len(silence), k,
        counted, *operands, SOURCES=sources, S=len(nmse), **chosen,
    )  # fmt: skip
    torch.autograd.graph.increment_version([silence])
    return summary
