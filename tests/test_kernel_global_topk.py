"""The supports by Triton kernels: no rows break the bound, no candidate is dropped, whatever the shape.

Samples are multiplied as they are, or centred: no support depends on which.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hard_rows import SCORES, VECTORS, encoder, expected, inf, nan, vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import kernel_device, largest, seeded
from torch import Tensor

from sparc_fast.ops import reference

pytest.importorskip("triton")
from sparc_fast.kernels.screened_operands import prepare
from sparc_fast.kernels.topk_rows import topk_rows

# the package may give its functions the names of their modules
kernel = importlib.import_module("sparc_fast.kernels.global_topk")

# infinite and NaN intervals are part of the method; the interpreter computes them with numpy
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = kernel_device()
SCREENINGS = ["auto", "bf16", "off"]


def support(x: Tensor, W_enc: Tensor, k: int, screening: str = "auto", bias: Tensor | None = None) -> Tensor:
    return kernel.global_topk(*(o.to(DEVICE) for o in encoder(x, W_enc, bias)), k, screening).to(x.device)


@pytest.fixture
def given_up(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each call scored in full."""
    totals: list[int] = []
    in_full = kernel._in_full

    def counted(*args: object) -> None:
        totals.append(int(args[-2][0]))  # type: ignore[index]
        in_full(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel, "_in_full", counted)
    return totals


def in_full(x: Tensor, W_enc: Tensor, pre_bias: Tensor, bias: Tensor, k: int) -> Tensor:
    """Where all samples are given up. Not the reference: where sums cancel to the last bit of float64, that one
    depends on the matrix library."""
    every = torch.arange(len(x), dtype=torch.int32, device=x.device)
    found, given_up = every.new_empty(len(x), k), kernel._biases(1, x.device)[2].zero_()
    given_up[0] = len(x)
    kernel._in_full(x, W_enc, pre_bias, reference.summed_bias(bias), k, torch.float32, found, every, given_up, None)
    return found


