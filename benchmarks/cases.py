"""Shapes by name, every operator's arguments at a shape on any device, and calls of every operator.

Random tensors are drawn on the device itself: at a million latents the host would take minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc_fast import SPARC
from sparc_fast.objective import pair_weights
from sparc_fast.ops import reference
from sparc_fast.ops.backends import Backend
from sparc_fast.ops.huge_pages import empty_rows
from sparc_fast.ops.layout import gradient_dtype, stream_slices, wide
from sparc_fast.ops.reference import nmse_scale, row_energy
from sparc_fast.ops.row_step import AdamStep, Bias, DecoderRows, Gradients, Rows, Samples
from sparc_fast.planning.process_memory import available_bytes

FLOAT = 4  # bytes of a float32
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}  # moves far beyond a weight's own rounding


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

    @property
    def held_bytes(self) -> int:
        """Weights, two moments of each, and inputs: what no float32 Adam does without."""
        weights = 2 * self.L * self.D + self.D + self.S * self.L
        return FLOAT * (3 * weights + self.N * self.D)

    def model(self, backend: str = "auto", **options: Any) -> SPARC:
        """The same weights every time on a device, drawn there; `options` are SPARC's."""
        torch.manual_seed(0)
        streams = {f"stream{s}": width for s, width in enumerate(self.d_streams)}
        return SPARC(streams, self.L, self.k, backend=backend, **options)

    def inputs(self, seed: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """Gaussian rows of unit norm in each stream: latents are used evenly, the hardest case for caches."""
        torch.manual_seed(seed)
        parts = [torch.randn(self.N, width, device=device) for width in self.d_streams]
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)


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
# what the GPU's figures are named after
U = Shape("U", 256, 8192)
A = Shape("A", 4096, 32768)
B = Shape("B", 4096, 131072)
C = Shape("C", 8192, 1048576, k=128)
ON_GPU = (A, B, U, SMALL)
TINY = Shape("tiny", N=5, L=48, k=3, d_streams=(8, 5, 3))
SHAPES = {shape.name: shape for shape in (U, A, B, C, TINY)}


@dataclass(frozen=True)
class Place:
    """Where a run happens: a device, and what is measured there of ours."""

    device: torch.device
    ours: Mapping[str, str]
    """Label of a contender -> its backend."""
    stands_in: bool = False
    """Whether a CPU runs what a GPU would."""

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def as_gpu(self) -> bool:
        """Whether a GPU's rivals and shapes run here."""
        return self.is_gpu or self.stands_in

    @property
    def role(self) -> str:
        """The first of ours."""
        return next(iter(self.ours))

    @property
    def backend(self) -> str:
        return self.ours[self.role]

    def free_bytes(self) -> float:
        """Memory the device could still give."""
        if self.is_gpu:
            return torch.cuda.mem_get_info(self.device)[0]
        free = available_bytes()
        return math.inf if free is None else free


