"""How far from the truth an operator may be: tolerance is earned, not chosen."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(got: Tensor, same_dtype: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """`got` is at most `factor` times as far from the float64 truth as plain PyTorch in its dtype, plus a rounding.

    In float64 the truth is itself a result: there, some roundings.
    """
    assert got.shape == truth.shape
    assert got.dtype == same_dtype.dtype
    if not got.numel():
        return
    rounding = torch.finfo(got.dtype).eps * truth.abs().max() * (64 if got.dtype == torch.float64 else 1)
    allowed = factor * (same_dtype.double() - truth).abs().max() + rounding
    error = (got.double() - truth).abs().max()
    assert error <= allowed, f"max error {error:.3g} exceeds {allowed:.3g}"
