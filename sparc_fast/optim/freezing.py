"""What an optimizer trains of a model: the encoder, the decoder or both, of some streams."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from sparc_fast.batch import as_names
from sparc_fast.ops.layout import stream_slices

PARTS = ("encoder", "decoder")
BY_STREAM = ("latent_bias", "latent_threshold")
"""Parameters [S, L], of the encoder."""


class Run(NamedTuple):
    """Streams that are neighbours and all trained."""

    streams: slice
    columns: slice
    """In the model."""
    own: slice
    """Among the columns that are trained, which is where moments and master rows have them."""
    own_streams: slice
    d_streams: tuple[int, ...]


class Trained(NamedTuple):
    """A frozen encoder keeps every code: W_enc, latent_bias and pre_bias stay. A frozen decoder keeps what codes mean:
    W_dec and pre_bias stay. A frozen stream keeps its columns of all of them."""

    encoder: bool
    decoder: bool
    everything: bool
    """Of all streams."""
    runs: tuple[Run, ...]

    @classmethod
    def but(cls, freeze: str | Collection[str], d_streams: Mapping[str, int]) -> Trained:
        """Everything but these; ValueError where they are none, or all there is."""
        names = as_names(freeze)
        known = (*PARTS, *d_streams)
        for name in names:
            if name not in known:
                raise ValueError(f"freeze must be of {known}, got {name!r}")
            if name in PARTS and name in d_streams:
                raise ValueError(f"freeze must name one thing, but {name!r} is a part and a stream")
        encoder, decoder = (part not in names for part in PARTS)
        trained = [name not in names for name in d_streams]
        if not any(trained) or not (encoder or decoder):
            raise ValueError(f"freeze must leave something to train, got {names}")
        return cls(encoder, decoder, all(trained), tuple(_runs(trained, tuple(d_streams.values()))))

    def has(self, name: str) -> bool:
        """Whether anything is trained of the model's parameter of this name."""
        parts = dict.fromkeys(("W_enc", *BY_STREAM), self.encoder) | {"W_dec": self.decoder}
        return parts.get(name, self.encoder and self.decoder)

    def of(self, name: str, parameter: Tensor) -> Tensor:
        """What is trained of it; a copy where that is not all."""
        if self.everything:
            return parameter
        if name in BY_STREAM:
            return torch.cat([parameter[run.streams] for run in self.runs])
        return torch.cat([parameter[..., run.columns] for run in self.runs], dim=-1)


def _runs(trained: Sequence[bool], widths: tuple[int, ...]) -> Iterator[Run]:
    columns, own, own_streams = stream_slices(widths), 0, 0
    for here, neighbours in groupby(range(len(widths)), trained.__getitem__):
        if here:
            some = list(neighbours)
            first, last = some[0], some[-1]
            there = slice(columns[first].start, columns[last].stop)
            streams, width = slice(first, last + 1), there.stop - there.start
            of_run = slice(own, own + width), slice(own_streams, own_streams + len(some))
            yield Run(streams, there, *of_run, widths[streams])
            own, own_streams = own + width, own_streams + len(some)
