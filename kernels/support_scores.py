"""scores[n, j] = h[n, indices[n, j]] of global_topk, as it is ranked: NaN is +inf, and a zero is +0.

A program takes R latents of one sample, whose scores are those that global_topk ranks by.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.global_topk import dense_rows, exact_scores, full_choice
from sparc_fast.kernels.launching import launch
from sparc_fast.ops.layout import wide_type
from sparc_fast.ops.reference import summed_bias


@triton.jit(do_not_specialize=["k"])
def _support_scores_kernel(
    scores, x, x_stride, pre_bias, W, W_stride, bias, indices, D, k,
    SUM: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * R + tl.arange(0, R)
    wanted = slot < k
    latent = tl.load(indices + row * k + slot, mask=wanted, other=0)
    score = exact_scores(x + row * x_stride, pre_bias, W, W_stride, bias, latent, wanted, D, SUM, R, BLOCK_D)
    score = tl.where(score == score, tl.where(score == 0, 0.0, score), float("inf"))
    tl.store(scores + row * k + slot, score, mask=wanted)


def choice(D: int, k: int, item_size: int) -> dict[str, int]:
    # estimated, not measured: 8 KB of W in flight, as where samples are scored in full, in programs of few threads
    chosen = full_choice(D, item_size)
    rows = min(chosen["R"], max(1, 1 << (k - 1).bit_length()))
    return {"R": rows, "BLOCK_D": chosen["BLOCK_D"], "num_warps": 4}


def support_scores(x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, indices: Tensor) -> Tensor:
    x, W, pre_bias = dense_rows(x.detach()), dense_rows(W_enc.detach()), pre_bias.detach().contiguous()
    (N, k), D = indices.shape, x.shape[1]
    sums = torch.promote_types(wide_type(x.dtype), wide_type(pre_bias.dtype))
    scores = torch.empty(N, k, dtype=sums, device=x.device)
    chosen = choice(D, k, W.element_size())
    is_float64 = sums == torch.float64
    launch(
        _support_scores_kernel, (N, triton.cdiv(k, chosen["R"])), scores, x, x.stride(0), pre_bias, W, W.stride(0),
        summed_bias(latent_bias.detach()), indices.contiguous(), D, k,
        SUM=tl.float64 if is_float64 else tl.float32, enable_fp_fusion=not is_float64, **chosen,
    )  # fmt: skip
    return scores
