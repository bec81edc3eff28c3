"""Reconstruction quality from per-sample squared errors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nmse_from_errors", "r2_from_errors", "squared_error"]

ROWS = 4096  # rows converted to float64 at a time


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """||x_n - x_hat_n||^2 of each sample, float64 [N]."""
    if x.dim() != 2 or x_hat.shape != x.shape:
        raise ValueError(f"x and x_hat must be of one shape [N, D], got {tuple(x.shape)} and {tuple(x_hat.shape)}")
    return (x.double() - x_hat.double()).square().sum(dim=1)


def nmse_from_errors(error: Tensor, x: Tensor) -> Tensor:
    """Mean over samples of ||x - x_hat||^2 / ||x||^2; error [..., N] from `squared_error`, x [N, D].

    0 is perfect, 1 is what predicting 0 scores; no upper bound. Uncentred, so a stream with a large mean
    looks easy: read it beside `r2_from_errors`. A zero row adds 0 and is counted. nan without samples.
    """
    _check(error, x)
    power = torch.cat([rows.double().square().sum(dim=1) for rows in torch.split(x, ROWS)])
    return torch.where(power > 0, error / power.where(power > 0, 1), 0).mean(dim=-1)


def r2_from_errors(error: Tensor, x: Tensor) -> Tensor:
    """1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2; error [..., N] from `squared_error`, x [N, D].

    1 is perfect, 0 is what predicting the mean scores; no lower bound. Sums run over samples and dimensions,
    so each dimension weighs by its variance; the plain average of per-dimension R^2 would be ruled by the
    nearly constant ones. nan if x does not vary.
    """
    _check(error, x)
    mean = x.mean(dim=0, dtype=torch.float64)
    variation = sum(((rows.double() - mean).square().sum() for rows in torch.split(x, ROWS)), error.new_zeros(()))
    return torch.where(variation > 0, 1 - error.sum(dim=-1) / variation, torch.nan)


def _check(error: Tensor, x: Tensor) -> None:
    if x.dim() != 2 or error.shape[-1:] != x.shape[:1]:
        raise ValueError(f"error and x must be [..., N] and [N, D], got {tuple(error.shape)} and {tuple(x.shape)}")
