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


def operands(N: int, L: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W_enc, pre_bias and latent_bias."""
    return normal(N, D).to(dtype), normal(L, D).to(dtype), normal(D).to(dtype), normal(2, L).to(dtype)


# several chunks; one chunk of few samples, in many steps; the largest k; rows off any vector
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "L", "D", "k"), [(4500, 16384, 256, 64), (5, 2**18, 64, 128), (300, 30000, 100, 2048), (33, 4099, 257, 7)]
)
def test_supports_are_exact(N: int, L: int, D: int, k: int, dtype: torch.dtype) -> None:
    x, W_enc, pre_bias, bias = operands(N, L, D, dtype)
    found = native_cuda.global_topk(x, W_enc, pre_bias, bias, k)
    for rows, indices in zip(x.split(64), found.split(64), strict=True):
        assert torch.equal(indices, reference.global_topk(rows, W_enc, pre_bias, bias, k))


def test_supports_are_exact_on_hard_samples() -> None:
    x, W_enc, pre_bias, bias = operands(64, 20000, 60)
    W_enc[10000:] = W_enc[:10000]
    x[3], x[5, 2], x[8, 0] = 0, torch.nan, torch.inf
    x[9] *= 1e30
    order = W_enc.sum(1).argsort()
    for weights, biases in (
        (W_enc, bias),
        (W_enc[order], bias * 0),
        (W_enc[order.flip(0)], bias),
        (W_enc * 0, bias * 0),
    ):
        found = native_cuda.global_topk(x, weights, pre_bias, biases, 64)
        assert torch.equal(found, reference.global_topk(x, weights, pre_bias, biases, 64))
    assert torch.equal(found, native_cuda.global_topk(x[:1], W_enc * 0, pre_bias, bias * 0, 64).expand(64, -1))


def test_streams_are_supported_alone() -> None:
    x, W_enc, pre_bias, bias = operands(100, 5000, 200)
    expected = reference.local_topk(x, W_enc, pre_bias, bias, 20, (130, 70))
    assert torch.equal(native_cuda.local_topk(x, W_enc, pre_bias, bias, 20, (130, 70)), expected)


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


def test_a_graph_of_supports_replays_with_new_samples() -> None:
    (x, *rest), graph = operands(128, 40000, 64), torch.cuda.CUDAGraph()
    native_cuda.global_topk(x, *rest, 64)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        indices = native_cuda.global_topk(x, *rest, 64)
    for numbers in (normal(128, 64), normal(128, 64).round(), torch.full_like(x, torch.inf), torch.zeros_like(x)):
        x.copy_(numbers)
        graph.replay()
        assert torch.equal(indices, reference.global_topk(x, *rest, 64))


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
