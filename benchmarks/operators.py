"""Every operator against the best plain PyTorch for it, on any device, each checked before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparc_fast.ops import backends
from sparc_fast.planning.roofline import Cost

from . import operator_rivals as rivals
from .cases import CALLS, FLOAT, ROWS, SMALL, STEP, Case, Operands, Shape, namespace
from .gpu_record import Record
from .rivals import invert
from .timing import Clock, Run, Work

CPU = torch.device("cpu")
Prepare = Callable[[Operands], Run]


def own_kernels(backend: str) -> frozenset[str]:
    """The operators a backend has an implementation of its own for."""
    if backend != "cuda":
        return frozenset(OPERATORS)
    return frozenset(import_module("sparc_fast.ops.cuda").OWN) & frozenset(OPERATORS)


PRODUCT: Mapping[str, Prepare] = {"x @ W_enc.T": lambda o: lambda: o.x @ o.W_enc.T}


@dataclass(frozen=True)
class Operator:
    """The best plain PyTorch for an operator on each kind of machine, and what the operator cannot do without."""

    work: Callable[[Operands], Work]
    cpu: Mapping[str, Prepare]
    gpu: Mapping[str, Prepare]
    comparable: Callable[[Operands, Any], Any] = lambda o, result: result
    """What two right results have in common."""
    cpu_yardsticks: Mapping[str, Prepare] = field(default_factory=dict)
    """They do less than the operator."""
    gpu_yardsticks: Mapping[str, Prepare] = field(default_factory=dict)
    shapes: tuple[Shape, ...] = (*STEP, SMALL)
    """On a CPU."""


def cpu_case(op: str, shape: Shape, names: Sequence[str]) -> Case:
    """Ours on some backends and PyTorch's, checked on the first 32 samples, ready to be timed on all."""
    operator, o = OPERATORS[op], Operands(shape, torch.float32, CPU, spread=False)
    own = {name: _calling(op, backends.resolve(name, CPU)) for name in names}
    if op == "global_topk":
        for name in names:
            if name != "reference":
                unscreened = partial(backends.resolve(name, CPU).global_topk, screening="off")
                own[f"{name}, float32 screen"] = _calling(op, namespace(global_topk=unscreened))
    few = o.first(32)
    want = operator.comparable(few, CALLS[op](backends.resolve("reference", CPU), few)())
    wrong = {}
    for name, prepare in (own | operator.cpu).items():
        if complaint := disagreement(operator.comparable(few, prepare(few)()), want):
            wrong[name] = complaint
    prepared = own | operator.cpu | operator.cpu_yardsticks
    contenders = {name: prepare(o) for name, prepare in prepared.items() if name not in wrong}
    work = operator.work(o)
    phases = (Cost(work.flops, work.bytes),)
    return Case(op, shape, contenders, tuple(own), phases, frozenset(operator.cpu_yardsticks), wrong)


def _calling(op: str, functions: Any) -> Prepare:
    return lambda o: CALLS[op](functions, o)


def _selected(scores: Tensor, indices: Tensor) -> Tensor:
    return scores.gather(1, indices.long()).sort(dim=1).values


def _aggregated(o: Operands) -> Tensor:
    return (o.x.double() - o.pre_bias.double()) @ o.W_enc.double().T + o.latent_bias.double().sum(0)


def _gather(o: Operands, sources: int = 1) -> float:
    """Bytes of k rows of every sample."""
    return o.shape.N * o.k * o.shape.D * o.x.element_size() * sources


def _flops(o: Operands) -> float:
    return 2.0 * o.shape.N * o.k * o.shape.D


def _rows(o: Operands) -> float:
    """Bytes of the touched rows of a weight matrix."""
    return o.touched * o.shape.D * o.x.element_size()


def _gradient_work(o: Operands, weight_bytes: float) -> Work:
    S = o.shape.S
    moved = weight_bytes * 2 * o.shape.L * o.shape.D + o.x.nbytes + o.grad_recons.nbytes
    return Work(_flops(o) * (1 + S), moved, _gather(o, 1 + S))


def _update_bytes(o: Operands) -> float:
    """A weight's float32 row and moments read and written, and its narrow copy written."""
    return 24 + (o.x.element_size() if o.dtype != torch.float32 else 0)


