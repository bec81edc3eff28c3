"""silence[l] = samples since latent l last fired in any stream, over a batch seen as one block, in place.

Everyone's silence grows by N; then every position of a support with a value > 0 writes 0 to its latent. Positions that
meet at one latent write the same 0, so their order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.launching import launch


def choice() -> dict[str, int]:
    # estimated, not measured: one pass over values and indices, far below the time of a launch
    return {"BLOCK": 1024, "num_warps": 4}


def count_silence(silence: Tensor, values: Tensor, indices: Tensor) -> None:
    values, indices = values.detach().contiguous(), indices.contiguous()
    N, S, k = values.shape
    sources = S if indices.ndim == 2 else 1  # streams that share an index
    silence.add_(N)
    chosen = choice()
    grid = (triton.cdiv(indices.numel(), chosen["BLOCK"]),)
    launch(
        _count_silence_kernel, grid, silence, silence.stride(0), values, indices, indices.numel(), len(silence), k,
        SOURCES=sources, **chosen,
    )  # fmt: skip
    torch.autograd.graph.increment_version([silence])


@triton.jit
def end_silence(
    block, silence, stride, values, indices, positions, L, k, SOURCES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of the latents that fired at a block of positions."""
    p = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = p < positions
    l = tl.load(indices + p, mask=live, other=-1).to(tl.int64)
    fired = tl.zeros([BLOCK], tl.int32)
    for s in range(SOURCES):
        at = (p // k * SOURCES + s) * k + p % k
        fired |= (tl.load(values + at, mask=live, other=0).to(tl.float32) > 0).to(tl.int32)
    tl.store(silence + l * stride, tl.zeros([BLOCK], tl.int64), mask=(fired != 0) & (l >= 0) & (l < L))


@triton.jit(do_not_specialize=["positions"])
def _count_silence_kernel(
    silence, stride, values, indices, positions, L, k, SOURCES: tl.constexpr, BLOCK: tl.constexpr
):
    end_silence(tl.program_id(0), silence, stride, values, indices, positions, L, k, SOURCES, BLOCK)