@settings(max_examples=8, deadline=None)
@given(
    x_kind=st.sampled_from(VECTORS),
    W_kind=st.sampled_from(VECTORS),
    D=st.integers(1, 70),
    L=st.integers(1, 150),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
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
    x, W_enc = vectors(x_kind, 2, D, generator).to(dtype), vectors(W_kind, L, D, generator).to(dtype)
    bias = (scale * torch.randn(2, L, generator=generator)).to(dtype)
    operands = [o.to(DEVICE) for o in (x, W_enc, x.new_zeros(D), bias)]
    assert torch.equal(kernel.global_topk(*operands, k, screening), in_full(*operands, k))


@pytest.mark.parametrize("seed", range(3))
def test_a_product_as_wrong_as_the_bound_allows_changes_no_support(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    D = 64
    x, W_enc = torch.randn(2, D).bfloat16(), torch.randn(500, D).bfloat16()
    plain = kernel.multiply

    def worst(X: Tensor, W: Tensor, out: Tensor) -> None:
        plain(X, W, out)
        gamma = D * 2.0**-22 / (1 - D * 2.0**-22)
        size = X.float().norm(dim=1)[:, None] * W.float().norm(dim=1)
        # those in the support are underrated, all others overrated
        out += 0.999 * gamma * size * torch.where(torch.zeros_like(out).scatter(1, inside, 1) > 0, -1, 1)

    monkeypatch.setattr(kernel, "multiply", worst)
    inside = expected(x, W_enc, 25).long().to(DEVICE)
    assert torch.equal(support(x, W_enc, 25), inside.int().to(x.device))


@pytest.mark.parametrize("sign", [1, -1], ids=["underrates", "overrates"])
@pytest.mark.parametrize("screening", ["auto", "bf16"])
def test_a_latent_that_rounding_misjudges_as_far_as_the_bound_allows_is_placed(sign: int, screening: str) -> None:
    lost = 2.0**-8 if screening == "bf16" else 2.0**-11
    signs = torch.randint(0, 2, (257,)) * 2 - 1
    nearly_halfway = 1 + lost - 2.0**-20
    x, W_enc = nearly_halfway * signs[None], torch.zeros(100, 257)
    W_enc[7] = sign * nearly_halfway * signs
    exact = 257 * nearly_halfway**2
    for nudge in (-1e-3, 1e-3):
        bias = torch.full((1, 100), sign * (exact + nudge))
        bias[0, 7] = 0
        for k in (1, 99):
            assert torch.equal(support(x, W_enc, k, screening, bias), expected(x, W_enc, k, bias))


def small(monkeypatch: pytest.MonkeyPatch, chunk: int = 200) -> None:
    monkeypatch.setattr(kernel, "chunk_length", lambda rows, L, *device: min(chunk, L))
    monkeypatch.setattr(kernel, "ROWS", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "plateau"])
def test_candidates_that_do_not_fit_are_never_dropped(
    order: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "ROOM", 1)
    monkeypatch.setattr(kernel, "SPARE", 8)
    small(monkeypatch)
    torch.manual_seed(0)
    x, W_enc = torch.rand(2, 30), torch.rand(700, 30)
    if order != "random":
        W_enc = W_enc[W_enc.sum(1).argsort(descending=order == "descending")]
    if order == "plateau":
        W_enc[200:600] = W_enc[650]
    x, W_enc = x.to(dtype), W_enc.to(dtype)
    assert torch.equal(support(x, W_enc, 40), expected(x, W_enc, 40))


@pytest.mark.parametrize(("columns", "block"), [(16, 16), (128, 32), (512, 512)], ids=str)
@pytest.mark.parametrize("screening", SCREENINGS)
def test_scores_taken_in_by_tiles_of_any_size_are_all_looked_at(
    screening: str, columns: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"COLUMNS": columns, "BLOCK": block}
    monkeypatch.setattr(kernel, "filter_choice", lambda chunk, capacity, rows: chosen)
    small(monkeypatch, 301)  # no multiple of four
    torch.manual_seed(0)
    x, W_enc, bias = torch.randn(2, 24), torch.randn(800, 24), torch.randn(2, 800)
    W_enc[400:420] = W_enc[7]
    bias[0, 5::90], bias[1, 9] = -inf, inf
    bias[0, 500], bias[1, 501:503] = 2e18, -2e18
    assert torch.equal(support(x, W_enc, 20, screening, bias), expected(x, W_enc, 20, bias))


def test_only_samples_without_a_proof_are_scored_in_full(given_up: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 512)
    torch.manual_seed(0)
    x, W_enc = torch.randn(7, 40), torch.randn(900, 40)
    x[1], x[2, 3], x[5, 0] = 0, nan, inf
    x[6] *= 1e30
    assert torch.equal(support(x, W_enc, 32), expected(x, W_enc, 32))
    assert given_up == [2]  # infinity and 1e30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("L", [1, 5, 16])
def test_a_sample_scored_in_full_may_be_cut_in_more_parts_than_there_are_latents(
    L: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_device", lambda device: (2**20, 4))
    torch.manual_seed(0)
    x, W_enc = torch.randn(2, 4).to(dtype), torch.randn(L, 4).to(dtype)
    x[1, 0] = inf  # the only one in float32
    assert torch.equal(support(x, W_enc, 1), expected(x, W_enc, 1))


@pytest.mark.parametrize("fill", [0.0, -2.5])
def test_zero_weights_tie_everywhere_and_still_need_no_full_scores(fill: float, given_up: list[int]) -> None:
    x, W_enc = torch.randn(3, 20), torch.zeros(2000, 20)
    bias = torch.full((2, 2000), fill)
    bias[1, 1500] = 9
    assert torch.equal(support(x, W_enc, 10, bias=bias), expected(x, W_enc, 10, bias))
    assert given_up == [0]


def test_float64_ranks_what_float32_cannot_tell_apart() -> None:
    W_enc = 1 + 2.0**-40 * torch.randperm(150, dtype=torch.float64)[:, None].expand(150, 5)
    x = torch.ones(2, 5, dtype=torch.float64)
    assert torch.equal(support(x, W_enc, 7), expected(x, W_enc, 7))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 300, 5), (9, 33, 7, 4), (2, 70, 1, 70)], ids=str)
