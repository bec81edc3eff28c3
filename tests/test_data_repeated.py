"""Several rows of one identifier, such as the captions of an image: one drawn in every epoch, or each a sample."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_files import WRITERS
from torch import Tensor
from training_runs import Recorder, assert_same_results

from sparc_fast import data
from sparc_fast.data.budget import Needs
from sparc_fast.data.views import SampledReader
from sparc_fast.training import Config, Trainer

N, CAPTIONS = 400, 5


def images(width: int = 6) -> Tensor:
    rows = torch.randn(N, width, generator=torch.Generator().manual_seed(0), device="cpu")
    rows[:, 0] = torch.arange(N)
    return rows


def captions(counts: list[int], order: Tensor | None = None, width: int = 4) -> tuple[Tensor, np.ndarray]:
    """(rows whose first numbers are the image's and the caption's, the images)"""
    of_image = torch.arange(N).repeat_interleave(torch.tensor(counts))
    nth = torch.cat([torch.arange(count) for count in counts])
    rows = torch.randn(len(of_image), width, generator=torch.Generator().manual_seed(1), device="cpu")
    rows[:, 0], rows[:, 1] = of_image, nth
    if order is not None:
        rows, of_image = rows[order], of_image[order]
    return rows, of_image.numpy()


def test_all_makes_each_row_a_sample_and_repeats_the_others() -> None:
    rows, of_image = captions([CAPTIONS] * N)
    files = data.open({"i": images(), "t": rows}, ids={"i": range(N), "t": of_image}, join="inner", repeated="all")
    assert torch.equal(files.rows(0, 5 * N), torch.cat([images().repeat_interleave(5, 0), rows], 1))
    assert str(files.matched) == "400 samples joined by id: 400 of 400 rows of 'i'; 2,000 of 2,000 rows of 't'"
    assert files.readers["t"].title == "tensor of 't'"
    assert not hasattr(files.readers["t"], "numbers"), "captions in order are read as they are"
    reordered, of_image = captions([CAPTIONS] * N, torch.randperm(5 * N, generator=torch.Generator().manual_seed(2)))
    files = data.open({"i": images(), "t": reordered}, ids={"i": range(N), "t": of_image}, join="inner", repeated="all")
    x = files.rows(0, 5 * N)
    assert torch.equal(x[:, 0], x[:, 6])
    assert torch.equal(x[:, 6:].sort(0).values, rows.sort(0).values)


def test_streams_with_equally_many_rows_of_a_sample_go_side_by_side() -> None:
    counts = [1 + n % 4 for n in range(N)]
    (one, of_image), (other, _) = captions(counts), captions(counts, width=3)
    sources = {"i": images(), "t": one, "u": other}
    ids = {"i": range(N), "t": of_image, "u": of_image}
    x = data.open(sources, ids=ids, join="inner", repeated="all").rows(0, sum(counts))
    assert torch.equal(x[:, 6:8], x[:, 10:12])
    files = data.open(sources, ids=ids, join="inner", repeated="sample")
    for x in islice(data.Loader(files, 50), 20):
        assert torch.equal(x[:, 6:8], x[:, 10:12]), "the same caption of both"
    (sources["u"], ids["u"]), (sources["t"], ids["t"]) = captions([2] * N, width=3), captions([3] * N)
    with pytest.raises(ValueError, match=r'repeated="all" takes one row of a sample .*, got 2 of 3 from \'u\''):
        data.open(sources, ids=ids, join="inner", repeated="all")


@pytest.mark.parametrize("in_windows", [True, False])
@pytest.mark.parametrize("kind", ["npy", "hdf5, gzip", "arrow file"])
def test_sample_draws_one_of_an_images_rows_anew_in_every_epoch(tmp_path: Path, kind: str, in_windows: bool) -> None:
    counts = [1 + n % 3 for n in range(N)]
    rows, of_image = captions(counts, torch.randperm(sum(counts), generator=torch.Generator().manual_seed(2)), 1000)
    files = data.open(
        {"i": images(1000), "t": WRITERS[kind](tmp_path / "t", rows)}, ids={"i": range(N), "t": of_image},
        join="inner", repeated="sample",
    )  # fmt: skip
    assert files.n_rows == N
    whole = {(int(row[0]), int(row[1])): row for row in rows}
    memory = Needs.of(files.readers.values(), 64, torch.float32, 2).fixed + (1_500_000 if in_windows else 2**27)
    loader = data.Loader(files, 64, memory=memory, n_threads=2, seed=7)
    assert (loader.plan.n_windows > 1) == in_windows
    drawn: Counter[tuple[int, int]] = Counter()
    for epoch in range(12):
        x = torch.cat(list(loader))
        assert torch.equal(x[:, 0].sort().values, torch.arange(N).float())
        assert torch.equal(x[:, 0], x[:, 1000])
        chosen = [(int(row[1000]), int(row[1001])) for row in x]
        if epoch == 0:
            assert all(torch.equal(x[n, 1000:], whole[one]) for n, one in enumerate(chosen))
        drawn.update(chosen)
    of_two = [drawn[n, 1] for n in range(N) if counts[n] == 2]
    assert abs(np.mean(of_two) - 6) < 5 * np.sqrt(3 / len(of_two)), "each as likely"
    assert len(set(of_two)) > 3
    state = loader.state_dict()
    after = next(iter(loader))
    again = data.Loader(files, 64, memory=memory, n_threads=1)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again)), after), "a function of the seed and the epoch"


def test_without_an_epoch_the_first_row_is_read() -> None:
    rows, of_image = captions([CAPTIONS] * N)
    files = data.open({"i": images(), "t": rows}, ids={"i": range(N), "t": of_image}, join="inner", repeated="sample")
    assert isinstance(files.readers["t"], SampledReader)
    assert torch.equal(files.rows(0, N)[:, 6:], rows[::CAPTIONS])
    assert files.readers["t"].origin(3) == ("tensor of 't'", 15)


def test_an_image_without_captions_lacks_them() -> None:
    counts = [n % 3 for n in range(N)]
    rows, of_image = captions(counts)
    for repeated, n in (("sample", N), ("all", sum(max(1, count) for count in counts))):
        files = data.open({"i": images(), "t": rows}, ids={"i": range(N), "t": of_image}, join="outer",
                          repeated=repeated)  # fmt: skip
        assert files.n_rows == n
        x, present = files.rows(0, n), files.present
        assert torch.equal(present[:, 1], torch.tensor(counts)[x[:, 0].long()] > 0)
        assert (x[~present[:, 1], 6:] == 0).all()
        assert torch.equal(x[present[:, 1], 0], x[present[:, 1], 6])


@pytest.mark.parametrize("repeated", ["sample", "all"])
def test_a_run_on_captions_goes_on_with_the_same_bits(tmp_path: Path, repeated: Any) -> None:
    rows, of_image = captions([CAPTIONS] * N)
    np.save(tmp_path / "i.npy", images().numpy())
    np.save(tmp_path / "t.npy", rows.numpy())
    np.save(tmp_path / "i_ids.npy", np.arange(N))
    np.save(tmp_path / "t_ids.npy", of_image)
    paths = {
        "data": {s: str(tmp_path / f"{s}.npy") for s in "it"},
        "ids": {s: str(tmp_path / f"{s}_ids.npy") for s in "it"},
    }
    config = Config(
        **paths, join="inner", repeated=repeated, n_latents=16, k=2, steps=30, batch_size=50, validation_rows=40,
        validate_every=10, checkpoint_every=7, log_every=5,
    )  # fmt: skip

    def stop() -> None:
        raise KeyboardInterrupt

    with Trainer(config, tmp_path / "whole") as trainer:
        trainer.run()
    with Trainer(config, tmp_path / "broken", sinks=[Recorder(20, stop)]) as trainer, pytest.raises(KeyboardInterrupt):
        trainer.run()
    with Trainer(config, tmp_path / "broken") as trainer:
        assert trainer.step == 14
        trainer.run()
    assert_same_results(tmp_path / "broken", tmp_path / "whole")
