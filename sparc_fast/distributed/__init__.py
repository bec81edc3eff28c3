"""Latents over many devices, exact: a model is shared between the ranks of torch.distributed, latent by latent."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sparc_fast.distributed.checkpoints import State, is_checkpoint, read, rows_here, write
    from sparc_fast.distributed.launch import check_same, leads, mesh_of
    from sparc_fast.distributed.sharding import received, shard

__all__ = [
    "State",
    "check_same",
    "is_checkpoint",
    "is_running",
    "leads",
    "mesh_of",
    "read",
    "received",
    "rows_here",
    "shard",
    "torchrun",
    "write",
]

_PLACES = {
    "checkpoints": ("State", "is_checkpoint", "read", "rows_here", "write"),
    "launch": ("check_same", "leads", "mesh_of"),
    "sharding": ("received", "shard"),
}


def is_running() -> bool:
    """Whether this process is a rank of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def torchrun() -> AbstractContextManager[None]:
    """In a process that torchrun started, a rank of torch.distributed while this lasts; in others, nothing."""
    if not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched() or is_running():
        return nullcontext()
    from sparc_fast.distributed.launch import joined

    return joined()


def __getattr__(name: str) -> Any:
    """Loaded on first use: one process needs none of it."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
