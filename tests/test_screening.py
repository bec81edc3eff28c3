"""The compiled selection: screening never changes a support, no rows break its bounds, no candidate is dropped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hard_rows import VECTORS, encoder, expected, vectors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import largest, seeded
from torch import Tensor

from sparc_fast.ops import reference

_cpu = pytest.importorskip("sparc_fast._cpu")
from sparc_fast.ops import cpu_topk  # noqa: E402

SCREENINGS = ["bf16", "off"]


@pytest.fixture(params=range(_cpu.simd_level() + 1), ids=["baseline", "avx2", "avx512"][: _cpu.simd_level() + 1])
def simd_level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Every instruction set this machine has."""
    best = _cpu.simd_level()
    yield _cpu.set_simd_level(request.param)
    _cpu.set_simd_level(best)


def support(x: Tensor, W_enc: Tensor, k: int, screening: str, bias: Tensor | None = None) -> Tensor:
    return cpu_topk.global_topk(*encoder(x, W_enc, bias), k, screening)


@settings(max_examples=150, deadline=None)
@given(
    x_kind=st.sampled_from(VECTORS),
    W_kind=st.sampled_from(VECTORS),
    D=st.integers(1, 70),
    L=st.integers(1, 400),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    screening=st.sampled_from(SCREENINGS),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_no_rows_break_the_bound(
    x_kind: str, W_kind: str, D: int, L: int, dtype: torch.dtype, screening: str, scale: float, data: st.DataObject,
    seed: int,
) -> None:  # fmt: skip
    k = data.draw(st.integers(1, min(L, 40)), label="k")
    generator = seeded(seed)
    x, W_enc = vectors(x_kind, 5, D, generator).to(dtype), vectors(W_kind, L, D, generator).to(dtype)
    bias = (scale * torch.randn(2, L, generator=generator)).to(dtype)
    in_full = cpu_topk._exact(x.float(), W_enc, bias.double().sum(0), k)
    assert torch.equal(support(x, W_enc, k, screening, bias), in_full)


@pytest.mark.parametrize("sign", [1, -1], ids=["underrates", "overrates"])
def test_a_latent_that_bfloat16_misjudges_as_far_as_the_bound_allows_is_placed(sign: int) -> None:
    # each x and w loses almost 2^-8 of itself and the product, 257, becomes 256: in all, 256 stands for 259.
    # Only a bound that is right in each of its three terms puts latent 7 on its side of the others.
    nearly_halfway = 1 + 2.0**-8 - 2.0**-20
    signs = torch.randint(0, 2, (257,)) * 2 - 1
    x, W_enc, bias = nearly_halfway * signs[None], torch.zeros(300, 257), torch.full((1, 300), sign * 258.98)
    W_enc[7], bias[0, 7] = sign * nearly_halfway * signs, 0
    for k in (1, 299):
        assert torch.equal(support(x, W_enc, k, "bf16", bias), expected(x, W_enc, k, bias))


@pytest.mark.parametrize("screening", SCREENINGS)
def test_sums_that_cancel_far_below_the_rounding_error_of_the_product_are_ranked(screening: str) -> None:
    torch.manual_seed(0)
    D, L = 600, 400
    large = 1e4 * torch.randn(L, D // 2)
    W_enc = torch.cat([large, 2.0**-10 * torch.randint(-8, 9, (L, D // 2)) - large], dim=1)[:, torch.randperm(D)]
    x = torch.ones(3, D)
    assert torch.equal(support(x, W_enc, 20, screening), expected(x, W_enc, 20))


@pytest.mark.parametrize("screening", SCREENINGS)
def test_a_tie_broken_by_one_unit_of_float32_at_the_last_place_is_seen(screening: str) -> None:
    torch.manual_seed(0)
    D, L, k = 64, 3000, 10
    x = torch.ones(1, D)
    W_enc = torch.zeros(L, D)
    # integers in 64 columns: 9 latents far above, and 40 within a unit of float32 of the k-th place
    W_enc[torch.randperm(L)[:9], 0] = 2.0**12
    near = torch.arange(100, 140)
    W_enc[near, 0], W_enc[near, 1] = 2.0**10, 2.0**-13 * torch.randint(0, 3, (40,))
    W_enc[torch.randperm(L)[:5], 2] += 2.0**-40
    assert torch.equal(support(x, W_enc, k, screening), expected(x, W_enc, k))


@pytest.mark.parametrize("screening", SCREENINGS)
def test_every_instruction_set_gives_the_same_support(screening: str, simd_level: int) -> None:
    torch.manual_seed(0)
    x, W_enc = torch.randn(20, 77), torch.randn(3001, 77)
    W_enc[1000:] = W_enc[torch.randint(0, 1000, (2001,))]
    assert torch.equal(support(x, W_enc, 33, screening), expected(x, W_enc, 33))
    scores = torch.randint(-40, 40, (5, 4099)).float()
    scores[0, ::7], scores[1, ::5], scores[2] = torch.nan, -torch.inf, 0
    for k in (1, 50, 4099):
        assert torch.equal(cpu_topk.topk_rows(scores, k), reference.topk_rows(scores, k))
        assert torch.equal(cpu_topk.topk_rows(scores.double(), k), reference.topk_rows(scores.double(), k))


@pytest.mark.parametrize("screening", SCREENINGS)
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "plateau"])
def test_candidates_that_do_not_fit_are_never_dropped(
    order: str, screening: str, simd_level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_topk, "ROOM", 1)
    monkeypatch.setattr(cpu_topk, "SPARE", 0)
    monkeypatch.setattr(cpu_topk, "LATENTS", 200)
    monkeypatch.setattr(cpu_topk, "ROWS", 7)
    torch.manual_seed(0)
    x, W_enc = torch.rand(20, 30), torch.rand(1500, 30)
    if order != "random":
        W_enc = W_enc[W_enc.sum(1).argsort(descending=order == "descending")]
    if order == "plateau":
        W_enc[200:1200] = W_enc[1200]
    assert torch.equal(support(x, W_enc, 40, screening), expected(x, W_enc, 40))


@pytest.mark.parametrize("screening", SCREENINGS)
def test_only_rows_without_a_proof_are_scored_in_full(screening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, W_enc = torch.randn(150, 40), torch.randn(3000, 40)
    x[17] = 0
    in_full = []
    exact = cpu_topk._exact
    monkeypatch.setattr(cpu_topk, "_exact", lambda x, *rest: in_full.append(len(x)) or exact(x, *rest))
    assert torch.equal(support(x, W_enc, 32, screening), expected(x, W_enc, 32))
    assert in_full == [1]


@settings(max_examples=100, deadline=None)
@given(
    L=st.integers(1, 3000),
    distinct=st.integers(1, 5000),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_topk_rows_selects_largest(L: int, distinct: int, dtype: torch.dtype, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, L), label="k")
    generator = seeded(seed)
    scores = torch.randint(0, distinct, (3, L), generator=generator).to(dtype)
    scores[torch.rand(3, L, generator=generator) < 0.01] = torch.nan
    scores[torch.rand(3, L, generator=generator) < 0.05] = -torch.inf
    assert torch.equal(cpu_topk.topk_rows(scores, k), largest(scores, k))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    L=st.integers(10_000, 60_000),
    k=st.integers(1, 40),
    distinct=st.sampled_from([1, 30, 2**24]),
    raised=st.integers(0, 60),
    stride=st.sampled_from([1, 4, 16, 64, 100]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_topk_rows_finds_the_largest_of_long_rows_wherever_they_lie(
    L: int, k: int, distinct: int, raised: int, stride: int, dtype: torch.dtype, seed: int, simd_level: int
) -> None:
    generator = seeded(seed)
    scores = torch.randint(0, distinct, (2, L), generator=generator).to(dtype)
    first = int(torch.randint(0, L - stride * raised, (), generator=generator))
    scores[0, first : first + stride * raised : stride] += (
        torch.randint(0, 9, (raised,), generator=generator) * distinct
    )
    scores[1, torch.randint(0, L, (raised,), generator=generator)] = torch.nan
    assert torch.equal(cpu_topk.topk_rows(scores, k), largest(scores, k))
