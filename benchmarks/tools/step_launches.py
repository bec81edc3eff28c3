"""How many kernels a step launches, and how long the host takes to, without a GPU.

A small model trains on the CPU by the Triton backend; a Triton kernel is noted where it would be launched, an operator
of PyTorch that computes something is one kernel (a sort is several). How many there are does not depend on the shape
while the scores of a batch are one product, as at U. The time is Python's and PyTorch's, until the kernels are handed
over: what Triton and CUDA take for each launch comes on top, for a step that is not captured some 5 to 20 µs a kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparc_fast import SPARC, SparcAdam
from sparc_fast.ops import backends
from sparc_fast.optim import step_graphs

aten = torch.ops.aten
NO_KERNELS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "detach",
    "set_",
    "lift_fresh",
    "promote_types",
    "_local_scalar_dense",
}
STREAMS, L, k, N = {"a": 32, "b": 16, "c": 16}, 128, 4, 64
TIMED = 200


@dataclass
class Counted:
    triton: int = 0
    """Kernels in Triton."""
    torch: int = 0
    """Operators of PyTorch that launch."""
    microseconds: float = 0
    """Of the host."""

    @property
    def kernels(self) -> int:
        return self.triton + self.torch


class Operators(TorchDispatchMode):
    """Counts those that would launch a kernel: no views, no memory, no numbers that the host keeps."""

    def __init__(self, into: Counted, of_host: set[int]) -> None:
        super().__init__()
        self.into, self.of_host = into, of_host

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if operator.namespace != "aten":  # our own are made of these
            with self:
                cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return operator.redispatch(cpu, *args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)
        on_host = any(tensor.data_ptr() in self.of_host for tensor in tensors)
        name = operator._schema.name.removeprefix("aten::")
        if name not in NO_KERNELS and not is_view and not on_host:
            self.into.torch += 1
        return operator(*args, **(kwargs or {}))


@contextmanager
def without_kernels(into: Counted) -> Iterator[None]:
    """The Triton backend is there on the CPU, and launches nothing."""
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        into.triton += 1

    def multiply(X: Tensor, W: Tensor, out: Tensor) -> None:
        torch.mm(X.float()[:1, :1].expand(len(X), 1), W.float()[:1, :1].expand(len(W), 1).T, out=out)

    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(backends, "_INTERPRETS", True))  # its operators take tensors of the CPU
        patched.enter_context(mock.patch.dict(backends._AVAILABLE, {"cpu": ("triton", "reference")}))
        backends.resolve("triton", torch.device("cpu"))
        patched.enter_context(mock.patch.object(JITFunction, "run", run))
        patched.enter_context(mock.patch("sparc_fast.kernels.global_topk.multiply", multiply))
        yield


def count(captured: bool) -> tuple[Counted, Counted]:
    """(what the host does in a step, what a captured step's graph holds)."""
    into, in_graph = Counted(), Counted()
    torch.manual_seed(0)

    def capture(function: Any, device: torch.device) -> Any:
        before = into.triton
        with Operators(in_graph, set()):
            result = function()
        in_graph.triton = into.triton - before
        return (lambda: None), result

    with (
        without_kernels(into),
        mock.patch.object(step_graphs, "capture", capture),
        mock.patch("sparc_fast.optim.sparc_adam.can_capture", return_value=captured),
    ):
        model = SPARC(STREAMS, L, k, backend="triton", dtype=torch.bfloat16)
        optimizer = SparcAdam(model)
        x = {name: torch.randn(N, width).bfloat16() for name, width in STREAMS.items()}
        for _ in range(step_graphs.MET + 2):
            optimizer.step(x)
        of_host = {state["step"].data_ptr() for state in optimizer.state.values()}
        into.triton = 0
        with Operators(into, of_host):
            optimizer.step(x)
        host = Counted(into.triton, into.torch)
        taken = []
        for _ in range(TIMED):
            began = perf_counter()
            optimizer.step(x)
            taken.append(perf_counter() - began)
        host.microseconds = statistics.median(taken) * 1e6
    return host, in_graph
