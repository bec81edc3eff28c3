"""nvcc compiles every CUDA kernel for the GPUs it is meant for, without a warning, a spill or an access to shared memory
that does not say so. Needs no GPU."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sparc_fast.benchmarks.checks import ARCHS
from sparc_fast.benchmarks.tools import cuda_resources
from sparc_fast.benchmarks.tools.cuda_resources import CudaResources

ROOT = Path(__file__).parents[1]
BODIES = {
    name: body
    for path in ROOT.glob("csrc/cuda/*.cu*")
    for name, body in re.findall(r"__global__ void.*?(\w+_kernel)(\(.*?\n\})", path.read_text(), re.DOTALL)
}
"""Every kernel's source."""
SHARED = {name for name, body in BODIES.items() if "shared_memory()" in body or "__shared__" in body}
COUNTED = {
    "topk_rows_kernel", "filter_scores_kernel", "tighten_kernel", "settle_supports_kernel", "sort_segments_kernel",
    "invert_few_kernel",
}  # fmt: skip
"""Kernels whose threads draw places from a counter in shared memory."""
OF_90A = {"screen_scores_kernel"}
"""Kernels that trap on any other GPU."""

pytestmark = [pytest.mark.compilers, pytest.mark.skipif(cuda_resources.nvcc() is None, reason="no nvcc")]


@pytest.fixture(scope="module")
def compiled(machine_code: Path) -> list[CudaResources]:
    return [resources for resources, _ in pickle.loads(machine_code.read_bytes())]


def test_every_kernel_compiles_without_a_spill(
    compiled: list[CudaResources], record_property: Callable[[str, object], None]
) -> None:
    record_property("shown", cuda_resources.table(compiled))
    assert BODIES
    kernels = sum(len(re.findall("__global__", path.read_text())) for path in ROOT.glob("csrc/cuda/*.cu*"))
    assert len(BODIES) == kernels
    assert {(r.kernel, r.arch) for r in compiled} == {(name, arch) for name in BODIES for arch in ARCHS.values()}
    assert not [(r.kernel, r.types, r.arch) for r in compiled if r.spilled]


def test_the_compiler_knows_every_access_to_shared_memory(compiled: list[CudaResources]) -> None:
    """Else each is a generic one, which first finds out which memory is meant."""
    assert not [(r.kernel, r.types, r.arch, r.generic) for r in compiled if r.generic]
    assert {r.kernel for r in compiled if r.count("LDS") and r.count("STS")} == SHARED >= COUNTED
    for r in (r for r in compiled if r.arch == "90a" or r.kernel not in OF_90A):
        assert (r.count("LDS") > 0) == (r.count("STS") > 0) == (r.kernel in SHARED), r
        assert (r.count("ATOMS") > 0) == (r.kernel in COUNTED), r


def test_tiles_are_brought_by_the_hardware_and_multiplied_by_four_warps_at_once(compiled: list[CudaResources]) -> None:
    screens = [r for r in compiled if r.kernel in OF_90A]
    assert {r.types for r in screens} == {"BFloat16", "Float16"}
    for r in screens:
        here = r.arch == "90a"
        assert (r.count("UTMALDG"), r.count("HGMMA")) == ((2, 4) if here else (0, 0)), r


def test_an_update_divides_no_integers(compiled: list[CudaResources]) -> None:
    """A division takes tens of instructions, which every entry of every latent would pay for."""
    updates = [r for r in compiled if r.kernel in ("update_rows_kernel", "sum_pieces_kernel")]
    assert updates
    # for sm_100 the compiler divides once where a block begins, before any loop
    assert not [(r.kernel, r.types, r.arch, r.divisions) for r in updates if r.divisions > (r.arch == "100")]
    # the count itself: this kernel divides its block's number by that of rows
    assert all(r.divisions for r in compiled if r.kernel == "replay_rows_kernel")
