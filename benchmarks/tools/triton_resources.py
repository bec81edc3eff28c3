"""Registers, shared memory and spills of every Triton kernel at its real launch choices, for GPUs that are not here.

The host functions of the kernels run on tensors without storage (PyTorch's fake tensors) of the real shapes and types;
a launch is noted, not made; what was noted is compiled for each target, and the compiler's own tools say what it takes.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sparc_fast.ops import backends

from .. import cases
from ..cases import CALLS, NARROW_MOMENTS, Operands, Shape, namespace

TARGETS = {80: 163, 90: 227, 100: 227}
"""Compute capability, and the shared memory in KB that one block may have there."""

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8",
    torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """What decides the machine code of one launch."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible_by_16: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def compile(self, capability: int) -> Resources:
        types = sorted({type_ for _, type_ in self.signature if type_.startswith("*")})
        tiles = ", ".join(f"{name}={value}" for name, value in self.constants if isinstance(value, int))
        known = (self.name, " ".join(types), tiles, dict(self.options), capability)
        try:
            compiled = self.compiled(capability)
            registers, spilled = resource_usage(compiled.asm["cubin"])
            return Resources(*known, registers, int(compiled.metadata.shared), spilled)
        except Exception as error:  # the other kernels are still worth knowing
            return Resources(*known, error=f"{type(error).__name__}: {str(error).strip()[-1500:]}")

    def compiled(self, capability: int) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget

        attrs = {(i,): [["tt.divisibility", 16]] for i in self.divisible_by_16}
        source = triton.compiler.ASTSource(
            fn=self.kernel, signature=dict(self.signature), constexprs=dict(self.constants), attrs=attrs
        )
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(self.options))


@dataclass(frozen=True)
class Resources:
    kernel: str
    types: str
    tiles: str
    options: dict[str, int]
    capability: int
    registers: int = 0
    """Of a thread."""
    shared: int = 0
    """Bytes of a block."""
    spilled: int = 0
    """Bytes of a thread's stack."""
    error: str = ""
    """Why it does not compile."""

    @property
    def fits(self) -> bool:
        return not self.error and self.spilled == 0 and self.shared <= TARGETS[self.capability] * 1024


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of the one kernel in a cubin."""
    printed = _printed("cuobjdump", "--dump-resource-usage", cubin)
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}
    spilled = used["STACK"] + used["LOCAL"]
    # the compiler leaves a frame behind where it found a register after all
    return used["REG"], spilled if spilled and re.search(r"\b(LDL|STL)\b", disassembled(cubin)) else 0


def disassembled(cubin: bytes) -> str:
    return _printed("nvdisasm", "-c", cubin)


def _printed(tool: str, option: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# noting launches


def noted(kernel: Any, args: Sequence[Any], named: dict[str, Any]) -> Launch:
    """A launch as Triton would specialise it: constants, integers equal to 1, and what 16 divides."""
    parameters = {p.name: p for p in kernel.params}
    bound = dict(zip(parameters, args, strict=False)) | {n: v for n, v in named.items() if n in parameters}
    signature, constants, divisible = {}, {}, []
    for at, (name, parameter) in enumerate(parameters.items()):
        value = bound.get(name, parameter.default)
        if parameter.is_constexpr or value is None or (_is_int(value) and value == 1 and _specialised(parameter)):
            signature[name], constants[name] = "constexpr", getattr(value, "value", value)
            continue
        signature[name] = _type(value)
        aligned = isinstance(value, Tensor) or (_is_int(value) and value % 16 == 0)
        if aligned and _specialised(parameter):
            divisible.append(at)
    options = {name: named[name] for name in named if name in OPTIONS}
    signature, constants, options = (tuple(pairs.items()) for pairs in (signature, constants, options))
    return Launch(kernel, signature, constants, tuple(divisible), options)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _specialised(parameter: Any) -> bool:
    return not parameter.do_not_specialize


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


@contextlib.contextmanager
def noting() -> Iterator[dict[Launch, int]]:
    """Inside, kernels are not started but noted, with their programs; tensors have no storage and say they are on a
    GPU."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from triton.runtime.jit import JITFunction

    seen: dict[Launch, int] = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launch = noted(kernel, args, named)
        seen[launch] = seen.get(launch, 0) + math.prod(grid)

    h200 = SimpleNamespace(
        name="NVIDIA H200", multi_processor_count=132, L2_cache_size=60 * 2**20, major=9, minor=0,
        shared_memory_per_block_optin=227 * 1024, total_memory=139 * 2**30,
    )  # fmt: skip
    device = h200.L2_cache_size, h200.multi_processor_count
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch("sparc_fast.kernels.global_topk._device", return_value=device),  # the tensors say they are on a CPU
        mock.patch.object(FakeTensor, "is_cuda", property(lambda self: True)),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=h200),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield seen


