from __future__ import annotations

from dataclasses import replace

import torch
from operands import operands, run


def test_an_activation_is_never_negative_and_a_nan_stays(backend: str) -> None:
    o = operands("ragged", torch.float32)
    o.x[2, 3] = torch.nan
    (values,) = run("support_values", o, backend)
    assert values[2, 0].isnan().all()
    assert not values[2, 1:].isnan().any()
    others = torch.cat([values[:2], values[3:]])
    assert (others >= 0).all()
    assert (others > 0).any()


def test_streams_do_not_see_each_other(backend: str) -> None:
    o = operands("ragged", torch.float32)
    other = o.x.clone()
    other[:, 8:] = 0
    (values,), (changed,) = run("support_values", o, backend), run("support_values", replace(o, x=other), backend)
    assert torch.equal(values[:, :2], changed[:, :2])
    assert not torch.equal(values[:, 2], changed[:, 2])