def test_any_shape_any_dtype_of_each_operand(shape: tuple[int, int, int, int]) -> None:
    N, L, D, k = shape
    torch.manual_seed(L)
    x, W_enc, pre_bias, bias = torch.randn(N, D) + 3, torch.randn(L, D), torch.randn(D) + 3, torch.randn(3, L)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for i, dtype in enumerate(dtypes):
        mixed = x.to(dtype), W_enc.to(dtypes[i - 1]), pre_bias.to(dtypes[i - 2]), bias.to(dtype)
        found = kernel.global_topk(*(o.to(DEVICE) for o in mixed), k).to(x.device)
        assert found.dtype == torch.int32
        assert torch.equal(found, reference.global_topk(*mixed, k))
    assert kernel.global_topk(*(o.to(DEVICE) for o in (x[:0], W_enc, pre_bias, bias)), k).shape == (0, k)


def test_a_sample_alone_equals_the_same_sample_in_a_batch_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, W_enc = torch.randn(9, 60), torch.randn(600, 60)
    W_enc[300:] = W_enc[:300]
    together = support(x, W_enc, 30)
    assert torch.equal(together, expected(x, W_enc, 30))
    small(monkeypatch)
    assert torch.equal(support(x, W_enc, 30), together)
    assert torch.equal(torch.cat([support(row[None], W_enc, 30) for row in x[:3]]), together[:3])


