"""Compiled functions get no address they could corrupt: a wrong tensor is refused, by name, before it is used."""

from __future__ import annotations

import ast
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulation import build
from torch import Tensor

import sparc_fast as sf
from sparc_fast.ops import reference

pytest.importorskip("sparc_fast._cpu")
from sparc_fast import _cpu

ROOT = Path(__file__).parents[1]
FILE = os.open(__file__, os.O_RDONLY)
N, L, K, WIDTHS = 5, 11, 3, [4, 3]
S, D = len(WIDTHS), sum(WIDTHS)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, dtype=torch.float32, device="cpu").to(dtype)


def support() -> Tensor:
    chosen = [torch.randperm(L, device="cpu")[:K] for _ in range(N)]
    return torch.stack(chosen).sort(1).values.to(torch.int32)


def sparse_rows() -> list[Tensor]:
    """Offsets, latents and values of N rows of K."""
    return [torch.arange(N + 1, device="cpu") * K, support().flatten(), floats(N * K)]


def calls() -> dict[str, list[Any]]:
    """Right arguments of every function of the CPU module that takes tensors."""
    indices = support()
    offsets, entries = reference.invert_indices(indices, L)
    x, values, grads = floats(N, D), floats(N, S, K), floats(N, S, D)
    matrix, moments = (lambda: floats(L, D)), [floats(L, D) for _ in range(4)]
    batch = (x, floats(D), values, floats(N, S, K), grads, offsets, entries, WIDTHS)
    gradients = (matrix(), matrix(), torch.ones(L, dtype=torch.bool, device="cpu"), WIDTHS)
    integers = lambda *shape: torch.zeros(shape, dtype=torch.int64, device="cpu")  # noqa: E731
    adam = _cpu.AdamStep(0.1, 0.9, 0.99, 1e-8, 1, 0)
    wide = {"dtype": torch.float64}
    return {
        "support_values": [floats(N, S, K), x, matrix(), floats(D), floats(S, L), indices, WIDTHS, 1],
        "support_values_grad_x": [floats(N, D), floats(N, S, K), values, indices, matrix(), WIDTHS, 1],
        "sparse_decode": [floats(N, S, D), values, indices, matrix(), floats(D), 1],
        "sparse_decode_grad_values": [floats(N, S, K), grads, indices, matrix(), 1],
        "decode_loss": [floats(S, S), floats(N, S, D), floats(N, S, K), floats(D), values, indices, matrix(), floats(D),
                        x, floats(N, S), [1.0] * S * S, WIDTHS, 1],
        "nested_decode_loss": [floats(2 * S, S), floats(2 * N, S, D), floats(N, S, K), floats(D), values, indices, matrix(),
                               floats(D), x, floats(N, S), [1.0] * S * S, WIDTHS,
                               torch.tensor([4, L], dtype=torch.int64, device="cpu"), 1],
        "invert_indices": [integers(L + 1), integers(N * K), indices, L],
        "weight_gradients": [matrix(), matrix(), floats(S, L), batch, 1],
        "gradient_squares": [floats(L, **wide), floats(S, L), batch, 1],
        "update_rows": [floats(S, L), floats(D), matrix(), matrix(), moments, [None, None], integers(L), batch, adam, 1],
        "step_rows": [matrix(), matrix(), moments, [None, None], integers(L), gradients, adam, 1],
        "replay_rows": [matrix(), [matrix(), matrix()], None, torch.arange(4, device="cpu"), integers(L),
                        floats(2, 4, **wide), WIDTHS, 0, 1],
        "count_silence": [integers(L), values, indices],
        "count_nearer": [floats(N), integers(N), integers(N), *sparse_rows(), *sparse_rows(), integers(N), integers(N) + 2,
                         L, 1e-6, 1],
        "find_nearest": [integers(N, 3), floats(N, 3), *sparse_rows(), *sparse_rows(), L, 1],
        "exact_scores": [floats(N, L), x, matrix(), floats(L, **wide), 1],
        "support_scores": [floats(N, K), x, matrix(), floats(L, **wide), indices, 1],
        "measure_rows": [floats(L), floats(L), None, matrix(), 1],
        "topk_rows": [torch.zeros(N, K, dtype=torch.int32, device="cpu"), floats(N, L), K, 1],
        "first_not_finite": [x, False],
        "read_spans": [FILE, [0], [N * D * 4], floats(N, D), False, False],
        "gather_rows": [floats(4, D), floats(L, D), torch.arange(4, device="cpu"), 0, 1],
        "prefer_huge_pages": [matrix()],
    }  # fmt: skip


