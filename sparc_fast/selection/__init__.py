"""Which latents fire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from sparc_fast.batch import Batch
from sparc_fast.ops import backends, functional
from sparc_fast.ops.backends import Backend

from .batch_topk import Thresholds
from .jumprelu import Offsets, StreamOffsets, fire
from .private import Private

__all__ = [
    "BY_THRESHOLD", "LOCAL", "RULES", "Private", "Selection", "Thresholds", "check_support_from", "encode", "select",
]  # fmt: skip

Selection = Literal["global", "local", "batch", "jumprelu", "local_jumprelu"]
RULES: tuple[Selection, ...] = get_args(Selection)
LOCAL = ("local", "local_jumprelu")
"""Under which each stream has a support of its own."""
BY_THRESHOLD: dict[str, type[Thresholds]] = {"batch": Thresholds, "jumprelu": Offsets, "local_jumprelu": StreamOffsets}
"""Under which latents fire above what is learned, and what the model stores for it: samples have as many as they need,
k on average, and supports have empty slots."""


def select(
    rule: Selection,
    batch: Batch,
    k: int,
    *,
    support_from: Sequence[str] | None = None,
    thresholds: Thresholds | None = None,
    private: Private | None = None,
    among: Tensor | None = None,
    backend: str | Backend = "auto",
) -> Tensor:
    """The support of a batch; reads no decoder row.

    Of all its streams, [N, k], under "global", of each stream, [N, S, k], under "local". Under "batch" [N, W], -1 where
    a sample has fewer than others: the largest scores of the batch, or, given `thresholds`, those above. Under
    "jumprelu" likewise, and under "local_jumprelu" [N, S, W]: those above `thresholds` and that of their latent.
    Streams that `support_from` leaves out have no say, but under "local" and "local_jumprelu". The rule chooses of the
    latents that are not `private`; each stream's own best of those are in the last slots. Under "global" and "local" it
    may be told `among` which, bool [L].
    """
    if private is not None:
        shared = select(
            rule, private.shared(batch), k, support_from=support_from, thresholds=thresholds, backend=backend
        )
        return private.beside(shared, batch, backend)
    if support_from is not None:
        check_support_from(rule)
        batch = batch.of_streams(support_from)
    if rule in ("jumprelu", "local_jumprelu"):
        assert thresholds is not None
        return fire(rule, batch, k, thresholds, backend)
    operands = (batch.x, batch.W_enc, batch.pre_bias, batch.latent_bias)
    if rule == "batch":
        if thresholds is None:
            return functional.batch_topk(*operands, k, backend=backend)
        return functional.latents_above(*operands, thresholds.of(batch.streams), k=k, backend=backend)
    if rule == "global":
        return functional.global_topk(*operands, k, among=among, backend=backend)
    return functional.local_topk(*operands, k, d_streams=batch.d_streams, among=among, backend=backend)


def encode(
    rule: Selection,
    batch: Batch,
    k: int,
    *,
    support_from: Sequence[str] | None = None,
    thresholds: Thresholds | None = None,
    private: Private | None = None,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(what `select` finds, activations there): [N, S, k] where the backend has them at once, else None.

    They carry no gradient.
    """
    if rule == "global" and isinstance(backend, str) and support_from is None and private is None:
        together = getattr(backends.resolve(backend, batch.x.device), "encode_topk", None)
        if together is not None and not torch.compiler.is_compiling():
            with torch.no_grad(), torch.autocast(batch.x.device.type, enabled=False):
                operands = batch.x, batch.W_enc, batch.pre_bias, batch.latent_bias
                indices, values = together(*operands, k, batch.d_streams)
                return indices, values
    support = select(rule, batch, k, support_from=support_from, thresholds=thresholds, private=private, backend=backend)
    return support, None


def check_support_from(rule: Selection) -> None:
    """ValueError where streams do not choose together."""
    if rule in LOCAL:
        raise ValueError("support_from must be None under local selection: each stream chooses its own")
