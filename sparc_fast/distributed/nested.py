"""Nested dictionaries over latents that ranks share: each rank decodes, and hears of, groups that it has latents of.

Groups, the latents that each dictionary adds, are neighbours, as a rank's latents are: all ranks together have but
P + G - 1 parts of a reconstruction, not P G, which in the order of ranks are in the order of groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparc_fast.ops.backends import Backend
from sparc_fast.ops.layout import by_group, gradient_dtype, wide

from .exchange import Exchange, shares
from .layout import groups_of, sizes_here, told_groups


def nested_decode_loss(
    backend: Backend, exchange: Exchange, values: Tensor, indices: Tensor, W_dec: Tensor, pre_bias: Tensor,
    target: Tensor, scale: Tensor, weights: Sequence[float], d_streams: Sequence[int], sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.nested_decode_loss` of all ranks' rows; grad_recons are those of the groups of `told_groups`.

    As `_OfRows.decode_loss`: what a rank's rows of one group add to a sample is one row of a dictionary, whose sizes
    say which of them are of the first groups.
    """
    P, (N, S, _), D, device = exchange.ranks, values.shape, W_dec.shape[1], values.device
    counts = shares(N, P)
    first, n = sum(counts[: exchange.rank]), counts[exchange.rank]
    own, groups = slice(first, first + n), groups_of(sizes, P)
    here = sizes_here(sizes, exchange.rank, P)
    n_groups = len(groups[exchange.rank])
    supports = by_group(indices, here)
    # for each rank's samples, group by group
    every = torch.arange(n_groups * N, device=device).view(n_groups, N)
    order = torch.cat([numbers.reshape(-1) for numbers in torch.split(every, counts, dim=1)])
    no_bias = torch.zeros(D, dtype=pre_bias.dtype, device=device)
    recons = backend.sparse_decode(wide(values)[order % N], supports[order], W_dec, no_bias)
    n_parts = [len(some) for some in groups]
    parts, numbers = exchange.deal(recons, counts, "reconstructions", n_parts)
    del recons
    if n:
        rows = numbers.T[:, None].int() * S + torch.arange(S, dtype=torch.int32, device=device)[:, None]
        of_parts = [g for some in groups for g in some]
        begins = [*(numbers[:, 0] * S).tolist(), parts[..., 0].numel()]
        ends = [begins[sum(other <= g for other in of_parts)] for g in range(len(sizes))]
        ones = torch.ones(n, S, len(of_parts), dtype=parts.dtype, device=device)
        operands = ones, rows.contiguous(), parts.view(-1, D), wide(pre_bias), wide(target[own]), scale[own]
        nmse, grad_recons, _, grad_pre_bias = backend.nested_decode_loss(*operands, weights, d_streams, ends)
        del operands
    else:
        nmse, grad_pre_bias = parts.new_zeros(len(sizes), S, S), parts.new_zeros(D)
        grad_recons = parts.new_zeros(len(sizes), 0, S, D)
    del parts
    summed = exchange.begin_sum(torch.cat([nmse.reshape(-1), grad_pre_bias]))
    grad_recons = exchange.hand(grad_recons.to(gradient_dtype(values)), counts, told_groups(sizes, P), "G")
    grad_values = wide(backend.sparse_decode_grad_values(grad_recons.flatten(0, 1), supports, W_dec))
    grad_values = grad_values.view(len(here), *values.shape).sum(0).to(grad_recons.dtype)
    sums = summed()
    return sums[: nmse.numel()].view_as(nmse), grad_recons, grad_values, sums[nmse.numel() :]
