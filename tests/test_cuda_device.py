"""The compiled CUDA kernels on a GPU: the same results as the reference, at full size, and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from accuracy import assert_equal, check_accuracy, check_replayed_rows
from cuda_emulation.build import planned
from operands import SUPPORTS, Operands, move_rows, operands, rows_to_update
from torch import Tensor

import sparc_fast as sf
from sparc_fast.ops import reference
from sparc_fast.ops.layout import stream_slices, wide

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
if find_spec("sparc_fast._cuda") is None:
    pytest.skip("sparc_fast._cuda is not compiled", allow_module_level=True)

from sparc_fast.ops import cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4096, 32768, 64), (300, 131072, 64), (5, 2**20, 128), (1, 2**21, 2048), (4096, 8192, 32), (7, 1003, 1003)]


@pytest.fixture(autouse=True)
def on_the_gpu() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def check(scores: Tensor, k: int) -> None:
    found = cuda.topk_rows(scores, k)
    for rows, indices in zip(scores.split(64), found.split(64), strict=True):
        assert torch.equal(indices, reference.topk_rows(wide(rows), k))


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


def to_select_from(N: int, L: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W_enc, pre_bias and latent_bias."""
    return normal(N, D).to(dtype), normal(L, D).to(dtype), normal(D).to(dtype), normal(2, L).to(dtype)


# several chunks; one chunk of few samples, in many steps; the largest k; rows off any vector
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "L", "D", "k"), [(4500, 16384, 256, 64), (5, 2**18, 64, 128), (300, 30000, 100, 2048), (33, 4099, 257, 7)]
)
def test_supports_are_exact(N: int, L: int, D: int, k: int, dtype: torch.dtype) -> None:
    x, W_enc, pre_bias, bias = to_select_from(N, L, D, dtype)
    found = cuda.global_topk(x, W_enc, pre_bias, bias, k)
    for rows, indices in zip(x.split(64), found.split(64), strict=True):
        assert torch.equal(indices, reference.global_topk(rows, W_enc, pre_bias, bias, k))
    check_together((x, W_enc, pre_bias, bias), k, found)


