"""Rows that are the same samples come together by their identifiers, however they lie in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_files import WRITERS, sample
from torch import Tensor

from sparc_fast import data
from sparc_fast.data import Match, views

N, WIDTH = 103, 7


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
        with data.open(sources, ids=ids, join=join) as files:  # type: ignore[arg-type]
            x, present = expected(rows, ids, samples)
            assert files.n_rows == len(samples)
            assert torch.equal(files.rows(0, len(samples)), x)
            assert torch.equal(files.rows(3, 40), x[3:40])
            assert (files.present is None) if join == "inner" else torch.equal(files.present, present)  # type: ignore[arg-type]


def test_a_join_says_what_matched(tmp_path: Path) -> None:
    rows = {"a": sample(6), "b": sample(4), "c": sample(6)}
    ids = {"a": list(range(6)), "b": [5, 4, 9, 8], "c": list(range(6))}
    inner, outer = (data.open(rows, ids=ids, join=join) for join in ("inner", "outer"))  # type: ignore[arg-type]
    assert inner.matched is not None
    assert inner.matched.streams == {"a": Match(6, 2, 0), "b": Match(4, 2, 0), "c": Match(6, 2, 0)}
    words = "2 samples joined by id: 2 of 6 rows of 'a'; 2 of 4 rows of 'b'; 2 of 6 rows of 'c'"
    assert str(inner.matched) == words
    words = "8 samples joined by id: 6 of 6 rows of 'a', absent in 2; 4 of 4 rows of 'b', absent in 4; 6 of 6 rows of 'c', absent in 2"
    assert str(outer.matched) == words
    assert data.open({"a": rows["a"], "c": rows["c"]}).matched is None


def test_files_in_the_same_order_are_read_as_they_are(tmp_path: Path) -> None:
    rows = {"a": sample(20), "b": sample(20), "c": sample(19)}
    files = data.open(rows, ids={"a": range(20), "b": range(20), "c": range(1, 20)}, join="outer")
    assert not isinstance(files.readers["a"], views.PickedReader)
    assert not isinstance(files.readers["b"], views.PickedReader)
    assert isinstance(files.readers["c"], views.PickedReader)


def test_ids_must_be_unique_to_be_joined_and_the_first_double_is_named() -> None:
    rows = {"a": sample(5), "b": sample(5)}
    message = r"ids of 'b' must be unique to be joined, got 'x' in rows 1 and 3; .* repeated must be"
    with pytest.raises(ValueError, match=message):
        data.open(rows, ids={"a": list("vwxyz"), "b": list("vxwxv")}, join="inner")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"join": "left", "ids": {"a": [0], "b": [0]}}, 'join must be None, "inner" or "outer", got \'left\''),
        ({"join": "inner"}, "ids must be given to join by, got None with join='inner'"),
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
    assert files.present is not None
    assert files.present.tolist() == [[True, False]] * 5


def test_a_hash_beyond_int64_is_no_negative_number() -> None:
    rows = {"a": sample(2), "b": sample(2)}
    with pytest.raises(ValueError, match="must match those of 'a' row by row, got '-1' and '18446744073709551615'"):
        data.open(rows, ids={"a": np.array([2**64 - 1, 5], np.uint64), "b": np.array([-1, 5])})


def test_a_scan_of_joined_files_does_not_count_what_is_absent(tmp_path: Path) -> None:
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
    assert len(counted.reads) < 50, "a megabyte at a time"
    if granule > 1:
        starts = [start // granule for start, _ in counted.reads]
        assert len(set(starts)) == len(starts), "no chunk is read twice"
    counted.reads.clear()
    far = np.arange(0, 20_000, 1000)[::-1].copy()
    assert torch.equal(views.PickedReader(counted, far).rows(0, 20), rows[far])
    assert counted.reads == [(row, row + 1) for row in far[::-1].tolist()], "what lies between is not read"
