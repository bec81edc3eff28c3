"""Every operator against the best plain PyTorch for it, on any device, each checked before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparc_fast.ops import backends
from sparc_fast.planning.roofline import Cost

from . import operator_rivals as rivals
from .cases import CALLS, FLOAT, ON_GPU, ROWS, SMALL, STEP, TYPES, Operands, Place, Shape, namespace
from .record import Case, Record
from .rivals import invert
from .timing import Run

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

    work: Callable[[Operands], Cost]
    cpu: Mapping[str, Prepare]
    gpu: Mapping[str, Prepare]
    comparable: Callable[[Operands, Any], Any] = lambda o, result: result
    """What two right results have in common."""
    cpu_yardsticks: Mapping[str, Prepare] = field(default_factory=dict)
    """They do less than the operator."""
    gpu_yardsticks: Mapping[str, Prepare] = field(default_factory=dict)
    shapes: tuple[Shape, ...] = (*STEP, SMALL)
    """On a CPU."""


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


def _gradient_work(o: Operands, weight_bytes: float) -> Cost:
    S = o.shape.S
    moved = weight_bytes * 2 * o.shape.L * o.shape.D + o.x.nbytes + o.grad_recons.nbytes
    return Cost(_flops(o) * (1 + S), moved, gathered=_gather(o, 1 + S))


def _update_bytes(o: Operands) -> float:
    """A weight's float32 row and moments read and written, and its narrow copy written."""
    return 24 + (o.x.element_size() if o.dtype != torch.float32 else 0)


OPERATORS: dict[str, Operator] = {
    "topk_rows": Operator(
        lambda o: Cost(0, o.scores.nbytes + FLOAT * o.shape.N * o.k),
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
        lambda o: Cost(2.0 * o.shape.N * o.shape.L * o.shape.D, o.x.nbytes + o.W_enc.nbytes + FLOAT * o.shape.N * o.k),
        cpu={"addmm + torch.topk": rivals.product_and_topk},
        gpu={"addmm + torch.topk": rivals.product_and_topk},
        comparable=lambda o, indices: _selected(_aggregated(o), indices),
        cpu_yardsticks=PRODUCT,
        gpu_yardsticks=PRODUCT,
    ),
    "support_values": Operator(
        lambda o: Cost(_flops(o), _rows(o) + o.x.nbytes + o.values.nbytes, gathered=_gather(o)),
        cpu={"index_select + bmm": partial(rivals.gather_and_dot, chunk=8, rows_of=rivals.rows_on_cpu)},
        gpu={"products, gather": rivals.logits_and_gather, "gather, bmm": rivals.gather_and_dot},
    ),
    "sparse_decode": Operator(
        lambda o: Cost(_flops(o) * o.shape.S, o.values.nbytes + _rows(o) + o.grad_recons.nbytes, gathered=_gather(o)),
        cpu={"S embedding_bags": rivals.three_bags, "S bags, adjacent": rivals.bags},
        gpu={"embedding_bag": rivals.bags, "dense codes @ W_dec": rivals.dense_decode},
        cpu_yardsticks={"S bags, no bias": rivals.bags_alone},
    ),
    "decode_loss": Operator(
        lambda o: Cost(
            2 * _flops(o) * o.shape.S,
            2 * o.values.nbytes + _rows(o) + o.x.nbytes + o.grad_recons.nbytes,
            gathered=_gather(o),
        ),
        cpu={"embedding_bag + autograd": rivals.decode_by_autograd},
        gpu={"embedding_bag, bmm": rivals.decode_by_bags, "dense products": rivals.decode_by_products},
        comparable=lambda o, result: result[:3],
    ),
    "nested_decode_loss": Operator(
        lambda o: Cost(
            2 * _flops(o) * o.shape.S,
            2 * o.values.nbytes + _rows(o) + o.x.nbytes + len(o.sizes) * o.grad_recons.nbytes,
            gathered=_gather(o),
        ),
        cpu={"decode_loss by autograd, each": rivals.every_dictionary(rivals.decode_by_autograd)},
        gpu={
            "embedding_bag, bmm, each": rivals.every_dictionary(rivals.decode_by_bags),
            "dense products, each": rivals.every_dictionary(rivals.decode_by_products),
        },
        comparable=lambda o, result: result[:3],
    ),
    "invert_indices": Operator(
        lambda o: Cost(0, 12.0 * o.indices.numel() + 8 * o.shape.L),
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
    record: Record, shape: Shape, dtype: str, names: Sequence[str], seconds: float, rivals: bool = True
) -> None:
    """Check and time operators at a shape, with PyTorch's or alone; whatever fails becomes a row."""
    place = record.place
    o = Operands(shape, TYPES[dtype], place.device, spread=place.as_gpu)
    for name in names:
        where = (name, shape.name, place.role, dtype)
        if not record.has_time(2 * seconds, *where):
            continue
        with record.guard(*where):
            operator = OPERATORS[name]
            own = _ours(name, place)
            others = (operator.gpu if place.as_gpu else operator.cpu) if rivals else {}
            yardsticks = operator.gpu_yardsticks if place.as_gpu else operator.cpu_yardsticks
            runs = dict(_ready(record, name, own | others, yardsticks, o))
            work = [replace(operator.work(o), dtype=dtype)]
            record.race(name, shape.name, dtype, runs, seconds, work, tuple(own), tuple(yardsticks))


def _ours(name: str, place: Place) -> dict[str, Prepare]:
    found = {}
    for label, backend in place.ours.items():
        functions = backends.resolve(backend, place.device)
        found[label] = partial(CALLS[name], functions)
        if name == "global_topk" and not place.as_gpu and backend != "reference":
            unscreened = namespace(global_topk=partial(functions.global_topk, screening="off"))
            found[f"{label}, float32 screen"] = partial(CALLS[name], unscreened)
    return found


def _ready(
    record: Record, name: str, checked: Mapping[str, Prepare], yardsticks: Mapping[str, Prepare], o: Operands
) -> Iterator[tuple[str, Run]]:
    """Those whose result is the reference's on few samples and that have run on all; yardsticks have no result."""
    few, operator, as_gpu = o.first(32), OPERATORS[name], record.place.as_gpu
    reference_run = CALLS[name](backends.resolve("reference", o.device), few)
    want = operator.comparable(few, reference_run())
    for label, prepare in {**checked, **yardsticks}.items():
        where = (name, o.shape.name, label, _name(o.dtype))
        with record.guard(*where):
            if label in checked:
                # plain PyTorch rounds codes, logits and gradients to the operands' type on the way
                narrow = 6e-2 if label in operator.gpu else 2e-2
                tolerance = {torch.float32: 1e-4, torch.float64: 1e-9}.get(o.dtype, narrow)
                got = operator.comparable(few, prepare(few)())
                complaint = disagreement(got, want, tolerance, order=2 if as_gpu else math.inf)
                if record.is_wrong(complaint, *where):
                    continue
            run = prepare(o)
            run()
            yield label, run


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
    difference = (got.double() - want.double()).masked_fill(got == want, 0)  # infinities that are the same
    size = want.double().where(want.isfinite(), 0)
    norms = [torch.linalg.vector_norm(t, order) for t in (difference, size)]
    error = float(norms[0] / norms[1].clamp_min(1e-300))
    of = "largest entry" if order == math.inf else "norm"
    return None if error <= tolerance else f"differs by {error:.2g} of the {of}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run(name: str, record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    measure(record, shape, dtype, [name], seconds)


CASES = {name: Case(partial(_run, name), operator.shapes, ON_GPU) for name, operator in OPERATORS.items()}
