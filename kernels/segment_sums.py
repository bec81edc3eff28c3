"""Sums over the entries of every latent, which both weight gradients and the row update are made of.

encoder:  sum over entries (n, j) of l in stream s of  grad_z[n, s, j] (x - pre_bias)[n, d]
decoder:  sum over entries (n, j) of l and streams s of  values[n, s, j] grad_recons[n, s, d]

A program sums LATENTS latents over BLOCK_D columns of one stream, entries ascending, ROWS of them in flight. Of a
latent with more than PIECE entries it sums the first PIECE; each further piece of PIECE entries is summed beforehand by
a program of its own into a row of scratch, and these rows are added in order. So a latent that every sample uses does
not keep one program busy, and the order of a sum depends on the entries alone. The row of a piece is its first position
in `entries` // PIECE: first positions lie at least PIECE apart, so no two pieces share a row, and nobody lists them.
Scratch is one row of D sums for every PIECE entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
        latents, rows = min(max(8192 // block, 1), 64), 16
    warps = min(max(block * latents // (32 * columns), 1), 16)
    per_thread = block * latents // (warps * 32)  # more columns a thread leave registers for fewer entries in flight
    return {
        "LATENTS": latents,
        "ROWS": max(rows * 8 // max(per_thread, 8), 1),
        "BLOCK_D": block,
        "num_warps": warps,
        "maxnreg": 128,  # left alone, the compiler spills some to make room for one more program
    }


class Entries(NamedTuple):
    """The inverse index of a batch with values [N, S, k], and what its coefficients are read from."""

    values: Tensor
    grad_values: Tensor | None
    offsets: Tensor
    entries: Tensor

    @classmethod
    def of(cls, values: Tensor, grad_values: Tensor | None, offsets: Tensor, entries: Tensor) -> Entries:
        grad_values = None if grad_values is None else grad_values.detach().contiguous()
        return cls(values.detach().contiguous(), grad_values, offsets.contiguous(), entries.contiguous())

    @property
    def n_latents(self) -> int:
        return len(self.offsets) - 1

    @property
    def constants(self) -> dict[str, Any]:
        N, S, k = self.values.shape
        per_stream = len(self.entries) != N * k
        return {
            "S": S,
            "K": k,  # known to the compiler, so that dividing by it is a multiplication or a shift
            "PER_STREAM": per_stream,
            "PIECE": PIECE * S if per_stream else PIECE,
            # positions of real batches fit 32 bits
            "POSITION": tl.int32 if self.values.numel() < 2**31 else tl.int64,
            "SUM": tl.float64 if self.values.dtype == torch.float64 else tl.float32,
        }


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

    rows: Tensor
    bias: Tensor | None


def encoder_pieces(x: Tensor, pre_bias: Tensor, batch: Entries, columns: Columns, choice: dict[str, int]) -> Pieces:
    constants = {**batch.constants, "SUM": tl.float64 if x.dtype == torch.float64 else tl.float32}
    slots = triton.cdiv(len(batch.entries), constants["PIECE"])
    widths = x.shape[1], constants["S"]
    D, dtype = x.shape[1], wide_type(x.dtype)
    pieces = Pieces(*(torch.empty(max(slots, 1), width, dtype=dtype, device=x.device) for width in widths))
    if slots > 1:  # the first slot is never taken
        grid = (triton.cdiv(slots, choice["LATENTS"]), len(columns.table))
        launch(
            _encoder_pieces_kernel, grid, *pieces, x, x.stride(0), pre_bias, *batch, columns.table, slots,
            batch.n_latents, batch.n_latents.bit_length() + 1, D,
            ALIGN=columns.ALIGN, **constants, **choice,
        )  # fmt: skip
    return pieces


def decoder_pieces(grad_recons: Tensor, batch: Entries, columns: Columns, choice: dict[str, int]) -> Pieces:
    """grad_recons as rows [N * S, D]."""
    constants = batch.constants
    slots = triton.cdiv(len(batch.entries), constants["PIECE"])
    D = grad_recons.shape[1]
    rows = torch.empty(max(slots, 1), D, dtype=wide_type(batch.values.dtype), device=grad_recons.device)
    if slots > 1:
        grid = (triton.cdiv(slots, choice["LATENTS"]), len(columns.table))
        launch(
            _decoder_pieces_kernel, grid, rows, grad_recons, grad_recons.stride(0), batch.values, batch.offsets,
            batch.entries, columns.table, slots, batch.n_latents, batch.n_latents.bit_length() + 1, D,
            ALIGN=columns.ALIGN, **constants, **choice,
        )  # fmt: skip
    return Pieces(rows, None)


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
def encoder_sums(
    begin, end, stream, columns, inside, centre, x, stride_x, values, grad_values, entries,
    S: tl.constexpr, K: tl.constexpr, PER_STREAM: tl.constexpr, ROWS: tl.constexpr, POSITION: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Gradient [LATENTS, BLOCK_D] and bias gradient [LATENTS] from entries begin : end of one stream."""
    gradient = tl.zeros([begin.shape[0], columns.shape[0]], SUM)
    bias = tl.zeros([begin.shape[0]], SUM)
    count = (end - begin).to(tl.int32)
    rows = tl.arange(0, ROWS)
    for i in range(0, tl.max(count, 0), ROWS):
        live = (i + rows)[None, :] < count[:, None]
        p = tl.load(entries + begin[:, None] + (i + rows)[None, :], mask=live, other=0).to(POSITION)
        n = p // K
        if PER_STREAM:
            live &= n % S == stream
            at = p
            n = n // S
        else:
            at = p + (n * (S - 1) + stream) * K
        value = tl.load(values + at, mask=live, other=0).to(SUM)
        coefficient = tl.load(grad_values + at, mask=live, other=0).to(SUM)
        coefficient = tl.where(value > 0, coefficient, 0.0)
        used = (coefficient != 0)[:, :, None] & inside[None, None, :]
        at_x = x + n.to(tl.int64)[:, :, None] * stride_x + columns[None, None, :]
        row = tl.load(at_x, mask=used, other=0, eviction_policy="evict_last").to(SUM)
        gradient += tl.sum(coefficient[:, :, None] * (row - centre[None, None, :]), 1)
        bias += tl.sum(coefficient, 1)
    return gradient, bias


