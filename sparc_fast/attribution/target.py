"""What is looked for: a number that a model of latents says of each row, linear in the row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sparc_fast.batch import position
from sparc_fast.model import SPARC
from sparc_fast.sizes import is_integer

__all__ = ["Latents", "Target", "strongest"]

Latents: TypeAlias = "int | tuple[Tensor, Tensor]"
"""A latent, or (values [n, m], indices [n, m]) as `SparseLatents.stream` gives: each sample's latents and weights."""


@dataclass(frozen=True, eq=False)
class Target:
    """Weighted sums of latents' pre-activations in one stream, one sum a sample.

        score[n] = sum_j weight[n, j] · pre-activation of latent[n, j]  =  u(x[n]) · direction[n] + offset[n]

    with the stream's calibration inside, and u(x) = x / ‖x‖ where the model normalizes the stream, else x. Neither ReLU
    nor the support is in it: where a latent is on, its pre-activation is its value.
    """

    direction: Tensor
    """float64 [n, D_s]."""
    offset: Tensor
    """float64 [n]."""
    is_unit: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: SPARC, stream: str, latents: Latents, n: int) -> Target:
        """That of `n` samples.

        Raises:
            ValueError: there is no such stream or latent, or not one row of latents a sample.
        """
        s = position(stream, model.streams, "stream")
        weights, indices = _checked(latents, n, model.n_latents)
        device = model.W_enc.device
        weights, indices = weights.to(device, torch.float64), indices.to(device).long()
        weights, indices = weights.masked_fill(indices < 0, 0), indices.clamp(min=0)
        columns = model._columns()[s]
        encoder = model.W_enc[:, columns][indices].double()  # [n, m, D_s]
        direction = (weights[..., None] * encoder).sum(1)
        offset = (weights * model.latent_bias[s].double()[indices]).sum(1)
        offset -= direction @ model.pre_bias[columns].double()
        if model.is_calibrated:  # (x - mean) / scale
            direction = direction / model._scales()[s].double()
            offset -= direction @ model.input_mean[columns].double()
        return cls(direction, offset, stream in model.normalize)

    def __getitem__(self, some: slice) -> Target:
        return Target(self.direction[some], self.offset[some], self.is_unit)

    def to(self, device: torch.device) -> Target:
        return Target(self.direction.to(device), self.offset.to(device), self.is_unit)

    def score(self, rows: Tensor) -> Tensor:
        """Of rows [n, D_s], or of their parts [n, ..., D_s] each for itself; float64, differentiable."""
        return self._score(rows.double(), rows.double())

    def share(self, parts: Tensor, rows: Tensor) -> Tensor:
        """Of parts [n, T, D_s] whose mean is the row: their scores' mean is the row's score, whatever its norm."""
        return self._score(parts.double(), rows.double()[:, None])

    def _score(self, x: Tensor, whole: Tensor) -> Tensor:
        shape = [len(self.offset), *[1] * (x.ndim - 2)]
        if self.is_unit:
            x = x / whole.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        return (x * self.direction.view(*shape, -1)).sum(-1) + self.offset.view(shape)


def strongest(values: Tensor, indices: Tensor, n: int) -> list[int]:
    """The latents of one code, values and indices [k], that are on, the strongest first, at most `n`."""
    on = values.detach().float().masked_fill(indices < 0, 0)
    order = on.argsort(descending=True, stable=True)[:n]
    return [int(indices[i]) for i in order.tolist() if on[i] > 0]


def _checked(latents: Latents, n: int, n_latents: int) -> tuple[Tensor, Tensor]:
    if is_integer(latents):
        if not 0 <= latents < n_latents:  # type: ignore[operator]
            raise ValueError(f"latents must be in 0 ... {n_latents - 1}, got {latents}")
        indices = torch.full((n, 1), int(latents), dtype=torch.int64, device="cpu")  # type: ignore[arg-type]
        return torch.ones(n, 1, dtype=torch.float64, device="cpu"), indices
    if not isinstance(latents, tuple) or len(latents) != 2 or not all(isinstance(part, Tensor) for part in latents):
        raise ValueError(f"latents must be a latent, or (values, indices) of each sample, got {type(latents).__name__}")
    values, indices = latents
    if values.shape != indices.shape or values.ndim != 2 or len(values) != n:
        raise ValueError(
            f"latents must be values and indices [n={n}, m], got {list(values.shape)} and {list(indices.shape)}"
        )
    if indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < n_latents:
        raise ValueError(f"latents must be in 0 ... {n_latents - 1}, got {indices.tolist()}")
    return values.detach(), indices
