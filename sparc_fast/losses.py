"""How far a reconstruction is from its input, and how the parts of the objective are weighed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparc_fast.reference import stream_slices, wide

ZERO_ROW = 1e-20
"""A row of smaller squared norm counts as a zero row: relative to nothing, no error can be told."""


def nmse(recons: Tensor, x: Tensor) -> Tensor:
    """mean_n ||recons[n] - x[n]||^2 / ||x[n]||^2 over the last dimension; a zero row counts as a sample of error 0.

    The uncentred normalised error that TopK autoencoders are trained on (Gao et al., arXiv 2406.04093).
    """
    _check_same_shape(recons, x)
    error = (wide(recons) - wide(x)).square().sum(-1)
    energy = wide(x).square().sum(-1)
    counted = energy >= ZERO_ROW
    ratio = torch.where(counted, error / energy.where(counted, 1.0), 0.0)
    return ratio.sum() / max(ratio.numel(), 1)


def fvu(recons: Tensor, x: Tensor) -> Tensor:
    """sum ||recons - x||^2 / sum ||x - mean(x)||^2 over all samples [..., D]: the fraction of variance unexplained.

    1 - R^2, variance-weighted: a near-constant coordinate cannot dominate it.
    """
    _check_same_shape(recons, x)
    x, recons = wide(x).reshape(-1, x.shape[-1]), wide(recons).reshape(-1, x.shape[-1])
    return (recons - x).square().sum() / (x - x.mean(0)).square().sum()


def _check_same_shape(recons: Tensor, x: Tensor) -> None:
    if recons.shape != x.shape or x.ndim == 0:
        raise ValueError(f"recons must have the shape of x, {list(x.shape)}, got {list(recons.shape)}")


def row_energy(x: Tensor, d_streams: Sequence[int]) -> Tensor:
    """energy[n, t] = ||x[n, t]||^2 of each stream, [N, S]."""
    return torch.stack([wide(x[:, cols]).square().sum(1) for cols in stream_slices(d_streams)], dim=1)


def nmse_scale(energy: Tensor, n_samples: int | None = None) -> Tensor:
    """scale[n, t] = 1 / (N energy[n, t]), and 0 for zero rows: what makes squared errors NMSE.

    N is `n_samples`, where these rows are only a part of those that the mean is taken over.
    """
    counted = energy >= ZERO_ROW
    N = len(energy) if n_samples is None else n_samples
    return torch.where(counted, 1 / energy.where(counted, 1.0) / max(N, 1), 0.0)


def pair_weights(n_streams: int, cross_loss_coef: float) -> tuple[float, ...]:
    """weights[s, s] = 1 / S and weights[s, t] = cross_loss_coef / (S (S - 1)), row-major source by target."""
    S = n_streams
    cross = cross_loss_coef / (S * (S - 1)) if S > 1 else 0.0
    return tuple(1 / S if s == t else cross for s in range(S) for t in range(S))


def self_weights(n_streams: int, coef: float) -> tuple[float, ...]:
    """weights[s, s] = coef / S, and 0 elsewhere."""
    return tuple(coef / n_streams if s == t else 0.0 for s in range(n_streams) for t in range(n_streams))


class SparcLoss(NamedTuple):
    """The objective and its parts; only `total` carries a gradient."""

    total: Tensor
    """self + cross_loss_coef * cross + auxk_coef * auxk, a scalar."""
    self: Tensor
    """Mean NMSE of each stream reconstructed from itself."""
    cross: Tensor | None
    """Mean NMSE over ordered pairs of streams; None when its coefficient is 0 or one stream is present."""
    auxk: Tensor | None
    """Mean NMSE of the residuals reconstructed by dead latents; None when none is dead."""
    nmse: Tensor
    """[S, S], source by target; 0 where a pair was not computed."""
    zero_rows: Tensor
    """[S], samples whose input was all zero: they count as error 0."""


def self_residual(grad_recons: Tensor, scale: Tensor, d_streams: Sequence[int]) -> Tensor:
    """residual[n, d] = x[n, d] - recons[n, s(d), d], what a stream's own reconstruction left over, [N, D].

    Read off grad_recons of a loss with `pair_weights`: it is -2 / S scale residual there. 0 where scale is 0.
    """
    S = len(d_streams)
    parts = []
    for s, cols in enumerate(stream_slices(d_streams)):
        factor = -2 / S * scale[:, s, None]
        parts.append(torch.where(factor != 0, wide(grad_recons[:, s, cols]) / factor, 0.0))
    return torch.cat(parts, dim=1).to(grad_recons.dtype)


def summarize(total: Tensor, nmse: Tensor, auxk: Tensor | None, energy: Tensor, cross_loss_coef: float) -> SparcLoss:
    """The parts of an objective as `SparcLoss`, from nmse [S, S] and the rows' energy [N, S]."""
    S = len(nmse)
    itself = torch.eye(S, dtype=torch.bool, device=nmse.device)
    has_cross = S > 1 and cross_loss_coef != 0
    cross = nmse.masked_fill(itself, 0).sum() / (S * (S - 1)) if has_cross else None
    return SparcLoss(total, nmse.diagonal().mean(), cross, auxk, nmse, (energy < ZERO_ROW).sum(0))