def cuda_calls(module: Any) -> dict[str, list[Any]]:
    """Right arguments of every function of the CUDA module that takes tensors."""
    integers = lambda *shape, dtype=torch.int32: torch.zeros(shape, dtype=dtype, device="cpu")  # noqa: E731
    room = lambda count: integers(count + 1, dtype=torch.uint8)  # noqa: E731
    whole = {"dtype": torch.int64}
    indices, x, W, pre_bias, capacity = support(), floats(N, D), floats(L, D), floats(D), L
    offsets, entries = reference.invert_indices(indices, L)
    streams, scores = module.Streams(WIDTHS), (x - pre_bias) @ W.T
    topk, update = module.TopkPlan(N, L, K, 4), module.UpdatePlan(streams, False, 4)
    rows = lambda: [*(floats(L, D) for _ in range(3)), floats(L, D).bfloat16()]  # noqa: E731
    candidates = [integers(N), integers(N), *(integers(N * capacity) for _ in range(4))]
    x_norm, w_norm = (x - pre_bias).norm(dim=1) + 1e-3, W.norm(dim=1) + 1e-3
    zeros, ones = (lambda n: floats(n) * 0), (lambda n: floats(n) * 0 + 1)
    take_in = [module.FilterPlan(L, K, capacity), candidates, capacity, scores, 0, [zeros(L), w_norm, zeros(L), ones(L)],
               [x_norm, zeros(N), ones(N)], K, [1e-5, 0.0, 0.0], 0]  # fmt: skip
    module.filter_scores(*take_in)
    X, of_tiles = floats(N, 8).bfloat16(), floats(L, 8).bfloat16()
    screened = [candidates, capacity, X, of_tiles, zeros(L), ones(L), [ones(N), zeros(N), ones(N)], 1, K,
                [1e-5, 0.0, 0.0], 2, room(module.screen_scores_workspace(N)), 0]  # fmt: skip
    samples = [x, floats(N * S, D), pre_bias, floats(N, S, K), floats(N, S, K), offsets, entries]
    step = [[0.1, 0.9, 0.99, 1e-8, 1.0], [floats(1).double(), ones(1).double()], integers(L, **whole)]
    return {
        "topk_rows": [topk, integers(N, K), scores, room(module.topk_rows_workspace(topk, N, K)), 0],
        "filter_scores": take_in,
        "screen_scores": screened,
        "settle_supports": [candidates, capacity, x, pre_bias, W, zeros(L).double(), 0, x_norm, w_norm, 1e-5, 0.0,
                            integers(N, K), integers(N), integers(1), [floats(S, L), floats(N, S, K)], streams, 0],
        "support_values": [x, pre_bias, W, floats(S, L), floats(N, S, K), indices.flatten(), integers(N), integers(1),
                           streams, 0],
        "invert_indices": [integers(L + 1, **whole), integers(N * K, **whole), indices.flatten(),
                           room(module.invert_indices_workspace(N * K, L)), False, 0],
        "update_rows": [update, floats(S, L), floats(D), rows(), rows(), samples, *step,
                        room(module.update_rows_workspace(update, N * K, L, streams)), streams, 0],
        "step_rows": [update, rows(), rows(), [floats(L, D), floats(L, D), offsets[1:] > offsets[:-1]], *step,
                      room(module.update_rows_workspace(update, 0, L, streams)), streams, 0],
        "replay_rows": [rows(), torch.arange(4, device="cpu"), integers(L, **whole), floats(2, 4).double(),
                        room(module.replay_rows_workspace(2)), streams, 0],
    }  # fmt: skip


