"""Reconstruction quality from per-sample squared errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .registry import Batch, Given, Metric, Row, Score, Sizes

__all__ = ["RECONSTRUCTION", "Reconstructed", "Reconstruction", "nmse_from_errors", "r2_from_errors", "squared_error"]

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


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """nmse and r2 [S, S] of each stream (column) from the code of each, encoded alone (row)."""

    streams: tuple[str, ...]
    nmse: Tensor
    r2: Tensor


class _Resampled:
    """The sums of a `Reconstruction`, in each of B resamplings of its samples."""

    def __init__(self) -> None:
        self._origin = self._n = self._error = self._relative = self._sum = self._squares = torch.zeros(
            (), dtype=torch.float64, device="cpu"
        )

    def add(self, error: Tensor, x: Tensor, weights: Tensor) -> None:
        """error [S, n], x [n, D], weights [n, B]."""
        if not len(x):
            return
        if not self._n.ndim:
            self._origin = x[0].double()
        for errors, rows, w in zip(
            torch.split(error, ROWS, 1), torch.split(x, ROWS), torch.split(weights, ROWS), strict=True
        ):
            power = rows.double().square().sum(dim=1)
            relative = torch.where(power > 0, errors / power.where(power > 0, 1), 0)
            apart = rows.double() - self._origin
            squares, w64 = apart.square().sum(dim=1), w.double()
            self._n = self._n.to(x.device) + w64.sum(dim=0)
            self._error = self._error.to(x.device) + errors @ w64
            self._relative = self._relative.to(x.device) + relative @ w64
            self._sum = self._sum.to(x.device) + (w.T @ apart.float()).double()
            self._squares = self._squares.to(x.device) + squares @ w64

    @property
    def nmse(self) -> Tensor:
        """[S, B]"""
        return (self._relative / self._n).cpu()

    @property
    def r2(self) -> Tensor:
        """[S, B]"""
        variation = self._squares - self._sum.square().sum(dim=1) / self._n
        return torch.where(variation > 0, 1 - self._error / variation, torch.nan).cpu()


class _Watch:
    """Every stream from every stream, a batch at a time."""

    def __init__(self, given: Given) -> None:
        self.targets = {name: Reconstruction() for name in given.streams}
        self.resampled = {name: _Resampled() for name in given.streams}

    def see(self, batch: Batch) -> None:
        for target, found in self.targets.items():
            truth = batch.truth[target]
            errors = torch.stack([squared_error(truth, batch.decoded(source, target)) for source in self.targets])
            found.add(errors, truth)
            if batch.weights is not None:
                self.resampled[target].add(errors, truth, batch.weights)


def _compute(given: Given) -> Reconstructed:
    targets = given.watched["reconstruction"].targets.values()
    nmse, r2 = (torch.stack([getattr(found, what).cpu() for found in targets], dim=1) for what in ("nmse", "r2"))
    return Reconstructed(given.streams, nmse, r2)


def _resample(given: Given, found: Reconstructed) -> Mapping[str, Tensor]:
    sums = given.watched["reconstruction"].resampled.values()
    own = torch.eye(len(found.streams), dtype=torch.bool, device="cpu")
    drawn = {}
    for what in ("nmse", "r2"):
        matrices = torch.stack([getattr(of_target, what) for of_target in sums], dim=1)  # [S, S, B]
        drawn[f"{what}_self"], drawn[f"{what}_cross"] = matrices[own].mean(dim=0), matrices[~own].mean(dim=0)
    return drawn


def _kept(sizes: Sizes) -> int:
    """The sums of each dimension, in each resampling."""
    return 8 * sizes.B * (sizes.D + 3 * sizes.S**2)


def _own(matrix: Tensor) -> float:
    return float(matrix.diagonal().mean())


def _cross(matrix: Tensor) -> float:
    return float(matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)].mean())


def _details(found: Reconstructed) -> Mapping[str, Any]:
    def by_pair(matrix: Tensor) -> dict[str, float]:
        return {
            f"{source} -> {target}": float(matrix[s, t])
            for s, source in enumerate(found.streams)
            for t, target in enumerate(found.streams)
        }

    return {"nmse": by_pair(found.nmse), "r2": by_pair(found.r2)}


def _rows(models: Mapping[str, Reconstructed]) -> Iterator[Row]:
    streams = next(iter(models.values())).streams
    for s, source in enumerate(streams):
        for t, target in enumerate(streams):
            cells = {name: f"{found.nmse[s, t]:.3f} / {found.r2[s, t]:.3f}" for name, found in models.items()}
            meaning = f"{target} reconstructed from the {source} code alone."
            yield Row(f"{source} → {target}", meaning, "neither", cells, "Reconstruction: NMSE / R²")


RECONSTRUCTION = Metric(
    "reconstruction",
    "Error and variance explained of every stream from the code of every stream.",
    _compute,
    (
        Score(
            "nmse_self",
            "Own error (NMSE)",
            "Squared error of rebuilding a stream from its own code, as a fraction of its squared norm.",
            better="lower",
            value=lambda found: _own(found.nmse),
        ),
        Score(
            "nmse_cross",
            "Cross error (NMSE)",
            "The same, from the code of another stream.",
            better="lower",
            value=lambda found: _cross(found.nmse),
        ),
        Score(
            "r2_self",
            "Own variance explained (R²)",
            "Fraction of a stream's variance that its own code explains; 0 is what the mean scores.",
            value=lambda found: _own(found.r2),
        ),
        Score(
            "r2_cross",
            "Cross variance explained (R²)",
            "The same, from the code of another stream.",
            value=lambda found: _cross(found.r2),
        ),
    ),
    default=True,
    watch=_Watch,
    resample=_resample,
    kept=_kept,
    details=_details,
    rows=_rows,
)