def prepared(
    x: Tensor, W: Tensor, pre_bias: Tensor, latent_bias: Tensor, first: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(X, of_x, float32 biases, ||w||) where x is, of the samples from `first` on."""
    D, L, here = x.shape[1], len(W), len(x) - first
    biases = kernel._biases(L, DEVICE)
    X = torch.empty(here, D, dtype=torch.bfloat16, device=DEVICE)
    of_x = torch.full((4, here), nan, device=DEVICE)
    w_norm = torch.full((L,), nan, device=DEVICE)
    numbers = 1 + math.ldexp(D + 48, -24), math.ldexp(math.sqrt(D), -63), math.ldexp(D / 256 + 64, -23)
    operands = [o.to(DEVICE) for o in (x, W, pre_bias, latent_bias)]
    prepare(biases, w_norm, X, of_x, *operands, first, here, *numbers)
    return X.to(x.device), of_x.to(x.device), biases[1].to(x.device), w_norm.to(x.device)


@pytest.mark.parametrize("away", [0.0, 0.5, 2.0, 4.0, 100.0])
@pytest.mark.parametrize("D", [3, 300])
def test_a_product_and_its_bias_are_no_farther_from_the_score_than_the_bound(D: int, away: float) -> None:
    g = seeded(0)
    pre_bias = (away * torch.randn(D, generator=g)).bfloat16()
    x, W = (torch.randn(70, D, generator=g) + pre_bias.float()).bfloat16(), torch.randn(90, D, generator=g).bfloat16()
    latent_bias = torch.randn(3, 90, generator=g).bfloat16()
    X, (norm, residual, inverse, size), bias, w_norm = prepared(x, W, pre_bias, latent_bias)
    centred = (x.float() - pre_bias.float()).double()
    exact = centred @ W.double().T + latent_bias.double().sum(0)
    apart = (X.double() @ W.double().T + bias.double() - exact).abs()
    assert (apart <= residual.double()[:, None] * w_norm.double() + 2.0**-23 * bias.double().abs()).all()
    assert (norm >= X.double().norm(dim=1) - residual).all()
    assert (size >= centred.norm(dim=1)).all()
    assert (w_norm >= W.double().norm(dim=1)).all()
    assert (inverse == 1).all()
    assert (size < 1.01 * centred.norm(dim=1)).all()


@pytest.mark.parametrize(("away", "as_they_are"), [(0.0, True), (2.0, True), (4.0, False), (nan, False)])
def test_samples_far_from_zero_are_centred_and_others_keep_every_bit(away: float, as_they_are: bool) -> None:
    g = seeded(0)
    pre_bias, W = torch.full((40,), away).bfloat16(), torch.randn(50, 40, generator=g).bfloat16()
    x = (torch.randn(9, 40, generator=g) + pre_bias.nan_to_num().float()).bfloat16()
    X, of_x, *_ = prepared(x, W, pre_bias, torch.zeros(1, 50).bfloat16())
    assert torch.equal(X, x) == as_they_are
    later, of_later, *_ = prepared(x, W, pre_bias, torch.zeros(1, 50).bfloat16(), first=4)
    assert torch.equal(later.nan_to_num(), X[4:].nan_to_num())
    assert torch.equal(of_later.nan_to_num(), of_x[:, 4:].nan_to_num())


def test_a_row_of_zeros_without_a_centre_has_no_error() -> None:
    x, W = torch.zeros(2, 20).bfloat16(), torch.randn(6, 20, generator=seeded(0)).bfloat16()
    W[3] = 0
    _, of_x, _, w_norm = prepared(x, W, torch.zeros(20).bfloat16(), torch.zeros(1, 6).bfloat16())
    assert of_x[:2].eq(0).all()
    assert w_norm[3] == 0


@settings(max_examples=10, deadline=None)
@given(
    x_kind=st.sampled_from(VECTORS),
    W_kind=st.sampled_from(VECTORS),
    D=st.integers(1, 70),
    L=st.integers(1, 150),
    away=st.sampled_from([0.0, 0.3, 2.0, 1e3, inf, nan]),
    N=st.integers(1, 6),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_no_rows_and_no_centre_break_the_bound(
    x_kind: str, W_kind: str, D: int, L: int, away: float, N: int, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, min(L, 40)), label="k")
    generator = seeded(seed)
    x, W_enc = vectors(x_kind, N, D, generator).bfloat16(), vectors(W_kind, L, D, generator).bfloat16()
    pre_bias = (away * torch.randn(D, generator=generator, device=x.device)).bfloat16()
    bias = torch.randn(2, L, generator=generator, device=x.device).bfloat16()
    operands = [o.to(DEVICE) for o in (x, W_enc, pre_bias, bias)]
    with pytest.MonkeyPatch.context() as small:
        small.setattr(kernel, "ROWS", 3)  # samples beyond these are prepared by themselves
        found = kernel.global_topk(*operands, k)
    assert torch.equal(found, in_full(*operands, k))


@pytest.mark.parametrize("k", [1, 20, 500])
@pytest.mark.parametrize("kind", SCORES)
def test_rows_of_scores_are_selected_by_value_then_column(kind: str, k: int) -> None:
    row = SCORES[kind](500)
    for dtype in (torch.float32, torch.bfloat16, torch.float64) if k == 20 else (torch.float32,):
        scores = torch.stack([row, row.flip(0)]).to(dtype)
        assert torch.equal(topk_rows(scores.to(DEVICE), k).to(scores.device), largest(scores, k))


@pytest.mark.parametrize(("N", "L", "k"), [(1, 20000, 300), (5, 4099, 1), (1, 9000, 2500), (0, 5, 2)], ids=str)
def test_long_rows_are_cut_in_parts_and_short_room_is_enough(N: int, L: int, k: int) -> None:
    torch.manual_seed(0)
    scores = torch.randint(-3000, 3000, (N, L)).float()
    scores[:, ::1000] = nan
    assert torch.equal(topk_rows(scores.to(DEVICE), k).to(scores.device), largest(scores, k))
    wider = torch.randn(N, L + 3).to(DEVICE)[:, 1:-2]
    assert torch.equal(topk_rows(wider, k), largest(wider, k))
    ascending = scores.sort(dim=1).values
    assert torch.equal(topk_rows(ascending.to(DEVICE), k).to(scores.device), largest(ascending, k))


@pytest.mark.parametrize("rows_here", [1, 8, 256, 1000, 4096])
@pytest.mark.parametrize("L", [3, 8192, 32768, 1048576])
def test_the_scores_of_a_chunk_stay_in_cache(rows_here: int, L: int) -> None:
    cache, multiprocessors = 50 * 2**20, 132
    chunk = kernel.chunk_length(rows_here, L, cache, multiprocessors)
    assert 1 <= chunk <= L
    assert 4 * rows_here * chunk <= kernel.SCORES * cache
    if chunk < L:
        tiles = math.ceil(rows_here / 128) * chunk // 256
        assert chunk % 256 == 0
        assert tiles / (math.ceil(tiles / multiprocessors) * multiprocessors) > 0.9