def operators() -> dict[str, Callable[..., Any]]:
    """The operators that `sparc_fast.kernels` has kernels for; what others are made of depends on data."""
    package = importlib.import_module("sparc_fast.kernels")
    return {name: getattr(package, name) for name in package.__all__ if name not in backends.RAGGED}


def launches(shape: Shape, dtype: torch.dtype, only: Sequence[str] = ()) -> dict[Launch, str]:
    """Every distinct launch of every operator at a shape, and the operator that made it."""
    found: dict[Launch, str] = {}
    backend = operators()
    with noting() as seen:
        o = Operands(shape, dtype, torch.device("cpu"))
        for name in only or backend:
            seen.clear()
            for calls in (CALLS, NARROW_MOMENTS):
                if name in calls:
                    calls[name](namespace(**backend), o)()
            for launch in seen:
                found.setdefault(launch, name)
    return found


Job = tuple[Launch, int]


SHAPES = (
    *(cases.SHAPES[name] for name in "AUBC"),
    Shape("two streams", 4096, 32768, k=256, d_streams=(1024, 768)),
    Shape("unaligned", 4096, 32768, d_streams=(1000, 500, 333)),  # no row can be read 16 bytes at once
)


def jobs(targets: Sequence[int], only: Sequence[str] = (), brief: bool = False) -> dict[Job, str]:
    """What to compile, and whose it is: at every shape in bfloat16 and float32, each distinct launch for each target.

    With `brief`, float32 and all shapes but A and U for sm_90 alone: compilers differ in kernels more than in sizes.
    """
    found: dict[Job, str] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            for launch, operator in launches(shape, dtype, only).items():
                for target in targets:
                    if not brief or target == 90 or (dtype == torch.bfloat16 and shape in (cases.A, cases.U)):
                        found.setdefault((launch, target), operator)
    return found


def resources(wanted: Sequence[Job]) -> list[Resources]:
    """Of every launch for its target, compiled in as many processes as there are cores."""
    global _wanted
    _wanted = list(wanted)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile, range(len(_wanted))))


_wanted: list[Job] = []  # for the forked processes: a kernel cannot be pickled


def _compile(at: int) -> Resources:
    launch, target = _wanted[at]
    return launch.compile(target)


def table(found: Mapping[Job, str], taken: Sequence[Resources]) -> str:
    """A line a launch; for each target registers / shared KB / bytes spilled."""
    targets = sorted({r.capability for r in taken})
    lines: dict[Launch, dict[int, Resources]] = {}
    for (launch, target), r in zip(found, taken, strict=True):
        lines.setdefault(launch, {})[target] = r
    printed = [f"{'operator':26} {'kernel':34} " + " ".join(f"{f'sm_{t}':>16}" for t in targets)]
    for launch, mine in lines.items():
        operator = next(found[launch, target] for target in mine)
        numbers = " ".join(f"{_numbers(mine[t]) if t in mine else '':>16}" for t in targets)
        any_ = next(iter(mine.values()))
        choice = " ".join(f"{name}={value}" for name, value in any_.options.items())
        printed.append(f"{operator:26} {launch.name:34} {numbers}   {any_.types}; {any_.tiles} {choice}")
        printed += dict.fromkeys(r.error for r in mine.values() if r.error)
    return "\n".join(printed)


def _numbers(r: Resources) -> str:
    return "fails" if r.error else f"{r.registers} / {r.shared / 1024:.1f} / {r.spilled}"
