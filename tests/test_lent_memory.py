"""Large results in memory that others have left: lent again, and never while somebody can still see it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import sparc_fast as sf
from sparc_fast.ops.huge_pages import LENT, give_back_freed, lent
from sparc_fast.planning import process_memory

pytest.importorskip("sparc_fast._cpu")
MANY = 256  # others that memory waits for, and what they leave
N, D = 1024, 2048

KEEP: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda rows: rows,
    "a row": lambda rows: rows[7],
    "a transposed view": lambda rows: rows.t(),
    "data": lambda rows: rows.data,
    "detached": lambda rows: rows.detach(),
    "another type": lambda rows: rows.view(torch.int32),
    "numpy": lambda rows: rows.numpy(),
    "a numpy column": lambda rows: rows.numpy()[:, 3],
    "storage": lambda rows: rows.untyped_storage(),
    "a memory view": lambda rows: memoryview(rows.numpy()),
    "what autograd saves": lambda rows: (rows * torch.ones(D, device="cpu", requires_grad=True)).grad_fn,
}


def made(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return lent(N, D, dtype=dtype).fill_(value)


def test_memory_that_a_result_has_left_is_lent_again() -> None:
    places = {made(i).data_ptr() for i in range(20)}
    assert len(places) == 1
    assert places.pop() % 64 == 0


@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
def test_memory_is_not_lent_while_anything_refers_to_it(keep: Callable[[Tensor], Any]) -> None:
    rows = made(1)
    place, kept = rows.data_ptr(), keep(rows)
    del rows
    others = [made(2) for _ in range(3)]
    assert all(other.data_ptr() != place for other in others)
    del kept
    assert made(3).data_ptr() == place


def test_two_that_are_held_never_overlap_whatever_their_sizes() -> None:
    random = torch.Generator("cpu").manual_seed(0)
    held: dict[int, Tensor] = {}
    for i in range(300):
        n = int(torch.randint(LENT // 4, 3 * LENT // 4, (), generator=random, device="cpu"))
        held[i % 7] = lent(n, dtype=torch.int32).fill_(i)
        assert all(bool((rows == rows[0]).all()) for rows in held.values())
        assert len({int(rows[0]) for rows in held.values()}) == len(held)


def test_threads_are_each_lent_their_own() -> None:
    def fill(i: int) -> bool:
        rows = made(i)
        return all(bool((rows == i).all()) for _ in range(3))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(fill, range(100)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64], ids=str)
def test_memory_that_is_lent_again_reads_as_fresh_memory_does(dtype: torch.dtype) -> None:
    made(0, dtype)
    for size in ((N, D), (3,)):  # poisoned, as tests/conftest.py asks for
        rows, fresh = lent(*size, dtype=dtype), torch.empty(size, dtype=dtype, device="cpu")
        torch.testing.assert_close(rows, fresh, equal_nan=True, rtol=0, atol=0)


def test_a_result_is_an_ordinary_tensor() -> None:
    rows = made(1)
    assert rows.is_contiguous()
    assert not rows._is_view()
    assert rows.untyped_storage().nbytes() == rows.nbytes
    assert torch.equal(rows.clone().requires_grad_(), rows)
    assert lent(0, 5, dtype=torch.float32).shape == (0, 5)


def test_a_large_reconstruction_may_be_changed_in_place() -> None:
    x = torch.randn(N, 1200, device="cpu")
    model = sf.SPARC({"one": 1200}, 64, 4, backend="auto").to("cpu")
    values, indices = torch.rand(N, 1, 4, device="cpu", requires_grad=True), torch.randint(0, 64, (N, 4), device="cpu")
    recons = sf.functional.sparse_decode(values, indices.int(), model.W_dec, model.pre_bias)
    recons -= x[:, None]
    recons.square().sum().backward()
    assert values.grad is not None
    assert bool(values.grad.isfinite().all())


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
def test_memory_that_nobody_uses_goes_back_to_the_system() -> None:
    def held_by_50() -> None:
        rows = [made(i) for i in range(50)]
        del rows

    give_back_freed()
    before = process_memory.resident("VmRSS")
    held_by_50()
    kept = process_memory.resident("VmRSS") - before
    assert kept > 50 * N * D * 4 * 0.8
    give_back_freed()
    assert process_memory.resident("VmRSS") - before < kept / 10
    held_by_50()
    for _ in range(MANY + 1):
        lent(4 * N, D, dtype=torch.float32)
    assert process_memory.resident("VmRSS") - before < kept / 2


@pytest.fixture
def small_pages() -> Iterator[None]:
    """Each fault is one page of 4096 bytes."""
    libc, disable_huge = ctypes.CDLL(None), 41  # PR_SET_THP_DISABLE
    give_back_freed()
    libc.prctl(disable_huge, 1, 0, 0, 0)
    yield
    libc.prctl(disable_huge, 0, 0, 0, 0)
    give_back_freed()


@pytest.mark.skipif(sys.platform != "linux", reason="faults are counted on Linux")
@pytest.mark.parametrize("rule", [{}, {"matryoshka": (256, 512)}, {"selection": "batch"}, {"selection": "jumprelu"}])
def test_a_step_takes_its_memory_from_the_step_before(rule: dict[str, Any], small_pages: None) -> None:
    import resource

    def faults_of_a_step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        optimizer.step(x)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    model = sf.SPARC({"one": 768, "two": 512}, 1024, 16, **rule).to("cpu")
    optimizer, x = sf.SparcAdam(model, lr=0.0), torch.randn(2048, 1280, device="cpu")
    pages_of_gradients = 2048 * 2 * 1280 * 4 // 4096 * (3 if "matryoshka" in rule else 1)
    for _ in range(3):
        optimizer.step(x)
    assert min(faults_of_a_step() for _ in range(5)) < pages_of_gradients / 10
