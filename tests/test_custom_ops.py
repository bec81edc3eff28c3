"""Every compiled operator is a sound PyTorch custom operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparc_fast.ops import backends, reference
from sparc_fast.ops.layout import wide

# of backends that compile their operators, those that run on the tensors of these tests
LIBRARIES = [name for name in backends.available(torch.get_default_device()) if name != "reference"]
EVERY_LIBRARY = pytest.mark.parametrize("library", LIBRARIES)

D_STREAMS = [5, 3]


def arguments(dtype: torch.dtype, local: bool, N: int = 3, L: int = 12, k: int = 4) -> dict[str, tuple[object, ...]]:
    torch.manual_seed(0)
    x, W_enc, W_dec = torch.randn(N, 8), torch.randn(L, 8), torch.randn(L, 8)
    x, W_enc, W_dec, pre_bias, latent_bias = (t.to(dtype) for t in (x, W_enc, W_dec, torch.randn(8), torch.randn(2, L)))
    shape = (N, 2, k) if local else (N, k)
    indices = torch.rand(*shape[:-1], L).topk(k).indices.sort().values.int()
    values, grad_values, grad_recons = (
        t.to(dtype) for t in (torch.rand(N, 2, k), torch.randn(N, 2, k), torch.randn(N, 2, 8))
    )
    scale = torch.rand(N, 2, dtype=wide(x).dtype)
    inverse = reference.invert_indices(indices, L)
    return {
        "global_topk": (x, W_enc, pre_bias, latent_bias, k),
        "topk_rows": (x, k),
        "support_scores": (x, W_enc, pre_bias, latent_bias, indices[:, 0] if local else indices),
        "support_values": (x, W_enc, pre_bias, latent_bias, indices, D_STREAMS),
        "support_values_grad_x": (grad_values, values, indices, W_enc, D_STREAMS),
        "sparse_decode": (values, indices, W_dec, pre_bias),
        "sparse_decode_grad_values": (grad_recons, indices, W_dec),
        "decode_loss": (values, indices, W_dec, pre_bias, x, scale, [0.5, 0.0, 1.0, 0.5], D_STREAMS),
        "nested_decode_loss": (values, indices, W_dec, pre_bias, x, scale, [0.5, 0.0, 1.0, 0.5], D_STREAMS, [4, L]),
        "invert_indices": (indices, L),
        "encoder_gradients": (x, pre_bias, values, grad_values, *inverse, D_STREAMS),
        "decoder_gradients": (values, grad_recons, *inverse),
        "weight_gradients": (x, pre_bias, values, grad_values, grad_recons, *inverse, D_STREAMS),
        "count_silence": (torch.zeros(L, dtype=torch.int64), values, indices),
    }  # fmt: skip


def operator_of(library: str, name: str) -> Any:
    backends.resolve(library, torch.get_default_device())
    return getattr(getattr(torch.ops, f"sparc_fast_{library}"), name)


@pytest.mark.covering(2)
@EVERY_LIBRARY
@pytest.mark.parametrize("local", [False, True], ids=["shared", "per-stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(arguments(torch.float32, False)))
def test_opcheck_finds_nothing(name: str, dtype: torch.dtype, local: bool, library: str) -> None:
    operator = operator_of(library, name)
    torch.library.opcheck(operator, arguments(dtype, local)[name], test_utils=("test_schema", "test_faketensor"))


@EVERY_LIBRARY
def test_counters_that_an_operator_changed_have_a_new_version(library: str) -> None:
    silence, *active = arguments(torch.float32, False)["count_silence"]
    assert isinstance(silence, torch.Tensor)
    before = silence._version
    operator_of(library, "count_silence")(silence, *active)
    assert silence._version > before


@EVERY_LIBRARY
@pytest.mark.parametrize(
    "name", ["support_values", "sparse_decode", "decode_loss", "nested_decode_loss", "global_topk"]
)
def test_opcheck_finds_nothing_without_samples(name: str, library: str) -> None:
    operator = operator_of(library, name)
    empty = arguments(torch.float32, False, N=0)[name]
    torch.library.opcheck(operator, empty, test_utils=("test_schema", "test_faketensor"))
