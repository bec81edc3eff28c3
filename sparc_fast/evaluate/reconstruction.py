"""Reconstruction quality from per-sample squared errors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Reconstruction", "nmse_from_errors", "r2_from_errors", "squared_error"]

ROWS = 256  # that are float64 at a time: they stay in cache


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """||x_n - x_hat_n||^2 of each sample, float64 [N]."""
    if x.dim() != 2 or x_hat.shape != x.shape:
        raise ValueError(f"x and x_hat must be of one shape [N, D], got {tuple(x.shape)} and {tuple(x_hat.shape)}")
    pieces = zip(torch.split(x, ROWS), torch.split(x_hat, ROWS), strict=True)
    return torch.cat([(rows.double() - rows_hat).square().sum(dim=1) for rows, rows_hat in pieces])


class Reconstruction:
    """How well one stream is reconstructed, over samples that come a batch at a time."""

    def __init__(self) -> None:
        self.n = 0
        self._error = self._relative = torch.zeros((), dtype=torch.float64, device="cpu")
        self._origin = self._sum = self._squares = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, error: Tensor, x: Tensor) -> None:
        """error [..., n] from `squared_error`, x [n, D]."""
        if x.dim() != 2 or error.shape[-1:] != x.shape[:1]:
            raise ValueError(f"error and x must be [..., N] and [N, D], got {tuple(error.shape)} and {tuple(x.shape)}")
        if not self.n and len(x):
            self._origin = x[0].double()
        for errors, rows in zip(torch.split(error, ROWS, dim=-1), torch.split(x, ROWS), strict=True):
            power = rows.double().square().sum(dim=1)
            relative = torch.where(power > 0, errors / power.where(power > 0, 1), 0)
            apart = rows.double() - self._origin  # sums of squares about a sample do not cancel as those about 0 may
            self.n += len(rows)
            self._error = self._error.to(x.device) + errors.sum(dim=-1)
            self._relative = self._relative.to(x.device) + relative.sum(dim=-1)
            self._sum = self._sum.to(x.device) + apart.sum(dim=0)
            self._squares = self._squares.to(x.device) + apart.square().sum()

    @property
    def nmse(self) -> Tensor:
        """Mean over samples of ||x - x_hat||^2 / ||x||^2, [...]: see `nmse_from_errors`."""
        return self._relative / self.n if self.n else torch.full_like(self._relative, torch.nan)

    @property
    def r2(self) -> Tensor:
        """1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, [...]: see `r2_from_errors`."""
        variation = self._squares - self._sum.square().sum() / max(self.n, 1)
        return torch.where(variation > 0, 1 - self._error / variation, torch.nan)


def nmse_from_errors(error: Tensor, x: Tensor) -> Tensor:
    """Mean over samples of ||x - x_hat||^2 / ||x||^2; error [..., N] from `squared_error`, x [N, D].

    0 is perfect, 1 is what predicting 0 scores; no upper bound. Uncentred, so a stream with a large mean
    looks easy: read it beside `r2_from_errors`. A zero row adds 0 and is counted. nan without samples.
    """
    return _of_all(error, x).nmse


def r2_from_errors(error: Tensor, x: Tensor) -> Tensor:
    """1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2; error [..., N] from `squared_error`, x [N, D].

    1 is perfect, 0 is what predicting the mean scores; no lower bound. Sums run over samples and dimensions,
    so each dimension weighs by its variance; the plain average of per-dimension R^2 would be ruled by the
    nearly constant ones. nan if x does not vary.
    """
    return _of_all(error, x).r2


def _of_all(error: Tensor, x: Tensor) -> Reconstruction:
    found = Reconstruction()
    found.add(error, x)
    return found
