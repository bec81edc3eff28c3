"""Safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from .flat import FlatReader
from .readers import Reader, choose_name

__all__ = ["open_file", "read_ids"]

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def open_file(path: Path, name: str | None) -> Reader:
    """Rows of one of the file's tensors."""
    with _opened(path) as file:
        name = choose_name(file.keys(), name, path)
        tensor = file.get_slice(name)
        shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
    if kind not in DTYPES:
        raise ValueError(f"{path}[{name}] must hold one of {', '.join(DTYPES)}, got {kind}")
    with path.open("rb") as raw:
        header_bytes = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(header_bytes))
    return FlatReader(path, f"{path}[{name}]", shape, DTYPES[kind], 8 + header_bytes + header[name]["data_offsets"][0])


def read_ids(path: Path, name: str | None) -> npt.NDArray[Any]:
    """One of the file's tensors."""
    with _opened(path) as file:
        found: npt.NDArray[Any] = file.get_tensor(choose_name(file.keys(), name, path))
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:  # checks the whole header against the file's length
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, but is truncated or foreign: {error}") from error
