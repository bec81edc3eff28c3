"""Inputs that a metric holds while it computes, for those that compare all with all or learn from them."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Batch, Given, Sizes

__all__ = ["InputsOnCPU", "InputsOnDevice", "bytes_of_inputs"]


class InputsOnDevice:
    """All inputs, float32 and in the units of reconstructions, on the model's device: a `Watch`."""

    device: torch.device | None = None

    def __init__(self, given: Given) -> None:
        self._parts: dict[str, list[Tensor]] = {name: [] for name in given.streams}

    def see(self, batch: Batch) -> None:
        for name, kept in self._parts.items():
            kept.append(batch.truth[name].to(self.device, torch.float32))

    def stream(self, name: str) -> Tensor:
        """[N, D]."""
        self._parts[name] = [torch.cat(self._parts[name])]
        return self._parts[name][0]


class InputsOnCPU(InputsOnDevice):
    """The same on the CPU, where codes are."""

    device = torch.device("cpu")


def bytes_of_inputs(sizes: Sizes) -> int:
    """That are kept, and side by side once."""
    return 8 * sizes.N * sizes.D
