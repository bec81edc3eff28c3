"""Held-out rows: every row is in one of the two parts, and is what it was."""

from __future__ import annotations

import pytest
import torch
from training_runs import D, files, rows

from sparc_fast import data
from sparc_fast.data import AlignedFiles, Loader
from sparc_fast.data.readers import TensorReader
from sparc_fast.training.validation import hold_out


def numbered(n: int, granule: int = 1) -> AlignedFiles:
    reader = TensorReader(torch.arange(n, dtype=torch.float32)[:, None], "numbers")
    reader.granule = granule
    return AlignedFiles({"a": reader})


@pytest.mark.parametrize("n", [2, 3, 65, 129, 1000, 1001])
@pytest.mark.parametrize("granule", [1, 7])
def test_every_row_is_in_one_part(n: int, granule: int) -> None:
    for held in {1, n // 10 or 1, n // 2}:
        train, validation = hold_out(numbered(n, granule), held)
        unit = granule if granule <= held else 1
        assert validation.n_rows == held // unit * unit
        both = [part.rows(0, part.n_rows)[:, 0].long() for part in (train, validation)]
        assert torch.equal(torch.cat(both).sort().values, torch.arange(n))
        for part in both:
            assert torch.equal(part, part.sort().values)
        firsts = both[1][both[1].diff(prepend=both[1][:1] - 2) > 1]
        assert (firsts % unit == 0).all()


def test_held_out_rows_come_from_everywhere_in_the_file() -> None:
    _, validation = hold_out(numbered(6400), 128)
    found = validation.rows(0, 128)[:, 0]
    assert torch.equal((found // 100).long(), torch.arange(64).repeat_interleave(2))


def test_any_range_of_a_part_is_read_in_one_piece_or_several() -> None:
    train, _ = hold_out(numbered(300), 75)
    whole = train.rows(0, train.n_rows)
    for start in range(0, train.n_rows, 13):
        for stop in (start, start + 1, min(start + 50, train.n_rows), train.n_rows):
            assert torch.equal(train.rows(start, stop), whole[start:stop])


def test_a_loader_never_gives_a_held_out_row() -> None:
    train, validation = hold_out(files(1000), 100)
    held = {tuple(row) for row in validation.rows(0, 100)[:, :3].tolist()}
    assert train.d_streams == D
    seen = torch.cat(list(Loader(train, 90)))
    assert len(seen) == 900
    expected = torch.cat(list(rows(1000).values()), 1)
    assert torch.equal(torch.cat([seen, validation.rows(0, 100)]).sum(0).round(), expected.sum(0).round())
    duplicates = {tuple(row) for row in train.rows(0, 900)[:, :3].tolist()} & held  # rows equal by their concepts
    assert {tuple(row) for row in seen[:, :3].tolist()} & held == duplicates


def test_more_than_half_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="validation_rows must be between 1 and 5, half of the rows, got 6"):
        hold_out(data.open({"a": torch.randn(10, 2)}), 6)
