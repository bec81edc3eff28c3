"""Rows that are the same samples come together by their identifiers, however they lie in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_files import WIDTH, WRITERS, N, numbered, sample
from torch import Tensor

from sparc_fast import data
from sparc_fast.data import Match, views


def expected(rows: dict[str, Tensor], ids: dict[str, list[Any]], samples: list[Any]) -> tuple[Tensor, Tensor]:
    """(rows side by side, present) by looking every sample up in every stream."""
    parts, present = [], []
    for stream, of_stream in rows.items():
        found = [ids[stream].index(i) if i in ids[stream] else -1 for i in samples]
        part = of_stream[found].float()
        part[[f < 0 for f in found]] = 0
        parts.append(part)
        present.append([f >= 0 for f in found])
    return torch.cat(parts, 1), torch.tensor(present).T


@pytest.mark.parametrize("text", [False, True], ids=["integers", "text"])
@pytest.mark.parametrize("kind", WRITERS)
def test_rows_in_another_order_or_missing_are_matched_by_id(tmp_path: Path, kind: str, text: bool) -> None:
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    rows = {"a": sample(N, 5), "b": sample(70, WIDTH), "c": sample(N, 3)}
    ids: dict[str, list[Any]] = {
        "a": list(range(100, 100 + N)),
        "b": (shuffled[:60] + 100).tolist() + list(range(500, 510)),
        "c": (shuffled + 103).tolist(),
    }
    if text:
        ids = {stream: [f"image {i}.jpg" for i in of_stream] for stream, of_stream in ids.items()}
    sources = {stream: WRITERS[kind](tmp_path / stream, of_stream) for stream, of_stream in rows.items()}
    both = [i for i in ids["a"] if all(i in other for other in ids.values())]
    either = list(dict.fromkeys(i for of_stream in ids.values() for i in of_stream))
    for join, samples in (("inner", both), ("outer", either)):
        with data.open(sources, ids=ids, join=join) as files:
            x, present = expected(rows, ids, samples)
            assert files.n_rows == len(samples)
            assert torch.equal(files.rows(0, len(samples)), x)
            assert torch.equal(files.rows(3, 40), x[3:40])
            assert (files.present is None) if join == "inner" else torch.equal(files.present, present)


def test_a_join_says_what_matched() -> None:
    rows = {"a": sample(6), "b": sample(4), "c": sample(6)}
    ids = {"a": list(range(6)), "b": [5, 4, 9, 8], "c": list(range(6))}
    inner, outer = (data.open(rows, ids=ids, join=join) for join in ("inner", "outer"))
    assert inner.matched.streams == {"a": Match(6, 2, 0), "b": Match(4, 2, 0), "c": Match(6, 2, 0)}
    assert str(inner.matched) == "2 samples joined by id: 2 of 6 rows of 'a'; 2 of 4 rows of 'b'; 2 of 6 rows of 'c'"
    words = "8 samples joined by id: 6 of 6 rows of 'a', absent in 2; 4 of 4 rows of 'b', absent in 4; 6 of 6 rows of 'c', absent in 2"
    assert str(outer.matched) == words
    assert data.open({"a": rows["a"], "c": rows["c"]}).matched is None


def test_files_in_the_same_order_are_read_as_they_are() -> None:
    rows = {"a": sample(20), "b": sample(20), "c": sample(19)}
    files = data.open(rows, ids={"a": range(20), "b": range(20), "c": range(1, 20)}, join="outer")
    assert [stream for stream, of_it in files.readers.items() if isinstance(of_it, views.PickedReader)] == ["c"]


def test_ids_must_be_unique_to_be_joined_and_the_first_double_is_named() -> None:
    rows = {"a": sample(5), "b": sample(5)}
    message = r"ids of 'b' must be unique to be joined, got 'x' in rows 1 and 3; .* repeated must be"
    with pytest.raises(ValueError, match=message):
        data.open(rows, ids={"a": list("vwxyz"), "b": list("vxwxv")}, join="inner")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"join": "left", "ids": {"a": [0], "b": [0]}}, 'join must be None, "inner" or "outer", got \'left\''),
        ({"join": "inner"}, "ids must be given for join to match rows by, got join 'inner' without ids"),
        ({"join": "inner", "ids": {"a": range(5)}}, "identifiers of all of the streams"),
        ({"join": "inner", "ids": {"a": range(5), "b": range(4)}}, "ids of 'b' must be one a row, 5 in all, got 4"),
        ({"repeated": "all"}, "join must be .* with repeated='all', got None"),
        ({"join": "inner", "ids": {"a": range(5), "b": range(5)}, "repeated": "some"}, "repeated must be None, "),
        (
            {"join": "inner", "ids": {"a": [1, 2, 3, 4, 5], "b": [f"{i:03}" for i in range(5)]}},
            "ids must have a sample in common to be joined, got none; the first are '1' in 'a', '000' in 'b'",
        ),
    ],
)
def test_a_join_that_cannot_be_is_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.open({"a": sample(5), "b": sample(5)}, **arguments)


def test_a_stream_without_rows_is_absent_everywhere() -> None:
    files = data.open({"a": sample(5), "b": sample(0)}, ids={"a": range(5), "b": []}, join="outer")
    assert torch.equal(files.rows(0, 5)[:, WIDTH:], torch.zeros(5, WIDTH))
    assert files.present.tolist() == [[True, False]] * 5


def test_a_hash_beyond_int64_is_no_negative_number() -> None:
    rows = {"a": sample(2), "b": sample(2)}
    with pytest.raises(ValueError, match="must match those of 'a' row by row, got '-1' and '18446744073709551615'"):
        data.open(rows, ids={"a": np.array([2**64 - 1, 5], np.uint64), "b": np.array([-1, 5])})


def test_a_scan_of_joined_files_does_not_count_what_is_absent() -> None:
    rows = {"a": sample(5), "b": sample(5)}
    rows["b"][2] = 0
    ids = {"a": range(5), "b": range(3, 8)}
    files = data.open(rows, ids=ids, join="outer")
    assert files.scan()["b"].zero == 1
    rows["b"][4, 3] = torch.nan
    with pytest.raises(ValueError, match="tensor of 'b' must be finite, but 1 of 8 rows are not; the first is row 4"):
        data.open(rows, ids=ids, join="outer", scan=True)


class Counted(views.PickedReader):
    """Counts what is asked of the file."""

    def __init__(self, whole: Any) -> None:
        super().__init__(whole, np.arange(whole.n_rows))
        self.reads: list[tuple[int, int]] = []

    def read(self, spans: Any, out: Tensor, check_finite: bool) -> None:
        self.reads += spans
        super().read(spans, out, check_finite)


@pytest.mark.parametrize("granule", [1, 32])
def test_neighbours_are_read_together_and_chunks_once(granule: int) -> None:
    rows = sample(20_000, 500)
    files = data.open({"a": rows})
    counted = Counted(files.readers["a"])
    counted.granule = granule
    every_other = torch.randperm(10_000, generator=torch.Generator().manual_seed(0)).numpy() * 2
    picked = views.PickedReader(counted, every_other)
    assert torch.equal(picked.rows(0, 10_000), rows[every_other])
    assert len(counted.reads) < 100, "half a megabyte at a time"
    if granule > 1:
        starts = [start // granule for start, _ in counted.reads]
        assert len(set(starts)) == len(starts), "no chunk is read twice"
    counted.reads.clear()
    far = np.arange(0, 20_000, 1000)[::-1].copy()
    assert torch.equal(views.PickedReader(counted, far).rows(0, 20), rows[far])
    assert counted.reads == [(row, row + 1) for row in far[::-1].tolist()], "what lies between is not read"


M = 3000
WINDOWED = 17_000_000  # bytes: below what all rows, their places and reading them take


@pytest.fixture
def disordered(tmp_path: Path) -> dict[str, Any]:
    """Arguments of open: stream b lacks a sixth of the samples, has some of its own, and is in another order."""
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))[: M - 1000]
    np.save(tmp_path / "a.npy", numbered(M, 300).numpy())
    b = torch.cat([numbered(M, 200)[order], numbered(500, 200, M)])
    path = WRITERS["hdf5, gzip"](tmp_path / "b", b)
    ids = {"a": np.arange(M), "b": np.append(order.numpy(), np.arange(M, M + 500))}
    return {"sources": {"a": tmp_path / "a.npy", "b": path}, "ids": ids}


@pytest.mark.parametrize("memory", [WINDOWED, 2**28])
@pytest.mark.parametrize("join", ["inner", "outer"])
def test_joined_batches_hold_every_sample_once_with_its_own_rows(
    disordered: dict[str, Any], join: Any, memory: int
) -> None:
    files = data.open(**disordered, join=join)
    whole = files.rows(0, files.n_rows)
    loader = data.Loader(files, 70, memory=memory, n_threads=2)
    assert (loader.plan.n_windows == 1) == (memory > WINDOWED)
    for _ in range(2):
        seen, present = [], []
        for x, which in loader.batches():
            seen.append(x)
            present.append(torch.ones(len(x), 2, dtype=torch.bool) if which is None else which)
        x, which = torch.cat(seen), torch.cat(present)
        assert bool(which.all()) == (join == "inner")
        columns = torch.where(which[:, :1], x[:, :2], x[:, 300:302])  # of a stream that is there
        assert torch.equal(x[:, :2][which.all(1)], x[:, 300:302][which.all(1)])
        sample_ = (columns[:, 0] + 1000 * columns[:, 1]).long()
        assert len(sample_.unique()) == files.n_rows
        assert (x[~which[:, 0], :300] == 0).all()
        assert (x[~which[:, 1], 300:] == 0).all()
        key = (whole[:, 2] if join == "inner" else whole.sum(1)).double()
        mine = (x[:, 2] if join == "inner" else x.sum(1)).double()
        assert torch.allclose(key.sort().values, mine.sort().values, atol=1e-3)


def test_absence_must_be_asked_for(disordered: dict[str, Any]) -> None:
    loader = data.Loader(data.open(**disordered, join="outer"), 70)
    with pytest.raises(ValueError, match=r"some are absent: iterate over loader\.batches\(\), which says which"):
        next(iter(loader))
    complete = data.Loader(data.open(**disordered, join="inner"), 70)
    for x, (same, present) in zip(complete, data.Loader(complete.files, 70).batches(), strict=True):
        assert torch.equal(x, same)
        assert present is None


@pytest.mark.parametrize("memory", [WINDOWED, 2**28])
def test_an_interrupted_joined_run_goes_on_with_the_same_batches(disordered: dict[str, Any], memory: int) -> None:
    files = data.open(**disordered, join="outer")
    first = data.Loader(files, 70, memory=memory, seed=3, n_threads=2)
    for _ in range(5):
        next(first.batches())
    second = data.Loader(files, 70, memory=memory, n_threads=1)
    second.load_state_dict(first.state_dict())
    for (x, present), (same, too) in zip(first.batches(), second.batches(), strict=True):
        assert torch.equal(x, same)
        assert torch.equal(present, too)


def test_a_joined_row_that_is_not_finite_is_named_as_in_its_file(disordered: dict[str, Any]) -> None:
    rows = numbered(M, 200)
    rows[1234, 7] = torch.nan
    sources = {"a": disordered["sources"]["a"], "b": rows}
    files = data.open(sources, ids={"a": np.arange(M), "b": np.arange(M)[::-1]}, join="inner")
    with pytest.raises(ValueError, match="tensor of 'b' must be finite, but row 1234 is not"):
        list(data.Loader(files, 70, memory=WINDOWED))
