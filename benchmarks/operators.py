"""The operators: what each computes here, the best plain PyTorch for the same, and what it cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc_fast import backends, reference
from sparc_fast.backends import Backend
from sparc_fast.roofs import Cost

from . import tuned
from .cases import ADAM, FLOAT, ROWS, SMALL, STEP, Case, Operands, Shape, Trained

Run = Callable[[], Any]


@dataclass(frozen=True)
class Operator:
    """`ours` and every baseline take operands and return a function to time, whose result is checked."""

    name: str
    shapes: tuple[Shape, ...]
    ours: Callable[[Operands, Backend], Run]
    baselines: Mapping[str, Callable[[Operands], Run]]
    cost: Callable[[Operands], Cost]
    yardsticks: Mapping[str, Callable[[Operands], Run]] = field(default_factory=dict)
    comparable: Callable[[Operands, Any], Any] = lambda o, result: result
    """What two right results have in common."""

    @property
    def rivals(self) -> tuple[str, ...]:
        return tuple(self.baselines)

    def case(self, shape: Shape, names: Sequence[str]) -> Case:
        """Checked on the first 32 samples against the reference, ready to be timed on all."""
        o = Operands(shape, torch.float32, torch.device("cpu"), spread=False)
        few = o.first(32)
        want = self.comparable(few, self.ours(few, backends.resolve("reference", few.x.device))())
        prepared = dict(self._contenders(names))
        wrong = {}
        for name, prepare in prepared.items():
            if complaint := disagreement(self.comparable(few, prepare(few)()), want):
                wrong[name] = complaint
        contenders = {name: prepare(o) for name, prepare in (prepared | self.yardsticks).items() if name not in wrong}
        ours = tuple(name for name in prepared if name not in self.baselines)
        return Case(self.name, shape, contenders, ours, (self.cost(o),), frozenset(self.yardsticks), wrong)

    def _contenders(self, names: Sequence[str]) -> Iterator[tuple[str, Callable[[Operands], Run]]]:
        for name in names:
            backend = backends.resolve(name, torch.device("cpu"))
            yield name, partial(self.ours, backend=backend)
            if self.name == "global_topk" and backend is not reference:
                yield f"{name}, float32 screen", partial(self.ours, backend=_Float32(backend))
        yield from self.baselines.items()


class _Float32:
    """The support without a narrower product in front."""

    def __init__(self, backend: Backend) -> None:
        self.global_topk = partial(backend.global_topk, screening="off")


def disagreement(got: Any, want: Any) -> str | None:
    """How a result differs from the reference's beyond rounding, in words; None where it does not."""
    if not isinstance(got, Tensor):
        complaints = (disagreement(a, b) for a, b in zip(got, want, strict=True))
        return next((complaint for complaint in complaints if complaint), None)
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, expected {list(want.shape)}"
    if not got.is_floating_point():
        return None if torch.equal(got.long(), want.long()) else f"{(got != want).sum()} entries differ"
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    return None if error < 1e-4 else f"largest error is {float(error):.2g} of the largest entry"


# rows of scores, already in memory


def _select_rows(backend: Backend) -> Callable[[Tensor, int], Tensor]:
    """Not part of the backends' vocabulary, but the heart of their TopK."""
    if backend is reference:
        return reference._largest
    from sparc_fast import native_topk

    return native_topk.topk_rows


def _rows_ours(o: Operands, backend: Backend) -> Run:
    select = _select_rows(backend)
    return lambda: select(o.scores, o.k)


def _selected_scores(scores: Tensor, indices: Tensor) -> Tensor:
    """The same for any right choice among near-equal scores."""
    return scores.gather(1, indices.long()).sort(dim=1).values


topk_rows = Operator(
    "topk_rows",
    (*ROWS, SMALL),
    _rows_ours,
    {"torch.topk": lambda o: lambda: o.scores.topk(o.k, dim=1).indices},
    lambda o: Cost(0, FLOAT * (o.scores.numel() + o.shape.N * o.k)),
    comparable=lambda o, indices: _selected_scores(o.scores, indices),
    yardsticks={"torch.amax": lambda o: lambda: o.scores.amax(1)},
)


# the support and the values


