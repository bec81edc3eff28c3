"""Sums over the entries of every latent, which both weight gradients and the row update are made of.

encoder:  sum over entries (n, j) of l in stream s of  grad_z[n, s, j] (x - pre_bias)[n, d]
decoder:  sum over entries (n, j) of l and streams s of  values[n, s, j] grad_recons[n, s, d]

What every entry adds, a row and its coefficients, is listed beforehand, in the order of entries, as all programs of a
latent need it. A program sums LATENTS latents over BLOCK_D columns of one stream, term after term, those of ROWS
entries in flight. Of a latent with more than PIECE entries it sums the first PIECE; each further piece of PIECE
entries is summed beforehand by a program of its own into a row of scratch, and these rows are added in order. So a
latent that every sample uses does not keep one program busy, and the order of a sum depends on the entries alone. The
row of a piece is its first position in `entries` // PIECE: first positions lie at least PIECE apart, so no two pieces
share a row, and nobody lists them. Scratch is one row of D sums for every PIECE entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.adam import Constants, write_constants
from sparc_fast.kernels.gather import sum_type, times, widened
from sparc_fast.kernels.launching import column_blocks, launch, next_power_of_2, widths
from sparc_fast.ops.gpu_scratch import PIECE  # of a support per stream, PIECE entries of each stream
from sparc_fast.ops.layout import wide_type


def tile(d_streams: Sequence[int], dtype: torch.dtype, widest: int, rows: int) -> dict[str, int]:
    """A launch choice for gathering rows of dtype: 8 or 4 columns a thread, several latents where rows are short."""
    block = min(next_power_of_2(max(d_streams)), widest)
    latents = min(max(1024 // block, 1), 16)
    rows = min(rows, 16 // dtype.itemsize)  # what is in flight is in registers,
    columns = 4 if dtype.itemsize == 8 else 8  # of a thread
    if any(d % 16 for d in d_streams):  # and so are the addresses of columns that cannot be read 16 bytes at once
        columns, rows = 4, max(rows // 2, 1)
    if triton.knobs.runtime.interpret:  # where a program costs milliseconds, whatever it does
        latents, rows = min(max(8192 // block, 1), 64), 1
    warps = min(max(block * latents // (32 * columns), 1), 16)
    per_thread = block * latents // (warps * 32)  # more columns a thread leave registers for fewer entries in flight
    return {
        "LATENTS": latents,
        "ROWS": max(rows * 8 // max(per_thread, 8), 1),
        "BLOCK_D": block,
        "num_warps": warps,
        "maxnreg": 128,  # left alone, the compiler spills some to make room for one more program
    }


class Terms(NamedTuple):
    """What each entry adds to the sum of its latent: `coefficients[s, i]` times row `rows[i] + s` of a matrix."""

    rows: Tensor
    coefficients: Tensor


class Entries(NamedTuple):
    """A batch with values [N, S, k] by latent: where the entries of each begin, and what every entry adds, in order."""

    offsets: Tensor
    encoder: Terms | None
    """Rows of x, a coefficient for each stream."""
    decoder: Terms | None
    """Rows of grad_recons [N * S, D], a coefficient for each source."""
    PIECE: int

    @classmethod
    def of(
        cls,
        values: Tensor,
        grad_values: Tensor | None,
        offsets: Tensor,
        entries: Tensor,
        decoder: bool = True,
        constants: Constants | None = None,
    ) -> Entries:
        """With terms of an encoder where there are gradients of values. The same launch writes `constants`."""
        (N, S, k), length, device = values.shape, len(entries), values.device
        per_stream = length != N * k

        def terms(sums: int) -> Terms:
            rows = torch.empty(length, dtype=torch.int32, device=device)
            return Terms(rows, torch.empty(sums, length, dtype=wide_type(values.dtype), device=device))

        encoder = None if grad_values is None else terms(S)
        of_decoder = terms(1 if per_stream else S) if decoder else None
        launch(
            _terms_kernel, (max(triton.cdiv(length, 256), 1),), *(encoder or (None, None)),
            *(of_decoder or (None, None)), values.detach().contiguous(),
            None if grad_values is None else grad_values.detach().contiguous(),
            entries.contiguous(), length, *_told(constants), S=S, K=k, PER_STREAM=per_stream, SUM=sum_type(values),
            BLOCK=256,
        )  # fmt: skip
        return cls(offsets.contiguous(), encoder, of_decoder, PIECE * S if per_stream else PIECE)

    @property
    def n_latents(self) -> int:
        return len(self.offsets) - 1

    @property
    def length(self) -> int:
        terms = self.encoder or self.decoder
        return 0 if terms is None else len(terms.rows)


def _told(constants: Constants | None) -> tuple[Tensor | int | None, ...]:
    """What `write_constants` takes."""
    return (None,) * 10 if constants is None else (constants.numbers, constants.noise, *constants.told)


class Columns(NamedTuple):
    """Blocks of columns none of which straddles two streams: the second axis of every grid here."""

    table: Tensor
    ALIGN: int

    @classmethod
    def of(cls, d_streams: Sequence[int], block: int, device: torch.device) -> Columns:
        aligned = all(d % 16 == 0 for d in d_streams)
        return cls(column_blocks(widths(d_streams), block, device), 16 if aligned else 1)


def of_blocks(columns: Columns, L: int) -> Tensor:
    """Room for a float64 number of each latent's row in each block of columns, [blocks, L]."""
    return torch.empty(len(columns.table), L, dtype=torch.float64, device=columns.table.device)


