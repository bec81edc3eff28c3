from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

# cuBLAS is deterministic only with a workspace of its own, and must be told before it starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Triton warns where nobody has said whether products and sums may be fused; they may
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# without a GPU, Triton's interpreter runs the kernels; it must be chosen before they are imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cuda_emulation import build
from operands import fast_backends

import sparc_fast as sf

torch.set_num_threads(1)  # shapes are tiny; tests of threads set their own number
# SPARC_FAST_TEST_DEVICE=cuda runs the operators' tests on a GPU
torch.set_default_device(os.environ.get("SPARC_FAST_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads as NaN, so that a value nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA backend with its kernels emulated on the host."""
    return build.emulated_backend(build.emulated_module(tmp_path_factory.mktemp("cuda")))


@pytest.fixture(params=["0", "1", "2", "3"], ids=["first to last", "last to first", "shuffled", "shuffled otherwise"])
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which the emulation runs threads."""
    monkeypatch.setenv("CUDA_EMULATION_SCHEDULE", request.param)


# the operators' own tests, small enough for Triton's interpreter
IN_INTERPRETER = {
    "test_decode_loss",
    "test_empty_slots",
    "test_every_operator",
    "test_global_topk",
    "test_local_topk",
    "test_offsets",
    "test_support_values",
    "test_update_rows",
    "test_weight_gradients",
}


def pytest_configure(config: pytest.Config) -> None:
    """NumPy, which Triton's interpreter computes with, warns of what floating point is meant to do."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every backend that runs here: an operator's tests hold for all of them."""
    if "backend" in metafunc.fixturenames:
        all_here = metafunc.module.__name__ in IN_INTERPRETER
        names = sf.available_backends(torch.get_default_device()) if all_here else fast_backends()
        metafunc.parametrize("backend", sorted(names))
