"""global_topk is exact: which latents, how ties fall, and what it must not depend on."""

from __future__ import annotations

import pytest
import torch
from hard_rows import SCORES, encoder, inf, nan
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DTYPES, IN_INTERPRETER, fast_backends, largest, seeded
from torch import Tensor

from sparc_fast.ops import functional
from sparc_fast.ops.layout import wide


def fitting(N: int, backend: str, most: int = IN_INTERPRETER) -> int:
    """N, or as many samples as Triton's interpreter gets through in a test."""
    interprets = backend == "triton" and torch.get_default_device().type == "cpu"
    return min(N, most) if interprets else N


def scores(x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor) -> Tensor:
    """To a rounding of float64: sums of small integers exactly."""
    centred = x.float() - pre_bias.float()
    return (centred.double() @ W_enc.double().T + latent_bias.double().sum(0)).float()


@pytest.mark.covering(2)
@pytest.mark.parametrize("k", [1, 20, 499, 500])
@pytest.mark.parametrize("kind", SCORES)
def test_the_largest_of_an_adversarial_row_are_found(kind: str, k: int, backend: str) -> None:
    row, W_enc, N = SCORES[kind](500), torch.ones(500, 1), fitting(2, backend, most=1)
    support = functional.global_topk(torch.zeros(N, 1), W_enc, torch.zeros(1), row[None], k, backend=backend)
    assert support.dtype == torch.int32
    assert torch.equal(support, largest(row[None], k).expand(N, k))


@pytest.mark.parametrize("kind", SCORES)
def test_the_same_holds_when_the_row_comes_from_the_weights(kind: str, backend: str) -> None:
    row = SCORES[kind](500)
    W_enc = row[:, None].clone()
    N = fitting(3, backend, most=1)
    support = functional.global_topk(*encoder(torch.ones(N, 1), W_enc), 20, backend=backend)
    assert torch.equal(support, largest(row[None], 20).expand(N, 20))


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 4),
    L=st.integers(1, 300),
    D=st.integers(1, 9),
    S=st.integers(1, 3),
    span=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_equal_scores_go_to_the_lower_latent_for_any_shape_and_dtype(
    N: int, L: int, D: int, S: int, span: int, dtype: torch.dtype, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, L), label="k")
    generator = seeded(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-span, span + 1, shape, generator=generator).to(dtype)

    operands = integers(N, D), integers(L, D), integers(D), integers(S, L)
    for backend in fast_backends():
        assert torch.equal(functional.global_topk(*operands, k, backend=backend), largest(scores(*operands), k))


