from __future__ import annotations

from dataclasses import replace

import torch
from operands import SUPPORTS, fitting, operands, run


def test_pairs_of_weight_0_are_not_computed(backend: str) -> None:
    o = operands("ragged", torch.float32)
    self_only = (1.0, 0, 0, 0, 1, 0, 0, 0, 1)
    nmse, grad_recons, grad_values, _ = run("decode_loss", replace(o, weights=self_only), backend)
    assert torch.equal(nmse != 0, torch.eye(3, dtype=torch.bool))
    for s, columns in enumerate([slice(0, 7), slice(7, 8), slice(8, 108)]):
        assert (grad_recons[:, s, columns] != 0).all()
        grad_recons[:, s, columns] = 0
    assert not grad_recons.any()
    # nothing of the absent pairs is read: not the target's columns, where no source has them
    o.x[:, :8] = torch.nan
    last_only = (0.0,) * 8 + (1.0,)
    nmse, grad_recons, last, _ = run("decode_loss", replace(o, weights=last_only), backend)
    assert nmse.isfinite().all()
    assert grad_recons.isfinite().all()
    torch.testing.assert_close(last[:, 2], grad_values[:, 2])


@SUPPORTS
def test_it_equals_decoding_and_comparing(per_stream: bool, backend: str) -> None:
    o = fitting(operands("several column runs", torch.float64, per_stream), backend)
    nmse, grad_recons, grad_values, grad_pre_bias = run("decode_loss", o, backend)
    torch.testing.assert_close(grad_pre_bias, grad_recons.sum((0, 1)))
    error = run("sparse_decode", o, backend)[0] - o.x[:, None]
    parts = error.split(o.d_streams, dim=2)
    expected = torch.stack([(o.scale[:, t, None] * part.square().sum(2)).sum(0) for t, part in enumerate(parts)], dim=1)
    torch.testing.assert_close(nmse, expected * (torch.tensor(o.weights).view(2, 2) != 0))
    torch.testing.assert_close(
        grad_values, run("sparse_decode_grad_values", replace(o, grad_recons=grad_recons), backend)[0]
    )
