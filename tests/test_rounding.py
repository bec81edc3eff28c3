"""Stochastic rounding of moments: right on average, from random bits that are a function of their place alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparc_fast.ops import reference

EVERY_RANDOM = torch.arange(65536)
LARGEST = 0x7F7F0000  # the largest finite bfloat16, as the bits of a float32


def of_bits(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("x", [1.0001, -1.0001, 3.14159e-12, -7.7e20, 1e-39, 2.0**-149, 0.9999999])
def test_the_mean_over_all_random_numbers_is_the_number_itself(x: float) -> None:
    wide = torch.tensor(x)
    rounded = reference.round_to_bfloat16(wide.expand(65536), EVERY_RANDOM)
    assert len(rounded.unique()) == 2
    assert rounded.double().mean() == wide.double()  # exact: both are multiples of one power of two


def test_what_bfloat16_holds_stays_as_it_is() -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for random in (0, 1, 32768, 65535):
        rounded = reference.round_to_bfloat16(every.float(), torch.full((65536,), random))
        torch.testing.assert_close(rounded, every, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rounded[every == 0].signbit(), every[every == 0].signbit())


def test_only_what_lies_beyond_the_largest_finite_number_becomes_infinite() -> None:
    finite = of_bits(LARGEST, LARGEST + 1, LARGEST + 0xFFFF, LARGEST - 1)
    up = reference.round_to_bfloat16(finite, torch.full((4,), 65535))
    assert up.isinf().tolist() == [False, True, True, False]
    assert not reference.round_to_bfloat16(finite, torch.zeros(4)).isinf().any()
    assert torch.equal(reference.round_to_bfloat16(-finite, torch.full((4,), 65535)), -up)


def test_nan_of_any_bits_stays_nan_and_infinity_infinity() -> None:
    nan = of_bits(0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFC00000)
    for random in (0, 65535):
        assert reference.round_to_bfloat16(nan, torch.full((4,), random)).isnan().all()
        infinite = reference.round_to_bfloat16(torch.tensor([torch.inf, -torch.inf]), torch.full((2,), random))
        assert infinite.tolist() == [torch.inf, -torch.inf]


def test_a_second_moment_that_changes_by_less_than_a_rounding_moves_on_average_and_stands_still_to_the_nearest() -> (
    None
):
    steps, n = 300, 4096
    truth, nearest, stochastic = 1.0, torch.ones(n).bfloat16(), torch.ones(1, n).bfloat16()
    gradient, m, w = torch.full((1, n), 0.5), torch.zeros(1, n).bfloat16(), torch.zeros(1, n)
    for step in range(1, steps + 1):
        truth = 0.999 * truth + 0.001 * 0.25
        nearest = (0.999 * nearest.float() + 0.001 * 0.25).bfloat16()
        noise = reference.rounding_noise(0, step, 0, torch.zeros(1, dtype=torch.int64), n)
        reference.apply_adam(w, gradient, m, stochastic, 1e-3, (0.9, 0.999), 1e-8, step, noise)
    assert (nearest == 1).all()
    assert truth < 0.81
    mean, error = stochastic.double().mean(), stochastic.double().std() / n**0.5
    assert abs(mean - truth) < 4 * error < 0.004


def words(seed: int, step: int, matrix: int, latent: int, column: int) -> int:
    """The definition once more, in whole numbers."""

    def mix(x: int, key: int = 0) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13 ^ key) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    a = b = 0
    for word in (seed % 2**32, seed // 2**32 % 2**32, step, 2 * latent + matrix):
        a = mix((a + word) % 2**32)
        b = mix(b ^ a)
    return mix((a + column) % 2**32, b)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1, -1])
def test_noise_is_the_hash_of_its_place_and_of_nothing_else(seed: int) -> None:
    latents = torch.tensor([7, 0, 2**20])
    for step, matrix in ((1, 0), (70_000, 1)):
        noise = reference.rounding_noise(seed, step, matrix, latents, 5)
        expected = [[words(seed, step, matrix, l, d) for d in range(5)] for l in latents.tolist()]
        assert noise.tolist() == expected
        part = reference.rounding_noise(seed, torch.tensor(float(step)), matrix, latents[:1], 3)
        assert torch.equal(part, noise[:1, :3])


L, D = 1024, 512


def noise(seed: int = 5, step: int = 1, matrix: int = 0) -> Tensor:
    return reference.rounding_noise(seed, step, matrix, torch.arange(L), D)


def halves(bits: Tensor) -> Iterator[Tensor]:
    """Both random numbers, centred and of variance 1."""
    for half in (bits & 0xFFFF, bits >> 16):
        yield (half.double() - 32767.5) / (65536 / 12**0.5)


def test_every_bit_of_the_noise_is_unbiased_and_independent_of_the_others() -> None:
    signs = torch.stack([(noise() >> i & 1).flatten() * 2.0 - 1 for i in range(32)])
    correlation = signs @ signs.T / (L * D) ** 0.5  # in standard deviations
    correlation.fill_diagonal_(0)
    assert signs.mean(1).abs().max() * (L * D) ** 0.5 < 4
    assert correlation.abs().max() < 5


def test_noise_is_uniform_and_its_rows_and_columns_have_no_mean_of_their_own() -> None:
    for half in halves(noise()):
        assert abs(half.mean()) * (L * D) ** 0.5 < 4
        counts = torch.histc(half.float(), 256)
        assert abs(((counts - L * D / 256) ** 2 / (L * D / 256)).sum() - 255) < 5 * (2 * 255) ** 0.5
        for axis, size in ((0, L), (1, D)):
            squares = half.mean(axis) ** 2 * size
            assert abs(squares.sum() - len(squares)) < 5 * (2 * len(squares)) ** 0.5


def test_noise_has_no_correlation_between_neighbours_steps_moments_matrices_and_seeds() -> None:
    bits = noise()
    first, second = halves(bits)
    pairs = {"the two moments": (first, second)}
    for other, changes in (("step", {"step": 2}), ("matrix", {"matrix": 1}), ("seed", {"seed": 6})):
        for i, (half, changed) in enumerate(zip((first, second), halves(noise(**changes)), strict=True)):
            pairs[f"{other}, moment {i}"] = half, changed
    for distance in (1, 2, 3, 16, 64):
        for half in (first, second):
            pairs[f"columns {distance} apart"] = half[:, distance:], half[:, :-distance]
            pairs[f"latents {distance} apart"] = half[distance:], half[:-distance]
    for what, (a, b) in pairs.items():
        assert abs((a * b).sum()) / a.numel() ** 0.5 < 5, what
    assert not torch.equal(noise(seed=0, step=2), noise(seed=1, step=1))


def test_bfloat16_moments_need_a_seed_and_float32_rows() -> None:
    narrow, wide = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3)
    assert reference.rounding_seed(wide, [wide, wide], 3) is None
    assert reference.rounding_seed(wide, [narrow, narrow], 3) == 3
    with pytest.raises(ValueError, match="seed must be an integer where moments are bfloat16, got None"):
        reference.rounding_seed(wide, [narrow, narrow], None)
    for rows, moments in ((wide, [narrow, wide]), (wide.double(), [narrow, narrow]), (narrow, [narrow, narrow])):
        with pytest.raises(ValueError, match="bfloat16 moments must be all of the moments of float32 rows, got"):
            reference.rounding_seed(rows, moments, 3)
