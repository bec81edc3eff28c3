"""How many kernels a step launches, and how long the host takes to, without a GPU.

A small model trains on the CPU; a Triton kernel is noted where it would be launched, a CUDA kernel by the emulation of
tests/cuda_emulation, an operator of PyTorch that computes something is one kernel (a sort is several). How many there
are does not depend on the shape while the scores of a batch are one product, as at U. The time is Python's and
PyTorch's, until the kernels are handed over: what Triton and CUDA take for each launch comes on top, for a step that is
not captured some 5 to 20 µs a kernel.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from types import ModuleType
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
TESTS = Path(__file__).resolve().parents[2] / "tests"


@dataclass
class Counted:
    triton: int = 0
    """Kernels in Triton."""
    cuda: int = 0
    """Kernels in CUDA C++."""
    torch: int = 0
    """Operators of PyTorch that launch."""
    microseconds: float = 0
    """Of the host."""

    @property
    def kernels(self) -> int:
        return self.triton + self.cuda + self.torch


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
        on_host = any(tensor.data_ptr() in self.of_host for tensor in tensors)
        name = operator._schema.name.removeprefix("aten::")
        result = operator(*args, **(kwargs or {}))
        may_be_view = any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)
        if name not in NO_KERNELS and not (may_be_view and _storages(result) <= _storages(tensors)) and not on_host:
            self.into.torch += 1
        return result


def _storages(tree: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def emulated(folder: Path) -> ModuleType:
    """The CUDA backend with its kernels compiled for the host, into the folder if they are not there. Needs g++ and a
    checkout."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    build = import_module("cuda_emulation.build")
    if not (folder / "_cuda.so").exists():
        build.compile_kernels(folder, "plain")
        build.compile_runtime(folder)
        build.emulated_module(folder, [])
    backend: ModuleType = build.emulated_backend(folder)
    return backend


class Launches:
    """What an emulated CUDA backend launches, if there is one; it runs nothing meanwhile."""

    def __init__(self, cuda: ModuleType | None) -> None:
        self.cuda = cuda
        library = None if cuda is None else ctypes.CDLL(cuda._cuda.__file__)
        self._made, self.leaves_out = (
            ctypes.c_int(0) if library is None else ctypes.c_int.in_dll(library, f"cuda_emulation_{name}")
            for name in ("launches", "leaves_out")
        )

    @property
    def made(self) -> int:
        return self._made.value

    @contextmanager
    def only_counted(self) -> Iterator[None]:
        self.leaves_out.value = 1
        try:
            yield
        finally:
            self.leaves_out.value = 0


@contextmanager
def without_kernels(into: Counted, launches: Launches) -> Iterator[str]:
    """A backend of this name is there on the CPU, and launches nothing."""
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        into.triton += 1

    def multiply(X: Tensor, W: Tensor, out: Tensor) -> None:
        out.zero_()  # one operator, too

    def stored(dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return dtype  # as on a GPU

    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(backends, "_INTERPRETS", True))  # its operators take tensors of the CPU
        patched.enter_context(mock.patch.dict(backends._AVAILABLE, {"cpu": ("triton", "cuda", "reference")}))
        backends.resolve("triton", torch.device("cpu"))
        if launches.cuda is not None:
            patched.enter_context(mock.patch.dict(backends._BACKENDS, {"cuda": launches.cuda}))
            patched.enter_context(launches.only_counted())
        patched.enter_context(mock.patch.object(JITFunction, "run", run))
        patched.enter_context(mock.patch("sparc_fast.kernels.global_topk.multiply", multiply))
        for name, module in list(sys.modules.items()):
            if name.startswith("sparc_fast.kernels.") and hasattr(module, "stored"):
                patched.enter_context(mock.patch.object(module, "stored", stored))
        yield "triton" if launches.cuda is None else "cuda"


def count(captured: bool, cuda: ModuleType | None = None) -> tuple[Counted, Counted]:
    """(what the host does in a step, what a captured step's graph holds), by Triton's backend or an emulated CUDA's."""
    into, in_graph, launches = Counted(), Counted(), Launches(cuda)
    torch.manual_seed(0)

    def capture(function: Any, device: torch.device) -> Any:
        before = into.triton, launches.made
        with Operators(in_graph, set()):
            result = function()
        in_graph.triton, in_graph.cuda = into.triton - before[0], launches.made - before[1]
        return (lambda: None), result

    with (
        without_kernels(into, launches) as backend,
        mock.patch.object(step_graphs, "capture", capture),
        mock.patch("sparc_fast.optim.sparc_adam.can_capture", return_value=captured),
    ):
        model = SPARC(STREAMS, L, k, backend=backend, dtype=torch.bfloat16)
        optimizer = SparcAdam(model)
        x = {name: torch.randn(N, width).bfloat16() for name, width in STREAMS.items()}
        for _ in range(step_graphs.MET + 2):
            optimizer.step(x)
        of_host = {state["step"].data_ptr() for state in optimizer.state.values()}
        into.triton, before = 0, launches.made
        with Operators(into, of_host):
            optimizer.step(x)
        host = Counted(into.triton, launches.made - before, into.torch)
        taken = []
        for _ in range(TIMED):
            began = perf_counter()
            optimizer.step(x)
            taken.append(perf_counter() - began)
        host.microseconds = statistics.median(taken) * 1e6
    return host, in_graph
