"""What holds for every operator: as accurate as plain PyTorch, and exact where exactness is promised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from accuracy import assert_equal, check_accuracy
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import (
    CASES,
    DTYPES,
    OPERATORS,
    SUPPORTS,
    Operands,
    fast_backends,
    fitting,
    operands,
    operators_of,
    run,
    sliced,
)
from torch import Tensor

from sparc_fast.ops import reference

# results that belong to one sample alone
OF_SAMPLES = {
    "support_values": slice(0, 1),
    "support_values_grad_x": slice(0, 1),
    "sparse_decode": slice(0, 1),
    "sparse_decode_grad_values": slice(0, 1),
    "decode_loss": slice(1, 3),
    "nested_decode_loss": slice(1, 3),
}


def of_samples(name: str, o: Operands, backend: str) -> tuple[Tensor, ...]:
    """Samples first; those of nested dictionaries come after a dictionary."""
    found = run(name, o, backend)[OF_SAMPLES[name]]
    return tuple(result.transpose(0, 1) if result.ndim == 4 else result for result in found)


EVERY_OPERATOR = pytest.mark.parametrize("name", list(OPERATORS))
# what is given gradients, or nothing but rows, reads no support
OF_EITHER_SUPPORT = [
    (name, per_stream)
    for name in OPERATORS
    for per_stream in (False, True)
    if not (per_stream and name.startswith(("step_rows", "replay_rows")))
]
EVERY_OPERATOR_AND_SUPPORT = pytest.mark.parametrize(("name", "per_stream"), OF_EITHER_SUPPORT)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.covering(3)
@EVERY_OPERATOR_AND_SUPPORT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", list(CASES))
def test_operators_are_as_accurate_as_plain_pytorch(
    name: str, case: str, dtype: torch.dtype, per_stream: bool, backend: str
) -> None:
    check_accuracy(name, fitting(operands(case, dtype, per_stream), backend), operators_of(backend))


@EVERY_OPERATOR
@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    N=st.integers(0, 40),
    L=st.integers(1, 12),
    data=st.data(),
    per_stream=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_operators_equal_the_reference_at_any_shape(
    name: str, widths: list[int], N: int, L: int, data: st.DataObject, per_stream: bool, dtype: torch.dtype, seed: int
) -> None:
    k = data.draw(st.integers(1, L), label="k")
    # a sum of few terms may cancel, so that its accuracy is luck: this is about shapes
    tolerance = {torch.float64: 1e-9, torch.float32: 0.05 if "bfloat16" in name else 1e-4}.get(dtype, 0.05)
    o = operands((tuple(widths), N, L, k), dtype, per_stream, seed)
    truth = run(name, o.to(torch.float64), "reference")
    for backend in fast_backends():
        for got, exact in zip(run(name, o, backend), truth, strict=True):
            scale = float(exact.abs().max()) + 1 if exact.numel() else 1
            torch.testing.assert_close(got.to(exact.dtype), exact, rtol=0, atol=tolerance * scale)


@EVERY_OPERATOR_AND_SUPPORT
@pytest.mark.parametrize("case", ["several column runs", "every latent in use again and again"])
@pytest.mark.skipif("cpu" not in fast_backends(), reason="the CPU backend is not here")
def test_results_do_not_depend_on_the_number_of_threads(name: str, case: str, per_stream: bool, threads: None) -> None:
    o = operands(case, torch.float32, per_stream)
    torch.set_num_threads(1)
    alone = run(name, o, "cpu")
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_equal(run(name, o, "cpu"), alone)


@pytest.mark.covering(3)
@pytest.mark.parametrize("name", list(OF_SAMPLES))
@SUPPORTS
@pytest.mark.parametrize("case", list(CASES))
def test_a_sample_alone_equals_the_same_sample_in_a_batch(name: str, case: str, per_stream: bool, backend: str) -> None:
    o = fitting(operands(case, torch.float32, per_stream), backend)
    batch = of_samples(name, o, backend)
    for n in range(min(len(o.x), 20)):
        one = slice(n, n + 1)
        assert_equal(of_samples(name, o.samples(one), backend), tuple(result[one] for result in batch))


@pytest.mark.parametrize("name", ["sparse_decode", "decode_loss", "nested_decode_loss"])
@pytest.mark.parametrize("widths", [(1024, 900, 876), (1001, 899, 901)], ids=["aligned rows", "unaligned rows"])
@pytest.mark.skipif("cpu" not in fast_backends(), reason="the CPU backend is not here")
def test_results_too_large_for_caches_have_the_same_bits(name: str, widths: tuple[int, ...]) -> None:
    o = operands((widths, 130, 40, 9), torch.float32)
    batch = of_samples(name, o, "cpu")
    assert batch[0].nbytes > 2**22  # from there on written past the caches
    for half in (slice(0, 65), slice(65, 130)):
        assert_equal(of_samples(name, o.samples(half), "cpu"), tuple(result[half] for result in batch))


@pytest.mark.covering(2)
@EVERY_OPERATOR
@pytest.mark.parametrize("case", ["ragged", "several column runs"])
def test_operands_may_be_slices_of_wider_tensors(name: str, case: str, backend: str) -> None:
    o = fitting(operands(case, torch.float32), backend)
    assert_equal(run(name, o.map(sliced), backend), run(name, o, backend))


@EVERY_OPERATOR_AND_SUPPORT
def test_supports_may_be_int64(name: str, per_stream: bool, backend: str) -> None:
    o = fitting(operands("ragged", torch.float32, per_stream), backend)
    assert_equal(run(name, replace(o, indices=o.indices.long()), backend), run(name, o, backend))


@SUPPORTS
def test_float32_values_give_float32_reconstructions_by_narrow_rows(per_stream: bool, backend: str) -> None:
    o = fitting(operands("several column runs", torch.bfloat16, per_stream), backend)
    arguments = o.values.float(), o.indices, o.W_dec, o.pre_bias.float()
    found = operators_of(backend).sparse_decode(*arguments)
    truth = reference.sparse_decode(*(a.double() if a.is_floating_point() else a for a in arguments))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-5)


@EVERY_OPERATOR_AND_SUPPORT
@pytest.mark.parametrize("mirrored", [False, True])
def test_no_samples_give_empty_results_whatever_their_strides(
    name: str, per_stream: bool, mirrored: bool, backend: str
) -> None:
    o = operands("ragged", torch.float32, per_stream).samples(slice(0, 0))
    if mirrored:
        tensors = {f.name: getattr(o, f.name) for f in fields(o)}
        of_samples = {n: t for n, t in tensors.items() if isinstance(t, Tensor) and not t.numel()}
        o = replace(o, **{n: t.new_empty(t.shape[::-1]).permute(*range(t.ndim)[::-1]) for n, t in of_samples.items()})
    check_accuracy(name, o, operators_of(backend))


@pytest.mark.parametrize(
    "name", sorted(name for name in OPERATORS if not name.startswith(("invert", "count", "replay")))
)
def test_a_latent_may_be_in_a_support_twice(name: str, backend: str) -> None:
    o = fitting(operands("ragged", torch.float32), backend)
    o.indices[:, 1] = o.indices[:, 0]
    check_accuracy(name, o, operators_of(backend))


@pytest.mark.parametrize(
    "name",
    ["support_values", "support_values_grad_x", "sparse_decode", "decode_loss", "nested_decode_loss", "invert_indices"],
)
@pytest.mark.parametrize("latent", [-2, 33])
def test_compiled_operators_never_read_outside_the_dictionary(name: str, latent: int) -> None:
    o = operands("ragged", torch.float32)
    o.indices[2, 1] = latent
    for backend in fast_backends():
        if backend == "cpu":  # on a GPU nobody waits to hear of it: tests of the kernels see that nothing is read
            with pytest.raises(IndexError, match=r"indices must lie in -1 ... n_latents - 1 = 32"):
                run(name, o, backend)