def check_together(of: tuple[Tensor, ...], k: int, support: Tensor) -> None:
    """Values that come with the choice are those found alone, bit for bit."""
    D = of[0].shape[1]
    widths = (D - D // 3, D // 3)
    indices, values = cuda.encode_topk(*of, k, widths)
    assert torch.equal(indices, support)
    assert_equal([values], [cuda.support_values(*of, support, widths)], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_supports_are_exact_on_hard_samples(dtype: torch.dtype) -> None:
    x, W_enc, pre_bias, bias = to_select_from(64, 20000, 64, dtype)
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
        found = cuda.global_topk(x, weights, pre_bias, biases, 64)
        assert torch.equal(found, reference.global_topk(x, weights, pre_bias, biases, 64))
        check_together((x, weights, pre_bias, biases), 64, found)
    assert torch.equal(found, cuda.global_topk(x[:1], W_enc * 0, pre_bias, bias * 0, 64).expand(64, -1))


def test_operands_may_be_columns_of_wider_matrices() -> None:
    x, W_enc, pre_bias, bias = to_select_from(100, 5000, 200)
    for s, cols in enumerate(stream_slices((130, 70))):
        of_stream = x[:, cols], W_enc[:, cols], pre_bias[cols], bias[s : s + 1]
        assert torch.equal(cuda.global_topk(*of_stream, 20), reference.global_topk(*of_stream, 20))


@pytest.mark.parametrize(("N", "k", "L"), [(4096, 64, 32768), (8192, 128, 2**20), (256, 64, 8192), (3, 2, 5)])
def test_inverse_indices_equal_the_reference(N: int, k: int, L: int) -> None:
    indices = torch.randint(0, L, (N, k), device="cuda", dtype=torch.int32)
    for often in (0, k // 2):
        indices[:, :often] = 1
        for got, expected in zip(cuda.invert_indices(indices, L), reference.invert_indices(indices, L), strict=True):
            assert torch.equal(got, expected)


@pytest.fixture
def operands_on_the_gpu(on_the_gpu: None) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(before)


# d_streams, N, L, k
UPDATES = [((1024, 768, 768), 1024, 8192, 64), ((100, 7), 300, 1000, 9), ((5000,), 64, 300, 8), ((1,), 33, 50, 2)]


def skewed(shape: tuple[tuple[int, ...], int, int, int], dtype: torch.dtype, per_stream: bool = False) -> Operands:
    """One latent is in every sample."""
    o = operands(shape, dtype, per_stream)
    o.indices[..., 0] = 3
    return o


def update_directly(rows: list[Tensor], o: Operands) -> tuple[Tensor, ...]:
    return (*rows, *move_rows(cuda, rows, o))


@SUPPORTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", UPDATES, ids=str)
def test_rows_are_moved_as_accurately_as_by_plain_pytorch(
    shape: tuple[tuple[int, ...], int, int, int], dtype: torch.dtype, per_stream: bool, operands_on_the_gpu: None
) -> None:
    o = skewed(shape, dtype, per_stream)
    for name in ("update_rows", "step_rows", "replay_rows"):
        # the largest error is that of the one weight whose second moment is next to 0: luck with both
        check_accuracy(name, o, cuda, factor=4)


@pytest.mark.parametrize("shape", UPDATES, ids=str)
def test_neither_a_second_run_nor_another_grid_changes_a_bit(
    shape: tuple[tuple[int, ...], int, int, int], operands_on_the_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    o = skewed(shape, torch.bfloat16)
    expected = update_directly(rows_to_update(o), o)
    for choices in ({}, {"blocks": 1}, {"blocks": 37}, {"blocks": 5000}):
        planned(cuda, monkeypatch, "UpdatePlan", **choices)
        assert_equal(update_directly(rows_to_update(o), o), expected)


@pytest.mark.parametrize("shape", UPDATES, ids=str)
def test_replayed_rows_equal_rows_that_were_never_left_behind(
    shape: tuple[tuple[int, ...], int, int, int], operands_on_the_gpu: None
) -> None:
    d_streams, _, L, k = shape
    check_replayed_rows(cuda, d_streams, L, k, torch.float32, [0.1 / t for t in range(1, 31)])


def test_a_graph_moves_rows_as_eager_steps_do(operands_on_the_gpu: None) -> None:
    o = skewed(UPDATES[0], torch.bfloat16)
    inverse = o.inverse
    lr, count = torch.tensor(0.01, dtype=torch.float64), torch.zeros(())
    eager, captured = rows_to_update(o), rows_to_update(o)

    def step(rows: list[Tensor]) -> None:
        move_rows(cuda, rows, o, inverse=inverse, lr=lr, step=count)

    graph = torch.cuda.CUDAGraph()
    step([row.clone() for row in eager])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        count += 1
        step(captured)
    count.zero_()
    for t in range(1, 4):
        lr.fill_(0.01 / t)
        o.values.copy_(torch.relu(torch.randn_like(o.values)))  # the indices, too, may be others at every replay
        o.indices.copy_(o.indices.roll(1, 0))
        for mine, fresh in zip(inverse, reference.invert_indices(o.indices, len(o.W_enc)), strict=True):
            mine.copy_(fresh)
        graph.replay()
        assert count == t
        step(eager)
        assert_equal(captured, eager)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_training_in_graphs_has_the_bits_of_training_without(backend: str) -> None:
    given, trained = normal(12, 256, 96).bfloat16(), []
    for graph in (False, True):
        torch.manual_seed(0)
        model = sf.SPARC({"a": 64, "b": 32}, 2048, 16, dead_after=1500, dtype=torch.bfloat16, backend=backend)
        optimizer = sf.SparcAdam(model.cuda(), lr=1e-3, graph=graph)
        losses = [optimizer.step(x) for x in given]
        assert bool(optimizer._graphs._kept) == graph
        trained.append((model.state_dict(), losses))
    (plain, expected), (captured, found) = trained
    assert all(torch.equal(captured[name], plain[name]) for name in plain)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_graph_replays_with_new_numbers() -> None:
    scores, graph = normal(128, 40000), torch.cuda.CUDAGraph()
    cuda.invert_indices(cuda.topk_rows(scores, 64), 40000)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        indices = cuda.topk_rows(scores, 64)
        offsets, entries = cuda.invert_indices(indices, 40000)
    for numbers in (normal(128, 40000), normal(128, 40000).round(), torch.zeros_like(scores)):
        scores.copy_(numbers)
        graph.replay()
        assert torch.equal(indices, reference.topk_rows(numbers, 64))
        for got, expected in zip((offsets, entries), reference.invert_indices(indices, 40000), strict=True):
            assert torch.equal(got, expected)


def test_a_graph_of_supports_replays_with_new_samples() -> None:
    (x, *rest), graph = to_select_from(128, 40000, 64), torch.cuda.CUDAGraph()
    cuda.global_topk(x, *rest, 64)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        indices = cuda.global_topk(x, *rest, 64)
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
        indices = cuda.topk_rows(scores, 64)
    stream.synchronize()
    assert torch.equal(indices, reference.topk_rows(numbers, 64))