def call(name: str, arguments: list[Any], module: Any = _cpu) -> Any:
    packed = {8: _cpu.Batch, 4: _cpu.Gradients}
    return getattr(module, name)(*(packed[len(a)](*a) if isinstance(a, tuple) else a for a in arguments))


def taking_tensors(module: Any) -> set[str]:
    return {name for name, of in vars(module).items() if "torch.Tensor" in (getattr(of, "__doc__", None) or "")}


def test_no_compiled_function_that_takes_tensors_is_left_out_here() -> None:
    assert taking_tensors(_cpu) == set(calls())


def places(arguments: list[Any]) -> Iterator[tuple[Any, ...]]:
    """Where tensors are among arguments, and in lists and batches among them."""
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            yield (i,)
        elif isinstance(argument, tuple | list):
            yield from ((i, j) for j, part in enumerate(argument) if isinstance(part, Tensor))


def at(arguments: list[Any], place: tuple[Any, ...]) -> Any:
    return arguments[place[0]] if len(place) == 1 else arguments[place[0]][place[1]]


def replaced(arguments: list[Any], place: tuple[Any, ...], tensor: Any) -> list[Any]:
    arguments = list(arguments)
    if len(place) == 1:
        arguments[place[0]] = tensor
    else:
        inner = list(arguments[place[0]])
        inner[place[1]] = tensor
        arguments[place[0]] = type(arguments[place[0]])(inner)
    return arguments


def wrong(tensor: Tensor) -> Iterator[tuple[str, Any]]:
    """Tensors that are not as this one is; memory of each is as small as it looks."""
    other = {torch.float32: torch.float64, torch.float64: torch.float32, torch.int32: torch.int64, torch.bool: torch.float32,
             torch.int64: torch.int32, torch.bfloat16: torch.float64, torch.uint8: torch.int32}[tensor.dtype]  # fmt: skip
    yield "dtype", tensor.to(other)
    yield "float16", tensor.to(torch.float16)
    yield "complex", tensor.to(torch.complex64)
    yield "meta", tensor.to("meta")
    yield "sparse", tensor.to_sparse()
    yield "one dimension more", tensor[None]
    yield "four dimensions", tensor.reshape(*[1] * (4 - tensor.ndim), *tensor.shape)
    yield "a scalar", tensor.flatten()[0]
    for d in range(tensor.ndim):
        for size in (0, 1, tensor.shape[d] - 1, 2 * tensor.shape[d] + 1):
            if size not in (tensor.shape[d], 0 if tensor.ndim == 1 else None):
                shape = list(tensor.shape)
                shape[d] = size
                yield f"size {size} in dimension {d}", torch.zeros(shape, dtype=tensor.dtype, device="cpu")
    if tensor.shape[-1] > 1:
        yield "apart in the last dimension", torch.stack([tensor, tensor], -1)[..., 0]
    yield "None", None
    yield "a list", tensor.tolist()


ANY_DTYPE = {"first_not_finite", "gather_rows", "prefer_huge_pages", "read_spans"}


def check_wrong(name: str, right: Callable[[], list[Any]], may_pass: Callable[..., bool], module: Any = _cpu) -> None:
    torch.manual_seed(0)
    call(name, right(), module)
    refused = 0
    for place in places(right()):
        for what, changed in wrong(at(right(), place)):
            try:
                call(name, replaced(right(), place, changed), module)
                assert what.startswith("size") or what == "None" or may_pass(place, what), f"{name}{place}: {what}"
            except (ValueError, TypeError, IndexError):
                refused += 1
    assert refused > 5


