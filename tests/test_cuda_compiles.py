"""nvcc compiles every CUDA kernel for the GPUs it is meant for, without a warning or a spill. Needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
ARCHS = ["80", "90a", "100"]
FLAGS = ["-O3", "-std=c++17", "--Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]
ENTRY = re.compile(
    r"Compiling entry function '_Z\d+(?P<kernel>\w+?_kernel)(?:I\d+(?P<type>\w+?)Ev)?\w*' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stored>\d+) bytes spill stores, (?P<loaded>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def resources(source: Path, arch: str, folder: Path) -> Iterator[dict[str, str]]:
    target = folder / f"{source.stem}-{arch}.o"
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [str(NVCC), *FLAGS, gencode, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return (match.groupdict() for match in ENTRY.finditer(done.stderr + done.stdout))


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_every_kernel_compiles_without_a_spill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [(source, arch, tmp_path) for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [entry for entries in pool.map(lambda job: list(resources(*job)), jobs) for entry in entries]
    kernels = sum(len(re.findall("__global__", path.read_text())) for path in ROOT.glob("csrc/cuda/*.cuh"))
    assert len({entry["kernel"] for entry in found}) == kernels > 0
    with capsys.disabled():  # shown in every run of the suite
        print("\nkernel                      type             arch  registers  bytes spilt")
        for entry in sorted(found, key=lambda entry: (entry["kernel"], entry["type"] or "", entry["arch"])):
            entry["type"] = entry["type"] or ""
            print("{kernel:27} {type:16} {arch:7} {registers:>7} {stored:>12}".format(**entry))
    spills = [entry for entry in found if any(int(entry[name]) for name in ("stack", "stored", "loaded"))]
    assert not spills
