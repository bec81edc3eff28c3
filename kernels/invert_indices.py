"""entries[offsets[l] : offsets[l + 1]] = the flat positions p, ascending, with indices.view(-1)[p] == l.

A stable radix sort of the positions by latent; then every latent looks up its first position by binary search.
Positions of latents below 0, as those of empty slots, are sorted before all others, and moved behind them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.launching import launch


def choice() -> dict[str, int]:
    # estimated, not measured: neighbours search the same cache lines, so only their number in flight counts
    return {"BLOCK": 256, "num_warps": 4}


def invert_indices(indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    indices = indices.detach().reshape(-1)
    if indices.dtype != torch.int32:  # clamped first, so that none wraps into range
        indices = indices.clamp(-1, n_latents).to(torch.int32)  # half as many passes of the sort
    keys, positions = torch.sort(indices, stable=True)
    offsets = torch.empty(n_latents + 1, dtype=torch.int64, device=indices.device)
    entries, length, chosen = torch.empty_like(positions), len(keys), choice()
    programs = triton.cdiv(n_latents + 1, chosen["BLOCK"]) + triton.cdiv(length, chosen["BLOCK"])
    launch(
        _offsets_kernel, (programs,), offsets, entries, keys, positions, n_latents + 1, length, length.bit_length(),
        **chosen,
    )  # fmt: skip
    return offsets, entries


@triton.jit
def _first(keys, latent, length, bits):
    """The first position with keys[position] >= latent."""
    low = tl.zeros_like(latent).to(tl.int64)
    high = low + length
    for _ in range(bits):
        middle = (low + high) // 2
        searching = low < high
        below = tl.load(keys + middle, mask=searching, other=0) < latent
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
    return low


@triton.jit(do_not_specialize=["length", "bits"])
def _offsets_kernel(offsets, entries, keys, positions, n_offsets, length, bits, BLOCK: tl.constexpr):
    program, of_offsets = tl.program_id(0), tl.cdiv(n_offsets, BLOCK)
    lanes = tl.arange(0, BLOCK)
    absent = tl.max(_first(keys, lanes * 0, length, bits), 0)
    if program < of_offsets:
        l = program * BLOCK + lanes
        tl.store(offsets + l, _first(keys, l, length, bits) - absent, mask=l < n_offsets)
    else:
        at = (program - of_offsets).to(tl.int64) * BLOCK + lanes
        moved = tl.where(at < absent, at - absent + length, at - absent)
        tl.store(entries + moved, tl.load(positions + at, mask=at < length), mask=at < length)
