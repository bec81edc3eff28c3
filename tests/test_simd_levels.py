"""Every instruction set the CPU backend is compiled for computes the same operators."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from accuracy import compare
from operands import CASES, DTYPES, OPERATORS, operands, operators_of

import sparc_fast as sf

if "cpu" not in sf.available_backends("cpu"):
    pytest.skip("the CPU backend is not compiled", allow_module_level=True)

from sparc_fast import _cpu
from sparc_fast.evaluate import retrieval_ranks
from sparc_fast.ops import reference

BEST = _cpu.simd_level()


@pytest.fixture
def levels() -> Iterator[Iterator[str]]:
    """Makes each in turn what runs."""
    yield (name for i, name in enumerate(["baseline", "avx2", "avx512"][: BEST + 1]) if _cpu.set_simd_level(i) == i)
    _cpu.set_simd_level(BEST)


@pytest.mark.parametrize("name", list(OPERATORS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_are_as_accurate_as_plain_pytorch_on_every_instruction_set(
    name: str, dtype: torch.dtype, levels: Iterator[str]
) -> None:
    run = OPERATORS[name]
    cases = [operands(case, dtype) for case in CASES]
    expected = [(run(o, reference), run(o.to(torch.float64), reference)) for o in cases]
    for _ in levels:
        for o, (plain, truth) in zip(cases, expected, strict=True):
            compare(run(o, operators_of("cpu")), plain, truth)


def test_ranks_of_sparse_codes_are_those_of_plain_pytorch_on_every_instruction_set(
    levels: Iterator[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(8500, 40, generator=generator).argsort(1)[:, :6]
    latents[:, 0] = 40  # that all fire
    codes = [(torch.randint(0, 4, (8500, 6), generator=generator).float(), latents[torch.randperm(8500)]) for _ in "ab"]
    with monkeypatch.context() as plain:
        plain.setattr(sys.modules["sparc_fast.evaluate.retrieval"], "_cpu", None)
        expected = retrieval_ranks(*codes, 41, chunk=512)
    for level in levels:
        assert (retrieval_ranks(*codes, 41) == expected).float().mean() > 0.999, level  # a tie may end at a rounding


@pytest.mark.parametrize(("dtype", "widening"), [(torch.bfloat16, 1), (torch.float16, 2)], ids=str)
def test_every_number_of_two_bytes_is_widened_exactly_and_told_from_nan_and_infinity(
    dtype: torch.dtype, widening: int, levels: Iterator[str]
) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    expected = numbers.float()
    for level in levels:
        for width in (1, 37):
            rows = numbers.expand(-1, width).contiguous()
            got = torch.full((len(rows), width + 3), 7.0)
            _cpu.gather_rows(got[:, 2:-1], rows, torch.arange(len(rows)), widening, 1)
            assert torch.equal(got[:, 2:-1].isnan(), expected.isnan().expand_as(rows)), level
            same = got[:, 2:-1].view(torch.int32) == expected.view(torch.int32)  # zeros have signs
            assert (same | expected.isnan()).all(), level
            assert (got[:, [0, 1, -1]] == 7).all(), level
        finite = [_cpu.first_not_finite(number[None], dtype == torch.bfloat16) == -1 for number in numbers[::7]]
        assert finite == expected[::7, 0].isfinite().tolist(), level
