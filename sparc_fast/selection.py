"""Which latents fire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from sparc_fast.batch import Batch
from sparc_fast.ops import functional
from sparc_fast.ops.backends import Backend

Selection = Literal["global", "local"]
RULES: tuple[Selection, ...] = get_args(Selection)


def select(
    rule: Selection, batch: Batch, k: int, *, support_from: Sequence[str] | None = None, backend: str | Backend = "auto"
) -> Tensor:
    """The support of a batch: [N, k] for all its streams under "global", [N, S, k] under "local"; reads no decoder row.

    Under "global", streams that `support_from` leaves out have no say.
    """
    if support_from is not None:
        if rule == "local":
            raise ValueError("support_from must be None under local selection: each stream chooses its own")
        batch = batch.of_streams(support_from)
    operands = (batch.x, batch.W_enc, batch.pre_bias, batch.latent_bias, k)
    if rule == "global":
        return functional.global_topk(*operands, backend=backend)
    return functional.local_topk(*operands, d_streams=batch.d_streams, backend=backend)
