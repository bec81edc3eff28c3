"""Triton's interpreter without the three things that take most of its time: it computes the same."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.runtime import interpreter

own_type, own_patch, own_reduce = (
    interpreter._get_np_dtype,
    interpreter._patch_lang,
    interpreter.ReduceOps.generic_reduce,
)
scalar_type = cache(own_type)  # which makes a table of all types whenever it is asked for one


def numpy_type(type: Any) -> np.dtype[Any]:
    return np.dtype(np.uint64) if type.scalar.is_ptr() else scalar_type(type.scalar)


@cache
def patch_for_good(function: Any) -> Any:
    """The language is made the interpreter's for a function's first call, where Triton's own does so for every call."""
    own_patch(function)
    return SimpleNamespace(restore=lambda: None)


def reduce_by_halves(reduction: Any, parts: tuple[Any, ...]) -> list[Any]:
    """Along an axis whole halves are combined, where Triton's own combines one element after another.

    Blocks are powers of two, and what combines them is associative.
    """
    if (axis := reduction.axis) is None:
        return own_reduce(reduction, parts)
    types = [part.dtype for part in parts]
    while parts[0].handle.data.shape[axis] > 1:
        halves = zip(*(np.split(part.handle.data, 2, axis) for part in parts), strict=True)
        first, second = ([reduction.to_tensor(*each) for each in zip(half, types, strict=True)] for half in halves)
        combined = reduction.combine_fn.fn(*first, *second)
        parts = combined if isinstance(combined, tuple) else (combined,)
    reduced = [part.handle.data if reduction.keep_dims else part.handle.data.squeeze(axis) for part in parts]
    return [reduction.to_tensor(*each) for each in zip(reduced, types, strict=True)]


def make_faster() -> None:
    """In this process."""
    interpreter._get_np_dtype = numpy_type
    interpreter._patch_lang = patch_for_good
    interpreter.ReduceOps.generic_reduce = reduce_by_halves
