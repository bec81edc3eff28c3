"""``pytest benchmarks/``: every operator at a small shape, each result checked first; its own history and comparison.

For the named shapes, interleaved with their rivals, run ``python -m benchmarks``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from sparc_fast import available_backends
from sparc_fast.ops import backends, reference

from .cases import CALLS, SMALL, Operands
from .operators import OPERATORS, disagreement


@cache
def small_operands() -> Operands:
    return Operands(SMALL, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "contender"),
    [(name, who) for name, operator in OPERATORS.items() for who in (*available_backends("cpu"), *operator.cpu)],
)
def test_operator(benchmark: Any, name: str, contender: str) -> None:
    o, operator = small_operands(), OPERATORS[name]
    is_ours = contender in available_backends("cpu")
    prepare = (lambda o: CALLS[name](backends.resolve(contender, o.device), o)) if is_ours else operator.cpu[contender]
    results = [operator.comparable(o, run()) for run in (prepare(o), CALLS[name](reference, o))]
    assert disagreement(*results) is None
    benchmark.group = name
    benchmark(prepare(o))
