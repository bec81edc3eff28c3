from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sparc_fast as sf

torch.set_num_threads(1)  # shapes are tiny; tests of threads set their own number


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads as NaN, so that a value nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=sorted(sf.available_backends("cpu")))
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs here: an operator's tests hold for all of them."""
    return str(request.param)
