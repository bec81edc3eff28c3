"""What ranks exchange comes while they work: in the order that says so, with the bits of an exchange that is waited for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import NEED_RANKS, Ranks, here, in_fork, own
from torch import Tensor
from training_runs import config, files

import sparc_fast as sf
from sparc_fast.distributed import exchange as exchanges
from sparc_fast.distributed import layout, shard, shared_memory, watch
from sparc_fast.distributed.exchange import Exchange, in_turn
from sparc_fast.training import Trainer

pytestmark = NEED_RANKS
WIDTHS = {"a": 16, "b": 7}
D = sum(WIDTHS.values())
WAYS = ("memory", "sockets", "gloo")


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    processes = Ranks(request.param)
    yield processes
    processes.close()


def samples(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def model_of(**options: Any) -> sf.SPARC:
    torch.manual_seed(0)
    model = sf.SPARC(WIDTHS, 50, 4, **options)
    with torch.no_grad():
        model.latent_bias[:, ::5] = -100  # dead soon
    return model


def by_way(patch: pytest.MonkeyPatch, way: str, least: int = 4) -> None:
    """Exchange through memory that ranks share, by messages through sockets where they are small, or through gloo."""
    patch.setattr(layout, "TOGETHER", least)  # samples of a piece
    for name in ("LEAST", "LEAST_DEALT"):
        patch.setattr(shared_memory, name, 1 if way == "memory" else 2**60)
    if way == "gloo":
        patch.setattr(exchanges, "neighbours", lambda *_: None)
        patch.setattr(shared_memory, "_place", lambda: "")


def test_each_piece_of_work_is_a_stage_behind_the_one_before_it() -> None:
    made = []

    def piece(name: int) -> Iterator[None]:
        for stage in "abc":
            made.append(f"{name}{stage}")
            yield

    in_turn(piece(name) for name in range(4))
    assert " ".join(made) == "0a 1a 0b 2a 1b 0c 3a 2b 1c 3b 2c 3c"
    in_turn([])


def recorded(way: str) -> list[str]:
    """What a rank begins, waits for and works on in the third of some steps."""
    events: list[str] = []

    def told(begin: Callable[..., Any]) -> Callable[..., Any]:
        def begun(exchange: Exchange, rows: Tensor, counts: Any, what: str, *more: Any) -> Any:
            wait = begin(exchange, rows, counts, what, *more)
            events.append(f"begin {what}")

            def waited() -> Any:
                events.append(f"wait {what}")
                return wait()

            return waited

        return begun

    def at_work(backend: Any, name: str) -> Callable[..., Any]:
        made = getattr(backend, name)

        def working(*operands: Any) -> Any:
            events.append(name)
            return made(*operands)

        return working

    with pytest.MonkeyPatch.context() as patch:
        by_way(patch, way)
        model = shard(model_of())
        optimizer = sf.SparcAdam(model)
        for name in ("begin_gather", "begin_deal"):
            patch.setattr(Exchange, name, told(getattr(Exchange, name)))
        backend = sf.ops.backends.resolve("auto", torch.device("cpu"))
        for name in ("sparse_decode", "sparse_decode_grad_values", "update_rows"):
            patch.setattr(backend, name, at_work(backend, name))
        coming = optimizer.send(own(samples(16)))
        for step in range(3):
            now, coming = coming, optimizer.send(own(samples(16, step)))
            events.append("step")
            optimizer.step(now)
    last = len(events) - events[::-1].index("step")
    return [event for event in events[last - 2 :] if not event.endswith(("candidates", "sums", "files"))]


ORDER = """
begin x, step, wait x,
sparse_decode, begin reconstructions,
sparse_decode, begin reconstructions, wait reconstructions, begin G,
sparse_decode, begin reconstructions, wait reconstructions, begin G, wait G, sparse_decode_grad_values,
sparse_decode, begin reconstructions, wait reconstructions, begin G, wait G, sparse_decode_grad_values,
wait reconstructions, begin G, wait G, sparse_decode_grad_values,
wait G, sparse_decode_grad_values,
update_rows
"""


@pytest.mark.parametrize("way", WAYS)
def test_the_next_batch_and_other_pieces_are_exchanged_while_a_rank_works(ranks: Ranks, way: str) -> None:
    expected = [event.strip() for event in ORDER.replace("\n", " ").split(",")]
    if ranks.n == 2:  # of 16 samples 4 pieces of 4
        assert ranks(recorded, way) == [expected] * 2
    for events in ranks(recorded, way):
        assert events[:2] == ["begin x", "step"]
        assert events.count("begin G") == events.count("wait G") > 2
        second = events.index("begin reconstructions", events.index("begin reconstructions") + 1)
        assert second < events.index("wait reconstructions") < events.index("wait G")


def trained(way: str, ahead: bool, parts: int, least: int, loss: Any = "nmse") -> list[Tensor]:
    """What a rank holds after some steps."""
    with pytest.MonkeyPatch.context() as patch:
        by_way(patch, way, least)
        model = shard(model_of(auxk=3, dead_after=20, loss=loss))
        optimizer = sf.SparcAdam(model, 1e-2)
        given = [own(samples(31, step)) for step in range(4)]
        batches: list[Any] = [x if parts == 1 else x.tensor_split(parts) for x in given]
        coming = optimizer.send(batches[0])
        for step, batch in enumerate(batches):
            if ahead and step + 1 < len(batches):
                now, coming = coming, optimizer.send(batches[step + 1])
            else:
                now = coming if ahead else batch
            optimizer.step(now)
    return [part.detach() for part in (*model.parameters(), model.silence)]


def differs(parts: int, loss: str) -> dict[str, tuple[bool, bool]]:
    """By way (whether bits are others than those of exchanges by memory, each waited for, whether pieces move more than
    rounding does)"""
    expected, whole = trained("memory", False, parts, 4, loss), trained("memory", False, parts, 2**60, loss)
    differ = {}
    for way in WAYS:
        found = trained(way, True, parts, 4, loss)
        differ[way] = (
            any(not torch.equal(a, b) for a, b in zip(found, expected, strict=True)),
            any(not torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(found, whole, strict=True)),
        )
    return differ


@pytest.mark.parametrize(("parts", "loss"), [(1, "nmse"), (3, "nmse"), (3, "fvu")])
def test_what_comes_meanwhile_has_the_same_bits_whichever_way_it_comes(ranks: Ranks, parts: int, loss: str) -> None:
    assert ranks(differs, parts, loss) == [dict.fromkeys(WAYS, (False, False))] * ranks.n


def gradients_differ(weights: list[float]) -> list[bool]:
    """Whether the gradients of samples that are exchanged in pieces have other bits than those of all at once."""
    torch.manual_seed(here()[0])
    shared, N = shard(model_of())._shards, 45
    backend = shared.backend("auto", torch.device("cpu"))
    values, indices = torch.rand(N, 2, 4), torch.stack([torch.randperm(16)[:4].sort()[0] for _ in range(N)]).int()
    torch.manual_seed(9)
    operands = values, indices, torch.randn(16, D), torch.randn(D), torch.randn(N, D), torch.rand(N, 2)
    found = []
    for least in (4, 2**60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "TOGETHER", least)
            found.append(backend.decode_loss(*operands, weights, tuple(WIDTHS.values())))
    (nmse, *_, bias), (other, *_, other_bias) = found
    torch.testing.assert_close((nmse, bias), (other, other_bias), rtol=1e-5, atol=1e-5)
    return [not torch.equal(a, b) for a, b in zip(found[0][1:3], found[1][1:3], strict=True)]


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2, 0.5], [0.5, 0.0, 0.0, 0.5]], ids=["all pairs", "from itself"])
def test_a_sample_has_the_same_gradients_in_a_piece_as_among_all(ranks: Ranks, weights: list[float]) -> None:
    assert ranks(gradients_differ, weights) == [[False, False]] * ranks.n


def sent_with_nan() -> tuple[int, str]:
    """(steps made, what the next says)"""
    optimizer = sf.SparcAdam(shard(model_of()))
    first, second = own(samples(12)).clone(), own(samples(12, 2)).clone()
    if here()[0] == 1:
        second[1, 2] = torch.nan
    now, coming = optimizer.send(first), optimizer.send(second)
    optimizer.step(now)
    made = int(optimizer.state[optimizer.model.W_enc]["step"])
    with pytest.raises(ValueError, match="must be finite") as error:
        optimizer.step(coming)
    optimizer.step(own(samples(12, 3)))
    assert int(optimizer.state[optimizer.model.W_enc]["step"]) == 2
    return made, str(error.value)


def test_what_is_wrong_with_the_next_batch_is_said_when_its_step_comes(ranks: Ranks) -> None:
    for rank, (made, said) in enumerate(ranks(sent_with_nan)):
        assert made == 1
        assert said.startswith("inputs['a']" if rank == 1 else "rank 1: inputs['a']")


def test_one_process_has_nothing_to_send() -> None:
    models = model_of(), model_of()
    optimizers = [sf.SparcAdam(model, 1e-2) for model in models]
    for step in range(3):
        x = samples(12, step)
        optimizers[0].step(x)
        optimizers[1].step(optimizers[1].send(x))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def loses_a_rank(folder: str) -> str:
    """What those say that wait for what a rank began, which has gone since."""
    watch.BEAT, watch.SILENT = 0.25, 2.0  # of a process that ends here
    optimizer = sf.SparcAdam(shard(model_of()))
    now, coming = (optimizer.send(own(samples(600, seed))) for seed in (1, 2))
    optimizer.step(now)
    if here()[0] == 1:
        os._exit(9)
    try:
        for _ in range(2):
            optimizer.step(coming)
    except ConnectionError as error:
        (Path(folder) / str(here()[0])).write_text(str(error))
    return ""


def test_a_rank_that_is_lost_while_others_wait_is_named(tmp_path: Path) -> None:
    said, end = [tmp_path / "0", tmp_path / "2"], time.monotonic() + 120
    with closing(Ranks(3)) as three:
        with pytest.raises(EOFError):
            three(loses_a_rank, str(tmp_path))
        while not all(file.exists() and file.read_text() for file in said) and time.monotonic() < end:
            time.sleep(0.1)
    for rank, file in zip((0, 2), said, strict=True):
        assert file.read_text() == f"rank 1 is gone, and rank {rank} cannot go on without"


def watches_of_two_groups() -> bool:
    watches = []
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        watches.append(watch.watch())
        assert watch.watch() is watches[-1]
        dist.destroy_process_group()
    return watches[0] is not watches[1]


def test_a_process_that_joins_other_ranks_later_watches_those() -> None:
    assert in_fork(watches_of_two_groups)


def order_of_a_run(folder: Path) -> tuple[list[str], list[int]]:
    """(what a trainer does in order, the rows that its checkpoints say were trained on)"""
    events: list[str] = []
    with (
        Trainer(config(steps=6, checkpoint_every=2), folder, files=files()) as trainer,
        pytest.MonkeyPatch.context() as p,
    ):
        for owner, name in ((trainer, "_send"), (trainer, "_train_on")):
            made = getattr(owner, name)

            def said(*arguments: Any, made: Any = made, name: str = name) -> Any:
                events.append(name)
                return made(*arguments)

            p.setattr(owner, name, said)
        rows: list[int] = []
        save = trainer.folder.save

        def saved(step: int, tensors: Any, state: Any, *more: Any) -> None:
            rows.append(state["loader"]["row"])
            save(step, tensors, state, *more)

        p.setattr(trainer.folder, "save", saved)
        trainer.run()
        size = trainer.config.batch_size
    return events, [row // size for row in rows]


def test_a_run_sends_each_batch_before_the_step_on_the_one_before_it(ranks: Ranks, tmp_path: Path) -> None:
    for events, rows in ranks(order_of_a_run, tmp_path):
        assert events == ["_send", *["_send", "_train_on"] * 5, "_train_on"]
        assert rows == [2, 4, 6]
