"""The compiled CUDA kernels on a GPU: the same results as the reference, at full size, and in a CUDA graph."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from sparc_fast import reference

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
if find_spec("sparc_fast._cuda") is None:
    pytest.skip("sparc_fast._cuda is not compiled", allow_module_level=True)

from sparc_fast import native_cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4096, 32768, 64), (300, 131072, 64), (5, 2**20, 128), (1, 2**21, 2048), (4096, 8192, 32), (7, 1003, 1003)]


@pytest.fixture(autouse=True)
def on_the_gpu() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def check(scores: Tensor, k: int) -> None:
    found = native_cuda.topk_rows(scores, k)
    for rows, indices in zip(scores.split(64), found.split(64), strict=True):
        assert torch.equal(indices, reference._largest(reference.wide(rows), k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "L", "k"), SHAPES)
def test_topk_rows_are_exact(N: int, L: int, k: int, dtype: torch.dtype) -> None:
    check(normal(N, L).to(dtype), k)


def test_topk_rows_are_exact_on_hard_rows() -> None:
    x = normal(64, 40000)
    column = torch.arange(40000, device="cuda").float().expand(64, -1)
    for rows in (x * 0, x.relu() * 0 - 0.0, x.round(), (x - 3).relu(), column, -column, 1e4 + 1e-3 * x, x * 1e-40):
        check(rows, 64)
    check(torch.where(x > 2, torch.nan, torch.where(x < 0, -torch.inf, x)), 64)


@pytest.mark.parametrize(("N", "k", "L"), [(4096, 64, 32768), (8192, 128, 2**20), (256, 64, 8192), (3, 2, 5)])
def test_inverse_indices_equal_the_reference(N: int, k: int, L: int) -> None:
    indices = torch.randint(0, L, (N, k), device="cuda", dtype=torch.int32)
    for often in (0, k // 2):
        indices[:, :often] = 1
        for got, expected in zip(
            native_cuda.invert_indices(indices, L), reference.invert_indices(indices, L), strict=True
        ):
            assert torch.equal(got, expected)


def test_a_graph_replays_with_new_numbers() -> None:
    scores, graph = normal(128, 40000), torch.cuda.CUDAGraph()
    native_cuda.invert_indices(native_cuda.topk_rows(scores, 64), 40000)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        indices = native_cuda.topk_rows(scores, 64)
        offsets, entries = native_cuda.invert_indices(indices, 40000)
    for numbers in (normal(128, 40000), normal(128, 40000).round(), torch.zeros_like(scores)):
        scores.copy_(numbers)
        graph.replay()
        assert torch.equal(indices, reference._largest(numbers, 64))
        for got, expected in zip((offsets, entries), reference.invert_indices(indices, 40000), strict=True):
            assert torch.equal(got, expected)


def test_kernels_run_on_the_stream_in_use() -> None:
    scores, stream = torch.zeros(64, 40000, device="cuda"), torch.cuda.Stream()
    numbers = normal(64, 40000)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        scores.copy_(numbers)
        indices = native_cuda.topk_rows(scores, 64)
    stream.synchronize()
    assert torch.equal(indices, reference._largest(numbers, 64))