def _mm_topk(o: Operands) -> Run:
    bias = o.latent_bias.sum(0)
    return lambda: torch.addmm(bias, o.x - o.pre_bias, o.W_enc.T).topk(o.k, dim=1, sorted=False).indices


def _aggregated(o: Operands) -> Tensor:
    return torch.addmm(o.latent_bias.sum(0), o.x - o.pre_bias, o.W_enc.T)


global_topk = Operator(
    "global_topk",
    (*STEP, SMALL),
    lambda o, backend: lambda: backend.global_topk(o.x, o.W_enc, o.pre_bias, o.latent_bias, o.k),
    {"addmm + torch.topk": _mm_topk},
    lambda o: Cost(2 * o.shape.N * o.shape.L * o.shape.D, FLOAT * (o.x.numel() + o.W_enc.numel() + o.shape.N * o.k)),
    yardsticks={"x @ W_enc.T": lambda o: lambda: o.x @ o.W_enc.T},
    comparable=lambda o, indices: _selected_scores(_aggregated(o), indices),
)


def _gather_dot(o: Operands) -> Run:
    indices = o.indices.long()

    def run() -> Tensor:
        centred = o.x - o.pre_bias
        values = o.x.new_empty(o.shape.N, o.shape.S, o.k)
        for n in range(0, o.shape.N, 8):  # the rows gathered for 8 samples stay in cache
            rows = o.W_enc.index_select(0, indices[n : n + 8].flatten()).view(-1, o.k, o.shape.D)
            for s, cols in enumerate(o.columns):
                values[n : n + 8, s] = (rows[:, :, cols] @ centred[n : n + 8, cols, None]).squeeze(2)
        bias = o.latent_bias[:, indices].transpose(0, 1)
        return values.add_(bias).relu_()

    return run


support_values = Operator(
    "support_values",
    (*STEP, SMALL),
    lambda o, backend: lambda: backend.support_values(o.x, o.W_enc, o.pre_bias, o.latent_bias, o.indices, o.d_streams),
    {"index_select + bmm": _gather_dot},
    lambda o: Cost(2 * o.shape.N * o.k * o.shape.D, FLOAT * (o.x.numel() + o.touched * o.shape.D + o.values.numel())),
)


# the decode


def _three_bags(o: Operands) -> Run:
    indices, values = o.indices.long(), o.values.transpose(0, 1).contiguous()

    def run() -> Tensor:
        bags = [F.embedding_bag(indices, o.W_dec, per_sample_weights=z, mode="sum") for z in values]
        return torch.stack([bag.add_(o.pre_bias) for bag in bags], dim=1)

    return run


def _adjacent_bags(o: Operands) -> Run:
    indices, values = o.indices.long().repeat_interleave(o.shape.S, 0), o.values.flatten(0, 1)
    shape = (o.shape.N, o.shape.S, o.shape.D)

    def run() -> Tensor:
        return F.embedding_bag(indices, o.W_dec, per_sample_weights=values, mode="sum").add_(o.pre_bias).view(shape)

    return run


def _bags_alone(o: Operands) -> Run:
    indices, values = o.indices.long(), o.values.transpose(0, 1).contiguous()
    return lambda: [F.embedding_bag(indices, o.W_dec, per_sample_weights=z, mode="sum") for z in values]


sparse_decode = Operator(
    "sparse_decode",
    (*STEP, SMALL),
    lambda o, backend: lambda: backend.sparse_decode(o.values, o.indices, o.W_dec, o.pre_bias),
    {"S embedding_bags": _three_bags, "S bags, adjacent": _adjacent_bags},
    lambda o: Cost(
        2 * o.values.numel() * o.shape.D,
        FLOAT * (o.values.numel() + o.touched * o.shape.D + o.shape.N * o.shape.S * o.shape.D),
    ),
    yardsticks={"S bags, no bias": _bags_alone},
)


def _decode_loss_ours(o: Operands, backend: Backend) -> Run:
    def run() -> tuple[Tensor, Tensor, Tensor]:
        nmse, grad_recons, grad_values, _ = backend.decode_loss(
            o.values, o.indices, o.W_dec, o.pre_bias, o.x, o.scale, o.weights, o.d_streams
        )
        return (nmse.flatten() * nmse.new_tensor(o.weights)).sum(), grad_values, grad_recons

    return run


