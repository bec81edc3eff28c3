"""Every operator on a device against the best plain PyTorch for it, each checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparc_fast import backends, reference

from . import gpu_rivals as rivals
from .cases import Shape
from .gpu_cases import CALLS, DeviceOperands, Place, Trained, namespace
from .gpu_cub import batched_topk
from .gpu_record import Record
from .gpu_timing import Clock, Run, Work

Prepare = Callable[[DeviceOperands], Run]
CUB = "cub::DeviceBatchedTopK"


class Ours:
    """A backend's operators, and what its package has beside them."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._backend = backends.resolve(name, device)
        if name == "reference":
            self.topk_rows = reference._largest
        elif name == "triton":
            from sparc_fast.kernels.replay_rows import replay_rows
            from sparc_fast.kernels.topk_rows import topk_rows

            self.topk_rows, self.replay_rows = topk_rows, replay_rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def kernels_beside(place: Place) -> dict[str, dict[str, Any]]:
    """Backends of ours that take part besides the one that is measured, and what each has kernels of its own for."""
    if place.backend == "cuda" or "cuda" not in backends.available(place.device):
        return {}
    native_cuda = import_module("sparc_fast.native_cuda")
    return {"cuda": {name: getattr(native_cuda, name) for name in native_cuda.__all__}}


@dataclass(frozen=True)
class Operator:
    work: Callable[[DeviceOperands], Work]
    baselines: Mapping[str, Prepare]
    comparable: Callable[[DeviceOperands, Any], Any] = lambda o, result: result
    """What two right results have in common."""
    yardsticks: Mapping[str, Prepare] | None = None
    """They do less than the operator."""


def _selected(scores: Tensor, indices: Tensor) -> Tensor:
    return scores.gather(1, indices.long()).sort(dim=1).values


def _aggregated(o: DeviceOperands) -> Tensor:
    return (o.x.double() - o.pre_bias.double()) @ o.W_enc.double().T + o.latent_bias.double().sum(0)


def _gather(o: DeviceOperands, sources: int = 1) -> float:
    """Bytes of k rows of every sample."""
    return o.shape.N * o.k * o.shape.D * o.x.element_size() * sources


def _flops(o: DeviceOperands) -> float:
    return 2.0 * o.shape.N * o.k * o.shape.D


def _rows(o: DeviceOperands) -> float:
    """Bytes of the touched rows of a weight matrix."""
    return o.touched * o.shape.D * o.x.element_size()


def _gradient_work(o: DeviceOperands, weight_bytes: float) -> Work:
    S = o.shape.S
    moved = weight_bytes * 2 * o.shape.L * o.shape.D + o.x.nbytes + o.grad_recons.nbytes
    return Work(_flops(o) * (1 + S), moved, _gather(o, 1 + S))


def _encoder_work(o: DeviceOperands) -> Work:
    return Work(2.0 * o.shape.N * o.shape.L * o.shape.D, o.x.nbytes + o.W_enc.nbytes)


def _update_bytes(o: DeviceOperands) -> float:
    """A weight's float32 row and moments read and written, and its narrow copy written."""
    return 24 + (o.x.element_size() if o.dtype != torch.float32 else 0)


OPERATORS: dict[str, Operator] = {
    "topk_rows": Operator(
        lambda o: Work(0, o.scores.nbytes),
        {
            "torch.topk": rivals.torch_topk,
            "torch.topk, unsorted": lambda o: lambda: o.scores.topk(o.k, dim=1, sorted=False).indices,
        },
        comparable=lambda o, indices: _selected(o.scores, indices),
    ),
    "global_topk": Operator(
        _encoder_work,
        {"addmm + torch.topk": rivals.product_and_topk},
        comparable=lambda o, indices: _selected(_aggregated(o), indices),
        yardsticks={"x @ W_enc.T": lambda o: lambda: o.x @ o.W_enc.T},
    ),
    "support_values": Operator(
        lambda o: Work(_flops(o), _rows(o) + o.x.nbytes + o.values.nbytes, _gather(o)),
        {"products, gather": rivals.logits_and_gather, "gather, bmm": rivals.gather_and_dot},
    ),
    "sparse_decode": Operator(
        lambda o: Work(_flops(o) * o.shape.S, _rows(o) + o.grad_recons.nbytes, _gather(o)),
        {"embedding_bag": rivals.bags, "dense codes @ W_dec": rivals.dense_decode},
    ),
    "decode_loss": Operator(
        lambda o: Work(2 * _flops(o) * o.shape.S, _rows(o) + o.x.nbytes + o.grad_recons.nbytes, _gather(o)),
        {"embedding_bag, bmm": rivals.decode_by_bags, "dense products": rivals.decode_by_products},
        comparable=lambda o, result: result[:3],
    ),
    "invert_indices": Operator(
        lambda o: Work(0, 12.0 * o.indices.numel() + 8 * o.shape.L), {"sort, searchsorted": rivals.sort_and_search}
    ),
    "weight_gradients": Operator(
        lambda o: _gradient_work(o, 4),
        {"dense products": rivals.gradients_by_products, "index_add_": rivals.gradients_by_index_add},
        comparable=lambda o, result: result[:2],
    ),
    "update_rows": Operator(
        lambda o: _gradient_work(o, _update_bytes(o)),
        {
            "dense products + fused Adam": rivals.update_by(rivals.gradients_by_products),
            "index_add_ + fused Adam": rivals.update_by(rivals.gradients_by_index_add),
        },
        comparable=lambda o, own: own.moved() if isinstance(own, Trained) else own,
    ),
}


