"""Every Triton kernel compiles at its real launch choices for the GPUs it is meant for, and fits them. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.compilers

TOY = """
import sys
import torch, triton, triton.language as tl
from sparc_fast.benchmarks.tools import triton_resources

@triton.jit(do_not_specialize=["N"])
def _sum_kernel(out, x, bias, stride, N, scale, BLOCK: tl.constexpr, KEPT: tl.constexpr):
    rows, cols = tl.program_id(0) * KEPT + tl.arange(0, KEPT), tl.arange(0, BLOCK)
    tile = tl.load(x + rows[:, None] * stride + cols[None, :], mask=rows[:, None] < N, other=0.0)
    for i in range(N):  # keeps the whole tile alive
        tile = tile * scale + tile * tile
    if bias is not None:
        tile += tl.load(bias + cols)[None, :]
    tl.store(out + rows[:, None] * stride + cols[None, :], tile)

with triton_resources.noting() as seen:
    x = torch.empty(64, 1024)
    for kept in (4, 32):
        _sum_kernel[(16,)](x, x, None, x.stride(0), 32, 0.5, BLOCK=1024, KEPT=kept, num_warps=4)
    _sum_kernel[(16,)](x, x, None, 1, 33, 0.5, BLOCK=1024, KEPT=4, num_warps=4)
small, large, narrow = seen
assert dict(small.signature) == {
    "out": "*fp32", "x": "*fp32", "bias": "constexpr", "stride": "i32", "N": "i32", "scale": "fp32",
    "BLOCK": "constexpr", "KEPT": "constexpr",
}
assert small.divisible_by_16 == (0, 1, 3) and narrow.divisible_by_16 == (0, 1)
assert dict(narrow.constants)["stride"] == 1 and dict(small.options) == {"num_warps": 4}
fits, spills = triton_resources.resources([(small, 90), (large, 90)])
assert fits.fits and fits.registers > 16, fits
assert not spills.fits and spills.spilled > 0, spills
print("as expected")
"""

MACHINE_CODE = """
import re
from dataclasses import replace
import torch
from sparc_fast.benchmarks import cases
from sparc_fast.benchmarks.tools import triton_resources
from sparc_fast.benchmarks.tools.machine_code import Code

wide = replace(cases.A, d_streams=(8192,))  # rows that go through memory
seen = set()
for shape in (cases.A, wide):
    names = ["update_rows", "step_rows", "replay_rows", "topk_rows"]
    for launch in triton_resources.launches(shape, torch.float32, names):
        if not launch.name.startswith(("_update", "_replay", "_parts")):
            continue
        compiled = launch.compiled(90)
        seen.add(launch.name)
        if launch.name == "_parts":
            Code(triton_resources.disassembled(compiled.asm["cubin"])).loop({r"LDG.*\\.128": 1})
            continue
        ptx = compiled.asm["ptx"]
        # max drops NaN: of roots of sums, and of float32, where every number is a weight's or a gradient's, it may not
        roots = re.findall(r"sqrt\\S*\\.f64\\s+(%\\w+)", ptx)
        assert roots or "encoder" in launch.name, launch.name
        taken = re.findall(r"(?:max|min)\\.f64\\s+%\\w+, (\\S+), (\\S+);", ptx)
        assert not {register for pair in taken for register in pair} & set(roots), launch.name
        assert not re.search(r"(?:max|min)\\.f32", ptx), launch.name
assert len(seen) == 6, seen
for launch in triton_resources.launches(cases.A, torch.bfloat16, ["global_topk"]):
    if launch.name == "_filter":
        way = Code(triton_resources.disassembled(launch.compiled(90).asm["cubin"])).loop({"LDG": 12})
        read = {name: many for name, many in way.accesses.items() if name.startswith("LDG")}
        assert read == {"LDG 16": 12}, read  # 16 scores, norms and biases a thread, 4 at once
print("as expected")
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process in which kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def test_every_kernel_compiles_and_fits_sm_80_sm_90_and_sm_100() -> None:
    done = run("-m", "sparc_fast.benchmarks.kernel_resources", "--json", "--brief")
    assert done.stdout.startswith("["), done.stderr[-3000:]
    taken: list[dict[str, Any]] = json.loads(done.stdout)
    assert {line["capability"] for line in taken} == {80, 90, 100}
    misfits = [{name: value for name, value in line.items() if value} for line in taken if not line["fits"]]
    assert not misfits, json.dumps(misfits, indent=1)


def test_spills_are_seen_and_launches_are_specialised_as_triton_does_it(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    done = run(str(script))
    assert done.stdout.strip() == "as expected", done.stdout + done.stderr[-3000:]


def test_machine_code_keeps_nan_and_loads_scores_16_bytes_at_once(tmp_path: Path) -> None:
    script = tmp_path / "machine_code.py"
    script.write_text(MACHINE_CODE)
    done = run(str(script))
    assert done.stdout.strip() == "as expected", done.stdout + done.stderr[-3000:]
