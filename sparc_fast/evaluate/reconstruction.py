"""Reconstruction quality from per-sample squared errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .registry import Batch, Given, Metric, Row, Score, Sizes, rows_by_pair

__all__ = ["RECONSTRUCTION", "Reconstructed", "Reconstruction", "nmse_from_errors", "r2_from_errors", "squared_error"]

ROWS = 256  # that are float64 at a time: they stay in cache


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """||x_n - x_hat_n||^2 of each sample, float64 [N]."""
    if x.dim() != 2 or x_hat.shape != x.shape:
        raise ValueError(f"x and x_hat must be of one shape [N, D], got {tuple(x.shape)} and {tuple(x_hat.shape)}")
    pieces = zip(torch.split(x, ROWS), torch.split(x_hat, ROWS), strict=True)
    return torch.cat([(rows.double() - rows_hat).square().sum(dim=1) for rows, rows_hat in pieces])


class Reconstruction:
    """How well one stream is reconstructed, over samples that come a batch at a time; or in each of B resamplings."""

    def __init__(self) -> None:
        self.n = 0
        self._origin = torch.zeros((), dtype=torch.float64, device="cpu")
        # samples; of them errors and relative errors; their distances from one, and squares
        self._sums = [self._origin] * 5

    def add(self, error: Tensor, x: Tensor, weights: Tensor | None = None) -> None:
        """error [..., n] from `squared_error`, x [n, D]; weights [n, B]: how often each is drawn."""
        if x.dim() != 2 or error.shape[-1:] != x.shape[:1]:
            raise ValueError(f"error and x must be [..., N] and [N, D], got {tuple(error.shape)} and {tuple(x.shape)}")
        if not self.n:
            self._origin = x[0].double() if len(x) else self._origin.to(x.device)
        self.n += len(x)
        for start in range(0, max(len(x), 1), ROWS):
            some = slice(start, start + ROWS)
            errors, rows = error[..., some], x[some].double()
            power = rows.square().sum(dim=1)
            relative = torch.where(power > 0, errors / power.where(power > 0, 1), 0)
            apart = rows - self._origin  # sums of squares about a sample do not cancel as those about 0 may
            squares = apart.square()
            if weights is None:
                n = torch.full((), len(rows), dtype=torch.float64, device=x.device)
                more = [n, errors.sum(dim=-1), relative.sum(dim=-1), apart.sum(dim=0), squares.sum()]
            else:
                w = weights[some].double()
                of_each = (weights[some].T @ apart.float()).double()
                more = [w.sum(dim=0), errors @ w, relative @ w, of_each, squares.sum(dim=1) @ w]
            self._sums = [total.to(x.device) + one for total, one in zip(self._sums, more, strict=True)]

    @property
    def nmse(self) -> Tensor:
        """Mean over samples of ||x - x_hat||^2 / ||x||^2, [...]: see `nmse_from_errors`."""
        n, _, relative, _, _ = self._sums
        return relative / n

    @property
    def r2(self) -> Tensor:
        """1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, [...]: see `r2_from_errors`."""
        n, error, _, apart, squares = self._sums
        variation = squares - apart.square().sum(dim=-1) / n
        return torch.where(variation > 0, 1 - error / variation, torch.nan)


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


class _Watch:
    """Every stream from every stream, a batch at a time."""

    def __init__(self, given: Given) -> None:
        self.targets, self.resampled = ({name: Reconstruction() for name in given.streams} for _ in range(2))

    def see(self, batch: Batch) -> None:
        for target, found in self.targets.items():
            truth = batch.truth[target]
            errors = torch.stack([squared_error(truth, batch.decoded(source, target)) for source in self.targets])
            found.add(errors, truth)
            if batch.weights is not None:
                self.resampled[target].add(errors, truth, batch.weights)


def _matrices(of_targets: Mapping[str, Reconstruction]) -> list[Tensor]:
    """nmse and r2, [S, S, ...] by source and target, on the CPU."""
    return [torch.stack([getattr(one, what).cpu() for one in of_targets.values()], dim=1) for what in ("nmse", "r2")]


def _compute(given: Given) -> Reconstructed:
    nmse, r2 = _matrices(given.watched["reconstruction"].targets)
    return Reconstructed(given.streams, nmse, r2)


def _resample(given: Given, found: Reconstructed) -> Mapping[str, Tensor]:
    own = torch.eye(len(found.streams), dtype=torch.bool, device="cpu")
    drawn = {}
    for what, matrices in zip(("nmse", "r2"), _matrices(given.watched["reconstruction"].resampled), strict=True):
        drawn[f"{what}_self"], drawn[f"{what}_cross"] = matrices[own].mean(dim=0), matrices[~own].mean(dim=0)
    return drawn


def _kept(sizes: Sizes) -> int:
    """The sums of each dimension, in each resampling."""
    return 8 * sizes.B * (sizes.D + 3 * sizes.S**2)


def _own(matrix: Tensor) -> float:
    return float(matrix.diagonal().mean())


def _cross(matrix: Tensor) -> float:
    return float(matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)].mean())


def _by_pair(found: Reconstructed) -> dict[tuple[str, str], tuple[float, float]]:
    figures = product(found.streams, found.streams), found.nmse.flatten().tolist(), found.r2.flatten().tolist()
    return {pair: (nmse, r2) for pair, nmse, r2 in zip(*figures, strict=True)}


def _details(found: Reconstructed) -> Mapping[str, Any]:
    pairs = _by_pair(found).items()
    return {what: {f"{s} -> {t}": one[i] for (s, t), one in pairs} for i, what in enumerate(("nmse", "r2"))}


def _rows(models: Mapping[str, Reconstructed]) -> Iterator[Row]:
    def cell(one: tuple[float, float]) -> str:
        return f"{one[0]:.3f} / {one[1]:.3f}"

    meaning = "{target} reconstructed from the {source} code alone."
    rows = rows_by_pair("Reconstruction: NMSE / R²", meaning, cell, "neither")
    return rows({name: _by_pair(found) for name, found in models.items()})


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
