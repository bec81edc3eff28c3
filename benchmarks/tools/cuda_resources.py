"""Registers, spills and instructions of the CUDA C++ kernels, read off what nvcc makes of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..checks import ARCHS

SOURCES = Path(__file__).resolve().parents[2] / "csrc/cuda"
FLAGS = ["-O3", "-std=c++17", "--Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]
ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?(?!NOP\b)([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class CudaResources:
    kernel: str
    types: str
    arch: str
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread's stack, and bytes stored and loaded again."""
    opcodes: Counter[str]
    """Instructions of the machine code, with their modifiers; without the NOPs that fill it up."""

    def count(self, *names: str) -> int:
        """Instructions of these names, with any modifiers."""
        return sum(many for opcode, many in self.opcodes.items() if opcode.split(".")[0] in names)

    @property
    def generic(self) -> int:
        """Accesses that look up which memory an address is of: the compiler lost sight of it."""
        return self.count("LD", "ST", "ATOM")

    @property
    def divisions(self) -> int:
        """Divisions of integers: each begins with the divisor's reciprocal, from a float that is rounded up."""
        return sum(many for opcode, many in self.opcodes.items() if opcode.startswith("I2F") and ".RP" in opcode)

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.generic == 0


def nvcc() -> str | None:
    return shutil.which("nvcc")


def cuobjdump() -> str:
    """Beside nvcc, on the PATH, or the one that Triton brings along."""
    beside = Path(nvcc() or "").resolve().parent
    found = shutil.which("cuobjdump", path=str(beside)) or shutil.which("cuobjdump")
    if found is None:
        from triton import knobs

        found = str(knobs.nvidia.cuobjdump.path)
    return found


def resources(targets: Sequence[int] = tuple(ARCHS)) -> list[CudaResources]:
    """Of every kernel for each target, by kernel."""
    return [found for found, _ in machine_code(targets)]


def machine_code(
    targets: Sequence[int] = tuple(ARCHS), sources: Sequence[str] = ("*",)
) -> list[tuple[CudaResources, str]]:
    """Of every kernel in these files for each target, by kernel, with what `cuobjdump -sass` prints of it.

    Raises RuntimeError with what nvcc says.
    """
    paths = sorted(path for source in sources for path in SOURCES.glob(f"{source}.cu"))
    # the host's part, which is the same for all, once
    jobs = [(path, ARCHS[target], target == targets[0]) for path in paths for target in targets]
    with tempfile.TemporaryDirectory() as objects, ThreadPoolExecutor(os.cpu_count()) as pool:
        each = pool.map(lambda job: list(_disassembled(*job, Path(objects))), jobs)
        found = [one for kernels in each for one in kernels]
    return sorted(found, key=lambda one: (one[0].kernel, one[0].types, one[0].arch))


def version() -> str:
    """Of nvcc."""
    return re.findall(r"release [\d.]+, V([\d.]+)", _run(str(nvcc()), "--version"))[0]


def _disassembled(source: Path, arch: str, host: bool, folder: Path) -> Iterator[tuple[CudaResources, str]]:
    target = folder / f"{source.stem}-{arch}.{'o' if host else 'cubin'}"
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    said = _run(str(nvcc()), *FLAGS, gencode, "-c" if host else "-cubin", str(source), "-o", str(target))
    functions = {text.split()[0]: text for text in _run(cuobjdump(), "-sass", str(target)).split("Function : ")[1:]}
    for name, *bytes_, registers in ENTRY.findall(said):
        opcodes = Counter(OPCODE.findall(functions[name]))
        yield CudaResources(*_named(name), arch, int(registers), sum(map(int, bytes_)), opcodes), functions[name]


def _named(mangled: str) -> tuple[str, str]:
    """(kernel, types it is instantiated for, and for which rows)."""
    kernel, arguments = re.findall(r"^_Z\d+(\w+?_kernel)(?:I(\w+?)Ev)?", mangled)[0]
    types = re.findall(r"B?Float(?:16|32)|S\w?_", arguments)
    types = [types[0] if type_.startswith("S") else type_ for type_ in types]
    rows = ["whole"] * arguments.startswith("Lb1E") + ["staged"] * ("StagedRows" in arguments)
    return kernel, " ".join([*types, *rows])


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr + done.stdout)
    return done.stdout + done.stderr


def table(taken: Sequence[CudaResources]) -> str:
    """A line a kernel. LDS, STS, ATOMS: accesses to shared memory; generic: the hardware has to find out."""
    columns = "registers  spilled  instructions   LDS   STS  ATOMS  generic  divisions"
    lines = [f"{'kernel':24} {'types':17} {'arch':5} {columns}"]
    for r in taken:
        lines.append(
            f"{r.kernel:24} {r.types:17} {r.arch:5} {r.registers:9} {r.spilled:8} {r.opcodes.total():13}"
            f" {r.count('LDS'):5} {r.count('STS'):5} {r.count('ATOMS'):6} {r.generic:8} {r.divisions:10}"
        )
    return "\n".join(lines)
