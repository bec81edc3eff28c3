"""CUDA graphs where there is none: operators and launches of Triton kernels are written down, and done again.

What a graph may not do raises while it is recorded: ask the device for a number, or how many there are of something.
What it does not do stays undone: Python runs when the graph is recorded, and never again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from sparc_fast.optim import SparcAdam, step_graphs

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
Result = TypeVar("Result")


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[Callable[[], object]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operator}")
        if operator.namespace.startswith("sparc_fast"):  # what it is made of is recorded
            with self:
                return operator.redispatch(CPU, *args, **kwargs)
        results = operator(*args, **kwargs)
        memory = [t.as_strided(t.shape, t.stride()) for t in _tensors(results)]  # shapes may be changed in place
        self.done.append(lambda: _again(operator, args, kwargs, memory))
        return results


def _again(operator: Any, args: Any, kwargs: Any, memory: Sequence[Tensor]) -> None:
    """Into the same memory; what is a view of the operands, or one of them, has its numbers already."""
    before = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
    for there, new in zip(memory, _tensors(operator(*args, **kwargs)), strict=True):
        if there.untyped_storage().data_ptr() not in before:
            there.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def capture(function: Callable[[], Result], changed: Sequence[Tensor]) -> tuple[Callable[[], object], Result]:
    """(what does it again, its results): nothing of `changed` is, as nothing runs while a graph is made."""
    recording, launch, kept = Recording(), GridExecutor.__call__, [tensor.clone() for tensor in changed]

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        recording.done.append(lambda: launch(executor, *args, **kwargs))
        with _disable_current_modes():
            launch(executor, *args, **kwargs)

    try:
        with mock.patch.object(GridExecutor, "__call__", launched), recording:
            result = function()
    finally:
        for tensor, before in zip(changed, kept, strict=True):
            tensor.data.copy_(before)

    def replay() -> None:
        for again in recording.done:
            again()

    return replay, result


@contextmanager
def recorded_graphs(optimizer: SparcAdam) -> Iterator[list[int]]:
    """This optimizer captures its steps wherever they are. Gives a number for every graph."""
    sizes: list[int] = []

    def captured(function: Callable[[], Result], device: torch.device) -> tuple[Callable[[], object], Result]:
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        replay, result = capture(function, [*optimizer.model.state_dict(keep_vars=True).values(), *states])
        sizes.append(1)
        return replay, result

    with (
        mock.patch.object(step_graphs, "capture", captured),
        mock.patch("sparc_fast.optim.sparc_adam.can_capture", return_value=True),
    ):
        yield sizes
