"""Ranks of one host exchange through memory that they share, and settle a support by each other's bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import NEED_RANKS, Ranks, here, own
from torch import Tensor

import sparc_fast as sf
from sparc_fast.distributed import neighbours, received, shard, shared_memory
from sparc_fast.distributed.exchange import Exchange, shares
from sparc_fast.distributed.layout import exchanged_bytes
from sparc_fast.selection import select

pytestmark = NEED_RANKS
WIDTHS = {"a": 16, "b": 7, "c": 9}
D = sum(WIDTHS.values())


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    processes = Ranks(request.param)
    yield processes
    processes.close()


def exchange() -> Exchange:
    world = torch.distributed.group.WORLD
    assert world is not None
    return Exchange(world, torch.device("cpu"))


def samples(n: int, seed: int = 1, width: int = D) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def model_of(n_latents: int = 60, k: int = 4, auxk: int = 3, matryoshka: tuple[int, ...] = ()) -> sf.SPARC:
    torch.manual_seed(0)
    model = sf.SPARC(WIDTHS, n_latents, k, auxk=auxk, dead_after=20, matryoshka=matryoshka)
    with torch.no_grad():
        model.latent_bias[:, ::5] = -100  # dead soon
    return model


def trained(least: int, matryoshka: tuple[int, ...]) -> tuple[list[Tensor], int]:
    """(what a rank holds after some steps, how many buffers of shared memory it used)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "LEAST", least)
        patch.setattr(shared_memory, "LEAST_DEALT", least)
        model = shard(model_of(matryoshka=matryoshka))
        optimizer = sf.SparcAdam(model, 1e-2)
        for step in range(6):
            optimizer.step(own(samples(31, step)))
        memory = model._shards.exchange._memory if least < 2**60 else None
    return [part.detach() for part in model.parameters()], 0 if memory is None else len(memory._buffers)


def memory_differs(matryoshka: tuple[int, ...]) -> tuple[bool, int, int]:
    (through_memory, used), (by_message, none) = trained(1, matryoshka), trained(2**60, matryoshka)
    return any(not torch.equal(a, b) for a, b in zip(through_memory, by_message, strict=True)), used, none


@pytest.mark.parametrize("matryoshka", [(), (7, 20, 40)], ids=["one dictionary", "nested"])
def test_training_has_the_same_bits_through_memory_and_by_message(ranks: Ranks, matryoshka: tuple[int, ...]) -> None:
    for differs, used, none in ranks(memory_differs, matryoshka):
        assert not differs
        assert used > 0
        assert none == 0


def held_and_let_go() -> tuple[bool, list[int]]:
    """(whether everything that is held is as it came, how many buffers there are after each round of exchanges)"""
    one, rank, n = exchange(), *here()
    counts, is_right, buffers = shares(7, n), True, []
    first = sum(counts[:rank])
    for turn in range(4):
        held = []
        for call in range(5):
            rows = samples(7, 10 * turn + call, 1000)
            held.append((one.gather(rows[first : first + counts[rank]], counts, "x"), rows))
            parts, numbers = one.deal(rows + rank, counts, "x")
            for other in range(n):
                is_right &= torch.equal(parts[numbers[other]], rows[first : first + counts[rank]] + other)
        is_right &= all(torch.equal(found, rows) for found, rows in held)
        assert one._memory is not None
        buffers.append(len(one._memory._buffers))
    return is_right, buffers


def test_memory_is_written_again_only_when_no_rank_holds_it(ranks: Ranks) -> None:
    for is_right, buffers in ranks(held_and_let_go):
        assert is_right
        assert buffers[1] == buffers[-1] <= 2 * 5 + 4


