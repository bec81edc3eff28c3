"""Batches in memory that earlier batches have left: fresh pages cost more than filling them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparc_fast.ops.huge_pages import empty_rows

__all__ = ["Recycled"]


class Recycled:
    """Gives tensors of one shape and dtype. A tensor is its owner's for as long as anything refers to its memory."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, at_most: int = 2) -> None:
        self._shape, self._dtype, self._at_most = shape, dtype, at_most
        self._memory: list[npt.NDArray[np.uint8]] = []
        self._taken: list[Callable[[], Any]] = []
        """Of each memory, a weak reference to the array that lent it: it dies with the last tensor on it."""

    def take(self) -> Tensor:
        """An uninitialised tensor."""
        for i, taken in enumerate(self._taken):
            if taken() is None:
                return self._lend(i)
        if len(self._memory) == self._at_most:  # their owners keep all of them
            return torch.empty(self._shape, dtype=self._dtype, device="cpu")
        self._memory.append(empty_rows(*self._shape, dtype=self._dtype, device="cpu").view(torch.uint8).numpy())
        self._taken.append(lambda: None)
        return self._lend(len(self._memory) - 1)

    def forget(self) -> None:
        """Keep no memory."""
        self._memory, self._taken = [], []

    def _lend(self, i: int) -> Tensor:
        array = self._memory[i].view()
        self._taken[i] = weakref.ref(array)
        return torch.from_numpy(array).view(self._dtype).view(self._shape)
