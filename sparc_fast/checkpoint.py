"""A model in one safetensors file: weights as tensors, configuration as JSON in the header.

One file, so that weights and configuration cannot disagree and replacing a checkpoint is one atomic rename.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparc_fast.files import atomic_path

__all__ = ["FORMAT", "load", "save"]

FORMAT = "sparc_fast.SPARC/1"


def save(path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], form: str = FORMAT) -> None:
    """Write tensors and configuration to `path`, atomically; `form` says what they are."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        # one entry: safetensors writes several in an order of its own, and equal models should be equal files
        save_file(contiguous, temporary, metadata={form: json.dumps(dict(config))})


def load(path: str | Path, form: str = FORMAT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration) from `path`; ValueError says what is wrong with a truncated or foreign file."""
    from safetensors import SafetensorError, safe_open

    expected = f"path must be {'a model' if form == FORMAT else 'codes'} saved by sparc_fast"

    if not Path(path).is_file():
        raise FileNotFoundError(f"{expected}, but there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{expected}, but {path} is truncated or foreign: {error}") from error
    if form not in metadata:
        raise ValueError(f"{expected} ({form}), but {path} says {sorted(metadata)}")
    try:
        config = json.loads(metadata[form])
    except json.JSONDecodeError as error:
        raise ValueError(f"{expected}, but {path} has no configuration") from error
    return tensors, config
