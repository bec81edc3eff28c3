"""How far from the truth an operator may be: tolerance is earned, not chosen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from operands import OPERATORS, Operands
from torch import Tensor

from sparc_fast.ops import reference
from sparc_fast.ops.backends import Backend


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


def check_accuracy(name: str, o: Operands, backend: Backend, factor: float = 2.0) -> None:
    """The operator on this backend against itself in plain PyTorch, of the same dtype and of float64."""
    run = OPERATORS[name]
    compare(run(o, backend), run(o, reference), run(o.to(torch.float64), reference), factor)


def compare(got: Iterable[Tensor], same_dtype: Iterable[Tensor], truth: Iterable[Tensor], factor: float = 2.0) -> None:
    """Numbers are as accurate as those of the same dtype, and integers equal."""
    for ours, plain, exact in zip(got, same_dtype, truth, strict=True):
        if ours.is_floating_point():
            assert_as_accurate(ours, plain, exact, factor)
        else:
            assert torch.equal(ours, exact)


def assert_equal(got: Iterable[Tensor], expected: Iterable[Tensor], equal_nan: bool = False) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=equal_nan)
