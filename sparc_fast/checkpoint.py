"""A model in one safetensors file: weights as tensors, configuration as JSON in the header.

One file, so that weights and configuration cannot disagree and replacing a checkpoint is one atomic rename.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparc_fast.files import as_path, atomic_path

__all__ = ["FORMAT", "load", "load_tensors", "save", "save_in_parts", "tensors_of", "under"]

FORMAT = "sparc_fast.SPARC/1"
LOAD_MODEL = ": sparc_fast.training.load_model reads a run's folder and its checkpoints"
NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""What safetensors calls them; the last come first in its files."""


def save(path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], form: str = FORMAT) -> None:
    """Write tensors and configuration to `path`, atomically; `form` says what they are."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        # one entry: safetensors writes several in an order of its own, and equal models should be equal files
        save_file(contiguous, temporary, metadata={form: json.dumps(dict(config))})


@contextmanager
def save_in_parts(
    path: str | Path,
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    config: Mapping[str, Any],
    form: str = FORMAT,
) -> Iterator[Callable[[str, Tensor], None]]:
    """As `save`, for tensors of these dtypes and shapes that come row by row: ``write(name, rows)`` goes on with one.

    The file has the bytes that safetensors would write.

    Raises:
        ValueError: when the block ends, rows are missing; no file is written.
    """
    header: dict[str, Any] = {"__metadata__": {form: json.dumps(dict(config))}}
    end = 0
    places = {dtype: place for place, dtype in enumerate(reversed(NAMES))}
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (places[item[1][0]], item[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        done = dict.fromkeys(tensors, 0)

        def write(name: str, rows: Tensor) -> None:
            dtype, shape = tensors[name]
            first, last = done[name], done[name] + len(rows)
            if rows.dtype != dtype or tuple(rows.shape[1:]) != tuple(shape[1:]) or last > shape[0]:
                expected = f"{dtype} {[shape[0] - first, *shape[1:]]} at most"
                raise ValueError(f"rows of {name} must be {expected}, got {rows.dtype} {list(rows.shape)}")
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            file.seek(8 + len(text) + header[name]["data_offsets"][0] + first * row_bytes)
            file.write(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            done[name] = last

        yield write
        if missing := {name: shape[0] - done[name] for name, (_, shape) in tensors.items() if done[name] < shape[0]}:
            raise ValueError(f"tensors must be written whole, but rows are missing: {missing}")


def load(path: str | Path, form: str = FORMAT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration) from `path`; ValueError says what is wrong with a truncated or foreign file."""
    from safetensors import SafetensorError, safe_open

    expected = f"path must be {'a model' if form == FORMAT else 'codes'} saved by sparc_fast"

    path = as_path(path, "path")
    if path.is_dir():
        raise FileNotFoundError(f"{expected}, but {path} is a folder{LOAD_MODEL if form == FORMAT else ''}")
    if not path.is_file():
        raise FileNotFoundError(f"{expected}, but there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{expected}, but {path} is truncated or foreign: {error}") from error
    if form not in metadata:
        of_run = (
            LOAD_MODEL if form == FORMAT and any(name.startswith("sparc_fast.training/") for name in metadata) else ""
        )
        raise ValueError(f"{expected} ({form}), but {path} says {sorted(metadata)}{of_run}")
    try:
        config = json.loads(metadata[form])
    except json.JSONDecodeError as error:
        raise ValueError(f"{expected}, but {path} has no configuration") from error
    return tensors, config


def tensors_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """``model.*`` and ``optimizer.<parameter>.*``; on a CPU they are the tensors themselves, not copies."""
    state = optimizer.state_dict()["state"]
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, name in enumerate(_parameters(model)):
        tensors.update({f"optimizer.{name}.{key}": value for key, value in state.get(i, {}).items()})
    return tensors


def load_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """What `tensors_of` gave, back in place."""
    model.load_state_dict(under("model.", tensors))
    state = {i: under(f"optimizer.{name}.", tensors) for i, name in enumerate(_parameters(model))}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensors[name] for name in tensors if name.startswith(prefix)}


def _parameters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]
