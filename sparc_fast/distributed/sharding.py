"""A model whose latents are shared between the ranks of a mesh."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sparc_fast.model import SPARC
from sparc_fast.ops import backends
from sparc_fast.ops.huge_pages import empty_rows
from sparc_fast.selection import BY_THRESHOLD

from .shards import Shards


@torch.no_grad()
def shard(model: SPARC, mesh: DeviceMesh | None = None) -> SPARC:
    """The model with this rank's latents alone; all ranks together are the model that was given to each.

    Every rank gives its own samples, some of a batch or none, to `SparcAdam.step`, `loss`, `encode`, `decode` and
    `translate`, which all ranks call together; losses are those of all samples, and codes and reconstructions those of
    the samples given. Supports are those of one device, bit for bit; sums are, to rounding. Nothing has a gradient:
    `SparcAdam` trains. `save` writes one file, which `SPARC.load` reads on one device.

    Args:
        model: the same on every rank. On the meta device it has no weights yet: then each rank draws its own, the bits
            that one device would with the same seed.
        mesh: of latents, by default all ranks; or of replicas by latents: each replica takes a part of the samples,
            its ranks share the latents, and replicas tell each other what moves their rows, which stay equal bit for
            bit. Its device is the model's, or where it gets one.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError: the ranks' models differ, or there are too few latents.
    """
    if not isinstance(model, SPARC) or not model._shards.is_whole:
        raise ValueError("model must be a SPARC that is whole")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed must be initialized to shard a model: start Python with torchrun")
    device = model.W_enc.device
    if mesh is None:
        kind = device.type if device.type != "meta" else "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("latents",))
    if mesh.ndim > 2 or mesh.mesh.flatten().tolist() != list(range(dist.get_world_size())):
        raise ValueError(f"mesh must be of all ranks in order, latents or replicas by latents, got {mesh}")
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else device
    device = torch.device("cpu") if device.type == "meta" else device
    shards = Shards(mesh, model.n_latents, device)
    about = f"{model.config()} {model.W_enc.dtype}"
    for rank, other in enumerate(shards.all.objects(about)):
        if other != about:
            raise ValueError(f"model must be the same on every rank, but on rank {rank} it is {other}, here {about}")
    return _with_rows(model, shards, device)


def received(model: SPARC) -> Counter[str]:
    """What -> bytes that this rank has received from others since the model was shared."""
    shards = model._shards
    return shards.received if isinstance(shards, Shards) else Counter()


def _with_rows(model: SPARC, shards: Shards, device: torch.device) -> SPARC:
    sharded = SPARC(**model.config(), dtype=model.W_enc.dtype, device="meta")
    backends.resolve(model.backend, device)
    sharded.backend = model.backend
    rows, has_weights = shards.rows(model.n_latents), model.W_enc.device.type != "meta"
    n, D = rows.stop - rows.start, model.W_enc.shape[1]
    for name in ("W_enc", "W_dec"):
        own = empty_rows(n, D, dtype=model.W_enc.dtype, device=device)
        if has_weights:
            own.copy_(getattr(model, name)[rows])
        setattr(sharded, name, nn.Parameter(own))
    for name in ("latent_bias", "latent_threshold"):
        if (by_stream := getattr(model, name)) is not None:
            own = by_stream.new_empty(len(model.streams), n, device=device)
            setattr(sharded, name, nn.Parameter(own.copy_(by_stream[:, rows]) if has_weights else own))
    sharded.pre_bias = nn.Parameter(_on(model.pre_bias, device))
    sharded.silence = _on(model.silence[rows], device)
    sharded.input_mean, sharded.input_rms = _on(model.input_mean, device), _on(model.input_rms, device)
    if model.selection in BY_THRESHOLD:
        empty = BY_THRESHOLD[model.selection].empty
        sharded.threshold, sharded.threshold_count = empty(len(model.streams), device)
        if has_weights:
            sharded.threshold.copy_(model.threshold)
            sharded.threshold_count.copy_(model.threshold_count)
    sharded._shards = shards
    if not has_weights:
        sharded.reset_parameters()
    return sharded.train(model.training)


def _on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device.type == "meta":
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return tensor.detach().to(device, copy=True)
