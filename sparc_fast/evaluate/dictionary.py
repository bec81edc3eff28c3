"""What latents add to a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sparc_fast.batch import position
from sparc_fast.ops import functional
from sparc_fast.whole import WHOLE, Whole

if TYPE_CHECKING:
    from sparc_fast.model import SPARC

__all__ = ["Dictionary", "dictionary_of", "directions"]


@torch.no_grad()
def dictionary_of(model: SPARC, stream: str) -> Tensor:
    """What a unit of each latent adds to a stream as `model.decode` gives it, [L, D], on the model's device."""
    if not model._shards.is_whole:
        raise ValueError("model must be whole for its dictionary to be in one place, but ranks share its latents")
    return directions(model, stream).rows


class Dictionary:
    """Directions of latents in a stream, [L, D], of which this process may have some rows alone.

    What is asked of all rows is answered by all processes together; no row goes from one to another.
    """

    def __init__(self, rows: Tensor, shards: Whole = WHOLE, n_latents: int | None = None) -> None:
        if rows.dim() != 2:
            raise ValueError(f"dictionary must be [L, D], got {list(rows.shape)}")
        self.rows, self._shards = rows, shards
        self.shape = torch.Size([len(rows) if n_latents is None else n_latents, rows.shape[1]])

    @property
    def here(self) -> slice:
        """Those of all latents whose rows are here."""
        return self._shards.rows(self.shape[0])

    def to(self, where: torch.device | torch.dtype | str) -> Dictionary:
        """As Tensor.to."""
        return Dictionary(self.rows.to(where), self._shards, self.shape[0])

    def of_each(self, numbers: Tensor) -> Tensor:
        """[L, ...], from the numbers of the rows here."""
        return self._shards.of_latents(numbers)

    def along(self, latents: Tensor, x: Tensor) -> Tensor:
        """Row latents[n, j] . x[n] of latents [n, k] and x [n, D], [n, k]; float32, or a dictionary's float64."""
        rows, elsewhere = self._own(latents)
        kind = torch.promote_types(self.rows.dtype, torch.float32)
        products = torch.bmm(self.rows[rows].to(kind), x.to(kind)[..., None])[..., 0]
        return products if elsewhere is None else self._shards.of_one(products.masked_fill(elsewhere, 0))

    def summed(self, latents: Tensor, values: Tensor) -> Tensor:
        """sum_j values[n, j] row latents[n, j] of [n, k] each, [n, D]."""
        rows, elsewhere = self._own(latents)
        weights = values.to(self.rows.dtype)
        weights = weights if elsewhere is None else weights.masked_fill(elsewhere, 0)
        return self._shards.sum(embedding_bag(rows, self.rows, per_sample_weights=weights, mode="sum"))

    def _own(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """(places among the rows here, bool: which are of other rows; None where all are here)."""
        if self._shards.is_whole:
            return latents, None
        here = self.here
        elsewhere = (latents < here.start) | (latents >= here.stop)
        return (latents - here.start).masked_fill(elsewhere, 0), elsewhere


@torch.no_grad()
def directions(model: SPARC, stream: str) -> Dictionary:
    """`dictionary_of`, also where ranks share the latents."""
    t = position(stream, model.streams, "stream")
    cols, W_dec = model._columns()[t], model.W_dec
    rows = torch.arange(len(W_dec), dtype=torch.int32, device=W_dec.device)[:, None]
    added, nothing = (
        functional.sparse_decode(
            fill(len(rows), 1, 1, dtype=W_dec.dtype, device=W_dec.device), rows, W_dec[:, cols],
            model.pre_bias[cols], backend=model.backend,
        )[:, 0]
        for fill in (torch.ones, torch.zeros)
    )  # fmt: skip
    return Dictionary(model._uncalibrate(added, t) - model._uncalibrate(nothing[:1], t), model._shards, model.n_latents)
