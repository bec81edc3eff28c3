"""A checkpoint that ranks write together: a folder of torch.distributed.checkpoint, whatever number of ranks reads it.

Beside it is state.json: what is no tensor, and the hash of every file. The folder has its name when all of it is there.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sparc_fast.checkpoint import tensors_of
from sparc_fast.files import atomic_path, flush, sha256_of
from sparc_fast.whole import Whole

from .model_file import DIMENSIONS
from .shards import Shards

if TYPE_CHECKING:
    from sparc_fast.model import SPARC
    from sparc_fast.optim import SparcAdam

FORMAT = "sparc_fast.sharded/1"
STATE = "state.json"


class State:
    """A model, and an optimizer on it, for `torch.distributed.checkpoint`; any number of ranks reads what it wrote.

    What has latents is a DTensor, sharded along them, on the memory that it has in training; what all ranks hold, and
    everything in one process, is a plain tensor. All ranks call it together::

        dcp.save({"training": State(model, optimizer)}, checkpoint_id=folder)
        dcp.load({"training": State(model, optimizer)}, checkpoint_id=folder)  # into those that are there
    """

    def __init__(self, model: SPARC, optimizer: SparcAdam | None = None) -> None:
        if optimizer is not None and optimizer.model is not model:
            raise ValueError("optimizer must be of the model, got one of another")
        self._model, self._optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """``model.<parameter or buffer>`` and ``optimizer.<parameter>.<step, exp_avg, exp_avg_sq or master>``."""
        tensors, shards = self._tensors(), self._model._shards
        return _distributed(tensors, shards) if isinstance(shards, Shards) else dict(tensors)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What `state_dict` gave, of as many ranks.

        Raises:
            ValueError: it is of another model.
        """
        tensors = self._tensors()
        given = {name: _local(state_dict[name]) for name in tensors if name in state_dict}
        for name, tensor in tensors.items():
            if name not in given or given[name].shape != tensor.shape:
                got = list(given[name].shape) if name in given else "none"
                raise ValueError(f"state_dict must hold {name} {list(tensor.shape)} of this rank, got {got}")
        with self._model._rows_left_behind():
            for name, tensor in tensors.items():
                tensor.copy_(given[name])
            if self._optimizer is not None:
                self._optimizer._all_current()

    @torch.no_grad()
    def _tensors(self) -> dict[str, Tensor]:
        if self._optimizer is None:
            return {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        self._optimizer._all_states()
        return tensors_of(self._model, self._optimizer)


def is_checkpoint(path: Path) -> bool:
    return (path / STATE).is_file()


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], shards: Whole) -> None:
    """Write what all ranks hold, atomically.

    Raises:
        OSError: it cannot be written; on every rank, and what was there is untouched.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    assert isinstance(shards, Shards)
    exchange = shards.all
    unfinished = path.with_name(f".{path.name}")
    with exchange.agreed("clear"):
        if shards.leads:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    with exchange.agreed("write"), _as_os_errors(unfinished):
        with _quiet():
            save(_distributed(tensors, shards), checkpoint_id=unfinished, process_group=exchange.group)
        own = {file.name: sha256_of(file) for file in unfinished.glob(f"__{shards.rank}_*")}
    hashes = {name: digest for part in exchange.objects(json.dumps(own)) for name, digest in json.loads(part).items()}
    with exchange.agreed("publish"):
        if not shards.leads:
            return
        hashes |= {file.name: sha256_of(file) for file in unfinished.glob(".metadata")}
        content = {"format": FORMAT, "sha256": hashes, "state": dict(state)}
        with atomic_path(unfinished / STATE) as temporary:
            temporary.write_text(json.dumps(content, allow_nan=False))
        if path.exists():
            shutil.rmtree(path)
        os.replace(unfinished, path)
        flush(path.parent)


def read(path: Path, shards: Whole) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(this rank's rows of every tensor, state), whatever number of ranks wrote them; or all rows, without ranks.

    Raises:
        ValueError: a file is damaged or missing.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    with shards.agreed("files"):  # before any is read by all together
        state = _checked(path, shards)
    with _quiet():
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {}
        for name, about in stored.items():
            assert isinstance(about, TensorStorageMetadata)
            shape = list(about.size)
            if (dim := _dimension(name)) is not None:
                rows = shards.rows(shape[dim])
                shape[dim] = rows.stop - rows.start
            tensors[name] = torch.empty(shape, dtype=about.properties.dtype, device="cpu")
        if isinstance(shards, Shards):
            load(_distributed(tensors, shards), checkpoint_id=path, process_group=shards.all.group)
        else:
            load(dict(tensors), checkpoint_id=path, no_dist=True)
    return tensors, state


def _checked(path: Path, shards: Whole) -> dict[str, Any]:
    """The state of a checkpoint; each rank looks at some of the files."""
    try:
        content = json.loads((path / STATE).read_text())
        hashes, state = content["sha256"], content["state"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path must be a checkpoint, but {path} has no {STATE} that can be read: {error}") from error
    for number, (name, expected) in enumerate(sorted(hashes.items())):
        mine, file = number % shards.ranks == shards.rank, path / name
        if mine and not (file.is_file() and sha256_of(file) == expected):
            raise ValueError(f"path must be a checkpoint, but {path} is damaged: {name} is not what was written")
    return cast("dict[str, Any]", state)


def rows_here(tensors: Mapping[str, Tensor], shards: Whole) -> dict[str, Tensor]:
    """Of the tensors of a whole checkpoint, this rank's rows."""
    found = {}
    for name, tensor in tensors.items():
        if (dim := _dimension(name)) is not None:
            rows = shards.rows(tensor.shape[dim])
            tensor = tensor.narrow(dim, rows.start, rows.stop - rows.start).clone()
        found[name] = tensor
    return found


def _dimension(name: str) -> int | None:
    """Along which a tensor ``model.<parameter>`` or ``optimizer.<parameter>.<state>`` is shared."""
    owner, _, rest = name.partition(".")
    parameter, _, of_state = rest.partition(".")
    return None if owner not in ("model", "optimizer") or of_state == "step" else DIMENSIONS.get(parameter)


def _distributed(tensors: Mapping[str, Tensor], shards: Shards) -> dict[str, Any]:
    """Those that are shared as DTensors, on the memory they have."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        dim, tensor = _dimension(name), tensor.detach()
        if dim is None:
            found[name] = tensor
            continue
        shape = list(tensor.shape)
        shape[dim] = shards.n_latents
        placements = [Shard(dim)] if shards.replicas is None else [Replicate(), Shard(dim)]
        stride = torch.empty(shape, dtype=tensor.dtype, device="meta").stride()
        found[name] = DTensor.from_local(
            tensor, shards.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )
    return found


def _local(tensor: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return torch.as_tensor(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


@contextmanager
def _as_os_errors(path: Path) -> Iterator[None]:
    """What torch.distributed.checkpoint raises of a full disk is of its own kind."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))
        reason = first[0] if isinstance(first, tuple) else first
        raise OSError(f"cannot write the checkpoint {path}: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
