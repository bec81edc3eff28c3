"""Tensors written by torch.save."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .readers import Reader, TensorReader, choose_name, refuse_name

__all__ = ["open_file", "read_ids"]

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # with which a file of before torch 1.6 begins


def open_file(path: Path, name: str | None) -> Reader:
    """Rows of a tensor, or of a tensor in a dictionary of tensors; mapped, and never unpickled."""
    loaded = _load_mapped(path)
    if isinstance(loaded, Tensor):
        refuse_name(path, name, "tensor")
        return TensorReader(loaded, str(path))
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    name = choose_name(tensors, name, path)
    return TensorReader(tensors[name], f"{path}[{name}]")


def read_ids(path: Path, name: str | None) -> npt.NDArray[Any]:
    """A tensor, or an entry of a dictionary."""
    found: Any = _load_mapped(path)
    if isinstance(found, dict):
        found = found[choose_name(found, name, path)]
    else:
        refuse_name(path, name, "tensor")
    return found.numpy() if isinstance(found, Tensor) else np.asarray(found)


def _load_mapped(path: Path) -> Tensor | dict[str, Tensor]:
    """What the file holds, with weights_only=True."""
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path} must hold tensors only, as today's torch.save writes them, but it {_why(path, error)}"
        ) from error
    if not isinstance(loaded, Tensor | dict):
        raise ValueError(f"{path} must hold a tensor or a dictionary of tensors, got {type(loaded).__name__}")
    return loaded


def _why(path: Path, error: Exception) -> str:
    """What is in the file instead; torch's own words advise to unpickle, which runs whatever code a file holds."""
    text = str(error)
    if "mmap can only be used" in text:
        with path.open("rb") as file:
            if file.read(len(LEGACY)) != LEGACY:
                return "is truncated or foreign"
        return "is in the format from before torch 1.6: load it with torch.load and save it again"
    if (named := re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)", text)) is None:
        return f"is truncated or foreign: {text.splitlines()[0] if text else type(error).__name__}"
    found = named.group(1) or named.group(2)
    if found.startswith("numpy"):
        return f"holds NumPy arrays ({found}): save torch.from_numpy(array), or the array itself by np.save"
    return f"holds other objects ({found}): save a dictionary of the tensors alone"
