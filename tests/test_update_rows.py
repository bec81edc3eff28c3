from __future__ import annotations

import pytest
import torch
from operands import operands, run, update_rows

from sparc_fast import backends, reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("extra", [False, True])
def test_it_equals_gradients_then_projection_then_adam_then_unit_norm(extra: bool, backend: str) -> None:
    o = operands("ragged", torch.float64)
    got = update_rows(o, backends.resolve(backend, CPU), extra)
    for result, expected in zip(got, update_rows(o, backends.resolve("reference", CPU), extra), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_decoder_rows_have_unit_norm_in_every_stream(backend: str) -> None:
    o = operands("several column runs", torch.float32)
    W_dec = run("update_rows", o, backend)[1]
    for part in W_dec.split(o.d_streams, dim=1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(len(part)))


def test_a_zero_decoder_row_without_gradient_stays_zero(backend: str) -> None:
    o = operands("ragged", torch.float32)
    W_enc, W_dec = o.W_enc.clone(), o.W_dec.clone()
    unused = int(torch.isin(torch.arange(33), o.indices).logical_not().nonzero()[0])
    W_dec[unused] = 0
    moments = [torch.zeros_like(W_enc) for _ in range(4)]
    backends.resolve(backend, CPU).update_rows(
        W_enc, W_dec, moments, o.x, o.pre_bias, o.values, o.grad_values, o.grad_recons, *o.inverse, o.d_streams,
        0.01, (0.9, 0.999), 1e-8, 1,
    )  # fmt: skip
    assert not W_dec[unused].any()
    assert W_dec.isfinite().all()


def test_columns_of_a_wider_matrix_are_updated_in_place_and_nothing_beside_them(backend: str) -> None:
    o = operands("ragged", torch.float32)
    expected = run("update_rows", o, backend)
    wider = [torch.full((33, 120), 7.0) for _ in range(6)]
    inner = [tensor[:, 5:113] for tensor in wider]
    start = [o.W_enc, o.W_dec.clone()]
    reference.normalize_rows(start[1], o.d_streams)
    generator = torch.Generator().manual_seed(1)
    start += [torch.rand(33, 108, generator=generator) for _ in range(4)]
    for window, tensor in zip(inner, start, strict=True):
        window.copy_(tensor)
    latents = torch.arange(0, 33, 3)
    rows = latents, o.W_enc[latents].flip(1), o.W_dec[latents].flip(1), o.latent_bias[:, latents]
    backends.resolve(backend, CPU).update_rows(
        *inner[:2], inner[2:], o.x, o.pre_bias, o.values, o.grad_values, o.grad_recons, *o.inverse, o.d_streams,
        0.01, (0.9, 0.999), 1e-8, 3, rows,
    )  # fmt: skip
    for window, outer, result in zip(inner, wider, expected, strict=False):
        assert torch.equal(window, result)
        assert (outer[:, :5] == 7).all()
        assert (outer[:, 113:] == 7).all()


def test_autograd_notices_that_weights_changed(backend: str) -> None:
    o = operands("ragged", torch.float32)
    W_enc, W_dec = o.W_enc.clone(), o.W_dec.clone()
    versions = W_enc._version, W_dec._version
    backends.resolve(backend, CPU).update_rows(
        W_enc, W_dec, [torch.zeros_like(W_enc) for _ in range(4)], o.x, o.pre_bias, o.values, o.grad_values,
        o.grad_recons, *o.inverse, o.d_streams, 0.01, (0.9, 0.999), 1e-8, 1,
    )  # fmt: skip
    assert W_enc._version > versions[0]
    assert W_dec._version > versions[1]
