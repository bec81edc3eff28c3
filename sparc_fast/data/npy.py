"""NumPy's .npy files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .flat import FlatReader
from .readers import Reader, numpy_dtype, refuse_name

__all__ = ["open_file", "read_ids"]


def open_file(path: Path, name: str | None) -> Reader:
    """Rows of a C-ordered array; two-byte void, as which numpy saves ml_dtypes' bfloat16, is bfloat16."""
    refuse_name(path, name, "array")
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # reads the header and checks the length; never unpickles
    except ValueError as error:
        raise ValueError(f"{path} must hold an array of numbers, but is truncated or foreign: {error}") from error
    if array.ndim == 2 and not array.flags.c_contiguous:
        raise ValueError(f"{path} must be C-ordered, got Fortran order; save np.ascontiguousarray(array)")
    dtype = torch.bfloat16 if array.dtype == np.dtype("V2") else numpy_dtype(array.dtype)
    if dtype is None:
        raise ValueError(
            f"{path} must hold float16, bfloat16, float32 or float64 in this byte order, got {array.dtype}"
        )
    return FlatReader(path, str(path), array.shape, dtype, array.offset)


def read_ids(path: Path, name: str | None) -> npt.NDArray[Any]:
    """The array."""
    refuse_name(path, name, "array")
    try:
        found: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"ids in {path} must be integers or text, saved as array.astype(str): {error}") from error
    return found
