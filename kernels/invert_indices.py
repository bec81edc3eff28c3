"""entries[offsets[l] : offsets[l + 1]] = the flat positions p, ascending, with indices.view(-1)[p] == l.

A stable radix sort of the positions by latent; then every latent looks up its first position by binary search.
Latents outside 0 ... L - 1, as those of empty slots, are sorted behind all others as if they were L.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.launching import launch, next_power_of_2


def choice(n_latents: int) -> dict[str, int]:
    # estimated, not measured: neighbours search the same cache lines, so only their number in flight counts
    return {"BLOCK_L": min(next_power_of_2(n_latents + 1), 256), "num_warps": 4}


def invert_indices(indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    indices = indices.detach().reshape(-1)
    keys = torch.empty(len(indices), dtype=torch.int32, device=indices.device)  # half as many passes as of int64
    block = 1024
    launch(_keys_kernel, (triton.cdiv(len(keys), block),), keys, indices, n_latents, len(keys), BLOCK=block)
    keys, entries = torch.sort(keys, stable=True)
    offsets = torch.empty(n_latents + 1, dtype=torch.int64, device=indices.device)
    chosen = choice(n_latents)
    grid = (triton.cdiv(n_latents + 1, chosen["BLOCK_L"]),)
    launch(_offsets_kernel, grid, offsets, keys, n_latents + 1, len(keys), len(keys).bit_length(), **chosen)
    return offsets, entries


@triton.jit(do_not_specialize=["length"])
def _keys_kernel(keys, indices, L, length, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(indices + at, mask=at < length, other=0)
    tl.store(keys + at, tl.where((latent < 0) | (latent > L), L, latent).to(tl.int32), mask=at < length)


@triton.jit(do_not_specialize=["length", "bits"])
def _offsets_kernel(offsets, keys, n_offsets, length, bits, BLOCK_L: tl.constexpr):
    l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    low = tl.zeros([BLOCK_L], tl.int64)  # ends as the first position with keys[position] >= l
    high = low + length
    for _ in range(bits):
        middle = (low + high) // 2
        searching = low < high
        below = tl.load(keys + middle, mask=searching, other=0) < l
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
    tl.store(offsets + l, low, mask=l < n_offsets)
