"""Codes: the few latents of each sample that are on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparc_fast import checkpoint
from sparc_fast.batch import position

FORMAT = "sparc_fast.SparseLatents/1"


@dataclass(frozen=True)
class SparseLatents:
    """A batch of codes: the few latents that are on, and how strongly each stream drives them.

    ``codes[i]``, ``codes[2:5]`` and ``codes[mask]`` index the leading dimensions; ``len(codes)`` is the first of them.
    """

    values: Tensor
    """[..., S, k], ReLU of each stream's own pre-activations on the support: a selected latent may be 0."""
    indices: Tensor
    """int32, [..., k] shared by all streams, or [..., S, k] where each stream has its own support; -1: none."""
    streams: tuple[str, ...]
    """The S streams encoded, in the model's order."""
    n_latents: int
    """L."""

    @property
    def is_shared(self) -> bool:
        """Whether one support serves all streams."""
        return self.indices.ndim < self.values.ndim

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions, those of the samples."""
        return self.values.shape[:-2]

    def __len__(self) -> int:
        return len(self.values) if self.shape else 1

    def __getitem__(self, at: Any) -> SparseLatents:
        places = torch.arange(self.shape.numel(), device=self.values.device).reshape(self.shape)[at]
        return self._map(lambda part: part.flatten(0, len(self.shape) - 1)[places] if self.shape else part)

    def to(self, *arguments: Any, **options: Any) -> SparseLatents:
        """As Tensor.to: another device, and another dtype of the values."""
        values = self.values.to(*arguments, **options)
        return SparseLatents(values, self.indices.to(values.device), self.streams, self.n_latents)

    def reshape(self, *leading: int) -> SparseLatents:
        """The same samples in other leading dimensions."""
        parts = [part.reshape(*leading, *part.shape[len(self.shape) :]) for part in (self.values, self.indices)]
        return SparseLatents(parts[0], parts[1], self.streams, self.n_latents)

    @staticmethod
    def cat(codes: Sequence[SparseLatents]) -> SparseLatents:
        """Samples below samples, of one model and the same streams."""
        first = codes[0] if codes else None
        like = [(one.streams, one.n_latents, one.is_shared, one.values.shape[1:]) for one in codes]
        if first is None or any(other != like[0] for other in like):
            raise ValueError(f"codes must be at least one, all of the same streams, latents and k, got {like}")
        values, indices = torch.cat([one.values for one in codes]), torch.cat([one.indices for one in codes])
        return SparseLatents(values, indices, first.streams, first.n_latents)

    def stream(self, name: str) -> tuple[Tensor, Tensor]:
        """(values, indices) of one stream, both [..., k]."""
        s = position(name, self.streams, "stream")
        return self.values[..., s, :], self.indices if self.is_shared else self.indices[..., s, :]

    def dense(self, name: str) -> Tensor:
        """One stream's latents scattered to [..., L]; for inspection, since it is as large as it looks."""
        values, indices = self.stream(name)
        on = values.masked_fill(indices < 0, 0)
        return values.new_zeros(*values.shape[:-1], self.n_latents).scatter_add(-1, indices.clamp(min=0).long(), on)

    def to_csr(self, name: str) -> Tensor:
        """One stream's latents as a sparse matrix [N, L], torch.sparse_csr: those that are not 0, N samples flattened.

        ``scipy.sparse.csr_array((m.values(), m.col_indices(), m.crow_indices()), m.shape)`` is SciPy's.
        """
        values, indices = (part.reshape(-1, part.shape[-1]) for part in self.stream(name))
        indices, order = indices.long().sort(1)
        values = values.gather(1, order)
        on = (values != 0) & (indices >= 0)
        rows = torch.zeros(len(values) + 1, dtype=torch.int64, device=values.device)
        rows[1:] = on.sum(1).cumsum(0)
        size = (len(values), self.n_latents)
        like: dict[str, Any] = {"dtype": values.dtype, "device": values.device}
        return torch.sparse_csr_tensor(rows, indices[on], values[on], size, check_invariants=True, **like)

    def save(self, path: str | Path) -> None:
        """Write the codes to one safetensors file, atomically."""
        config = {"streams": list(self.streams), "n_latents": self.n_latents}
        checkpoint.save(path, {"values": self.values, "indices": self.indices}, config, FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> SparseLatents:
        """The codes that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, or holds no codes.
        """
        tensors, config = checkpoint.load(path, FORMAT)
        try:
            return cls(tensors["values"], tensors["indices"], tuple(config["streams"]), config["n_latents"])
        except KeyError as error:
            raise ValueError(f"path must be codes saved by sparc_fast, but {path} has no {error}") from error

    def _map(self, change: Callable[[Tensor], Tensor]) -> SparseLatents:
        return SparseLatents(change(self.values), change(self.indices), self.streams, self.n_latents)
