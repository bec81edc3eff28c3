"""``pytest benchmarks/``: every operator and the whole step at a small shape, results checked first.

For the named shapes, interleaved with their rivals, run ``python -m benchmarks``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from sparc_fast import available_backends

from .cases import SMALL, Case
from .main import CASES


@cache
def small_case(op: str) -> Case:
    shape = next(shape for shape in CASES[op].shapes if shape.name == SMALL.name)
    return CASES[op].case(shape, available_backends("cpu"))


@pytest.mark.parametrize(
    ("op", "contender"),
    [(op, name) for op, case in CASES.items() for name in (*available_backends("cpu"), *case.rivals)],
)
def test_operator(benchmark: Any, op: str, contender: str) -> None:
    case = small_case(op)
    assert contender not in case.wrong, case.wrong[contender]
    if contender not in case.contenders:
        pytest.skip(f"{contender} has no {op}")
    benchmark.group = op
    benchmark(case.contenders[contender])
