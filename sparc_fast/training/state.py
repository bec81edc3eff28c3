"""A run's tensors under names of their own, in and out of the model and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparc_fast import checkpoint
from sparc_fast.model import SPARC
from sparc_fast.optim import SparcAdam

from . import checkpoint_file


def tensors_of(model: SPARC, optimizer: SparcAdam) -> dict[str, Tensor]:
    """``model.*`` and ``optimizer.<parameter>.*``; on a CPU they are the tensors themselves, not copies."""
    state = optimizer.state_dict()["state"]
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, name in enumerate(_parameters(model)):
        tensors.update({f"optimizer.{name}.{key}": value for key, value in state.get(i, {}).items()})
    return tensors


def load_tensors(model: SPARC, optimizer: SparcAdam, tensors: Mapping[str, Tensor]) -> None:
    """What `tensors_of` gave, back in place."""
    model.load_state_dict(_under("model.", tensors))
    state = {i: _under(f"optimizer.{name}.", tensors) for i, name in enumerate(_parameters(model))}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})


def load_model(path: str | Path, *, device: torch.device | str | None = None, backend: str = "auto") -> SPARC:
    """The model in a checkpoint of a training run, such as ``checkpoints/step-000001000.safetensors``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or damaged.
    """
    tensors, state = checkpoint_file.read(Path(path))
    of_model = _under("model.", tensors)
    with torch.random.fork_rng(devices=[]):  # the first weights are thrown away: draw nothing for them
        model = SPARC(**state["model"], dtype=of_model["W_enc"].dtype, device=device, backend=backend)
    model.load_state_dict(of_model)
    return model.eval()


def save_model_of(path: Path, to: Path) -> None:
    """``load_model(path).save(to)`` without a second model in memory: tensors go from file to file."""
    tensors, state = checkpoint_file.read(path)
    checkpoint.save(to, _under("model.", tensors), state["model"])


def find_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with NaN or infinity in it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # NaN comes through, and nothing is allocated
            if not bool((low.isfinite() & high.isfinite()).item()):
                return name
    return None


def _parameters(model: SPARC) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
