"""NumPy's arrays as tensors."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["as_tensor", "tensor_of"]


def tensor_of(given: Any) -> Any:
    """An array as a tensor, anything else as it is."""
    return as_tensor(given) if isinstance(given, np.ndarray) else given


def as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Of the same memory, which nobody writes, where torch can take it as it lies; else of a copy."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 or stride % native.itemsize for stride in native.strides):
        native = np.ascontiguousarray(native)
    with warnings.catch_warnings():  # of memory that may not be written, such as that of a file that is mapped
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")
        return torch.from_numpy(native)
