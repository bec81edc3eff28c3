"""The compiled operators under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_emulation import build as cuda_emulation
from native import build as native

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.compilers,
    pytest.mark.skipif(native.COMPILER is None or not native.SOURCES, reason="no g++ or sources"),
]


Objects = Callable[[str], list[Path]]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_a_sanitizer_finds_nothing(sanitizer: str, native_results: Callable[[str], tuple[int, str]]) -> None:
    status, printed = native_results(sanitizer)
    assert status == 0, printed
    assert printed.startswith("results ")


WRONG_CALLS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("sparc_fast._cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["sparc_fast._cpu"] = module
spec.loader.exec_module(module)
import test_compiled_arguments as tests
assert tests._cpu is module
for name in tests.calls():
    tests.test_a_tensor_of_another_dtype_shape_layout_or_device_is_refused(name)
tests.test_numbers_that_are_places_must_be_places_there_are()
"""
WRONG_CUDA_CALLS = """
import sys
from pathlib import Path
from cuda_emulation import build
import test_compiled_arguments as tests
cuda = build.emulated_backend(Path(sys.argv[1]).parent)
for name in tests.READ:
    tests.test_a_cuda_kernel_gets_no_tensor_of_another_dtype_shape_layout_or_device(name, cuda)
tests.test_a_cuda_kernel_refuses_a_workspace_that_is_too_small_and_sizes_beyond_its_integers(cuda)
"""


def test_no_wrong_call_from_python_touches_what_is_not_its_own(native_objects: Objects, tmp_path: Path) -> None:
    sanitizer = "address,undefined"
    native.compile_module(tmp_path, native_objects(sanitizer), sanitizer)
    run_in_python(WRONG_CALLS, tmp_path / "_cpu.so")


def test_no_wrong_call_of_a_cuda_kernel_touches_what_is_not_its_own(
    emulated_kernels: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    cuda_emulation.emulated_module(tmp_path, emulated_kernels("address"), "address")
    run_in_python(WRONG_CUDA_CALLS, tmp_path / "_cuda.so")


def run_in_python(program: str, module: Path) -> None:
    # the C++ library with it, or the sanitizer does not find what exceptions are thrown with
    found = [
        subprocess.run([str(native.COMPILER), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ, "LD_PRELOAD": " ".join(one.stdout.strip() for one in found), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", program, str(module)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
