"""Rows of private latents move in their stream alone: block by block, as if each were a model of one stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparc_fast.ops.backends import Backend
from sparc_fast.ops.layout import wide_type
from sparc_fast.ops.row_step import DecoderRows, Rows, Samples
from sparc_fast.optim.freezing import Run
from sparc_fast.selection import Private


class Block(NamedTuple):
    """Latents of the same streams, and what moves their rows."""

    latents: slice
    streams: slice
    """Among those of the rows that it is a block of; so are the columns."""
    columns: slice
    rows: Rows
    run: Run | None
    samples: Samples
    used: Tensor
    """The supports that the samples' entries are of."""


def blocks(
    samples: Samples, used: Tensor, private: Private, rows: Rows, run: Run | None, backend: Backend
) -> Iterator[Block]:
    """The rows of a run of streams, or of all: those of shared latents, then those of each stream's own, if any."""
    if private.n_shared:
        shared = slice(0, private.n_shared)
        columns = slice(0, sum(rows.d_streams))
        whole = slice(0, len(rows.d_streams))
        yield Block(
            shared, whole, columns, rows.block(shared, columns, rows.d_streams), run,
            samples._replace(offsets=samples.offsets[: private.n_shared + 1]),
            used.masked_fill(used >= private.n_shared, -1) if run is not None else used,
        )  # fmt: skip
    for s, stream, here in _own(private, run):
        latents, width = private.latents[stream], here.stop - here.start
        one = slice(s, s + 1)
        first = 0 if run is None else run.streams.start
        yield Block(
            latents, slice(s - first, s - first + 1), here, rows.block(latents, here, (width,)), None,
            *_of_stream(samples, used, latents, one, private.columns[stream], backend),
        )  # fmt: skip


def decoder_blocks(
    rows: DecoderRows, run: Run | None, latents: Tensor, private: Private | None
) -> Iterator[tuple[DecoderRows, Tensor]]:
    """The decoder's rows in the same blocks, with those of some latents that each has."""
    if private is None:
        yield rows, latents
        return
    shared = slice(0, private.n_shared), slice(0, sum(rows.d_streams)), rows.d_streams
    own = [(private.latents[name], here, (here.stop - here.start,)) for _, name, here in _own(private, run)]
    for some, here, widths in (block for block in (shared, *own) if block[0].start < block[0].stop):
        W_dec, *moments = (part[some, here] for part in (rows.W_dec, *rows.moments))
        copy = None if rows.copy is None else rows.copy[some, here]
        inside = latents[(latents >= some.start) & (latents < some.stop)] - some.start
        yield DecoderRows(W_dec, moments, widths, rows.last_step[some], copy), inside


def of_all(samples: Samples, private: Private, rows: Rows, found: Sequence[tuple[Block, Tensor]]) -> Tensor:
    """[S, L] of what was found of blocks; 0 where a latent is another stream's. Of no use where the encoder stays."""
    grad_latent_bias = _sums(samples, len(rows.d_streams), private.n_latents)
    for block, of_block in found if rows.W_enc is not None else ():
        grad_latent_bias[block.streams, block.latents] = of_block
    return grad_latent_bias


def sum_of_columns(samples: Samples, rows: Rows, found: Sequence[tuple[Block, Tensor]]) -> Tensor:
    """[D] of what was found of the columns of blocks."""
    sums = _sums(samples, sum(rows.d_streams))
    for block, of_block in found if rows.W_enc is not None else ():
        sums[block.columns] += of_block
    return sums


def _sums(samples: Samples, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=wide_type(samples.x.dtype), device=samples.x.device)


def _own(private: Private, run: Run | None) -> Iterator[tuple[int, str, slice]]:
    """(its place in the model, its name, its columns in the run) of each stream of a run that has private latents."""
    for s, (name, columns) in enumerate(private.columns.items()):
        own = private.latents.get(name, slice(0, 0))
        if own.start == own.stop or (run is not None and not run.streams.start <= s < run.streams.stop):
            continue
        first = 0 if run is None else run.columns.start
        yield s, name, slice(columns.start - first, columns.stop - first)


def _of_stream(
    samples: Samples, used: Tensor, latents: slice, one: slice, columns: slice, backend: Backend
) -> tuple[Samples, Tensor]:
    """Samples and their supports as a model of this stream and these latents alone sees them."""
    used = used if used.ndim == 2 else used[:, one.start]
    inside = (used >= latents.start) & (used < latents.stop)
    own = torch.where(inside, used - latents.start, -1)
    offsets, entries = backend.invert_indices(own, latents.stop - latents.start)
    samples = samples._replace(
        x=samples.x[:, columns], pre_bias=samples.pre_bias[columns], values=samples.values[:, one],
        grad_values=samples.grad_values[:, one], grad_recons=samples.grad_recons[:, one, columns],
        offsets=offsets, entries=entries,
    )  # fmt: skip
    return samples, own
