"""A step of Adam of the biases, one launch for two: by the constants that `update_rows` moves rows by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.adam import adam_by, adam_numbers, scalar, settings_on
from sparc_fast.kernels.launching import launch
from sparc_fast.kernels.update_rows import store_copy
from sparc_fast.ops import reference
from sparc_fast.ops.row_step import AdamStep, Bias


@triton.jit
def _step(bias, gradient, more, M, V, copy, size, block, numbers, BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    w, m, v = tl.load(bias + at, mask=inside), tl.load(M + at, mask=inside), tl.load(V + at, mask=inside)
    total = tl.load(gradient + at, mask=inside).to(w.dtype)
    if more is not None:
        total += tl.load(more + at, mask=inside).to(w.dtype)
    w, m, v = adam_by(w, total, m, v, numbers)
    tl.store(bias + at, w, mask=inside)
    tl.store(M + at, m, mask=inside)
    tl.store(V + at, v, mask=inside)
    store_copy(copy, at, w, inside)


@triton.jit
def _grow(counters, stride, size, by, block, BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    place = counters + at.to(tl.int64) * stride
    tl.store(place, tl.load(place, mask=at < size, other=0) + by, mask=at < size)


@triton.jit(do_not_specialize=["by"])
def _step_biases_kernel(
    lr, settings, step, counters, stride, counted, by, a, a_gradient, a_more, a_m, a_v, a_copy, a_size, b, b_gradient,
    b_more, b_m, b_v, b_copy, b_size, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one bias, and in the blocks behind its own of another, if there is one; behind these, counters grow."""
    block, blocks = tl.program_id(0), tl.cdiv(a_size, BLOCK)
    numbers = adam_numbers(
        tl.load(lr), tl.load(settings), tl.load(settings + 1), tl.load(settings + 2), tl.load(step), a.dtype.element_ty
    )
    if block < blocks:
        _step(a, a_gradient, a_more, a_m, a_v, a_copy, a_size, block, numbers, BLOCK)
    more = tl.cdiv(b_size, BLOCK)
    if b is not None and block >= blocks and block < blocks + more:
        _step(b, b_gradient, b_more, b_m, b_v, b_copy, b_size, block - blocks, numbers, BLOCK)
    if counters is not None and block >= blocks + more:
        _grow(counters, stride, counted, by, block - blocks - more, BLOCK)


def choice() -> dict[str, int]:
    # estimated, not measured: a pass over a few arrays, far below the time of a launch
    return {"BLOCK": 512, "num_warps": 4}


def step_biases(biases: Sequence[Bias], adam: AdamStep) -> None:
    if not are_dense(biases):
        reference.step_biases(biases, adam)
        return
    for first in range(0, len(biases), 2):
        step_pair(biases[first : first + 2], adam)


def are_dense(biases: Sequence[Bias]) -> bool:
    return all(tensor.is_contiguous() for one in biases for tensor in _changed(one))


def step_pair(pair: Sequence[Bias], adam: AdamStep, counters: Tensor | None = None, by: int = 0) -> None:
    """Of one or two biases; in the same launch counters grow."""
    device, chosen = pair[0].bias.device, choice()
    numbers = (scalar(adam.lr, torch.float64, device), settings_on(*adam.betas, adam.eps, device),
               scalar(adam.step, torch.float64, device))  # fmt: skip
    growing = (None, 0, 0, by) if counters is None else (counters, counters.stride(0), len(counters), by)
    operands = [part for one in pair for part in _operands(one)]
    nothing = [None] * 6 + [0] if len(pair) == 1 else []
    sizes = [*(one.bias.numel() for one in pair), 0 if counters is None else len(counters)]
    blocks = sum(triton.cdiv(size, chosen["BLOCK"]) for size in sizes)
    launch(_step_biases_kernel, (blocks,), *numbers, *growing, *operands, *nothing, **chosen)
    torch.autograd.graph.increment_version([tensor for one in pair for tensor in _changed(one)])


def _changed(one: Bias) -> list[Tensor]:
    return [tensor for tensor in (one.bias, *one.moments, one.copy) if tensor is not None]


def _operands(one: Bias) -> list[Tensor | int | None]:
    gradient, *more = [part.contiguous() for part in one.gradients]
    copy = None if one.copy is None else one.copy.detach()
    return [one.bias.detach(), gradient, more[0] if more else None, *one.moments, copy, one.bias.numel()]
