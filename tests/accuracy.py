"""How far from the truth an operator may be: tolerance is earned, not chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from operands import OPERATORS, SEED, Operands, move_rows, operands, rows_to_update
from torch import Tensor

from sparc_fast.ops import reference
from sparc_fast.ops.backends import Backend
from sparc_fast.ops.row_step import DecoderRows


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


def check_replayed_rows(
    backend: Backend, d_streams: tuple[int, ...], L: int, k: int, dtype: torch.dtype, lrs: Sequence[float],
    eps: float = 1e-8, narrow: bool = False,
) -> None:  # fmt: skip
    """Rows that were left behind and replayed equal, bit for bit, those that made each of these steps."""
    dense = rows_to_update(operands((d_streams, 1, L, k), dtype), narrow)
    dense[4][1] *= 1e-6
    lazy = [tensor.clone() for tensor in dense]
    dense_copies, lazy_copies = ([W.bfloat16() for W in rows[:2]] for rows in (dense, lazy))
    last_step = torch.zeros(L, dtype=torch.int64)
    left_behind = DecoderRows(lazy[1], lazy[4:], d_streams, last_step, lazy_copies[1])
    history = torch.tensor([(lr, 0.9, 0.999, eps) for lr in lrs], dtype=torch.float64)
    for t, lr in enumerate(lrs, 1):
        o = operands((d_streams, 1, L, k), dtype, seed=t)
        used = o.indices[0].long()
        move_rows(backend, dense, o, step=t, lr=lr, eps=eps, copies=dense_copies, seed=SEED)
        backend.replay_rows(left_behind, used, history[: t - 1], SEED)
        move_rows(backend, lazy, o, step=t, lr=lr, eps=eps, copies=lazy_copies, last_step=last_step, seed=SEED)
        assert (last_step[used] == t).all()
        assert_equal([lazy[1][used]], [dense[1][used]])
    assert (last_step < len(lrs)).any()
    backend.replay_rows(left_behind, torch.arange(L), history, SEED)
    assert_equal([*lazy, *lazy_copies], [*dense, *dense_copies])
    assert (last_step == len(lrs)).all()