class Pieces(NamedTuple):
    """Sums of the pieces beyond the first of every latent: rows [slots, D], and the encoder's bias [slots, S]."""

    rows: Tensor | None
    bias: Tensor | None


NO_PIECES = Pieces(None, None)


def pieces_choice(d_streams: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
    # estimated, not measured: 4 rows of 2 KB in flight
    return tile(d_streams, dtype, widest=1024, rows=4)


def pieces_of(
    batch: Entries,
    d_streams: Sequence[int],
    x: Tensor | None = None,
    pre_bias: Tensor | None = None,
    grad_recons: Tensor | None = None,
) -> tuple[Pieces, Pieces]:
    """Of the encoder where there is x, of the decoder where there is grad_recons, as rows [N * S, D]: in one launch."""
    given = [source for source in (x, grad_recons) if source is not None]
    (D,), device = {source.shape[1] for source in given}, given[0].device
    slots = triton.cdiv(batch.length, batch.PIECE)
    chosen = pieces_choice(d_streams, max((source.dtype for source in given), key=lambda dtype: dtype.itemsize))
    columns = Columns.of(d_streams, chosen["BLOCK_D"], device)

    def room(source: Tensor | None, terms: Terms | None) -> Pieces:
        if source is None or terms is None:
            return NO_PIECES
        dtype, sums = wide_type(source.dtype), len(terms.coefficients)
        rows = torch.empty(max(slots, 1), D, dtype=dtype, device=device)
        return Pieces(rows, rows.new_empty(max(slots, 1), sums) if source is x else None)

    encoder, decoder = room(x, batch.encoder), room(grad_recons, batch.decoder)
    if slots > 1:  # the first slot is never taken
        grid = (triton.cdiv(slots, chosen["LATENTS"]), len(columns.table), len(given))
        of_encoder, of_decoder = batch.encoder or (None, None), batch.decoder or (None, None)
        launch(
            _pieces_kernel, grid, *encoder, x, 0 if x is None else x.stride(0), pre_bias, *of_encoder,
            decoder.rows, grad_recons, 0 if grad_recons is None else grad_recons.stride(0), *of_decoder,
            batch.offsets, batch.length, columns.table, slots, batch.n_latents, batch.n_latents.bit_length() + 1, D,
            S=1 if batch.encoder is None else len(batch.encoder.coefficients),
            SOURCES=1 if batch.decoder is None else len(batch.decoder.coefficients),
            PIECE=batch.PIECE, ALIGN=columns.ALIGN, **chosen,
        )  # fmt: skip
    return encoder, decoder


@triton.jit(do_not_specialize=["length", "steps", "seed_low", "seed_high"])
def _terms_kernel(
    encoder_rows, encoder_coefficients, decoder_rows, decoder_coefficients, values, grad_values, entries, length,
    constants, noise, lr, settings, stride_lr, stride_settings, first_step, steps, seed_low, seed_high,
    S: tl.constexpr, K: tl.constexpr, PER_STREAM: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if constants is not None and tl.program_id(0) == 0:
        write_constants(
            tl.arange(0, BLOCK), constants, noise, lr, settings, stride_lr, stride_settings, first_step, steps,
            seed_low, seed_high,
        )  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < length
    p = tl.load(entries + i, mask=inside, other=0)
    row = p // K  # K is known to the compiler, so this is a multiplication or a shift
    n = row // S if PER_STREAM else row
    if encoder_rows is not None:
        tl.store(encoder_rows + i, n.to(tl.int32), mask=inside)
    if decoder_rows is not None:
        tl.store(decoder_rows + i, (row if PER_STREAM else n * S).to(tl.int32), mask=inside)
    for s in range(S):
        at = p if PER_STREAM else p + (n * (S - 1) + s) * K
        mine = inside & (row - n * S == s) if PER_STREAM else inside
        value = tl.load(values + at, mask=mine, other=0).to(SUM)
        to = s * length.to(tl.int64) + i
        if encoder_rows is not None:
            coefficient = tl.load(grad_values + at, mask=mine, other=0).to(SUM)
            tl.store(encoder_coefficients + to, tl.where(value > 0, coefficient, 0.0), mask=inside)
        if decoder_rows is not None:
            tl.store(decoder_coefficients + (i if PER_STREAM else to), value, mask=mine)


@triton.jit
def column_block(table, i, ALIGN: tl.constexpr):
    """(first column, last column + 1, stream) of block i."""
    first = tl.multiple_of(tl.load(table + 3 * i), ALIGN)
    last = tl.multiple_of(tl.load(table + 3 * i + 1), ALIGN)
    return first, last, tl.load(table + 3 * i + 2)


@triton.jit
def writers(table, stream, L):
    """L where this program's block of columns is the first of its stream, which writes for all of them; else 0."""
    before = tl.program_id(1) - 1
    return tl.where(tl.load(table + 3 * before + 2, mask=before >= 0, other=-1) != stream, L, 0)


@triton.jit
def segment(offsets, l, L):
    """(first, last + 1) of the entries of latents l; none where l is no latent."""
    return tl.load(offsets + l, mask=l < L, other=0), tl.load(offsets + l + 1, mask=l < L, other=0)


@triton.jit
def weighted_rows(
    begin, end, columns, inside, source, stride, centre, rows, coefficients, length, SOURCES: tl.constexpr,
    ROWS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """[LATENTS, BLOCK_D] and [LATENTS], sums over entries begin : end and sources s, one after another, of
    coefficients[s, entry] (source[rows[entry] + s] - centre)  and of the coefficients."""
    total = tl.zeros([begin.shape[0], columns.shape[0]], SUM)
    weight = tl.zeros([begin.shape[0]], SUM)
    count = (end - begin).to(tl.int32)
    rows += begin
    coefficients += begin
    source += columns[None, :]
    for i in range(0, tl.max(count, 0), ROWS):
        left = count - i
        for r in tl.static_range(ROWS):  # without a branch, so that all are read before the first is added
            at = times(tl.load(rows + i + r, mask=r < left, other=0), stride)[:, None]
            for s in tl.static_range(SOURCES):
                coefficient = tl.load(coefficients + s * length.to(tl.int64) + i + r, mask=r < left, other=0).to(SUM)
                used = (coefficient != 0)[:, None] & inside[None, :]
                row = tl.load(source + s * stride + at, mask=used, other=0, eviction_policy="evict_last")
                row = widened(row, SUM)
                if centre is not None:
                    row -= centre[None, :]
                total = tl.fma(coefficient[:, None], row, total)
                weight += coefficient
    return total, weight


@triton.jit
def add_pieces(gradient, begin, end, pieces, D, columns, inside, PIECE: tl.constexpr):
    """gradient plus the sums of the pieces beyond the first, in order."""
    further = (end - begin - 1) // PIECE
    for r in range(1, tl.max(further, 0).to(tl.int32) + 1):
        slot = (begin + r * PIECE) // PIECE
        live = (r <= further)[:, None] & inside[None, :]
        gradient += tl.load(pieces + slot[:, None] * D + columns[None, :], mask=live, other=0)
    return gradient


@triton.jit
def add_bias_pieces(bias, begin, end, pieces, stream, S: tl.constexpr, PIECE: tl.constexpr):
    further = (end - begin - 1) // PIECE
    for r in range(1, tl.max(further, 0).to(tl.int32) + 1):
        slot = (begin + r * PIECE) // PIECE
        bias += tl.load(pieces + slot * S + stream, mask=r <= further, other=0)
    return bias


@triton.jit
def piece_of_slot(slot, slots, offsets, L, bits, PIECE: tl.constexpr):
    """(first, last + 1) of the piece that belongs to a slot: it is of the latent that owns entry slot * PIECE."""
    position = slot.to(tl.int64) * PIECE
    low = tl.zeros_like(slot)  # ends as the first l with offsets[l] > position
    high = low + L + 1
    for _ in range(bits):
        middle = (low + high) // 2
        searching = low < high
        below = tl.load(offsets + middle, mask=searching, other=0) <= position
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
    owned = (low > 0) & (low <= L) & (slot < slots)
    begin = tl.load(offsets + low - 1, mask=owned, other=0)
    end = tl.load(offsets + low, mask=owned, other=0)
    piece = tl.where(owned, (position - begin + PIECE - 1) // PIECE, 0)
    first = begin + piece * PIECE
    is_piece = owned & (piece > 0) & (first < end)  # the first piece of a latent has no slot
    return tl.where(is_piece, first, 0), tl.where(is_piece, tl.minimum(first + PIECE, end), 0)


@triton.jit(do_not_specialize=["length", "slots"])
def _pieces_kernel(
    x_sums, bias_sums, x, stride_x, pre_bias, x_rows, x_coefficients, sums, grad_recons, stride, rows, coefficients,
    offsets, length, table, slots, L, bits, D,
    S: tl.constexpr, SOURCES: tl.constexpr, PIECE: tl.constexpr, ALIGN: tl.constexpr, LATENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The encoder's, if there are any, then the decoder's."""
    first, last, stream = column_block(table, tl.program_id(1), ALIGN)
    columns = first + tl.arange(0, BLOCK_D)
    inside = columns < last
    slot = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    begin, end = piece_of_slot(slot, slots, offsets, L, bits, PIECE)
    taken = begin < end
    at = slot.to(tl.int64)[:, None] * D + columns[None, :]
    if x is not None and tl.program_id(2) == 0:
        SUM: tl.constexpr = x_sums.dtype.element_ty
        centre = tl.load(pre_bias + columns, mask=inside, other=0).to(SUM)
        total, weight = weighted_rows(
            begin, end, columns, inside, x, stride_x, centre, x_rows,
            x_coefficients + stream.to(tl.int64) * length, length, 1, ROWS, SUM,
        )  # fmt: skip
        tl.store(bias_sums + slot * S + stream, weight, mask=taken)
        tl.store(x_sums + at, total, mask=taken[:, None] & inside[None, :])
    if grad_recons is not None and tl.program_id(2) == tl.num_programs(2) - 1:
        total, _ = weighted_rows(
            begin, end, columns, inside, grad_recons, stride, None, rows, coefficients, length, SOURCES, ROWS,
            sums.dtype.element_ty,
        )  # fmt: skip
        tl.store(sums + at, total, mask=taken[:, None] & inside[None, :])
