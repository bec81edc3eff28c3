"""Codes: the few latents of each sample that are on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparc_fast.batch import position


@dataclass(frozen=True)
class SparseLatents:
    """A batch of codes: the few latents that are on, and how strongly each stream drives them."""

    values: Tensor
    """[..., S, k], ReLU of each stream's own pre-activations on the support: a selected latent may be 0."""
    indices: Tensor
    """int32, [..., k] shared by all streams, or [..., S, k] where each stream has its own support."""
    streams: tuple[str, ...]
    """The S streams encoded, in the model's order."""
    n_latents: int
    """L."""

    def stream(self, name: str) -> tuple[Tensor, Tensor]:
        """(values, indices) of one stream, both [..., k]."""
        s = position(name, self.streams, "stream")
        shared = self.indices.ndim < self.values.ndim
        return self.values[..., s, :], self.indices if shared else self.indices[..., s, :]

    def dense(self, name: str) -> Tensor:
        """One stream's latents scattered to [..., L]; for inspection, since it is as large as it looks."""
        values, indices = self.stream(name)
        return values.new_zeros(*values.shape[:-1], self.n_latents).scatter(-1, indices.long(), values)
