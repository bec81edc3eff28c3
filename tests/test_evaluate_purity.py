from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate_codes import Case, cases, code_of, dense_of

from sparc_fast.evaluate import class_purity


@settings(max_examples=150, deadline=None)
@given(case=cases(), weighted=st.booleans())
def test_purity_equals_its_definition(case: Case, weighted: bool) -> None:
    streams, labels, L = case
    found = class_purity(streams, labels, L, weighted=weighted)
    N, C = labels.shape
    labelled = [n for n in range(N) if labels[n].any()]
    for s, code in enumerate(streams.values()):
        z = dense_of(code, L).double()
        weight = (z if weighted else (z > 0).double()).tolist()
        for l in range(L):
            total = sum(weight[n][l] for n in labelled)
            of = [sum(weight[n][l] for n in labelled if labels[n, y]) for y in range(C)]
            if total == 0:
                assert found.purity[s, l].isnan()
                assert (int(found.concept[s, l]), bool(found.base[s, l].isnan())) == (-1, True)
                continue
            y = of.index(max(of))
            assert int(found.concept[s, l]) == y
            assert float(found.purity[s, l]) == pytest.approx(of[y] / total)
            assert float(found.base[s, l]) == pytest.approx(int(labels[:, y].sum()) / len(labelled))


def test_one_concept_in_all_streams_is_consistent() -> None:
    labels = torch.eye(3, dtype=torch.bool)
    mine, swapped = labels.float(), labels.float()[:, [1, 0, 2]]
    streams = {"a": code_of(mine.tolist()), "b": code_of(swapped.tolist())}
    assert class_purity(streams, labels, 3).consistent.tolist() == [False, False, True]
    silent = {"a": code_of([[0.0]] * 3), "b": code_of([[0.0]] * 3)}
    assert class_purity(silent, labels, 1).consistent.tolist() == [False]
