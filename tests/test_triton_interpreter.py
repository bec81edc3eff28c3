"""What makes Triton's interpreter faster in these tests changes no result of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
import triton_interpreter as faster
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


def larger_and_first(value: Any, place: Any, other: Any, other_place: Any) -> tuple[Any, Any]:
    ahead = (other > value) | ((other == value) & (other_place < place))
    return tl.where(ahead, other, value), tl.where(ahead, other_place, place)


@pytest.mark.parametrize("shape", [(4, 8), (16,), (1, 2)])
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("keep_dims", [False, True])
def test_halves_reduce_to_what_one_element_after_another_does(
    shape: tuple[int, ...], axis: int, keep_dims: bool
) -> None:
    axis %= len(shape)
    values = np.random.default_rng(0).integers(0, 5, shape).astype(np.float32)
    reduction = interpreter.ReduceOps(axis, SimpleNamespace(fn=larger_and_first), keep_dims)
    places = np.arange(values.size).reshape(shape)
    parts = reduction.to_tensor(values, tl.float32), reduction.to_tensor(places, tl.int32)
    faster.patch_for_good(larger_and_first)
    found, expected = (reduce(reduction, parts) for reduce in (faster.reduce_by_halves, faster.own_reduce))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.type == theirs.type
        assert ours.handle.data.dtype == theirs.handle.data.dtype
        assert np.array_equal(ours.handle.data, theirs.handle.data)


@pytest.mark.parametrize("scalar", [tl.int1, tl.uint8, tl.int64, tl.bfloat16, tl.float16, tl.float64], ids=str)
def test_types_are_those_of_tritons_own_table(scalar: tl.dtype) -> None:
    for type in (
        scalar,
        tl.block_type(scalar, [4]),
        tl.pointer_type(scalar),
        tl.block_type(tl.pointer_type(scalar), [4]),
    ):
        assert faster.numpy_type(type) == faster.own_type(type)