def measure(record: Record, clock: Clock, shape: Shape, dtype: torch.dtype, names: list[str], seconds: float) -> None:
    """Check and time operators at a shape; whatever fails becomes a row."""
    o, type_ = DeviceOperands(shape, dtype, record.place.device), _name(dtype)
    ours = Ours(record.place.backend, record.place.device)
    for name in names:
        if not record.has_time(2 * seconds, name, shape.name, "ours", type_):
            continue
        with record.guard(name, shape.name, "ours", type_):
            operator = OPERATORS[name]
            prepared: dict[str, Prepare] = {"ours": lambda o, name=name: CALLS[name](ours, o)}
            for backend, kernels in kernels_beside(record.place).items():
                if name in kernels:
                    beside = namespace(**kernels)
                    prepared[backend] = lambda o, name=name, beside=beside: CALLS[name](beside, o)
            prepared |= operator.baselines | _compiled_rivals(record, name, shape.name, type_)
            runs = dict(_checked(record, name, operator, prepared, o))
            for label, prepare in (operator.yardsticks or {}).items():
                runs[label] = prepare(o)
            fitting = _fitting(record, name, o, runs)
            for label, taken in clock.in_turns(fitting, seconds, cold=True).items():
                record.times(name, shape.name, label, type_, taken, operator.work(o))


def _compiled_rivals(record: Record, name: str, shape: str, dtype: str) -> dict[str, Prepare]:
    """Those that are compiled first: only where there is a GPU, and where that costs the others no time."""
    wanted = name == "topk_rows" and record.place.is_gpu and not record.quick
    return {CUB: batched_topk} if wanted and record.has_time(25, name, shape, CUB, dtype) else {}


def _checked(
    record: Record, name: str, operator: Operator, prepared: Mapping[str, Prepare], o: DeviceOperands
) -> Iterator[tuple[str, Run]]:
    """The contenders whose result is the reference's on few samples, ready to run on all."""
    few, where = o.first(32), (name, o.shape.name)
    reference_run = CALLS[name](Ours("reference", o.device), few)
    want = operator.comparable(few, reference_run())
    for label, prepare in prepared.items():
        with record.guard(*where, label, _name(o.dtype)):
            # plain PyTorch rounds codes, logits and gradients to the operands' type on the way
            narrow = 6e-2 if label in operator.baselines else 2e-2
            tolerance = {torch.float32: 1e-4, torch.float64: 1e-9}.get(o.dtype, narrow)
            complaint = disagreement(operator.comparable(few, prepare(few)()), want, tolerance)
            if complaint:
                record.add(*where, label, _name(o.dtype), error=f"wrong, not timed: {complaint}")
            else:
                yield label, prepare(o)


def _fitting(record: Record, name: str, o: DeviceOperands, runs: Mapping[str, Run]) -> dict[str, Run]:
    """Those that run once without running out of memory."""
    fitting = {}
    for label, run in runs.items():
        with record.guard(name, o.shape.name, label, _name(o.dtype)):
            run()
            fitting[label] = run
    return fitting


def disagreement(got: Any, want: Any, tolerance: float) -> str | None:
    """How a result differs from the reference's beyond rounding, in words; None where it does not."""
    if not isinstance(got, Tensor):
        complaints = (disagreement(a, b, tolerance) for a, b in zip(got, want, strict=True))
        return next((complaint for complaint in complaints if complaint), None)
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, expected {list(want.shape)}"
    if not got.is_floating_point():
        return None if torch.equal(got.long(), want.long()) else f"{int((got != want).sum())} entries differ"
    # of the whole, not of each entry: Adam moves an entry whose gradient rounds to 0 by its sign
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))
    return None if error <= tolerance else f"differs by {error:.2g} of the norm"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