@triton.jit
def decoder_sums(
    begin, end, columns, inside, grad_recons, stride_recons, values, entries,
    S: tl.constexpr, K: tl.constexpr, PER_STREAM: tl.constexpr, ROWS: tl.constexpr, POSITION: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Gradient [LATENTS, BLOCK_D] from entries begin : end: one row of grad_recons [N * S, D] an entry and source."""
    SOURCES: tl.constexpr = 1 if PER_STREAM else S  # of one entry
    gradient = tl.zeros([begin.shape[0], columns.shape[0]], SUM)
    count = (end - begin).to(tl.int32) * SOURCES
    rows = tl.arange(0, ROWS)
    for i in range(0, tl.max(count, 0), ROWS):
        pair = i + rows
        live = pair[None, :] < count[:, None]
        p = tl.load(entries + begin[:, None] + (pair // SOURCES)[None, :], mask=live, other=0).to(POSITION)
        n, s = p // K, (pair % SOURCES)[None, :]
        coefficient = tl.load(values + p + (n * (SOURCES - 1) + s) * K, mask=live, other=0).to(SUM)
        used = (coefficient != 0)[:, :, None] & inside[None, None, :]
        at_recons = grad_recons + (n * SOURCES + s).to(tl.int64)[:, :, None] * stride_recons + columns[None, None, :]
        row = tl.load(at_recons, mask=used, other=0, eviction_policy="evict_last").to(SUM)
        gradient += tl.sum(coefficient[:, :, None] * row, 1)
    return gradient


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


@triton.jit(do_not_specialize=["slots"])
def _encoder_pieces_kernel(
    piece_rows, piece_bias, x, stride_x, pre_bias, values, grad_values, offsets, entries, table, slots, L, bits, D,
    S: tl.constexpr, K: tl.constexpr, PER_STREAM: tl.constexpr, PIECE: tl.constexpr, POSITION: tl.constexpr,
    SUM: tl.constexpr, ALIGN: tl.constexpr, LATENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, last, stream = column_block(table, tl.program_id(1), ALIGN)
    columns = first + tl.arange(0, BLOCK_D)
    inside = columns < last
    slot = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    begin, end = piece_of_slot(slot, slots, offsets, L, bits, PIECE)
    centre = tl.load(pre_bias + columns, mask=inside, other=0).to(SUM)
    gradient, bias = encoder_sums(
        begin, end, stream, columns, inside, centre, x, stride_x, values, grad_values, entries,
        S, K, PER_STREAM, ROWS, POSITION, SUM,
    )  # fmt: skip
    taken = begin < end
    at = piece_rows + slot.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(at, gradient, mask=taken[:, None] & inside[None, :])
    tl.store(piece_bias + slot * S + stream, bias, mask=taken)


@triton.jit(do_not_specialize=["slots"])
def _decoder_pieces_kernel(
    piece_rows, grad_recons, stride_recons, values, offsets, entries, table, slots, L, bits, D,
    S: tl.constexpr, K: tl.constexpr, PER_STREAM: tl.constexpr, PIECE: tl.constexpr, POSITION: tl.constexpr,
    SUM: tl.constexpr, ALIGN: tl.constexpr, LATENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, last, _ = column_block(table, tl.program_id(1), ALIGN)
    columns = first + tl.arange(0, BLOCK_D)
    inside = columns < last
    slot = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    begin, end = piece_of_slot(slot, slots, offsets, L, bits, PIECE)
    gradient = decoder_sums(
        begin, end, columns, inside, grad_recons, stride_recons, values, entries,
        S, K, PER_STREAM, ROWS, POSITION, SUM,
    )  # fmt: skip
    at = piece_rows + slot.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(at, gradient, mask=(begin < end)[:, None] & inside[None, :])