def _decode_loss_autograd(o: Operands) -> Run:
    indices = o.indices.long()
    return lambda: tuned.decode_and_compare(o.values, indices, o.W_dec, o.pre_bias, o.x, o.d_streams)


decode_loss = Operator(
    "decode_loss",
    (*STEP, SMALL),
    _decode_loss_ours,
    {"embedding_bag + autograd": _decode_loss_autograd},
    lambda o: Cost(
        4 * o.values.numel() * o.shape.D,
        FLOAT * (2 * o.values.numel() + o.touched * o.shape.D + o.x.numel() + o.shape.N * o.shape.S * o.shape.D),
    ),
)


# from samples to latents, and the update


invert_indices = Operator(
    "invert_indices",
    (*STEP, SMALL),
    lambda o, backend: lambda: backend.invert_indices(o.indices, o.shape.L),
    {"argsort + bincount": lambda o: lambda: tuned.invert(o.indices, o.shape.L)},
    lambda o: Cost(0, 12 * o.indices.numel() + 8 * o.shape.L),
)


def _gradients_ours(o: Operands, backend: Backend) -> Run:
    args = (o.x, o.pre_bias, o.values, o.grad_values, o.grad_recons, *o.inverse, o.d_streams)
    return lambda: backend.weight_gradients(*args)[:2]


def _gradients_torch(o: Operands) -> Run:
    indices = o.indices.long()
    grads = torch.zeros_like(o.W_enc), torch.zeros_like(o.W_dec)

    def run() -> tuple[Tensor, Tensor]:
        grad_z = o.grad_values * (o.values > 0)
        tuned.weight_gradients(o.x - o.pre_bias, indices, o.values, grad_z, o.grad_recons, o.columns, *grads)
        return grads

    return run


def _gradients_cost(o: Operands, weight_passes: int) -> Cost:
    flops = 2 * o.indices.numel() * o.shape.D * (1 + o.shape.S)
    return Cost(flops, FLOAT * (weight_passes * o.W_enc.numel() + o.x.numel() + o.grad_recons.numel()))


weight_gradients = Operator(
    "weight_gradients",
    (*STEP, SMALL),
    _gradients_ours,
    {"CSR products": _gradients_torch},
    lambda o: _gradients_cost(o, weight_passes=2),
)


def _update_ours(o: Operands, backend: Backend) -> Run:
    own = Trained(o)
    args = (o.x, o.pre_bias, o.values, o.grad_values, o.grad_recons, *o.inverse, o.d_streams)

    def run() -> Trained:
        backend.update_rows(own.W_enc, own.W_dec, own.moments, *args, **ADAM, step=1000)
        return own

    return run


def _update_torch(o: Operands) -> Run:
    own = Trained(o)
    parameters = own.W_enc, own.W_dec
    for p in parameters:
        p.grad = torch.zeros_like(p)
    adam = torch.optim.Adam(parameters, **ADAM, fused=True)
    for p, m, v in zip(parameters, own.moments[::2], own.moments[1::2], strict=True):
        adam.state[p] = {"step": torch.tensor(999.0), "exp_avg": m, "exp_avg_sq": v}
    indices = o.indices.long()

    def run() -> Trained:
        grad_z = o.grad_values * (o.values > 0)
        grads = own.W_enc.grad, own.W_dec.grad
        tuned.weight_gradients(o.x - o.pre_bias, indices, o.values, grad_z, o.grad_recons, o.columns, *grads)
        tuned.project_gradients(own.W_dec.grad, own.W_dec, o.columns)
        adam.step()
        tuned.normalize_rows(own.W_dec, o.columns)
        return own

    return run


update_rows = Operator(
    "update_rows",
    (*STEP, SMALL),
    _update_ours,
    {"CSR products + fused Adam": _update_torch},
    lambda o: _gradients_cost(o, weight_passes=12),  # 2 matrices and 4 moments, read and written
    comparable=lambda o, own: own.moved(),
)

OPERATORS = {
    operator.name: operator
    for operator in (
        topk_rows,
        global_topk,
        support_values,
        sparse_decode,
        decode_loss,
        invert_indices,
        weight_gradients,
        update_rows,
    )
}
