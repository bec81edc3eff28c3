"""Other people's pickled checkpoints: tensors alone are read, and nothing in them runs."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["load_tensors"]


def load_tensors(path: Path, owner: str) -> dict[str, Tensor]:
    """A state_dict of `owner`, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or foreign, or holds anything but tensors, of which nothing runs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint of {owner}, but there is no file {path}")
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that are refused anyhow
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"path must hold tensors alone, but {path} is no checkpoint, or holds other pickled objects; "
                f"loading those could run code, and is refused: {_reason(error)}"
            ) from error
        except Exception as error:  # a foreign file can raise anything
            raise ValueError(
                f"path must be a PyTorch checkpoint, but {path} is truncated or foreign: {error}"
            ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        kind = "other objects beside tensors" if isinstance(tensors, dict) else type(tensors).__name__
        raise ValueError(f"path must be a state_dict of {owner}, but {path} holds {kind}")
    return tensors


def _reason(error: pickle.UnpicklingError) -> str:
    """What was refused, without the advice how to trust it."""
    return str(error.__context__ or error).partition(". ")[0]