# N, L, D, k: below a vector; ragged; several chunks of latents; k near L
@pytest.mark.parametrize(
    ("N", "L", "D", "k"), [(1, 3, 1, 2), (5, 333, 77, 20), (130, 5001, 40, 32), (2, 2100, 17, 2000)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_supports_are_those_of_the_float64_scores(
    N: int, L: int, D: int, k: int, dtype: torch.dtype, backend: str
) -> None:
    torch.manual_seed(N + L)
    N = fitting(N, backend)
    operands = [torch.randn(shape).to(dtype) for shape in ((N, D), (L, D), (D,), (3, L))]
    assert torch.equal(functional.global_topk(*operands, k, backend=backend), largest(scores(*operands), k))


def test_scores_that_differ_in_float64_but_not_in_float32_are_a_tie(backend: str) -> None:
    x = torch.ones(1, 2)
    W_enc = torch.tensor([[1.0, 2.0**-26], [1.0, 2.0**-25], [1.0, 2.0**-23], [1.0, 2.0**-26]])
    assert functional.global_topk(*encoder(x, W_enc), 2, backend=backend).tolist() == [[0, 2]]


def test_cancellation_leaves_the_order_of_what_remains(backend: str) -> None:
    torch.manual_seed(0)
    W_enc = torch.randn(400, 40)
    W_enc[:, 1] = -W_enc[:, 0] + 1e-5 * torch.randn(400)
    x = torch.randn(6, 40)
    x[:, :2] = 1e5
    support = functional.global_topk(*encoder(x, W_enc), 10, backend=backend)
    assert torch.equal(support, largest(scores(*encoder(x, W_enc)), 10))


def test_a_sample_alone_equals_the_same_sample_in_a_batch_and_at_any_thread_count(backend: str) -> None:
    torch.manual_seed(0)
    x, W_enc = torch.randn(fitting(150, backend), 60), torch.randn(3000, 60)
    together = functional.global_topk(*encoder(x, W_enc), 30, backend=backend)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [functional.global_topk(*encoder(row[None], W_enc), 30, backend=backend) for row in x]
        single = functional.global_topk(*encoder(x, W_enc), 30, backend=backend)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(single, together)


def test_a_bad_row_does_not_disturb_the_others(backend: str) -> None:
    torch.manual_seed(0)
    N = 2 * fitting(60, backend)
    x, W_enc = torch.randn(N, 30), torch.randn(2500, 30)
    expected = functional.global_topk(*encoder(x, W_enc), 12, backend=backend)
    with_nan, infinite, zero, large = 0, N // 2 - 1, N // 2, N - 2
    bad = x.clone()
    bad[with_nan, 4], bad[infinite, 0], bad[zero] = nan, -inf, 0
    bad[large] *= 1e30
    support = functional.global_topk(*encoder(bad, W_enc), 12, backend=backend)
    good = torch.ones(N, dtype=torch.bool)
    good[[with_nan, infinite, zero, large]] = False
    assert torch.equal(support[good], expected[good])
    assert torch.equal(support[with_nan], torch.arange(12, dtype=torch.int32))
    assert torch.equal(support[zero], torch.arange(12, dtype=torch.int32))


def test_bad_latents_rank_by_the_rule_and_masked_ones_last(backend: str) -> None:
    torch.manual_seed(0)
    x, W_enc = torch.randn(fitting(7, backend), 30), torch.randn(600, 30)
    W_enc[5, 0], W_enc[7, 3] = nan, inf
    latent_bias = torch.zeros(2, 600)
    latent_bias[0, 300:], latent_bias[1, 20], latent_bias[1, 30] = -inf, inf, 3e38
    support = functional.global_topk(x, W_enc, torch.zeros(30), latent_bias, 40, backend=backend)
    assert torch.equal(support, largest(scores(x, W_enc, torch.zeros(30), latent_bias), 40))


def test_weights_may_be_columns_of_a_wider_matrix(backend: str) -> None:
    torch.manual_seed(0)
    x, W_enc = torch.randn(fitting(9, backend), 50), torch.randn(700, 80)
    for columns in (slice(11, 47), slice(3, 4)):
        part, rows = x[:, columns], W_enc[:, columns]
        expected = functional.global_topk(*encoder(part.clone(), rows.clone()), 8, backend=backend)
        assert torch.equal(functional.global_topk(*encoder(part, rows), 8, backend=backend), expected)


def test_no_samples_give_no_supports(backend: str) -> None:
    W_enc = torch.randn(10, 3)
    assert functional.global_topk(*encoder(torch.zeros(0, 3), W_enc), 4, backend=backend).shape == (0, 4)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_and_autocast_do_not_change_the_support(precision: str, backend: str) -> None:
    torch.manual_seed(0)
    N = fitting(200, backend)
    x, W_enc = torch.randn(N, 300), torch.randn(15 * N, 300)
    expected = largest(scores(*encoder(x, W_enc)), 30)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(functional.global_topk(*encoder(x, W_enc), 30, backend=backend), expected)
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(functional.global_topk(*encoder(x, W_enc), 30, backend=backend), expected)


SHAPES = [(3, 40, 1, 5), (4, 90, 17, 9), (5, 300, 257, 20), (3, 60, 700, 7)]  # N, L, D, k


@pytest.mark.covering(2)
@pytest.mark.parametrize(("N", "L", "D", "k"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_have_the_same_bits_on_every_backend_and_for_a_part_of_the_latents_or_samples(
    N: int, L: int, D: int, k: int, dtype: torch.dtype, backend: str
) -> None:
    N, generator = fitting(N, backend, most=2), seeded(D)
    x, W_enc, pre_bias, latent_bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((N, D), (L, D), (D,), (3, L))
    )
    of_all = x, W_enc, pre_bias, latent_bias
    indices, found = functional.global_topk(*of_all, k, return_scores=True, backend=backend)
    assert found.dtype == wide(x).dtype
    assert torch.equal(indices, functional.global_topk(*of_all, k, backend="reference"))
    assert torch.equal(found, functional.global_topk(*of_all, k, return_scores=True, backend="reference")[1])
    one = functional.global_topk(x[1:2], W_enc, pre_bias, latent_bias, k, return_scores=True, backend=backend)
    assert torch.equal(one[1], found[1:2])
    # shards of the latents merge by (score descending, latent ascending)
    half = L // 2
    shards = [
        functional.global_topk(x, W_enc[p], pre_bias, latent_bias[:, p], k, return_scores=True, backend=backend)
        for p in (slice(0, half), slice(half, L))
    ]
    latents = torch.cat([shards[0][0], shards[1][0] + half], dim=1)
    best = largest(torch.cat([shards[0][1], shards[1][1]], dim=1), k).long()
    assert torch.equal(latents.gather(1, best), indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_are_summed_in_the_order_of_the_specification(dtype: torch.dtype, backend: str) -> None:
    D = 300
    generator = seeded(3)
    x = torch.randn(2, D, generator=generator).to(dtype) * 10.0 ** torch.randint(-6, 7, (2, D), generator=generator)
    W_enc, latent_bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((4, D), (3, 4)))
    W_enc[1] = W_enc[0]
    x, W_enc = x.to(dtype), W_enc.to(dtype)
    indices, found = functional.global_topk(
        x, W_enc, torch.zeros(D, dtype=dtype), latent_bias, 4, return_scores=True, backend=backend
    )
    for n in range(2):
        for j, l in enumerate(indices[n].tolist()):
            lanes = [0.0] * 256
            for d in range(D):
                lanes[d % 256] += float(x[n, d]) * float(W_enc[l, d])
            while len(lanes) > 1:
                lanes = [left + right for left, right in zip(lanes[::2], lanes[1::2], strict=True)]
            bias = sum(float(of_stream) for of_stream in latent_bias[:, l])
            assert found[n, j] == torch.tensor(lanes[0] + bias, dtype=torch.float64).to(dtype)


def test_equal_rows_of_float64_weights_have_equal_scores_whatever_stands_between(backend: str) -> None:
    generator = seeded(0)
    x, W_enc = (torch.randn(shape, 37, generator=generator, dtype=torch.float64) for shape in (fitting(20, backend), 7))
    W_enc = W_enc.repeat(30, 1)
    indices, found = functional.global_topk(*encoder(x, W_enc), 30, return_scores=True, backend=backend)
    assert torch.equal(indices, indices[:, :1] + 7 * torch.arange(30, dtype=torch.int32))
    assert torch.equal(found, found[:, :1].expand_as(found))


def test_scores_that_are_nan_come_back_as_infinity_and_zeros_as_plus_zero(backend: str) -> None:
    bias = torch.tensor([[nan, -inf, -0.0, 1.0]])
    operands = torch.zeros(1, 2), torch.zeros(4, 2), torch.zeros(2), bias
    found = functional.global_topk(*operands, 4, return_scores=True, backend=backend)[1]
    assert found.tolist() == [[inf, -inf, 0.0, 1.0]]
    assert not found.signbit()[0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_among_some_latents_the_best_of_those_are_chosen_and_slots_stay_empty(dtype: torch.dtype, backend: str) -> None:
    generator = seeded(3)
    N, L, D, k = 5, 70, 24, 4
    x, W = (torch.randn(n, D, generator=generator).to(dtype) for n in (N, L))
    bias, pre_bias = torch.randn(2, L, generator=generator).to(dtype), torch.zeros(D, dtype=dtype)
    x[3] = torch.nan
    W[::3] = W[0]  # ties go to the lower latent
    for many in (L, 40, 3, 0):
        among = torch.zeros(L, dtype=torch.bool)
        among[torch.randperm(L, generator=generator)[:many]] = True
        found = functional.global_topk(x, W, pre_bias, bias, k, among=among, backend=backend)
        latents, here = among.nonzero()[:, 0], min(k, many)
        expected = torch.full((N, k), -1, dtype=torch.int32)
        if here:
            best = functional.global_topk(x, W[latents], pre_bias, bias[:, latents], here, backend="reference")
            expected[:, :here] = latents[best.long()].int()
        assert torch.equal(found, expected)


def test_what_to_choose_among_must_say_it_of_every_latent() -> None:
    x, W = torch.zeros(2, 3), torch.zeros(4, 3)
    for among in (torch.ones(3, dtype=torch.bool), torch.ones(4)):
        with pytest.raises(ValueError, match=r"among must be bool \[4\] on "):
            functional.global_topk(x, W, x[0], torch.zeros(1, 4), 2, among=among)
    with pytest.raises(ValueError, match="return_scores must be False with among"):
        functional.global_topk(x, W, x[0], torch.zeros(1, 4), 2, among=W[:, 0] > 0, return_scores=True)
