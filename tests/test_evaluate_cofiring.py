from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from test_evaluate_codes import Case, cases, dense_of

from sparc_fast.evaluate import cofiring_iou, energy_share, firing_entropy


def by_definition(case: Case) -> tuple[list[float], list[float]]:
    streams, _, L = case
    fires = [(dense_of(code, L) > 0).tolist() for code in streams.values()]
    N, S = len(fires[0]), len(fires)
    entropy, iou = [], []
    for l in range(L):
        n = [sum(of_stream[i][l] for i in range(N)) for of_stream in fires]
        some = sum(any(f[i][l] for f in fires) for i in range(N))
        iou.append(sum(all(f[i][l] for f in fires) for i in range(N)) / some if some else 0.0)
        if S == 1 or sum(n) == 0:
            entropy.append(math.nan)
        else:
            entropy.append(-sum(c / sum(n) * math.log(c / sum(n)) for c in n if c) / math.log(S))
    return entropy, iou


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_entropy_and_iou_equal_their_definitions(case: Case) -> None:
    entropy, iou = by_definition(case)
    streams, _, L = case
    assert firing_entropy(streams, L).tolist() == pytest.approx(entropy, abs=1e-12, nan_ok=True)
    assert cofiring_iou(streams, L).tolist() == pytest.approx(iou, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_energy_shares_equal_their_definition(case: Case) -> None:
    streams, _, L = case
    energy = torch.stack([dense_of(code, L).double().square().sum(0) for code in streams.values()])
    torch.testing.assert_close(energy_share(streams, L, relative=False), energy / energy.sum(0), equal_nan=True)
    total = energy.sum(1, keepdim=True)
    relative = energy / torch.where(total > 0, total, 1)
    torch.testing.assert_close(energy_share(streams, L), relative / relative.sum(0), equal_nan=True)
