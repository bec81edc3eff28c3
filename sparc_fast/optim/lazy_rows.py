"""Which decoder rows an optimizer has left behind, and the steps they missed."""

from __future__ import annotations

import torch
from torch import Tensor


class Behind:
    """The last step each of L rows has made, and the settings of every step so far.

    `last_step` is int64 [L]. `history` is float64 [T, 4]: (lr, beta_1, beta_2, eps) of steps 1 ... T; 32 bytes a step.
    `is_any`: whether a row may have missed one, as far as is known without reading `last_step`.
    """

    def __init__(self, n_latents: int, device: torch.device) -> None:
        self.last_step = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self._steps, self._count = torch.empty(0, 4, dtype=torch.float64, device=device), 0
        self.is_any = False

    @property
    def history(self) -> Tensor:
        return self._steps[: self._count]

    def record(self, lr: float, beta_1: float, beta_2: float, eps: float) -> None:
        """One more step is being made."""
        self._make_room(self._count + 1)
        self._steps[self._count] = torch.tensor((lr, beta_1, beta_2, eps), dtype=torch.float64, device="cpu")
        self._count += 1
        self.is_any = True

    def all_current(self, step: int) -> None:
        """Every row has made this many steps, whatever they were."""
        self.last_step.fill_(step)
        self._make_room(step)
        self._count = step
        self.is_any = False

    def _make_room(self, count: int) -> None:
        if count > len(self._steps):
            wider = self._steps.new_full((max(count, 2 * len(self._steps), 1024), 4), torch.nan)
            wider[: self._count] = self.history
            self._steps = wider
