"""What comes in which order, how much memory it takes, and that an interrupted run goes on as if nothing had been."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import in_fork
from safetensors.torch import save_file
from test_data_files import WRITERS, numbered, write_npy, write_parquet
from torch import Tensor

from sparc_fast import data
from sparc_fast.data import flat, readers
from sparc_fast.data import loader as loader_module
from sparc_fast.data.shuffle import Shuffling
from sparc_fast.planning.process_memory import forget_peak, resident

N = 6000
WINDOWED = 9_500_000  # bytes: below what all rows take
RESIDENT = 2**28


def rows_of() -> dict[str, Tensor]:
    return {"a": numbered(N, 300), "b": numbered(N, 200).half()}


@pytest.fixture
def files(tmp_path: Path) -> data.AlignedFiles:
    return data.open({stream: write_npy(tmp_path / stream, rows) for stream, rows in rows_of().items()})


def loader(files: data.AlignedFiles, memory: int = WINDOWED, batch_size: int = 100, **kwargs: Any) -> data.Loader:
    made = data.Loader(files, batch_size, memory=memory, n_threads=kwargs.pop("n_threads", 2), **kwargs)
    assert (made.plan.n_windows == 1) == (memory == RESIDENT)
    return made


def numbers(batches: list[Tensor]) -> Tensor:
    x = torch.cat(batches)
    assert torch.equal(x[:, :2], x[:, 300:302]), "the streams' rows differ"
    return (x[:, 0] + 1000 * x[:, 1]).long()


@pytest.mark.parametrize("memory", [WINDOWED, RESIDENT])
@pytest.mark.parametrize("batch_size", [1, 70, 2999, 6000, 7000])
def test_every_row_comes_once_an_epoch_with_all_its_streams(
    files: data.AlignedFiles, memory: int, batch_size: int
) -> None:
    made = data.Loader(files, batch_size, memory=memory + 3 * batch_size * 500 * 4, n_threads=1)
    assert (made.plan.n_windows == 1) == (memory == RESIDENT)
    expected = torch.cat([s.float() for s in rows_of().values()], 1)
    orders = []
    for epoch in range(2):
        assert made.epoch == epoch
        batches = list(made)
        assert len(batches) == len(made) == -(-N // batch_size)
        assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        orders.append(numbers(batches))
        assert torch.equal(orders[-1].sort().values, torch.arange(N))
        assert torch.equal(torch.cat(batches), expected[orders[-1]])
    assert not torch.equal(*orders)


def test_the_last_batch_is_kept_short_or_dropped(files: data.AlignedFiles) -> None:
    for memory in (WINDOWED, RESIDENT):
        kept, dropped = loader(files, memory, 170), loader(files, memory, 170, last="drop")
        assert [len(b) for b in kept] == [170] * 35 + [50]
        seen = [numbers(list(dropped)) for _ in range(2)]
        assert [len(s) for s in seen] == [5950, 5950]
        assert len(dropped) == 35
        assert set(seen[0].tolist()) != set(seen[1].tolist())
        assert torch.equal(seen[0], numbers(list(islice(loader(files, memory, 170), 35))))


@pytest.mark.parametrize("batch_size", [2, 170])
def test_the_parts_of_all_ranks_together_are_the_batches_of_one_process(
    files: data.AlignedFiles, batch_size: int
) -> None:
    for memory in (WINDOWED, RESIDENT):
        whole = islice(loader(files, memory, batch_size), 36)
        parts = [islice(loader(files, memory, batch_size, part=(rank, 3)), 36) for rank in range(3)]
        for batch, *of_ranks in zip(whole, *parts, strict=True):
            assert torch.equal(torch.cat(of_ranks), batch)


def test_the_order_is_of_the_seed_alone(files: data.AlignedFiles) -> None:
    for memory in (WINDOWED, RESIDENT):
        first, threads, other = (
            numbers(list(loader(files, memory, seed=s, n_threads=n))) for s, n in ((3, 1), (3, 4), (4, 2))
        )
        assert torch.equal(first, threads)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("memory", [WINDOWED, RESIDENT])
@pytest.mark.parametrize("n_before", [0, 1, 17, 59, 60, 61, 75])
def test_an_interrupted_run_goes_on_with_the_same_batches(files: data.AlignedFiles, memory: int, n_before: int) -> None:
    def stream(made: data.Loader) -> Iterator[Tensor]:
        return chain.from_iterable(repeat(made))

    whole = list(islice(stream(loader(files, memory, seed=5)), 130))
    stopped = loader(files, memory, seed=5)
    before = list(islice(stream(stopped), n_before))
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = loader(files, memory, seed=99)
    resumed.load_state_dict(state)
    after = list(islice(stream(resumed), 130 - n_before))
    assert all(torch.equal(a, b) for a, b in zip(whole, before + after, strict=True))


def test_a_state_goes_on_with_more_memory_and_is_refused_with_too_little(files: data.AlignedFiles) -> None:
    for memory, others in ((WINDOWED, [RESIDENT, 2 * WINDOWED]), (RESIDENT, [2 * RESIDENT])):
        first = data.Loader(files, 100, memory=memory, n_threads=2)
        next(iter(first))
        rest = list(loader_from(files, first.state_dict(), memory))
        for other in others:
            again = list(loader_from(files, first.state_dict(), other))
            assert all(torch.equal(a, b) for a, b in zip(rest, again, strict=True))
    with pytest.raises(ValueError, match=rf"memory must be at least \d+ bytes to go on .*, got {WINDOWED}"):
        loader_from(files, first.state_dict(), WINDOWED)


def loader_from(files: data.AlignedFiles, state: dict[str, Any], memory: int) -> data.Loader:
    made = data.Loader(files, 100, memory=memory, n_threads=2)
    made.load_state_dict(state)
    return made


def test_a_state_of_other_data_is_refused(files: data.AlignedFiles) -> None:
    made = loader(files)
    state = made.state_dict()
    for name, value in (("batch_size", 99), ("last", "drop"), ("n_rows", 1), ("d_streams", {"b": 200, "a": 300})):
        with pytest.raises(ValueError, match=f"state must have {name} "):
            made.load_state_dict({**state, name: value})
    for change in ({"row": 50}, {"row": N}, {"epoch": -1}):
        with pytest.raises(ValueError, match="state must stand before a batch"):
            made.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match=r"state must be what state_dict\(\) gave"):
        made.load_state_dict({"row": 0})


def test_breaking_off_and_closing_lose_no_row(files: data.AlignedFiles) -> None:
    for memory in (WINDOWED, RESIDENT):
        made = loader(files, memory)
        seen = [next(iter(made)) for _ in range(3)]
        made.close()
        seen += list(made)
        assert torch.equal(numbers(seen).sort().values, torch.arange(N))
        assert made.epoch == 1


@pytest.mark.parametrize("keep", [lambda b: b, lambda b: b[3:5], lambda b: b[:, 4].numpy(), lambda b: b.detach().t()])
def test_batches_are_the_callers_own(files: data.AlignedFiles, keep: Callable[[Tensor], Any]) -> None:
    for memory in (WINDOWED, RESIDENT):
        made = loader(files, memory)
        kept = [(keep(batch), keep(batch.clone())) for _ in range(2) for batch in made]
        assert all((part == copy).all() for part, copy in kept)


def test_memory_that_a_batch_has_left_is_used_again(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((4096, 1024), np.float32))
    made = data.Loader(data.open({"rows": str(tmp_path / "rows.npy")}), 1024)
    addresses = {batch.data_ptr() for _ in range(3) for batch in made}
    assert len(addresses) <= 3
    assert all(address % 64 == 0 for address in addresses), "rows of whole vectors should not straddle cache lines"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_without_shuffling_rows_come_in_order_and_in_the_dtype_asked_for(
    files: data.AlignedFiles, dtype: torch.dtype
) -> None:
    for memory in (WINDOWED, RESIDENT):
        x = torch.cat(list(loader(files, memory, dtype=dtype, shuffle=False)))
        assert x.dtype == dtype
        assert torch.equal(x, torch.cat([s.to(dtype) for s in rows_of().values()], 1))


@pytest.mark.parametrize("memory", [WINDOWED, RESIDENT])
def test_a_row_that_is_not_finite_is_named_when_it_is_read(tmp_path: Path, memory: int) -> None:
    streams = rows_of()
    streams["b"][1234, 5] = torch.nan
    torch.save(streams["b"], tmp_path / "b.pt")
    files = data.open({"a": streams["a"], "b": tmp_path / "b.pt"})
    with pytest.raises(ValueError, match=r"b\.pt must be finite, but row 1234 is not"):
        list(loader(files, memory))
    x = torch.cat(list(loader(files, memory, check_finite=False)))
    assert x.isnan().any(1).sum() == 1


def test_a_file_that_cannot_be_read_is_an_error_of_the_loop(files: data.AlignedFiles, tmp_path: Path) -> None:
    made = loader(files)
    iterator = iter(made)
    next(iterator)
    with (tmp_path / "b.npy").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(OSError, match=r"b\.npy ends before row"):
        list(iterator)
    assert made.epoch == 0


def test_no_thread_outlives_the_loader(files: data.AlignedFiles) -> None:
    before = threading.active_count()
    made = loader(files)
    next(iter(made))
    del made
    gc.collect()
    assert threading.active_count() == before


def without_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (flat, readers, loader_module):
        monkeypatch.setattr(module, "_cpu", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_batches_are_the_same_where_nothing_is_compiled(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = 2.0 ** torch.arange(-25, 15)  # subnormal in half precision, and almost too large for it
    streams = {}
    for name, width in (("a", 131), ("b", 1), ("c", 64)):
        rows = torch.randn(8000, width, generator=torch.Generator().manual_seed(width), device="cpu")
        streams[name] = (rows.clamp(-1.9, 1.9) * sizes[torch.arange(8000) % len(sizes), None]).to(stored)
        save_file({"features": streams[name]}, tmp_path / f"{name}.safetensors")
    files = data.open({name: tmp_path / f"{name}.safetensors" for name in streams})
    rows = torch.cat([stream.to(dtype) for stream in streams.values()], 1)
    seen = []
    for _ in range(2):
        for memory, n_windows in ((6_000_000, range(2, 99)), (RESIDENT, (1,))):
            made = data.Loader(files, 70, memory=memory, dtype=dtype, n_threads=1)
            assert made.plan.n_windows in n_windows
            seen.append(torch.cat(list(made)))
        without_compiled(monkeypatch)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    # every row once: compared as bits, in the order of all their columns
    sort = [np.sort(x.double().numpy().view([("", np.float64)] * 196)[:, 0]) for x in (rows, seen[0])]
    assert (sort[0] == sort[1]).all()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_row_of_a_file_that_is_not_finite_is_named(
    tmp_path: Path, dtype: torch.dtype, value: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        without_compiled(monkeypatch)
    largest = torch.finfo(dtype).max  # finite, though its sums are not
    for row in (0, 2345, 5999):
        rows = torch.full((6000, 300), largest, dtype=dtype)
        rows[row, 299] = value
        save_file({"features": rows}, tmp_path / "a.safetensors")
        with data.open({"a": tmp_path / "a.safetensors"}) as files:
            made = data.Loader(files, 64, memory=6_000_000, n_threads=2, dtype=dtype)
            assert made.plan.n_windows > 1
            with pytest.raises(ValueError, match=rf"a\.safetensors\[features\] must be finite, but row {row} is not"):
                list(made)


def measured(path: Path, how: str, memory: int) -> tuple[int, int, int]:
    """(bytes that a loader takes, rows of two epochs, windows)"""
    torch.set_num_threads(1)
    with data.Loader(data.open({"w": torch.zeros(100, 8)}), 10, n_threads=2) as warm:
        list(warm)
    files = data.open({"0": str(path)})
    if how == "joined":
        order = torch.randperm(len(files))
        ids = {"0": order.sort().values, "again": order}
        files = data.open({"0": str(path), "again": str(path)}, ids=ids, join="inner")
    files.rows(0, 1)
    gc.collect()
    forget_peak()
    base, rows = resident("VmRSS"), 0
    loader = data.Loader(files, 64, memory=memory, n_threads=2)
    for _ in range(2):
        for batch in loader:
            rows += len(batch)
    return resident("VmHWM") - base, rows, loader.plan.n_windows


@pytest.mark.parametrize(
    ("kind", "how", "memory"),
    [
        ("npy", "plain", 17_000_000),
        ("hdf5, gzip", "plain", 17_000_000),
        ("parquet", "plain", 28_000_000),
        ("parquet, one group", "plain", 90_000_000),
        ("npy", "joined", 36_000_000),
    ],
)
def test_the_loader_stays_within_its_memory(tmp_path: Path, kind: str, how: str, memory: int) -> None:
    n = {"parquet, one group": 45_000, "parquet": 30_000}.get(kind, 18_000)
    rows = torch.randn(n, 512) if kind == "parquet, one group" else torch.rand(n, 512).mul(8).round()
    path = WRITERS.get(kind, partial(write_parquet, group=None))(tmp_path / "file", rows)
    assert rows.nbytes * (2 if how == "joined" else 1) > memory
    taken, n_read, n_windows = in_fork(measured, path, how, memory)
    assert n_read == 2 * n
    assert n_windows > 2
    assert taken <= memory, f"{taken} bytes of {memory}"
    assert taken > memory / 4, "the windows cannot have been in memory"


def test_too_little_memory_says_how_much_is_needed_and_that_suffices(files: data.AlignedFiles) -> None:
    with pytest.raises(ValueError, match=r"memory must be at least \d+ bytes here, got 1000") as error:
        data.Loader(files, 100, memory=1000, n_threads=1)
    least = int(str(error.value).split()[5])
    assert torch.equal(numbers(list(data.Loader(files, 100, memory=least, n_threads=1))).sort().values, torch.arange(N))
    with pytest.raises(ValueError, match="memory must be at least"):
        data.Loader(files, 100, memory=least - 70_000, n_threads=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"memory": -5}, 'memory must be an integer >= 1, in bytes, or a size such as "4GiB", got -5'),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"n_threads": 0}, "n_threads must be an integer >= 1, got 0"),
        ({"last": "fold"}, 'last must be "keep" or "drop", got \'fold\''),
        ({"dtype": torch.int32}, "dtype must be torch.float32, bfloat16, float16 or float64"),
        (
            {"batch_size": N + 1, "last": "drop"},
            f"files must hold at least one batch, got {N} rows for batch_size {N + 1}",
        ),
    ],
)
def test_settings_out_of_range(files: data.AlignedFiles, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.Loader(files, **{"batch_size": 10, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="here memory can be pinned")
def test_memory_cannot_be_pinned_without_cuda(files: data.AlignedFiles) -> None:
    with pytest.raises(ValueError, match="pin_memory must be False or None where there is no CUDA device, got True"):
        data.Loader(files, 10, pin_memory=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned_where_cuda_is(files: data.AlignedFiles) -> None:
    batches = list(loader(files))
    assert all(batch.is_pinned() for batch in batches)
    assert torch.equal(numbers(batches).sort().values, torch.arange(N))


def test_files_without_rows_cannot_be_loaded() -> None:
    with pytest.raises(ValueError, match="files must hold at least one batch, got 0 rows"):
        data.Loader(data.open({"a": torch.empty(0, 3)}), 10)


def places(plan: Shuffling, epochs: int) -> np.ndarray:
    """Where each row of the file comes in each of the epochs, [epochs, n_rows]."""
    found = np.empty((epochs, plan.n_rows))
    for epoch in range(epochs):
        rows = []
        for number, blocks in enumerate(plan.windows(epoch)):
            mine = np.concatenate([np.arange(*plan.rows(int(block))) for block in blocks])
            assert len(mine) == plan.n_rows_of(blocks)
            rows.append(mine[plan.order(epoch, number, len(mine))])
        found[epoch, np.concatenate(rows)] = np.arange(plan.n_rows)
    return found


@pytest.mark.parametrize("window_blocks", [6, 50], ids=["windows", "one window"])
def test_every_row_can_come_at_any_time(window_blocks: int) -> None:
    plan = Shuffling(n_rows=203, block_rows=5, window_blocks=window_blocks, seed=0)
    where = places(plan, 2000)
    spread = 203 / np.sqrt(12)
    assert np.abs(where.mean(0) - 101).max() < 5 * spread / np.sqrt(2000)
    assert np.abs(where.std(0) / spread - 1).max() < 0.07
    assert abs(np.corrcoef(where[:50])[np.triu_indices(50, 1)].mean()) < 0.02


def test_data_that_fit_are_permuted_uniformly() -> None:
    plan = Shuffling(n_rows=4, block_rows=2, window_blocks=2, seed=0)
    orders, counts = np.unique(places(plan, 12_000), axis=0, return_counts=True)
    assert len(orders) == 24
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 49.7  # 0.1 % of true permutations exceed it (23 degrees of freedom)
