"""Latents shared between processes: the supports of one process bit for bit, its sums to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor

import sparc_fast as sf
from sparc_fast.distributed import shard
from sparc_fast.selection import select

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]
WIDTHS = {"a": 16, "b": 7}
D = sum(WIDTHS.values())


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    processes = Ranks(request.param)
    yield processes
    processes.close()


def here() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def own(x: Any, uneven: bool = False) -> Any:
    """This rank's rows: as evenly as can be, or the last rank none and the first all that is left."""
    rank, n = here()
    if isinstance(x, dict):
        return {name: own(part, uneven) for name, part in x.items()}
    if uneven and n > 1:
        few = len(x) // (2 * n)
        sizes = [len(x) - few * (n - 2), *[few] * (n - 2), 0]
        return x.split(sizes)[rank]
    return x.tensor_split(n)[rank]


def model_of(seed: int = 0, n_latents: int = 50, k: int = 4, **options: Any) -> sf.SPARC:
    torch.manual_seed(seed)
    model = sf.SPARC(WIDTHS, n_latents, k, **options)
    with torch.no_grad():
        model.latent_bias.uniform_(-0.1, 0.1)
        model.pre_bias.uniform_(-0.1, 0.1)
    return model


def samples(n: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hard_model(case: str) -> tuple[sf.SPARC, Tensor]:
    """(a model, samples) of which the support is hard to tell."""
    x = samples(13)
    if case == "random":
        return model_of(), x
    if case == "float64":
        return model_of(dtype=torch.float64), x.double()
    if case == "bfloat16":
        return model_of(dtype=torch.bfloat16), x.bfloat16()
    if case == "local":
        return model_of(selection="local"), x
    if case == "k above a share":
        return model_of(n_latents=13, k=11), x
    if case == "all latents":
        return model_of(n_latents=10, k=10), x
    model = model_of()
    with torch.no_grad():
        if case == "all equal":  # equal scores go to the lower latent, on whatever rank
            model.W_enc.copy_(model.W_enc[:1].expand_as(model.W_enc))
            model.latent_bias.zero_()
        elif case == "two values":
            model.W_enc.copy_(model.W_enc[torch.arange(50) % 2])
            model.latent_bias.zero_()
        elif case == "all winners on one rank":
            model.latent_bias[:, -5:] += 100
        elif case == "infinities":
            model.latent_bias[:, ::3] = torch.inf
            model.latent_bias[:, 1::3] = -torch.inf
        elif case == "NaN rows":
            model.check_finite = False
            x[3], x[7, 2] = torch.nan, torch.nan
    return model, x


CASES = [
    "random", "float64", "bfloat16", "local", "k above a share", "all latents", "all equal", "two values",
    "all winners on one rank", "infinities", "NaN rows",
]  # fmt: skip


def supports_differ(case: str, uneven: bool) -> int:
    whole, x = hard_model(case)
    sharded = shard(whole)
    given = sharded._batch(own(x, uneven))
    assert torch.equal(given.x.view(torch.uint8), x.to(given.x.dtype).view(torch.uint8))
    expected = select(whole.selection, whole._batch(x), whole.k)
    found = select(sharded.selection, given, whole.k, backend=sharded._shards.backend("auto", x.device))
    rows = sharded._shards.rows(whole.n_latents)
    mine = torch.where((expected >= rows.start) & (expected < rows.stop), expected - rows.start, -1)
    compact = sharded._shards.compact(found)
    assert torch.equal(compact[compact >= 0], found[found >= 0])
    return int((found != mine).sum())


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("case", CASES)
def test_supports_are_those_of_one_process_bit_for_bit(ranks: Ranks, case: str, uneven: bool) -> None:
    assert ranks(supports_differ, case, uneven) == [0] * ranks.n


def draws_differ() -> bool:
    torch.manual_seed(5)
    whole = sf.SPARC(WIDTHS, 50, 4)
    torch.manual_seed(5)
    mine = shard(sf.SPARC(WIDTHS, 50, 4, device="meta"))
    rows = mine._shards.rows(50)
    same = [torch.equal(getattr(mine, name), getattr(whole, name)[rows]) for name in ("W_enc", "W_dec", "silence")]
    return (
        all(same) and torch.equal(mine.latent_bias, whole.latent_bias[:, rows]) and mine.pre_bias.device.type == "cpu"
    )


def test_a_model_without_weights_draws_those_of_one_process(ranks: Ranks) -> None:
    assert all(ranks(draws_differ))
