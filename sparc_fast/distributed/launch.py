"""The processes that torchrun starts: how they find each other, and that they are there for the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sparc_fast.version import __version__
from sparc_fast.whole import Whole

from .shards import Shards
from .together import fingerprint

if TYPE_CHECKING:
    from sparc_fast.data import AlignedFiles


def leads() -> bool:
    return dist.get_rank() == 0


def mesh_of(device: torch.device, replicas: int = 1) -> DeviceMesh:
    """Of all ranks: so many replicas, whose ranks each have latents of their own."""
    ranks = dist.get_world_size()
    if ranks % replicas:
        raise ValueError(f"replicas must divide the number of ranks, {ranks}, got {replicas}")
    if replicas == 1:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("latents",))
    return init_device_mesh(device.type, (replicas, ranks // replicas), mesh_dim_names=("replicas", "latents"))


@contextmanager
def joined() -> Iterator[None]:
    """A rank of torch.distributed while this lasts, as torchrun says."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun keeps its store when it starts ranks again, in which those before left addresses
    store, rank, ranks = next(rendezvous("env://"))
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    wires = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(wires, store=store, rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_same(shards: Whole, settings: Mapping[str, Any], files: AlignedFiles) -> None:
    """Ranks must compute the same thing.

    Raises:
        ValueError: a rank has another version, other settings or other data than rank 0; it names the rank.
    """
    assert isinstance(shards, Shards)
    mine: dict[str, Any] = {
        "sparc_fast": __version__, "torch": str(torch.__version__), **settings,
        "data": fingerprint(files),
    }  # fmt: skip
    for rank, text in enumerate(told := shards.all.objects(json.dumps(mine, default=str))):
        first, other = json.loads(told[0]), json.loads(text)
        if different := [name for name in first if first[name] != other.get(name)]:
            name = different[0]
            raise ValueError(
                f"every rank must have the {name} of rank 0, {first[name]!r}, but rank {rank} has {other.get(name)!r}"
            )