OPERATORS: dict[str, Operator] = {
    "topk_rows": Operator(
        lambda o: Work(0, o.scores.nbytes + FLOAT * o.shape.N * o.k),
        cpu={"torch.topk": rivals.torch_topk},
        gpu={
            "torch.topk": rivals.torch_topk,
            "torch.topk, unsorted": lambda o: lambda: o.scores.topk(o.k, dim=1, sorted=False).indices,
        },
        comparable=lambda o, indices: _selected(o.scores, indices),
        cpu_yardsticks={"torch.amax": lambda o: lambda: o.scores.amax(1)},
        shapes=(*ROWS, SMALL),
    ),
    "global_topk": Operator(
        lambda o: Work(2.0 * o.shape.N * o.shape.L * o.shape.D, o.x.nbytes + o.W_enc.nbytes + FLOAT * o.shape.N * o.k),
        cpu={"addmm + torch.topk": rivals.product_and_topk},
        gpu={"addmm + torch.topk": rivals.product_and_topk},
        comparable=lambda o, indices: _selected(_aggregated(o), indices),
        cpu_yardsticks=PRODUCT,
        gpu_yardsticks=PRODUCT,
    ),
    "support_values": Operator(
        lambda o: Work(_flops(o), _rows(o) + o.x.nbytes + o.values.nbytes, _gather(o)),
        cpu={"index_select + bmm": partial(rivals.gather_and_dot, chunk=8, rows_of=rivals.rows_on_cpu)},
        gpu={"products, gather": rivals.logits_and_gather, "gather, bmm": rivals.gather_and_dot},
    ),
    "sparse_decode": Operator(
        lambda o: Work(_flops(o) * o.shape.S, o.values.nbytes + _rows(o) + o.grad_recons.nbytes, _gather(o)),
        cpu={"S embedding_bags": rivals.three_bags, "S bags, adjacent": rivals.bags},
        gpu={"embedding_bag": rivals.bags, "dense codes @ W_dec": rivals.dense_decode},
        cpu_yardsticks={"S bags, no bias": rivals.bags_alone},
    ),
    "decode_loss": Operator(
        lambda o: Work(
            2 * _flops(o) * o.shape.S,
            2 * o.values.nbytes + _rows(o) + o.x.nbytes + o.grad_recons.nbytes,
            _gather(o),
        ),
        cpu={"embedding_bag + autograd": rivals.decode_by_autograd},
        gpu={"embedding_bag, bmm": rivals.decode_by_bags, "dense products": rivals.decode_by_products},
        comparable=lambda o, result: result[:3],
    ),
    "invert_indices": Operator(
        lambda o: Work(0, 12.0 * o.indices.numel() + 8 * o.shape.L),
        cpu={"argsort + bincount": lambda o: lambda: invert(o.indices, o.shape.L)},
        gpu={"sort, searchsorted": rivals.sort_and_search},
    ),
    "weight_gradients": Operator(
        lambda o: _gradient_work(o, 4),
        cpu={"CSR products": rivals.gradients_by_csr},
        gpu={"dense products": rivals.gradients_by_products, "index_add_": rivals.gradients_by_index_add},
        comparable=lambda o, result: result[:2],
    ),
    "update_rows": Operator(
        lambda o: _gradient_work(o, _update_bytes(o)),
        cpu={"CSR products + fused Adam": rivals.update_by(rivals.gradients_by_csr)},
        gpu={
            "dense products + fused Adam": rivals.update_by(rivals.gradients_by_products),
            "index_add_ + fused Adam": rivals.update_by(rivals.gradients_by_index_add),
        },
        comparable=lambda o, own: own.moved(),
    ),
}


def measure(
    record: Record,
    clock: Clock,
    shape: Shape,
    dtype: torch.dtype,
    names: Sequence[str],
    seconds: float,
    rivals: bool = True,
) -> None:
    """Check and time operators at a shape, with PyTorch's or alone; whatever fails becomes a row."""
    o, type_, role = Operands(shape, dtype, record.place.device), _name(dtype), record.place.role
    ours = backends.resolve(record.place.backend, record.place.device)
    for name in names:
        if not record.has_time(2 * seconds, name, shape.name, role, type_):
            continue
        with record.guard(name, shape.name, role, type_):
            operator = OPERATORS[name]
            prepared = {role: _calling(name, ours), **(operator.gpu if rivals else {})}
            runs = dict(_checked(record, name, operator, prepared, o))
            for label, prepare in operator.gpu_yardsticks.items():
                runs[label] = prepare(o)
            fitting = _fitting(record, name, o, runs)
            for label, taken in clock.operators(fitting, seconds).items():
                record.times(name, shape.name, label, type_, taken, operator.work(o))


def _checked(
    record: Record, name: str, operator: Operator, prepared: Mapping[str, Prepare], o: Operands
) -> Iterator[tuple[str, Run]]:
    """The contenders whose result is the reference's on few samples, ready to run on all."""
    few, where = o.first(32), (name, o.shape.name)
    reference_run = CALLS[name](backends.resolve("reference", o.device), few)
    want = operator.comparable(few, reference_run())
    for label, prepare in prepared.items():
        with record.guard(*where, label, _name(o.dtype)):
            # plain PyTorch rounds codes, logits and gradients to the operands' type on the way
            narrow = 6e-2 if label in operator.gpu else 2e-2
            tolerance = {torch.float32: 1e-4, torch.float64: 1e-9}.get(o.dtype, narrow)
            complaint = disagreement(operator.comparable(few, prepare(few)()), want, tolerance, order=2)
            if complaint:
                record.add(*where, label, _name(o.dtype), error=f"wrong, not timed: {complaint}")
            else:
                yield label, prepare(o)


def _fitting(record: Record, name: str, o: Operands, runs: Mapping[str, Run]) -> dict[str, Run]:
    """Those that run once without running out of memory."""
    fitting = {}
    for label, run in runs.items():
        with record.guard(name, o.shape.name, label, _name(o.dtype)):
            run()
            fitting[label] = run
    return fitting


def disagreement(got: Any, want: Any, tolerance: float = 1e-4, order: float = math.inf) -> str | None:
    """How a result differs from the reference's beyond rounding, in words; None where it does not.

    The error's norm of this order over the result's: the largest entry's, or 2 for the whole where types are narrow
    (Adam moves an entry whose gradient rounds to 0 by its sign).
    """
    if not isinstance(got, Tensor):
        complaints = (disagreement(a, b, tolerance, order) for a, b in zip(got, want, strict=True))
        return next((complaint for complaint in complaints if complaint), None)
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, expected {list(want.shape)}"
    if not got.is_floating_point():
        return None if torch.equal(got.long(), want.long()) else f"{int((got != want).sum())} entries differ"
    norms = [torch.linalg.vector_norm(t, order) for t in (got.double() - want.double(), want.double())]
    error = float(norms[0] / norms[1].clamp_min(1e-300))
    of = "largest entry" if order == math.inf else "norm"
    return None if error <= tolerance else f"differs by {error:.2g} of the {of}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