def without_memory(case: str) -> tuple[bool, bool]:
    """(whether there is shared memory, whether rows come as they should)"""
    rank, n = here()
    rows = samples(6 * n, 3, 500)
    with pytest.MonkeyPatch.context() as patch:
        if case == "other host" and rank == 1:
            patch.setattr(shared_memory, "_place", lambda: "elsewhere")
            patch.setattr(neighbours, "_network", lambda: "elsewhere")
        if case == "not to be connected":
            patch.setattr(neighbours, "CONNECTING", 0.5)
            if rank == 1:
                patch.setattr(neighbours, "_connected", refuse)
        if case == "not allowed" and rank == 1:
            patch.setattr("os.open", refuse)
        if case == "no buffers left":
            patch.setattr(shared_memory, "MOST_BUFFERS", 0)
        one = exchange()
        assert (one._neighbours is None) == (case in ("other host", "not to be connected"))
        found = one.gather(rows[6 * rank :][:6], [6] * n, "x")
        has = one._memory is not None and bool(one._memory._buffers)
    return has, torch.equal(found, rows)


def refuse(*_: object) -> Any:
    raise PermissionError("not yours")


@pytest.mark.parametrize("case", ["other host", "not allowed", "no buffers left"])
def test_ranks_that_cannot_share_memory_send_messages(ranks: Ranks, case: str) -> None:
    assert ranks(without_memory, case) == [(False, True)] * ranks.n


def test_ranks_that_may_not_connect_share_memory_nevertheless(ranks: Ranks) -> None:
    assert ranks(without_memory, "not to be connected") == [(True, True)] * ranks.n


def waits_for_no_other_host() -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "CONNECTING", None)  # would be forever
        patch.setattr(neighbours, "_network", lambda: str(here()[0]))
        return exchange()._neighbours is None


def test_ranks_of_other_hosts_are_not_waited_for(ranks: Ranks) -> None:
    assert all(ranks(waits_for_no_other_host, timeout=60))


def hard(case: str) -> tuple[sf.SPARC, Tensor]:
    """Of enough samples and latents that a screen in bfloat16 chooses candidates, and may give up."""
    torch.manual_seed(0)
    model = sf.SPARC(WIDTHS, 1501, 1 if case == "one latent" else 12)
    x = samples(40)
    with torch.no_grad():
        if case == "ties":  # more than there is room for
            model.W_enc.copy_(model.W_enc[:3].repeat(501, 1)[:1501])
            model.latent_bias.zero_()
        elif case == "near ties":
            model.W_enc.copy_(model.W_enc[:1] + 1e-6 * torch.randn(1501, D))
        elif case == "one rank has all":
            model.latent_bias[:, 900:940] += 10
        elif case == "few of a rank":
            model.latent_bias[:, 10:] -= torch.inf
        elif case == "NaN and zero":
            model.check_finite = False
            x[3], x[7, 2], x[11] = torch.nan, torch.nan, 0.0
    return model, x


def supports_differ(case: str) -> int:
    whole, x = hard(case)
    sharded = shard(whole)
    expected = select("global", whole._batch(x), whole.k)
    given = sharded._batch(own(x))
    found = select("global", given, whole.k, backend=sharded._shards.backend("auto", x.device))
    rows = sharded._shards.rows(whole.n_latents)
    mine = torch.where((expected >= rows.start) & (expected < rows.stop), expected - rows.start, -1)
    return int((found != mine).sum())


@pytest.mark.parametrize(
    "case", ["random", "ties", "near ties", "one rank has all", "few of a rank", "NaN and zero", "one latent"]
)
def test_bounds_of_all_ranks_leave_the_support_of_one_process(ranks: Ranks, case: str) -> None:
    assert ranks(supports_differ, case) == [0] * ranks.n


def exchanged_with_auxk() -> dict[str, int]:
    model = shard(model_of(auxk=3))
    optimizer = sf.SparcAdam(model)
    for _ in range(3):
        before = received(model)
        optimizer.step(own(samples(360)))
    return dict(received(model) - before)


def test_dead_latents_exchange_what_each_stream_is_reconstructed_to_from_itself(ranks: Ranks) -> None:
    expected = exchanged_bytes(360, list(WIDTHS.values()), 4, ranks.n, auxk=3)
    plain = exchanged_bytes(360, list(WIDTHS.values()), 4, ranks.n)
    assert expected["G"] == pytest.approx(plain["G"] * (len(WIDTHS) + 1) / len(WIDTHS))
    for came in ranks(exchanged_with_auxk):
        for what, n_bytes in expected.items():
            assert came[what] == pytest.approx(n_bytes, rel=0.02)
