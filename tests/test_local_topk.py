from __future__ import annotations

import pytest
import torch
from test_global_topk import fitting

from sparc_fast.ops import functional
from sparc_fast.ops.layout import stream_slices


@pytest.mark.parametrize("widths", [[7], [100, 1], [3, 1, 7, 5]], ids=str)
@pytest.mark.parametrize("N", [0, 1, 130])
def test_each_stream_has_the_support_it_would_have_alone(widths: list[int], N: int, backend: str) -> None:
    N = fitting(N, backend)
    torch.manual_seed(N)
    D, L, k = sum(widths), 300, 9
    x, W_enc, pre_bias = torch.randn(N, D), torch.randn(L, D), torch.randn(D)
    latent_bias = torch.randn(len(widths), L)
    supports = functional.local_topk(x, W_enc, pre_bias, latent_bias, k, d_streams=widths, backend=backend)
    assert supports.shape == (N, len(widths), k)
    assert supports.dtype == torch.int32
    for s, cols in enumerate(stream_slices(widths)):
        alone = functional.global_topk(
            x[:, cols].clone(), W_enc[:, cols].clone(), pre_bias[cols], latent_bias[s : s + 1], k, backend="reference"
        )
        assert torch.equal(supports[:, s], alone)


def test_equal_pre_activations_go_to_the_lower_latent_in_every_stream(backend: str) -> None:
    torch.manual_seed(0)
    N = fitting(40, backend)
    x, W_enc = torch.randint(-1, 2, (N, 9)).float(), torch.randint(-1, 2, (200, 9)).float()
    operands = x, W_enc, torch.zeros(9), torch.zeros(2, 200), 13
    expected = functional.local_topk(*operands, d_streams=[4, 5], backend="reference")
    assert torch.equal(functional.local_topk(*operands, d_streams=[4, 5], backend=backend), expected)
