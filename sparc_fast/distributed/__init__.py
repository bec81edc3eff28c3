"""Latents over many devices, exact: a model is shared between the ranks of torch.distributed, latent by latent."""

from sparc_fast.distributed.sharding import shard

__all__ = ["shard"]
