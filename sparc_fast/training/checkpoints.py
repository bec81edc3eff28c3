"""One checkpoint, one file: a safetensors file whose header holds the state that is not tensors, and a hash of all.

One file, so that weights, moments and the loader's place cannot disagree and a checkpoint appears by one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparc_fast import checkpoint, distributed
from sparc_fast.checkpoint import under
from sparc_fast.files import as_path, atomic_path
from sparc_fast.model import SPARC
from sparc_fast.whole import WHOLE, Whole

FORMAT = "sparc_fast.training/1"
HASHED_TOGETHER = 2**26  # bytes: pieces that threads hash side by side
AT_ONCE = 2**23  # bytes that are read from a file before their pages are given back


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and plain data to `path`, atomically.

    Raises:
        OSError: it cannot be written, for example because the disk is full; what was there is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one entry: safetensors writes several in an order of its own, and equal checkpoints should be equal files
    header = json.dumps({"sha256": _digest(on_host, state), "state": dict(state)}, allow_nan=False)
    try:
        with atomic_path(path) as temporary:
            save_file(on_host, temporary, metadata={FORMAT: header})
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write the checkpoint {path}: {error}") from error


def read(path: Path, shards: Whole = WHOLE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) from `path`; ValueError where the file is not whole, or not ours, or not what was written.

    Of a file, or of a folder that ranks have written together: this process's rows.
    """
    if path.is_dir():
        return distributed.read(path, shards)
    tensors, state = _checked(path)
    return (dict(tensors) if shards.is_whole else distributed.rows_here(tensors, shards)), state


class _OneByOne(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each of which is mapped alone, and only while somebody has it.

    The pages that have been read are resident until the map of them is gone.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path, self._names = path, names

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _checked(path: Path) -> tuple[_OneByOne, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint of a training run, but there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(FORMAT)
            if header is None:
                raise ValueError(f"path must be a checkpoint of a training run ({FORMAT}), but {path} is none")
            tensors = _OneByOne(path, list(file.keys()))
        content = json.loads(header)
        expected, state = content["sha256"], content["state"]
        found = _digest(tensors, state)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"path must be a checkpoint, but {path} is truncated or damaged: {error}") from error
    if found != expected:
        raise ValueError(f"path must be a checkpoint, but {path} is damaged: its content has another hash")
    return tensors, state


def _digest(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """SHA-256 of names, shapes, dtypes and state, and of the SHA-256s of the tensors' pieces."""
    names = sorted(tensors)
    shapes = [(name, str(tensor.dtype), list(tensor.shape)) for name in names for tensor in [tensors[name]]]
    whole = hashlib.sha256(json.dumps([shapes, state]).encode())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        pieces = ((tensors, name, start) for name in names for start in range(0, tensors[name].nbytes, HASHED_TOGETHER))
        for piece in threads.map(_hash, pieces):
            whole.update(piece)
    return whole.hexdigest()


def _hash(piece: tuple[Mapping[str, Tensor], str, int]) -> bytes:
    tensors, name, start = piece
    digest, stop = hashlib.sha256(), min(start + HASHED_TOGETHER, tensors[name].nbytes)
    for at in range(start, stop, AT_ONCE):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data[at : min(at + AT_ONCE, stop)])
    return digest.digest()


def load_model(path: str | Path, *, device: torch.device | str | None = None, backend: str = "auto") -> SPARC:
    """The model in a checkpoint of a training run, such as ``checkpoints/step-000001000.safetensors``.

    Or in a model file, or the folder of a run that is finished.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, nor a model, or damaged.
    """
    path = as_path(path, "path")
    if path.is_dir() and not distributed.is_checkpoint(path):
        path = path / "model.safetensors"
    try:
        tensors, state = read(path)
    except ValueError as no_checkpoint:
        try:
            return SPARC.load(path, device=device, backend=backend).eval()
        except ValueError:
            raise no_checkpoint from None
    of_model = under("model.", tensors)
    with torch.random.fork_rng(devices=[]):  # the first weights are thrown away: draw nothing for them
        model = SPARC(**state["model"], dtype=of_model["W_enc"].dtype, device=device, backend=backend)
    model.load_state_dict(of_model)
    return model.eval()


def save_model_of(path: Path, to: Path) -> None:
    """``load_model(path).save(to)`` without a second model in memory: rows go from file to file."""
    tensors, state = read(path) if path.is_dir() else _checked(path)
    names = [name.removeprefix("model.") for name in tensors if name.startswith("model.")]
    shapes = {name: (tensor.dtype, tensor.shape) for name in names for tensor in [tensors[f"model.{name}"]]}
    with checkpoint.save_in_parts(to, shapes, state["model"]) as write_rows:
        for name, (dtype, shape) in shapes.items():
            together = max(1, AT_ONCE // (shape[1:].numel() * dtype.itemsize))
            for start in range(0, shape[0], together):
                write_rows(name, tensors[f"model.{name}"][start : start + together])


def find_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with NaN or infinity in it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # NaN comes through, and nothing is allocated
            if not bool((low.isfinite() & high.isfinite()).item()):
                return name
    return None
