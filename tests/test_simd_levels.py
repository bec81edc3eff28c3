"""Every instruction set the CPU backend is compiled for computes the same operators."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accuracy import assert_as_accurate
from operands import CASES, DTYPES, OPERATORS, operands, run

import sparc_fast as sf

if "cpu" not in sf.available_backends("cpu"):
    pytest.skip("the CPU backend is not compiled", allow_module_level=True)

from sparc_fast import _cpu


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    number = ["baseline", "avx2", "avx512"].index(request.param)
    best = _cpu.simd_level()
    if _cpu.set_simd_level(number) != number:
        pytest.skip("not on this machine")
    yield request.param
    _cpu.set_simd_level(best)


@pytest.mark.parametrize("name", list(OPERATORS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_are_as_accurate_as_plain_pytorch_on_every_instruction_set(
    name: str, dtype: torch.dtype, level: str
) -> None:
    for case in CASES:
        o = operands(case, dtype)
        plain, truth = run(name, o, "reference"), run(name, o.to(torch.float64), "reference")
        for got, same_dtype, exact in zip(run(name, o, "cpu"), plain, truth, strict=True):
            if got.is_floating_point():
                assert_as_accurate(got, same_dtype, exact)
            else:
                assert torch.equal(got, exact)
