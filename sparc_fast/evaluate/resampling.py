"""Bootstrap: samples drawn again and again with replacement, as weights, so that no metric runs again."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RESAMPLES", "Resampling"]

RESAMPLES = 200  # by default; the width of an interval is then known to 5 %


class Resampling:
    """How often each of N samples is drawn in each of B resamplings: multinomial, of samples or of whole groups.

    The draws depend on N, the groups and the seed alone. So all models on the same samples have the same, and what two
    models' scores differ by in each resampling is the paired bootstrap of their difference. N bytes each are held.
    """

    def __init__(self, n: int, n_resamples: int = RESAMPLES, groups: Tensor | None = None, seed: int = 0) -> None:
        if n_resamples < 2:
            raise ValueError(f"resamples must be at least 2, or 0 for no intervals, got {n_resamples}")
        if groups is not None and groups.shape != (n,):
            raise ValueError(f"groups must be of the samples, [N={n}], got {list(groups.shape)}")
        self.n, self.n_resamples = n, n_resamples
        self._group = None if groups is None else torch.unique(groups, return_inverse=True)[1]
        units = n if self._group is None else (int(self._group.max()) + 1 if n else 0)
        self._drawn = torch.empty(units, n_resamples, dtype=torch.uint8, device="cpu")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for b in range(n_resamples if units else 0):
            drawn = torch.randint(units, (units,), generator=generator, device="cpu")
            self._drawn[:, b] = torch.bincount(drawn, minlength=units).clamp_max(255)

    def __getitem__(self, kept: Tensor) -> Resampling:
        """Of some samples, bool [N] or their places."""
        some = object.__new__(Resampling)
        places = torch.arange(self.n, device="cpu")[kept]
        some._group = places if self._group is None else self._group[places]
        some.n, some.n_resamples, some._drawn = len(places), self.n_resamples, self._drawn
        return some

    def weights(self, rows: slice | Tensor, resamples: slice = slice(None)) -> Tensor:
        """float32 [rows, B] of these samples, and of some of the B."""
        drawn = self._drawn[:, resamples]
        return (drawn[rows] if self._group is None else drawn[self._group[rows]]).float()