@pytest.mark.parametrize("name", list(calls()))
def test_a_tensor_of_another_dtype_shape_layout_or_device_is_refused(name: str) -> None:
    """A size that nothing else tells may be another; what is optional may be None, and what is alone of another type."""

    def may_pass(place: tuple[int, ...], what: str) -> bool:
        return what == "dtype" or name in ANY_DTYPE or (name, what) == ("invert_indices", "one dimension more")

    check_wrong(name, lambda: calls()[name], may_pass)


READ = {
    "topk_rows": {(2,)},
    "filter_scores": {(3,), *((5, i) for i in range(4)), *((6, i) for i in range(3))},
    "screen_scores": {(2,), (3,), (4,), (5,), *((6, i) for i in range(3))},
    "settle_supports": {*((i,) for i in (2, 3, 4, 5, 7, 8)), (14, 0)},
    "support_values": {(i,) for i in (0, 1, 2, 3, 5, 6, 7)},
    "invert_indices": {(2,)},
    "update_rows": {*((5, i) for i in range(7)), (7, 0), (7, 1)},
    "step_rows": {*((3, i) for i in range(3)), (5, 0), (5, 1)},
    "replay_rows": {(1,), (3,)},
}
"""Of each CUDA kernel, the places of what is only read."""
EMULATED = pytest.mark.skipif(build.COMPILER is None, reason="no g++")
EVERY_KERNEL = pytest.mark.parametrize("name", list(READ))
# scores, x, weights, pre_bias and copies, whose type is their own
NARROW = {"topk_rows": [2], "settle_supports": [2, 3, 4, (14, 0), (14, 1)],
          "support_values": [0, 1, 2, 3, 4], "update_rows": [(3, 3), (4, 3), *((5, i) for i in range(5))],
          "step_rows": [(1, 3), (2, 3)], "replay_rows": [(0, 3)]}  # fmt: skip


@EMULATED
@EVERY_KERNEL
def test_a_cuda_kernel_gets_no_tensor_of_another_dtype_shape_layout_or_device(name: str, cuda: ModuleType) -> None:
    module = cuda._cuda
    assert taking_tensors(module) == set(READ)
    narrow = [place if isinstance(place, tuple) else (place,) for place in NARROW.get(name, [])]

    def may_pass(place: tuple[int, ...], what: str) -> bool:
        return what == "float16" and place in narrow

    check_wrong(name, lambda: cuda_calls(module)[name], may_pass, module)


HUGE = (2**31, 2**33 + 1, 2**40, 2**61, 2**62)  # bytes beyond 32 and beyond 64 bits
ENDLESS = {("replay_rows", (5,)), ("count_silence", (1,))}  # so many missed steps or streams are right