class Operands:
    """Every operator's arguments at a shape, made when first asked for; the same numbers every time.

    The support is that of the scores, or `spread` evenly over the latents where the scores are too many to form.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, spread: bool = True, of: Operands | None = None
    ) -> None:
        self.shape, self.dtype, self.device, self.spread = shape, dtype, device, spread
        self.of = of
        """Whose weights these are."""
        self.d_streams, self.k, self.n_latents = shape.d_streams, shape.k, shape.L
        self.columns = stream_slices(shape.d_streams)

    def first(self, N: int) -> Operands:
        """The same weights before fewer samples: cheap enough for the reference."""
        return Operands(replace(self.shape, N=min(N, self.shape.N)), self.dtype, self.device, self.spread, self)

    def normal(self, seed: int, *size: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.randn(size, device=self.device)

    @cached_property
    def x(self) -> Tensor:
        return self.shape.inputs(device=self.device).to(self.dtype)

    def weights_drawn(self, seed: int) -> Tensor:
        """float32 [L, D], as `SPARC` draws them."""
        torch.manual_seed(seed)
        W = empty_rows(self.shape.L, self.shape.D, device=self.device)
        for cols in self.columns:
            W[:, cols].uniform_(-1, 1).mul_((cols.stop - cols.start) ** -0.5)
        return W

    @cached_property
    def W_enc(self) -> Tensor:
        return self.weights_drawn(10).to(self.dtype) if self.of is None else self.of.W_enc

    @cached_property
    def W_dec(self) -> Tensor:
        if self.of is not None:
            return self.of.W_dec
        W = self.weights_drawn(11)
        reference.normalize_rows(W, self.d_streams)
        return W.to(self.dtype)

    @cached_property
    def pre_bias(self) -> Tensor:
        return (self.normal(12, self.shape.D) / 100).to(self.dtype)

    @cached_property
    def latent_bias(self) -> Tensor:
        return (self.normal(13, self.shape.S, self.shape.L) / 100).to(self.dtype)

    @property
    def threshold(self) -> float:
        """What some latents' scores are above: a deviation and a half of theirs, but for the biases."""
        return 1.5 * (len(self.d_streams) / 3) ** 0.5

    @cached_property
    def scores(self) -> Tensor:
        return self.normal(14, self.shape.N, self.shape.L)

    @cached_property
    def indices(self) -> Tensor:
        """Distinct and ascending: the support, or with `spread` one latent of each of k equal ranges."""
        if not self.spread:
            scores = torch.addmm(self.latent_bias.sum(0), self.x - self.pre_bias, self.W_enc.T)
            return scores.topk(self.k, dim=1).indices.sort(dim=1).values.int()
        torch.manual_seed(15)
        low = torch.arange(self.k, device=self.device) * self.shape.L // self.k
        high = torch.arange(1, self.k + 1, device=self.device) * self.shape.L // self.k
        drawn = torch.rand(self.shape.N, self.k, device=self.device)
        return torch.minimum(low + (drawn * (high - low)).long(), high - 1).int()

    @cached_property
    def values(self) -> Tensor:
        return (self.normal(16, self.shape.N, self.shape.S, self.k).relu() / 10).to(self.dtype)

    @cached_property
    def grad_values(self) -> Tensor:
        return (self.normal(17, self.shape.N, self.shape.S, self.k) / max(self.shape.N, 1)).to(self.dtype)

    @cached_property
    def grad_recons(self) -> Tensor:
        grad = self.normal(18, self.shape.N, self.shape.S, self.shape.D) / max(self.shape.N, 1)
        return grad.to(gradient_dtype(self.values))

    @cached_property
    def scale(self) -> Tensor:
        return nmse_scale(row_energy(self.x, self.d_streams))

    @property
    def energy(self) -> Tensor:
        return row_energy(self.x, self.d_streams)

    @cached_property
    def nmse(self) -> Tensor:
        return self.normal(19, self.shape.S, self.shape.S).abs()

    @property
    def auxk(self) -> Tensor:
        return self.nmse[0, 0]

    @property
    def auxk_coef(self) -> float:
        return 1 / 32

    @cached_property
    def weights(self) -> tuple[float, ...]:
        return pair_weights(self.shape.S, 1.0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of four nested dictionaries."""
        return nested_sizes(self.shape.L)

    @cached_property
    def inverse(self) -> tuple[Tensor, Tensor]:
        return reference.invert_indices(self.indices, self.shape.L)

    @property
    def target(self) -> Tensor:
        return self.x

    @property
    def offsets(self) -> Tensor:
        return self.inverse[0]

    @property
    def entries(self) -> Tensor:
        return self.inverse[1]

    @cached_property
    def silence(self) -> Tensor:
        return torch.zeros(self.shape.L, dtype=torch.int64, device=self.device)

    @cached_property
    def touched(self) -> int:
        """Latents that are in some sample's support: the rows a gather cannot avoid."""
        return len(self.indices.unique())


def nested_sizes(L: int) -> tuple[int, ...]:
    return L // 16, L // 4, L // 2, L


class Trained:
    """Weights of our own to move, with Adam's moments as after some steps (at rest, Adam only keeps signs).

    Narrow weights are copies of float32 rows, as `SparcAdam` keeps them.
    """

    def __init__(self, o: Operands, moments: torch.dtype | None = None) -> None:
        self.start = o.W_enc, o.W_dec
        self.W_enc, self.W_dec = (wide(W).clone() for W in self.start)
        self.moments = [torch.full_like(self.W_enc, value, dtype=moments) for value in (0.0, 1e-6, 0.0, 1e-6)]
        self.copies = None if self.W_enc.dtype == o.dtype else (o.W_enc.clone(), o.W_dec.clone())

    def rows(self, d_streams: tuple[int, ...]) -> Rows:
        return Rows(self.W_enc, self.W_dec, self.moments, d_streams, self.copies)

    def moved(self) -> tuple[Tensor, Tensor]:
        return self.W_enc - self.start[0], self.W_dec - self.start[1]


def _samples(o: Operands) -> Samples:
    return Samples(o.x, o.pre_bias, o.values, o.grad_values, o.grad_recons, *o.inverse)


def _moving(move: Callable[..., Any], given: Any, o: Operands, moments: torch.dtype | None) -> Callable[[], Trained]:
    own = Trained(o, moments)
    rows = own.rows(o.d_streams)

    def run() -> Trained:
        move(rows, given, AdamStep(**ADAM, step=1000, seed=0))
        return own

    return run


def _update_rows(b: Any, o: Operands, moments: torch.dtype | None = None) -> Callable[[], Trained]:
    return _moving(b.update_rows, _samples(o), o, moments)


def _step_rows(b: Any, o: Operands, moments: torch.dtype | None = None) -> Callable[[], Trained]:
    args = (o.x.float(), o.pre_bias.float(), o.values.float(), o.grad_values.float(), o.grad_recons.float())
    gradients = Gradients(*reference.weight_gradients(*args, *o.inverse, o.d_streams)[:2], o.inverse[0].diff() > 0)
    return _moving(b.step_rows, gradients, o, moments)


def _biases(o: Operands) -> list[Bias]:
    own = [wide(bias).clone() for bias in (o.latent_bias, o.pre_bias)]
    copies = [None if bias.dtype == o.dtype else bias.to(o.dtype) for bias in own]
    return [Bias(w, [w / 10], [w * 0, w * 0 + 1e-6], copy) for w, copy in zip(own, copies, strict=True)]


def _step_biases(b: Any, o: Operands) -> Callable[[], Tensor]:
    biases = _biases(o)

    def run() -> Tensor:
        b.step_biases(biases, AdamStep(**ADAM, step=1000))
        return biases[0].bias

    return run


def _finish_step(b: Any, o: Operands) -> Callable[[], Tensor]:
    biases, counted = _biases(o), torch.ones((), dtype=torch.float64, device=o.device)
    told = o.nmse, o.auxk, o.energy, o.weights, o.auxk_coef

    def run() -> Tensor:
        b.finish_step(biases, AdamStep(**ADAM, step=1000), o.silence, o.values, o.indices, counted, *told)
        return biases[0].bias

    return run


def _replay_rows(b: Any, o: Operands, moments: torch.dtype | None = None) -> Callable[[], Tensor]:
    """Ten skipped steps of every second latent."""
    own = Trained(o, moments)
    latents = torch.arange(0, o.shape.L, 2, device=o.device)
    history = torch.tensor([[1e-4, 0.9, 0.999, 1e-8]] * 10, dtype=torch.float64, device=o.device)
    copy = own.copies and own.copies[1]

    def run() -> Tensor:
        last_step = torch.zeros(o.shape.L, dtype=torch.int64, device=o.device)
        b.replay_rows(DecoderRows(own.W_dec, own.moments[2:], o.d_streams, last_step, copy), latents, history, seed=0)
        return own.W_dec

    return run


def _of_operands(name: str, b: Any, o: Operands) -> Callable[[], Any]:
    """The operator on the operands that its parameters are named after."""
    parameters = list(signature(getattr(Backend, name)).parameters.values())[1:]
    return partial(getattr(b, name), *[getattr(o, p.name) for p in parameters if p.default is p.empty])


# every operator as a function to call again and again; `b` is a backend, or any namespace of its functions
CALLS: dict[str, Callable[[Any, Operands], Callable[[], Any]]] = {
    **{name: partial(_of_operands, name) for name in vars(Backend) if not name.startswith("_")},
    "gradient_squares": lambda b, o: partial(b.gradient_squares, _samples(o), o.d_streams),
    "update_rows": _update_rows,
    "step_rows": _step_rows,
    "replay_rows": _replay_rows,
    "step_biases": _step_biases,
    "finish_step": _finish_step,
}
# the same operators with Adam's moments in bfloat16, which other machine code does
NARROW_MOMENTS = {
    name: partial(CALLS[name], moments=torch.bfloat16) for name in ("update_rows", "step_rows", "replay_rows")
}


def namespace(**functions: Any) -> Any:
    """A backend of some functions."""
    return SimpleNamespace(**functions)
