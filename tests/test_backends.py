"""Which backend "auto" is, and what it takes from the CUDA kernels once they have been measured to be faster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparc_fast.ops import backends

GPU = torch.device("cuda")
OPERATORS = [name for name in vars(backends.Backend) if not name.startswith("_")]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends that say who they are, as if there were a GPU with all of them."""
    fakes: dict[str, Any] = {
        name: SimpleNamespace(**{operator: f"{name} {operator}" for operator in OPERATORS})
        for name in ("triton", "cuda")
    }
    monkeypatch.setattr(backends, "_BACKENDS", fakes)
    monkeypatch.setattr(backends, "_AVAILABLE", {"cuda": ("triton", "cuda", "reference")})


def test_every_operator_said_to_be_faster_in_cuda_is_one_and_says_what_was_measured() -> None:
    assert set(backends.FASTER_IN_CUDA) <= set(OPERATORS)
    assert all(backends.FASTER_IN_CUDA.values())


def test_auto_takes_from_the_cuda_kernels_what_was_measured_to_be_faster(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "FASTER_IN_CUDA", {})
    assert vars(backends.resolve("auto", GPU)) == vars(backends.resolve("triton", GPU))
    monkeypatch.setattr(backends, "FASTER_IN_CUDA", {"global_topk": "A, some GPU: 0.9 ms, Triton 1.0 ms"})
    auto = backends.resolve("auto", GPU)
    for operator in OPERATORS:
        assert getattr(auto, operator) == f"{'cuda' if operator == 'global_topk' else 'triton'} {operator}"
    assert backends.resolve("triton", GPU).global_topk == "triton global_topk"
    assert backends.resolve("cuda", GPU).decode_loss == "cuda decode_loss"


def test_auto_is_triton_where_the_cuda_kernels_are_not_compiled(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_AVAILABLE", {"cuda": ("triton", "reference")})
    monkeypatch.setattr(backends, "FASTER_IN_CUDA", {"global_topk": "measured"})
    assert backends.resolve("auto", GPU).global_topk == "triton global_topk"
