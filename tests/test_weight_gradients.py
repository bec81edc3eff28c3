from __future__ import annotations

import pytest
import torch
from accuracy import assert_equal, compare
from operands import SUPPORTS, Operands, operands, run


def hot(per_stream: bool) -> Operands:
    """Latents 0 to 2 are active in every sample; most others never."""
    o = operands(((70, 3), 1500, 200, 4), torch.float32, per_stream)
    o.indices[..., :3] = torch.arange(3, dtype=torch.int32)
    o.indices[..., 3] = torch.arange(1500, dtype=torch.int32).view(-1, *[1] * (o.indices.ndim - 2)) % 7 + 3
    return o


@SUPPORTS
@pytest.mark.parametrize("name", ["weight_gradients", "encoder_gradients", "decoder_gradients", "update_rows"])
def test_latents_active_in_every_sample_are_summed_alike_by_any_number_of_threads(
    name: str, per_stream: bool, backend: str
) -> None:
    o = hot(per_stream)
    got = run(name, o, backend)
    compare(got, run(name, o, "reference"), run(name, o.to(torch.float64), "reference"))
    if backend == "cpu":
        torch.set_num_threads(2)
        assert_equal(run(name, o, backend), got)
        torch.set_num_threads(1)


def test_both_halves_equal_the_whole(backend: str) -> None:
    o = hot(per_stream=False)
    W_enc, W_dec, latent_bias = run("weight_gradients", o, backend)
    for half, whole in zip(run("encoder_gradients", o, backend), (W_enc, latent_bias), strict=True):
        torch.testing.assert_close(half, whole, rtol=0, atol=0)
    torch.testing.assert_close(run("decoder_gradients", o, backend)[0], W_dec, rtol=0, atol=0)


def test_a_latent_no_sample_has_gets_no_gradient(backend: str) -> None:
    for gradient in run("weight_gradients", hot(per_stream=False), backend)[:2]:
        assert not gradient[10:].any()
