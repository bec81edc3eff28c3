"""The public operators, under the name people import them by."""

from sparc_fast.ops.functional import (
    global_topk,
    invert_indices,
    local_topk,
    reconstruction_loss,
    sparse_decode,
    support_values,
)

__all__ = [
    "global_topk",
    "invert_indices",
    "local_topk",
    "reconstruction_loss",
    "sparse_decode",
    "support_values",
]
