from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from test_evaluate_codes import Case, cases, code_of, dense_of
from torch import Tensor

from sparc_fast.evaluate import StreamCode, bridge_pairs, bridge_score, codes


def matrix(a: StreamCode, b: StreamCode, of_a: Tensor, of_b: Tensor) -> Tensor:
    """B as it is defined, [L, L]."""
    L = len(of_a)
    z_a, z_b = dense_of(a, L).double(), dense_of(b, L).double()
    return (z_a.T @ z_b) / max(len(z_a), 1) * (of_a.double() @ of_b.double().T)


def operands(case: Case, seed: int) -> tuple[StreamCode, StreamCode, Tensor, Tensor]:
    streams, _, L = case
    several = list(streams.values())
    of_a, of_b = (
        torch.nn.functional.normalize(torch.randn(L, 3, generator=seeded(seed + i)).double(), dim=1) for i in (0, 1)
    )
    return several[0], several[-1], of_a, of_b


@settings(max_examples=100, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**31), chunk=st.sampled_from([1, 400, 2**26]))
def test_sums_and_strongest_pairs_equal_those_of_the_whole_matrix(case: Case, seed: int, chunk: int) -> None:
    given_ = operands(case, seed)
    B = matrix(*given_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "CHUNK_BYTES", chunk)
        found, pairs = bridge_score(*given_), bridge_pairs(*given_, top=4)
    torch.testing.assert_close(found.own, B.diagonal())
    torch.testing.assert_close(found.of_a, B.sum(1))
    torch.testing.assert_close(found.of_b, B.sum(0))
    assert found.total == pytest.approx(float(B.sum()), abs=1e-12)
    assert found.shared == pytest.approx(float(B.trace() / B.sum()), rel=1e-6, nan_ok=True)
    together = (B != 0).nonzero().tolist()
    expected = sorted((float(B[l, m]) for l, m in together), reverse=True)[:4]
    assert [pair.score for pair in pairs] == pytest.approx(expected, abs=1e-12)
    assert all(pair.score == pytest.approx(float(B[pair.a, pair.b]), abs=1e-12) for pair in pairs)


def test_one_dictionary_with_equal_codes_bridges_by_the_latents_themselves() -> None:
    code = code_of(torch.eye(3).repeat(4, 1).tolist())
    found = bridge_score(code, code, torch.eye(3), torch.eye(3))
    assert found.shared == 1
    assert found.own.tolist() == found.of_a.tolist() == found.of_b.tolist() == [1 / 3] * 3
    assert [pair[:2] for pair in bridge_pairs(code, code, torch.eye(3), torch.eye(3), top=2)] == [(0, 0), (1, 1)]


def test_dictionaries_of_different_spaces_are_refused() -> None:
    code = code_of([[1.0]])
    message = r"dictionary_a and dictionary_b must be of one shape \[L, D\], got \(1, 2\) and \(1, 3\)"
    with pytest.raises(ValueError, match=message):
        bridge_score(code, code, torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        bridge_pairs(code, code, torch.ones(1, 2), torch.ones(1, 2), top=0)
