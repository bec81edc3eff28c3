"""A model whose latents are shared, on samples that all ranks give alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparc_fast.batch import Arrays, Inputs, as_tensors, streams_of
from sparc_fast.codes import SparseLatents
from sparc_fast.data import AlignedFiles
from sparc_fast.whole import Whole

from .exchange import Exchange, shares

if TYPE_CHECKING:
    from sparc_fast.model import SPARC

PROBES = 64  # rows by which samples are told from others


class Together:
    """Such a model, to which every rank gives the same samples, and of which it has all results.

    Each rank encodes and decodes its share of them, and is told the others': codes and reconstructions, the same bits
    on all.
    """

    def __init__(self, model: SPARC, shards: Whole, everybody: Exchange) -> None:
        self._model, self._shards, self._everybody = model, shards, everybody

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, inputs: Inputs | Arrays, present: Tensor | None = None) -> SparseLatents:
        """As `SPARC.encode`."""
        parts = streams_of(as_tensors(inputs, self._model.W_enc.device), self._model.d_streams)
        leading = next(iter(parts.values())).shape[:-1]
        own = {name: self._own(x.flatten(0, -2)) for name, x in parts.items()}
        has = None if present is None else self._own(present.flatten(0, -2))
        codes = self._model.encode(own, has)
        codes = codes.with_slots(self._shards.most(codes.values.shape[-1]))  # replicas have found their own widths
        values, indices = (self._of_all(part, leading.numel()) for part in (codes.values, codes.indices))
        return SparseLatents(values, indices, codes.streams, codes.n_latents).reshape(*leading)

    def decode(self, codes: SparseLatents, source: str, target: str) -> Tensor:
        """As `SPARC.decode`."""
        n = codes.shape.numel()
        flat = codes.reshape(n)
        mine = SparseLatents(self._own(flat.values), self._own(flat.indices), codes.streams, codes.n_latents)
        recons = self._of_all(self._model.decode(mine, source, target).detach(), n)
        return recons.reshape(*codes.shape, recons.shape[-1])

    def translate(self, inputs: Inputs | Arrays, source: str, target: str) -> Tensor:
        """As `SPARC.translate`."""
        parts = streams_of(as_tensors(inputs, self._model.W_enc.device), self._model.d_streams)
        return self.decode(self.encode({source: parts[source]}), source, target)

    def _own(self, rows: Tensor) -> Tensor:
        own = self._shards.own(rows)
        assert own is not None
        return own

    def _of_all(self, rows: Tensor, n: int) -> Tensor:
        return self._everybody.gather(rows.detach(), shares(n, self._shards.ranks), "results")


def fingerprint(inputs: Mapping[str, Tensor] | AlignedFiles) -> str:
    """Of the streams, how many rows they have, and some of them."""
    if isinstance(inputs, AlignedFiles):
        widths, n = dict(inputs.d_streams), inputs.n_rows
    else:
        flat = {name: x.flatten(0, -2) for name, x in inputs.items()}
        widths, n = {name: x.shape[1] for name, x in flat.items()}, len(next(iter(flat.values())))
    whole = hashlib.sha256(f"{widths} {n}".encode())
    for i in range(min(PROBES, n)):
        row = i * (n - 1) // max(1, min(PROBES, n) - 1)
        some = (
            [inputs.rows(row, row + 1)]
            if isinstance(inputs, AlignedFiles)
            else [x[row].detach().cpu() for x in flat.values()]
        )
        for part in some:
            whole.update(part.contiguous().view(torch.uint8).numpy().data)
    return whole.hexdigest()
