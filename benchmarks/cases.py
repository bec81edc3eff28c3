"""Shapes by name, and the tensors of an operator at a shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc_fast import SPARC
from sparc_fast.objective import nmse_scale, pair_weights, row_energy
from sparc_fast.reference import invert_indices, stream_slices
from sparc_fast.roofs import Cost

FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Shape:
    name: str
    N: int
    L: int
    k: int = 64
    d_streams: tuple[int, ...] = (1024, 768, 768)

    @property
    def S(self) -> int:
        return len(self.d_streams)

    @property
    def D(self) -> int:
        return sum(self.d_streams)

    def model(self, backend: str = "auto") -> SPARC:
        """The same weights every time."""
        torch.manual_seed(0)
        streams = {f"stream{s}": width for s, width in enumerate(self.d_streams)}
        return SPARC(streams, self.L, self.k, backend=backend)

    def inputs(self, seed: int = 1) -> Tensor:
        """Gaussian rows of unit norm in each stream: latents are used evenly, the hardest case for caches."""
        torch.manual_seed(seed)
        return torch.cat([F.normalize(torch.randn(self.N, width), dim=1) for width in self.d_streams], dim=1)


SMALL = Shape("small", N=64, L=1024, k=16, d_streams=(64, 48, 48))
STEP = (Shape("N1024-L8192", 1024, 8192), Shape("N256-L32768", 256, 32768))
WIDE = Shape("N1024-L131072", 1024, 131072)
# one training set-up at ever more latents; the first is for tests
WIDTHS = tuple(Shape(f"N512-L{L}", 512, L, k=32, d_streams=(128, 128)) for L in (2048, 65536, 262144, 1048576))
# samples far more than latents
MANY = (Shape("N65536-L8192", 65536, 8192), Shape("N16384-L1024", 16384, 1024, k=16, d_streams=(256, 192, 192)))
SINGLE = Shape("S1-N384-L8192", 384, 8192, k=32, d_streams=(256,))
SMALL_SINGLE = Shape("small", N=64, L=1024, k=16, d_streams=(64,))
# rows of scores: N L = 16 M of them, more than any cache holds
ROWS = tuple(Shape(f"rows-{name}", 2**24 // L, L) for name, L in
             {"8k": 8192, "32k": 32768, "131k": 131072, "1M": 1048576}.items())  # fmt: skip


@dataclass
class Case:
    """Contenders that do the same work; `ours` names the one that ratios are taken against."""

    op: str
    shape: Shape
    contenders: dict[str, Callable[[], Any]]
    ours: tuple[str, ...]
    phases: tuple[Cost, ...]
    """One after another; the floor of a case is the sum of theirs."""
    yardsticks: frozenset[str] = frozenset()
    """Contenders that do less: a bound to compare with, not a rival."""
    wrong: Mapping[str, str] = field(default_factory=dict)
    """Contenders whose result was not the reference's, and in what; they are not timed."""


class Operands:
    """Every operator's arguments at a shape, made when first asked for."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.d_streams, self.k = shape, shape.d_streams, shape.k
        self.columns = stream_slices(shape.d_streams)
        self.x = shape.inputs()

    def first(self, N: int) -> Operands:
        """The same weights before fewer samples: cheap enough for the reference."""
        return Operands(replace(self.shape, N=min(N, self.shape.N)))

    @cached_property
    def model(self) -> SPARC:
        return self.shape.model().requires_grad_(False)

    @cached_property
    def W_enc(self) -> Tensor:
        return self.model.W_enc.data

    @cached_property
    def W_dec(self) -> Tensor:
        return self.model.W_dec.data

    @cached_property
    def pre_bias(self) -> Tensor:
        torch.manual_seed(2)
        return torch.randn(self.shape.D) / 100

    @cached_property
    def latent_bias(self) -> Tensor:
        torch.manual_seed(3)
        return torch.randn(self.shape.S, self.shape.L) / 100

    @cached_property
    def scores(self) -> Tensor:
        torch.manual_seed(4)
        return torch.randn(self.shape.N, self.shape.L)

    @cached_property
    def indices(self) -> Tensor:
        logits = torch.addmm(self.latent_bias.sum(0), self.x - self.pre_bias, self.W_enc.T)
        return logits.topk(self.k, dim=1).indices.sort(dim=1).values.int()

    @cached_property
    def values(self) -> Tensor:
        torch.manual_seed(5)
        return torch.randn(self.shape.N, self.shape.S, self.k).relu() / 10

    @cached_property
    def grad_values(self) -> Tensor:
        torch.manual_seed(6)
        return torch.randn(self.shape.N, self.shape.S, self.k) / self.shape.N

    @cached_property
    def grad_recons(self) -> Tensor:
        torch.manual_seed(7)
        return torch.randn(self.shape.N, self.shape.S, self.shape.D) / self.shape.N

    @cached_property
    def scale(self) -> Tensor:
        return nmse_scale(row_energy(self.x, self.d_streams))

    @cached_property
    def weights(self) -> tuple[float, ...]:
        return pair_weights(self.shape.S, 1.0)

    @cached_property
    def inverse(self) -> tuple[Tensor, Tensor]:
        return invert_indices(self.indices, self.shape.L)

    @cached_property
    def touched(self) -> int:
        """Latents that are in some sample's support: the rows a gather cannot avoid."""
        return len(self.indices.unique())
