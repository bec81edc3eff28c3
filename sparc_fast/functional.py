"""The public operators, under the name people import them by."""

from sparc_fast.ops.functional import (
    batch_topk,
    global_topk,
    invert_indices,
    latents_above,
    local_topk,
    reconstruction_loss,
    sparse_decode,
    support_values,
)

__all__ = [
    "batch_topk",
    "global_topk",
    "invert_indices",
    "latents_above",
    "local_topk",
    "reconstruction_loss",
    "sparse_decode",
    "support_values",
]
