"""Codes: the few latents of each sample that are on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc_fast import checkpoint
from sparc_fast.batch import position, stack
from sparc_fast.sizes import is_integer, is_number

FORMAT = "sparc_fast.SparseLatents/1"
SHOWN = 5  # samples, and latents of each, in a notebook


@dataclass(frozen=True, repr=False)
class SparseLatents:
    """A batch of codes: the few latents that are on, and how strongly each stream drives them.

    ``codes[i]``, ``codes[2:5]`` and ``codes[mask]`` index the leading dimensions; ``len(codes)`` is the first of them.
    To steer, change a latent and decode: ``model.decode(codes.set(7, 0), "image", "text")`` is what the text stream
    would be without what latent 7 stands for.
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

    def __repr__(self) -> str:
        samples, k = list(self.shape), self.indices.shape[-1]
        support = "shared by all streams" if self.is_shared else "of each stream"
        return (
            f"SparseLatents({samples} samples, streams {', '.join(self.streams)}: supports {support}, "
            f"{k} of {self.n_latents} latents, {self.values.dtype}, {self.values.device})"
        )

    def _repr_html_(self) -> str:
        from html import escape

        """The strongest latents of the first samples, for a notebook."""
        flat = self.reshape(self.shape.numel())[:SHOWN]
        head = "".join(f"<th>{escape(name)}</th>" for name in self.streams)
        rows = "".join(
            f"<tr><th>{i}</th>{''.join(f'<td>{_strongest(*one.stream(name))}</td>' for name in self.streams)}</tr>"
            for i, one in enumerate(flat[i] for i in range(len(flat)))
        )
        return f"<p>{escape(repr(self))}</p><table><tr><th>sample</th>{head}</tr>{rows}</table>"

    def set(self, latent: int, value: float, stream: str | None = None) -> SparseLatents:
        """The same codes with a latent at this value in every sample, of one stream or of all; at 0 it is out.

        Where it is in no slot of a sample, the sample gets one slot more.
        """
        here, value = self._at(latent), _number(value, "value")
        indices, values = self.indices, self.values
        if value != 0 and not bool(here.any(-1).all()):
            lacking = torch.where(here.any(-1, keepdim=True), -1, latent).to(indices.dtype)
            indices = torch.cat([indices, lacking], dim=-1)
            values = torch.cat([values, values.new_zeros(*values.shape[:-1], 1)], dim=-1)
        grown = replace(self, values=values, indices=indices)
        return grown._change(latent, stream, lambda old: torch.full_like(old, value))

    def scale(self, latent: int, factor: float, stream: str | None = None) -> SparseLatents:
        """The same codes with a latent's values times a factor, of one stream or of all."""
        factor = _number(factor, "factor")
        return self._change(latent, stream, lambda old: old * factor)

    def _at(self, latent: int) -> Tensor:
        """bool, as indices: the slots of a latent."""
        if not is_integer(latent) or not 0 <= latent < self.n_latents:
            raise ValueError(f"latent must be in 0 ... {self.n_latents - 1}, got {latent!r}")
        return self.indices == latent

    def _change(self, latent: int, stream: str | None, change: Callable[[Tensor], Tensor]) -> SparseLatents:
        here = self._at(latent)
        here = here.unsqueeze(-2).expand(self.values.shape) if self.is_shared else here
        if stream is not None:
            chosen = torch.zeros(len(self.streams), 1, dtype=torch.bool, device=here.device)
            chosen[position(stream, self.streams, "stream")] = True
            here = here & chosen
        return replace(self, values=torch.where(here, change(self.values), self.values))

    def to(self, *arguments: Any, **options: Any) -> SparseLatents:
        """As Tensor.to: another device, and another dtype of the values."""
        values = self.values.to(*arguments, **options)
        return replace(self, values=values, indices=self.indices.to(values.device))

    def reshape(self, *leading: int) -> SparseLatents:
        """The same samples in other leading dimensions."""
        return self._map(lambda part: part.reshape(*leading, *part.shape[len(self.shape) :]))

    def with_slots(self, k: int) -> SparseLatents:
        """The same with k slots a sample, the further ones empty: latent -1 of value 0."""
        room = (0, k - self.values.shape[-1])
        return replace(self, values=pad(self.values, room), indices=pad(self.indices, room, value=-1))

    @staticmethod
    def cat(codes: Sequence[SparseLatents]) -> SparseLatents:
        """Samples below samples, of one model and the same streams; empty slots where some have fewer than others."""
        codes = [one if one.shape else one.reshape(1) for one in codes]
        first = codes[0] if codes else None
        like = [(one.streams, one.n_latents, one.is_shared, one.values.shape[1:-1]) for one in codes]
        if first is None or any(other != like[0] for other in like):
            raise ValueError(f"codes must be at least one, all of the same streams and latents, got {like}")
        values, indices = stack([one.values for one in codes]), stack([one.indices for one in codes])
        return replace(first, values=values, indices=indices)

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
        return replace(self, values=change(self.values), indices=change(self.indices))


def _strongest(values: Tensor, indices: Tensor) -> str:
    """The latents of one sample and stream that are on, strongest first."""
    values = values.detach().float().masked_fill(indices < 0, 0)
    top = values.topk(min(SHOWN, len(values)))
    latents = indices[top.indices].tolist()
    return ", ".join(f"{l}: {value:.3g}" for l, value in zip(latents, top.values.tolist(), strict=True) if value != 0)


def _number(value: Any, name: str) -> float:
    found = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not is_number(found):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(found)