def huge(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors that name far more numbers than they have memory for, as far as PyTorch makes them."""
    for d, size in product(range(tensor.ndim), HUGE):
        shape = [*tensor.shape[:d], size, *tensor.shape[d + 1 :]]
        with suppress(RuntimeError):
            yield f"{size} in dimension {d}, expanded", tensor.narrow(d, 0, 1).expand(shape)
        with suppress(RuntimeError):
            yield f"{size} in dimension {d}, meta", tensor.to("meta").narrow(d, 0, 1).expand(shape)


def check_huge(name: str, right: Callable[[], list[Any]], module: Any = _cpu) -> None:
    for place in places(right()):
        tensor = at(right(), place)
        for what, changed in huge(tensor) if (name, place) not in ENDLESS else ():
            may_pass = what.endswith("expanded") and tensor.ndim > 1
            try:
                call(name, replaced(right(), place, changed), module)
                assert may_pass, f"{name}{place}: {what}"
            except (ValueError, TypeError, IndexError):
                pass


@pytest.mark.parametrize("name", list(calls()))
def test_a_tensor_that_names_more_numbers_than_memory_holds_is_refused_or_only_read_where_it_has_some(
    name: str,
) -> None:
    """Rows that are read may be one row again and again."""
    check_huge(name, lambda: calls()[name])


@EMULATED
@EVERY_KERNEL
def test_a_cuda_kernel_gets_no_tensor_that_names_more_numbers_than_memory_holds(name: str, cuda: ModuleType) -> None:
    check_huge(name, lambda: cuda_calls(cuda._cuda)[name], cuda._cuda)


@EMULATED
@EVERY_KERNEL
def test_what_a_cuda_kernel_writes_shares_no_memory_with_what_else_it_is_given(name: str, cuda: ModuleType) -> None:
    """Every tensor in turn takes the place of every other of its shape and type."""
    right, refused = cuda_calls(cuda._cuda)[name], 0
    for one, other in product(places(right), repeat=2):
        a, b = at(right, one), at(right, other)
        if one != other and (a.shape, a.dtype) == (b.shape, b.dtype):
            arguments = cuda_calls(cuda._cuda)[name]
            try:
                call(name, replaced(arguments, one, at(arguments, other)), cuda._cuda)
                assert {one, other} <= READ[name], f"{name}: {other} as {one}"
            except ValueError as error:
                assert "must be memory of its own, got that of" in str(error)  # noqa: PT017
                refused += 1
    assert refused or name in ("topk_rows", "invert_indices", "support_values")


@EMULATED
def test_a_cuda_kernel_refuses_a_workspace_that_is_too_small_and_sizes_beyond_its_integers(cuda: ModuleType) -> None:
    module = cuda._cuda
    at_workspace = {"screen_scores": 11, "invert_indices": 3, "update_rows": 9, "step_rows": 7, "replay_rows": 4}
    for name, i in at_workspace.items():
        right = cuda_calls(module)[name]
        call(name, replaced(right, (i,), right[i][:-1]), module)
        with pytest.raises(ValueError, match=r"workspace must be [0-9]+ bytes that begin at whole 16"):
            call(name, replaced(right, (i,), right[i][:-2]), module)
        with pytest.raises(ValueError, match="workspace must be"):
            call(name, replaced(right, (i,), right[i][1:]), module)
    for widths in ([], [1] * 65, [4, 0], [-1], [2**30, 2**30], [2**40], [2**62, 2**62]):
        with pytest.raises(ValueError, match=r"1 to 64 streams|widths of at least 1 with a sum below"):
            module.Streams(widths)
    right = cuda_calls(module)["topk_rows"]
    right[0].parts = 0
    with pytest.raises(ValueError, match="the plan does not fit"):
        call("topk_rows", right, module)


@pytest.mark.parametrize(("made", "name", "place"), [("Batch", "weight_gradients", 3), ("Gradients", "step_rows", 5)])
def test_what_holds_addresses_keeps_their_tensors(made: str, name: str, place: int) -> None:
    tensors = list(calls()[name][place][:-1])
    seen = [weakref.ref(tensor) for tensor in tensors]
    held = getattr(_cpu, made)(*tensors, WIDTHS)
    tensors.clear()
    assert all(tensor() is not None for tensor in seen)
    del held
    assert all(tensor() is None for tensor in seen)


def test_lists_of_tensors_have_the_length_that_is_read() -> None:
    right = calls()["update_rows"]
    for moments, copies in ((right[4][:3], [right[4][3], None, None]), (right[4] + [None], [None]), ([], right[4])):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            call("update_rows", [*right[:4], moments, copies, *right[6:]])


def test_widths_whose_sum_is_beyond_64_bits_are_refused() -> None:
    right = calls()["support_values"]
    with pytest.raises(ValueError, match="d_streams must be widths with a sum below 2\\^63"):
        call("support_values", replaced(right, (6,), [2**62, 2**62, 2**62, 2**62 + D]))


def test_a_refusal_names_function_argument_what_it_must_be_and_what_it_is() -> None:
    right = calls()["sparse_decode"]
    with pytest.raises(ValueError, match=r"^sparse_decode: W_dec must be float32 or bfloat16, got float16 \[11, 7\]$"):
        call("sparse_decode", replaced(right, (3,), right[3].half()))
    with pytest.raises(ValueError, match=r"^sparse_decode: values must be \[N=5, S=2, k\], got float32 \[4, 2, 3\]$"):
        call("sparse_decode", replaced(right, (1,), right[1][1:].contiguous()))


def test_results_must_have_memory_of_their_own() -> None:
    right = calls()["sparse_decode"]
    room = floats(N * S * D + N * S * K)
    overlapping = [room[: N * S * D].view(N, S, D), room[N * S * D - 1 : -1].view(N, S, K), *right[2:]]
    with pytest.raises(ValueError, match="recons must be memory of its own, got that of values"):
        call("sparse_decode", overlapping)
    with pytest.raises(ValueError, match="recons must be memory of its own, got overlapping rows"):
        call("sparse_decode", [floats(1, S, D).expand(N, S, D), *right[1:]])


def test_a_file_is_read_where_the_rows_are_and_nowhere_beside_them() -> None:
    """Of one row, and of rows without numbers, strides may be any."""
    right, room = calls()["read_spans"], floats(3 * D)
    for out in (room.as_strided((1, D), (3 * D, 1)), floats(N, D)[:, :0]):
        call("read_spans", replaced(replaced(right, (2,), [out.nbytes]), (3,), out))
        with pytest.raises(IndexError, match="spans must fit in out"):
            call("read_spans", replaced(replaced(right, (2,), [out.nbytes + 4]), (3,), out))


def test_numbers_that_are_places_must_be_places_there_are() -> None:
    for name, place, bad in (
        ("support_values", (5,), L), ("sparse_decode", (2,), -2), ("count_silence", (2,), 2**30),
        ("support_scores", (4,), -1), ("gather_rows", (2,), L), ("replay_rows", (3,), -1), ("replay_rows", (4,), 3),
        ("count_nearer", (4,), L), ("count_nearer", (7,), -1), ("count_nearer", (10,), N + 1),
        ("find_nearest", (3,), L), ("find_nearest", (6,), -1),
    ):  # fmt: skip
        arguments = calls()[name]
        arguments[place[0]].flatten()[1] = bad
        with pytest.raises(IndexError, match=r"must (lie in|be of)"):
            call(name, arguments)
    for position, bad in ((5, -1), (5, 10**9), (6, -1), (6, N * K)):
        arguments = calls()["update_rows"]
        arguments[7][position][2] = bad
        with pytest.raises(IndexError, match=r"offsets must ascend|entries must be places"):
            call("update_rows", arguments)
    for position, bad in ((3, -1), (3, N * K + 1), (6, N * K + 1), (9, 3), (9, -1)):
        arguments = calls()["count_nearer"]
        arguments[position][2] = bad
        with pytest.raises(IndexError, match=r"must ascend from 0|must be of candidates there are"):
            call("count_nearer", arguments)
    with pytest.raises(IndexError, match="k must lie in 1"):
        _cpu.topk_rows(torch.zeros(N, L + 1, dtype=torch.int32, device="cpu"), floats(N, L), L + 1, 1)


@pytest.mark.parametrize(("k", "capacity"), [(0, 70), (L + 1, 80), (K, K + 63), (K, 2**40), (K, 2**62)])
def test_a_screen_has_room_for_its_candidates_and_for_no_more_than_there_can_be(k: int, capacity: int) -> None:
    with pytest.raises(IndexError, match="capacity in k"):
        _cpu.Screen(
            floats(4), floats(4), floats(L, dtype=torch.float64), D, k, capacity, False, _cpu.Among.row, 0.0, 0.0
        )


def test_bounds_of_other_latents_are_of_the_same_rows_and_enough() -> None:
    numbers = floats(4), floats(4), floats(L, dtype=torch.float64), D, K, K + 64
    rows = _cpu.Screen(*numbers, False, _cpu.Among.row, 0.0, 0.0)
    for bad in (floats(3, K), floats(4, K + 1), floats(4, K, dtype=torch.float64)):
        with pytest.raises(ValueError, match="best_ends"):
            rows.best_ends(bad, 1)
    results = torch.zeros(4, K, dtype=torch.int32, device="cpu"), floats(4, K), torch.zeros(4, dtype=torch.bool)
    operands = floats(4, D), floats(L, D)
    for k_all in (K - 1, 2 * K + 1):
        with pytest.raises(IndexError, match="k_all must lie in k"):
            rows.settle_among(*results, floats(4, 2 * K), k_all, *operands, 1)
    for ends, x in ((floats(3, 2 * K), operands[0]), (floats(4, 2 * K), floats(4, D + 1))):
        with pytest.raises(ValueError, match="settle_among"):
            rows.settle_among(*results, ends, 2 * K, x, operands[1], 1)
    above = _cpu.Screen(*numbers, False, _cpu.Among.above, -1.0, 0.0)
    with pytest.raises(ValueError, match="the k must be each row's"):
        above.best_ends(floats(4, K), 1)
    with pytest.raises(ValueError, match="the k must be each row's"):
        above.settle_among(*results, floats(4, 2 * K), 2 * K, *operands, 1)


def test_a_ragged_support_is_written_where_there_is_room_for_it() -> None:
    numbers = floats(4), floats(4), floats(L, dtype=torch.float64), D, K, K + 64
    room = torch.zeros(4, L, dtype=torch.int32, device="cpu")
    rows = _cpu.Screen(*numbers, False, _cpu.Among.row, 0.0, 0.0)
    with pytest.raises(ValueError, match="no ragged support"):
        rows.settle_ragged(floats(4, D), floats(L, D), 1)
    above = _cpu.Screen(*numbers, False, _cpu.Among.above, -1.0, 0.0)
    above.filter(floats(4, L).fill_(9.0), 0, floats(L).fill_(0.0), floats(L).fill_(0.0), 1)
    for x, W in ((floats(3, D), floats(L, D)), (floats(4, D), floats(L, D + 1)), (floats(4, D), floats(L - 1, D))):
        with pytest.raises(ValueError, match="settle_ragged"):
            above.settle_ragged(x, W, 1)
    width = above.settle_ragged(floats(4, D), floats(L, D), 1)
    for bad in (room[:, : width - 1], room[:3], room.long(), room[:, ::2]):
        with pytest.raises((ValueError, IndexError), match="write"):
            above.write(bad)
        with pytest.raises((ValueError, IndexError), match="write_scores"):
            above.write_scores(bad.float() if bad.dtype == torch.int32 else bad)
    above.write(room)
    above.write_scores(room.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        x = {name: torch.randn(256, width, dtype=torch.float32) for name, width in (("a", 24), ("b", 16))}
        model = sf.SPARC({"a": 24, "b": 16}, 640, 4, dtype=torch.float32)
        model.calibrate(x)
        codes, optimizer = model.encode(x), sf.SparcAdam(model)
        losses = [optimizer.step(x).total for _ in range(3)]
        return [codes.values, codes.indices, *losses, *model.state_dict().values()]

    expected = run()
    torch.set_default_dtype(dtype)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


CONSTRUCTORS = {"empty", "zeros", "ones", "full", "rand", "randn", "linspace", "eye", "randint", "randperm", "arange"}
DTYPES = CONSTRUCTORS - {"arange", "randint", "randperm"}  # integers, unless they are given others


def test_every_allocation_names_its_device_and_its_dtype() -> None:
    """But for the research code's parameters, which follow torch's defaults as they do there."""
    missing = []
    for path in [*(ROOT / "sparc_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name, module = node.func.attr, node.func.value
            if isinstance(module, ast.Name) and module.id == "torch" and name in CONSTRUCTORS:
                given = {keyword.arg for keyword in node.keywords}
                wanted = {"device"} | ({"dtype"} if name in DTYPES else set())
                if None not in given and not wanted <= given and path.name != "research_code.py":
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno} torch.{name}")
    assert not missing, "\n".join(missing)
