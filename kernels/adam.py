"""Adam (Kingma & Ba, arXiv 1412.6980) as every kernel that moves something makes a step of it, and its constants.

Every product that meets a sum is an explicit fma, and the same instructions approximate the root and the quotient, so
that no kernel's compiler chooses another order: a step that is replayed has the bits of the step that was missed.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.launching import launch

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Constants(NamedTuple):
    """What kernels read of some steps; on the device once `write` has been launched, or `write_constants` in another
    kernel. Worked out in float64 and rounded once."""

    numbers: Tensor
    """[steps, 7]: beta_1, beta_2, 1 - beta_1, 1 - beta_2, eps, lr / (1 - beta_1^t), 1 / sqrt(1 - beta_2^t)."""
    noise: Tensor | None
    """With a seed, int32 [steps, 2]: the two words that the noise of a step's roundings comes from."""
    told: tuple[Tensor | int, ...]
    """What these are worked out from."""

    @classmethod
    def of(
        cls, lr: Tensor, settings: Tensor, first_step: Tensor, steps: int, dtype: torch.dtype, seed: int | None
    ) -> Constants:
        """`lr` [steps] and `settings` [steps, 3] = (beta_1, beta_2, eps) of each step are float64, or one row for all;
        so is `first_step`, the t of the first row."""
        numbers = torch.empty(steps, 7, dtype=dtype, device=lr.device)
        noise = None if seed is None else torch.empty(steps, 2, dtype=torch.int32, device=lr.device)
        strides = (lr.stride(0) if lr.ndim else 0, settings.stride(0) if settings.ndim > 1 else 0)
        return cls(numbers, noise, (lr, settings, *strides, first_step, steps, *_words(seed or 0)))

    def write(self) -> Constants:
        grid = (triton.cdiv(len(self.numbers), 128),)
        launch(_constants_kernel, grid, self.numbers, self.noise, *self.told, BLOCK=128, num_warps=4)
        return self


def _words(seed: int) -> tuple[int, int]:
    """The lower and the upper 32 of 64 bits, as int32."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    # full() puts a number on the device without a copy from the host, which would wait
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


@cache
def settings_on(beta_1: float, beta_2: float, eps: float, device: torch.device) -> Tensor:
    """Kept for good, as a captured CUDA graph goes on reading it: 512 bytes of the device for all betas ever used."""
    return torch.tensor([beta_1, beta_2, eps], dtype=torch.float64, device=device)


@triton.jit
def adam_numbers(lr, beta_1, beta_2, eps, step, TYPE: tl.constexpr):
    """What `adam` is told by, worked out in float64 and rounded once."""
    rate = lr / (1 - tl.exp(step * tl.log(beta_1)))
    scale = 1 / tl.sqrt(1 - tl.exp(step * tl.log(beta_2)))
    rest_1, rest_2 = 1 - beta_1, 1 - beta_2
    return (beta_1.to(TYPE), beta_2.to(TYPE), rest_1.to(TYPE), rest_2.to(TYPE), eps.to(TYPE), rate.to(TYPE),
            scale.to(TYPE))  # fmt: skip


@triton.jit
def write_constants(
    i, constants, noise, lr, settings, stride_lr, stride_settings, first_step, steps, seed_low, seed_high
):  # fmt: skip
    """`Constants` of steps i."""
    live = i < steps
    step = tl.load(first_step) + i
    beta_1 = tl.load(settings + i * stride_settings, mask=live, other=0.5)
    beta_2 = tl.load(settings + i * stride_settings + 1, mask=live, other=0.5)
    eps = tl.load(settings + i * stride_settings + 2, mask=live, other=0)
    lr = tl.load(lr + i * stride_lr, mask=live, other=0)
    numbers = adam_numbers(lr, beta_1, beta_2, eps, step, constants.dtype.element_ty)
    for n in tl.static_range(7):
        tl.store(constants + i * 7 + n, numbers[n], mask=live)
    if noise is not None:
        nothing = tl.zeros_like(i).to(tl.uint32)
        a, b = absorb(nothing, nothing, nothing + seed_low.to(tl.uint32, bitcast=True))
        a, b = absorb(a, b, nothing + seed_high.to(tl.uint32, bitcast=True))
        a, b = absorb(a, b, step.to(tl.int64).to(tl.uint32))
        tl.store(noise + 2 * i, a.to(tl.int32, bitcast=True), mask=live)
        tl.store(noise + 2 * i + 1, b.to(tl.int32, bitcast=True), mask=live)


@triton.jit(do_not_specialize=["steps", "seed_low", "seed_high"])
def _constants_kernel(
    constants, noise, lr, settings, stride_lr, stride_settings, first_step, steps, seed_low, seed_high,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    write_constants(
        i, constants, noise, lr, settings, stride_lr, stride_settings, first_step, steps, seed_low, seed_high
    )  # fmt: skip


@triton.jit
def root(a):
    """Of float32 approximate, at most one unit in the last place off, also below the normal numbers."""
    if INTERPRETED or a.dtype == tl.float64:
        result = tl.sqrt(a)
    else:
        result = tl.inline_asm_elementwise("sqrt.approx.f32 $0, $1;", "=f,f", [a], a.dtype, is_pure=True, pack=1)
    return result


@triton.jit
def reciprocal(a):
    """Of float32 approximate, as far off; of numbers beyond 2^126, and below the normal ones, of infinity and 0."""
    if INTERPRETED or a.dtype == tl.float64:
        result = 1 / a
    else:
        result = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [a], a.dtype, is_pure=True, pack=1)
    return result


@triton.jit
def adam(w, gradient, m, v, constants):
    """The row and its moments, in its type, after a step, with the row of `Constants` at `constants`."""
    beta_1, beta_2 = tl.load(constants), tl.load(constants + 1)
    rest_1, rest_2 = tl.load(constants + 2), tl.load(constants + 3)
    eps, rate, scale = tl.load(constants + 4), tl.load(constants + 5), tl.load(constants + 6)
    return adam_by(w, gradient, m, v, (beta_1, beta_2, rest_1, rest_2, eps, rate, scale))


@triton.jit
def adam_by(w, gradient, m, v, numbers):
    """The same, by `adam_numbers`."""
    beta_1, beta_2, rest_1, rest_2, eps, rate, scale = numbers
    m = tl.fma(m.to(w.dtype), beta_1, rest_1 * gradient)
    v = tl.fma(v.to(w.dtype), beta_2, rest_2 * gradient * gradient)
    inverse = reciprocal(tl.fma(root(v), scale, eps))
    return tl.fma(-(rate * m), inverse, w), m, v


@triton.jit
def mix(x, key):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13) ^ key) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def absorb(a, b, word):
    a = mix(a + word, 0)
    return a, mix(b ^ a, 0)
