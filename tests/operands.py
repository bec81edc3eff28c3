"""Random operands for every operator, and every operator as a function of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from sparc_fast.ops import backends, reference
from sparc_fast.ops.backends import Backend
from sparc_fast.ops.layout import wide
from sparc_fast.ops.row_step import AdamStep, Bias, DecoderRows, Gradients, Rows, Samples

# d_streams, N, L, k
CASES = {
    "ragged": ((7, 1, 100), 5, 33, 3),
    "width 1": ((1,), 3, 4, 4),
    "several column runs": ((300, 520), 17, 40, 9),
    "more streams than one gather takes": ((3, 1, 7, 5, 20), 9, 20, 6),
    "every latent in use again and again": ((64, 16), 130, 12, 10),
    "few samples of many latents": ((48,), 4, 500, 2),
}
# programs of Triton's interpreter run one by one: it gets the first of the samples
IN_INTERPRETER = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SUPPORTS = pytest.mark.parametrize("per_stream", [False, True], ids=["shared support", "support per stream"])


@dataclass(frozen=True)
class Operands:
    x: Tensor
    W_enc: Tensor
    W_dec: Tensor
    pre_bias: Tensor
    latent_bias: Tensor
    indices: Tensor
    values: Tensor
    grad_values: Tensor
    grad_recons: Tensor
    scale: Tensor
    d_streams: tuple[int, ...]
    weights: tuple[float, ...]

    def map(self, change: Callable[[Tensor], Tensor]) -> Operands:
        """A copy with every floating-point tensor changed."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        floats = {n: t for n, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point()}
        return replace(self, **{name: change(tensor) for name, tensor in floats.items()})

    def to(self, dtype: torch.dtype) -> Operands:
        return self.map(lambda tensor: tensor.to(dtype))

    def samples(self, chosen: slice) -> Operands:
        of_samples = ("x", "indices", "values", "grad_values", "grad_recons", "scale")
        return replace(self, **{name: getattr(self, name)[chosen] for name in of_samples})

    @property
    def sizes(self) -> list[int]:
        """Of four nested dictionaries, two of them the same, the first perhaps of no latent."""
        L = len(self.W_enc)
        return [L // 8, L // 3, L // 3, L]

    @property
    def inverse(self) -> tuple[Tensor, Tensor]:
        return reference.invert_indices(self.indices, len(self.W_enc))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def sliced(tensor: Tensor) -> Tensor:
    """Equal numbers, in a window of a wider tensor of NaN."""
    wider = torch.full([size + 3 for size in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
    window = wider[tuple(slice(1, size + 1) for size in tensor.shape)]
    return window.copy_(tensor)


def largest(scores: Tensor, k: int) -> Tensor:
    """The rule of selection, by a stable sort: the k largest, ties to the lower column, NaN ranks with infinity."""
    order = torch.where(scores.isnan(), torch.inf, scores).sort(dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values.int()


def fast_backends() -> tuple[str, ...]:
    """The backends that get through any test: Triton's interpreter does not."""
    device = torch.get_default_device()
    return tuple(name for name in backends.available(device) if name != "triton" or device.type == "cuda")


def kernel_device() -> torch.device:
    """Where the Triton kernels run: without a GPU in the interpreter, wherever the tests do."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.get_default_device()


def operators_of(backend: str) -> Backend:
    return backends.resolve(backend, torch.get_default_device())


def operands(
    case: str | tuple[tuple[int, ...], int, int, int], dtype: torch.dtype, per_stream: bool = False, seed: int = 0
) -> Operands:
    d_streams, N, L, k = CASES[case] if isinstance(case, str) else case
    S, D = len(d_streams), sum(d_streams)
    generator = seeded(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (N, S, L) if per_stream else (N, L)
    weights = tuple(float(s + 2 * t + 1) * (s != t or s % 2 == 0) for s in range(S) for t in range(S))
    return Operands(
        x=random(N, D) + 3,
        W_enc=random(L, D),
        W_dec=random(L, D),
        pre_bias=random(D) + 3,
        latent_bias=random(S, L),
        indices=torch.rand(shape, generator=generator).topk(k).indices.sort().values.int(),
        values=torch.relu(random(N, S, k)),
        grad_values=random(N, S, k),
        grad_recons=random(N, S, D),
        scale=torch.rand(N, S, generator=generator),
        d_streams=d_streams,
        weights=weights,
    ).to(dtype)


STEP, SEED = 3, 2**40 + 7


def samples_of(o: Operands, inverse: tuple[Tensor, Tensor] | None = None) -> Samples:
    return Samples(o.x, o.pre_bias, o.values, o.grad_values, o.grad_recons, *(inverse or o.inverse))


def move_rows(
    backend: Backend,
    rows: list[Tensor],
    o: Operands,
    *,
    inverse: tuple[Tensor, Tensor] | None = None,
    lr: float | Tensor = 0.01,
    eps: float = 1e-8,
    step: int | Tensor = STEP,
    copies: list[Tensor] | None = None,
    last_step: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, ...]:
    """An update of rows = [W_enc, W_dec, 4 moments] in place; what it returns."""
    W_enc, W_dec, *moments = rows
    settings = AdamStep(lr, (0.9, 0.999), eps, step, seed)
    moving = Rows(W_enc, W_dec, moments, o.d_streams, copies, last_step)
    return backend.update_rows(moving, samples_of(o, inverse), settings)


def rows_to_update(o: Operands, narrow: bool = False) -> list[Tensor]:
    """W_enc, W_dec with unit norm, and their moments, in the type of the sums.

    Narrow moments are bfloat16; beside float64 weights, the same numbers in float64.
    """
    weights = [wide(W).clone() for W in (o.W_enc, o.W_dec)]
    reference.normalize_rows(weights[1], o.d_streams)
    generator = seeded(1)
    moments = [torch.rand(W.shape, generator=generator).to(W.dtype) for W in (*weights, *weights)]
    if narrow:
        moments = [m.bfloat16().to(m.dtype if m.dtype == torch.float64 else torch.bfloat16) for m in moments]
    return [*weights, *moments]


def moved(
    move: Callable[[Rows, AdamStep], tuple[Tensor, ...] | None], o: Operands, lazy: bool, narrow: bool
) -> tuple[Tensor, ...]:
    """The moved rows, whose copies, where these are narrower, follow them; what `move` returns; and the steps made."""
    W_enc, W_dec, *moments = rows = rows_to_update(o, narrow)
    copies = [W.to(o.W_enc.dtype) for W in (W_enc, W_dec)] if o.W_enc.dtype != W_enc.dtype else None
    last_step = torch.full((len(W_enc),), STEP - 1) if lazy else None
    adam = AdamStep(0.01, (0.9, 0.999), 1e-8, STEP, SEED if narrow else None)
    grads = move(Rows(W_enc, W_dec, moments, o.d_streams, copies, last_step), adam)
    for copy, exact in zip(copies or (), rows, strict=False):
        assert torch.equal(copy, exact.to(copy.dtype))
    return (*rows, *(grads or ()), *([] if last_step is None else [last_step]))


def update_rows(o: Operands, backend: Backend, lazy: bool = False, narrow: bool = False) -> tuple[Tensor, ...]:
    return moved(lambda rows, adam: backend.update_rows(rows, samples_of(o), adam), o, lazy, narrow)


def step_rows(o: Operands, backend: Backend, lazy: bool = False, narrow: bool = False) -> tuple[Tensor, ...]:
    """With the reference's gradients of every row that is used."""
    widened = [wide(tensor) if tensor.is_floating_point() else tensor for tensor in samples_of(o)]
    gradients = Gradients(*reference.weight_gradients(*widened, o.d_streams)[:2], o.inverse[0].diff() > 0)
    return moved(lambda rows, adam: backend.step_rows(rows, gradients, adam), o, lazy, narrow)


def replay_rows(o: Operands, backend: Backend, narrow: bool = False) -> tuple[Tensor, ...]:
    """Decoder rows after the steps they missed, every third of them left as it is, and the last step of all."""
    _, W_dec, _, _, m, v = rows_to_update(o, narrow)
    last_step = torch.arange(len(W_dec)) % 7
    latents = torch.arange(len(W_dec)).roll(1)
    history = torch.tensor([(0.01 / t, 0.9, 0.999, 1e-8) for t in range(1, 12)], dtype=torch.float64)
    copy = W_dec.to(o.W_dec.dtype) if o.W_dec.dtype != W_dec.dtype else None
    rows = DecoderRows(W_dec, [m, v], o.d_streams, last_step, copy)
    backend.replay_rows(rows, latents[latents % 3 > 0], history, SEED if narrow else None)
    if copy is not None:
        assert torch.equal(copy, W_dec.to(copy.dtype))
    return W_dec, m, v, last_step


def count_silence(o: Operands, backend: Backend) -> tuple[Tensor, ...]:
    silence = torch.arange(len(o.W_enc))
    backend.count_silence(silence, o.values, o.indices)
    return (silence,)


def biases_to_step(o: Operands) -> list[Bias]:
    """Both biases, of which one has two gradients and one a narrower copy, and their moments."""
    generator = seeded(2)
    moved = []
    for bias, count in ((o.latent_bias, 1), (o.pre_bias, 2)):
        w = wide(bias).clone()
        gradients, moments = (
            [torch.rand(w.shape, generator=generator).to(w.dtype) for _ in range(n)] for n in (count, 2)
        )
        moved.append(Bias(w, gradients, moments, bias.clone() if bias.dtype != w.dtype else None))
    return moved


def stepped(biases: Sequence[Bias]) -> tuple[Tensor, ...]:
    for one in biases:
        assert one.copy is None or torch.equal(one.copy, one.bias.to(one.copy.dtype))
    return tuple(tensor for one in biases for tensor in (one.bias, *one.moments))


def step_biases(o: Operands, backend: Backend) -> tuple[Tensor, ...]:
    biases = biases_to_step(o)
    backend.step_biases(biases, AdamStep(0.01, (0.9, 0.999), 1e-8, STEP))
    return stepped(biases)


def finish_step(o: Operands, backend: Backend) -> tuple[Tensor, ...]:
    biases, silence, (nmse, energy) = biases_to_step(o), torch.arange(len(o.W_enc)), told(o)
    counted = torch.tensor(STEP, dtype=torch.float64)
    adam = AdamStep(0.01, (0.9, 0.999), 1e-8, counted)
    summary = backend.finish_step(
        biases, adam, silence, o.values, o.indices, counted, nmse, nmse.sum(), energy, o.weights, 0.5
    )
    return *stepped(biases), silence, counted, *(part for part in summary if part is not None)


def told(o: Operands) -> tuple[Tensor, Tensor]:
    """(nmse, energy)"""
    S = len(o.d_streams)
    energy, nmse = wide(o.scale).clone(), wide(o.values).square().sum() + torch.arange(S * S).view(S, S)
    energy[1::3, 0] = 0
    return nmse, energy


def loss_summary(o: Operands, backend: Backend) -> tuple[Tensor, ...]:
    nmse, energy = told(o)
    with_auxk = backend.loss_summary(nmse, nmse.sum(), energy, o.weights, 0.5)
    without = backend.loss_summary(nmse, None, energy, o.weights, 0.0)
    assert without[3] is None
    return tuple(part for part in (*with_auxk, *without) if part is not None)


def gradient_squares(o: Operands, backend: Backend) -> tuple[Tensor, Tensor]:
    """Squares in the type of the gradients' sums: float64 holds them, but they are no more exact than those."""
    squares, grad_latent_bias = backend.gradient_squares(samples_of(o), o.d_streams)
    assert squares.dtype == torch.float64
    return squares.to(grad_latent_bias.dtype), grad_latent_bias


OPERATORS: dict[str, Callable[[Operands, Backend], tuple[Tensor, ...]]] = {
    "support_values": lambda o, b: (b.support_values(o.x, o.W_enc, o.pre_bias, o.latent_bias, o.indices, o.d_streams),),
    "support_values_grad_x": lambda o, b: (
        b.support_values_grad_x(o.grad_values, o.values, o.indices, o.W_enc, o.d_streams),
    ),
    "sparse_decode": lambda o, b: (b.sparse_decode(o.values, o.indices, o.W_dec, o.pre_bias),),
    "sparse_decode_grad_values": lambda o, b: (b.sparse_decode_grad_values(o.grad_recons, o.indices, o.W_dec),),
    "decode_loss": lambda o, b: b.decode_loss(
        o.values, o.indices, o.W_dec, o.pre_bias, o.x, o.scale, o.weights, o.d_streams
    ),
    "nested_decode_loss": lambda o, b: b.nested_decode_loss(
        o.values, o.indices, o.W_dec, o.pre_bias, o.x, o.scale, o.weights, o.d_streams, o.sizes
    ),
    "invert_indices": lambda o, b: b.invert_indices(o.indices, len(o.W_enc)),
    "encoder_gradients": lambda o, b: b.encoder_gradients(
        o.x, o.pre_bias, o.values, o.grad_values, *o.inverse, o.d_streams
    ),
    "decoder_gradients": lambda o, b: (b.decoder_gradients(o.values, o.grad_recons, *o.inverse),),
    "weight_gradients": lambda o, b: b.weight_gradients(*samples_of(o), o.d_streams),
    "gradient_squares": gradient_squares,
    "update_rows": update_rows,
    "update_rows lazily": lambda o, b: update_rows(o, b, lazy=True),
    "update_rows, bfloat16 moments": lambda o, b: update_rows(o, b, narrow=True),
    "step_rows": step_rows,
    "step_rows lazily": lambda o, b: step_rows(o, b, lazy=True),
    "step_rows, bfloat16 moments": lambda o, b: step_rows(o, b, narrow=True),
    "replay_rows": replay_rows,
    "replay_rows, bfloat16 moments": lambda o, b: replay_rows(o, b, narrow=True),
    "count_silence": count_silence,
    "step_biases": step_biases,
    "sample_scale": lambda o, b: b.sample_scale(o.x, o.d_streams),
    "loss_summary": loss_summary,
    "finish_step": finish_step,
}


def fitting(o: Operands, backend: str) -> Operands:
    """As many of the samples as this backend gets through in a test."""
    interprets = backend == "triton" and o.x.device.type == "cpu"
    return o.samples(slice(IN_INTERPRETER)) if interprets else o


def run(name: str, o: Operands, backend: str) -> tuple[Tensor, ...]:
    return OPERATORS[name](o, operators_of(backend))
