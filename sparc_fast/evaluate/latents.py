"""Which latents are in use: alive, dead or mixed over the streams, and how often each fires."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codes import Codes, check_codes, firing_counts

__all__ = ["LatentUse", "latent_use"]


@dataclass(frozen=True, eq=False)
class LatentUse:
    """Use of each latent in each stream.

    frequency[s, l]: fraction of samples that fire latent l in stream s, in [0, 1]. A latent is alive in a
    stream when at least one sample fires it. Every latent is exactly one of: alive in all streams, dead in
    all, or mixed (alive in some only). On joint codes of a shared support, mixed is near 0 by construction.
    """

    streams: tuple[str, ...]
    frequency: Tensor

    @property
    def alive(self) -> Tensor:
        """Bool [S, L]."""
        return self.frequency > 0

    @property
    def alive_in_any(self) -> Tensor:
        """Bool [L]: not dead in all streams."""
        return self.alive.any(dim=0)

    @property
    def n_alive(self) -> int:
        """Latents alive in all streams."""
        return int(self.alive.all(dim=0).sum())

    @property
    def n_dead(self) -> int:
        """Latents dead in all streams."""
        return int((~self.alive_in_any).sum())

    @property
    def n_mixed(self) -> int:
        """Latents alive in some streams and dead in others."""
        return self.frequency.shape[1] - self.n_alive - self.n_dead

    @property
    def n_alive_in(self) -> tuple[int, ...]:
        """Latents alive in exactly 0, 1, ... S streams."""
        return tuple(torch.bincount(self.alive.sum(dim=0), minlength=len(self.streams) + 1).tolist())

    @property
    def dead(self) -> dict[str, int]:
        """Number of dead latents of each stream."""
        return {name: int(n) for name, n in zip(self.streams, (~self.alive).sum(dim=1), strict=True)}

    @property
    def active_per_sample(self) -> dict[str, float]:
        """Mean number of active latents of a sample (its L0) in each stream."""
        return {name: float(n) for name, n in zip(self.streams, self.frequency.sum(dim=1), strict=True)}


def latent_use(codes: Codes, n_latents: int) -> LatentUse:
    """Firing frequency of each latent in each stream, and the counts that follow from it."""
    n_samples = check_codes(codes, n_latents)
    counts = torch.stack([firing_counts(code, n_latents) for code in codes.values()])
    return LatentUse(tuple(codes), counts.cpu().double() / max(n_samples, 1))
