"""Samples that lack a stream, and zero rows, which stand for that: trained, calibrated and validated on what is there."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training_command import main
from torch import Tensor
from training_runs import D, assert_same_results, rows, save_rows, trained
from training_runs import config as windowed

import sparc_fast as sf
from sparc_fast import data
from sparc_fast.data import AlignedFiles, Loader
from sparc_fast.data.absence import mark_zero_rows
from sparc_fast.data.readers import TensorReader
from sparc_fast.training import Config, Trainer, read_config, read_metrics
from sparc_fast.training.trainer import calibrate
from sparc_fast.training.validation import hold_out, validate

N = 1200


ALL_ROWS = 2**28
"""Memory for them, so that the order is the same whether they are joined or not."""


def config(**changes: Any) -> Config:
    return windowed(memory=ALL_ROWS, **changes)


def lacking(n: int = N) -> tuple[dict[str, Tensor], Tensor]:
    """(samples, present): a tenth lacks a, another tenth b; where they lack it, rows are 0."""
    streams, present = rows(n), torch.ones(n, 2, dtype=torch.bool)
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    for s, name in enumerate(D):
        of_stream = chosen[s * n // 10 : (s + 1) * n // 10]
        present[of_stream, s] = False
        streams[name][of_stream] = 0
    return streams, present


def joined(n: int = N) -> AlignedFiles:
    """The same by identifiers: each stream's file holds only the rows it has."""
    streams, present = lacking(n)
    kept = {name: present[:, s].nonzero()[:, 0] for s, name in enumerate(D)}
    files = data.open({s: streams[s][kept[s]] for s in D}, ids=dict(kept), join="outer")
    assert files.present is not None
    order = torch.cat([kept["a"], kept["b"][~present[kept["b"], 0]]])
    assert torch.equal(files.present, present[order])
    return files


def in_that_order() -> AlignedFiles:
    """Zero rows for what is absent in `joined`, in its order."""
    files = joined()
    return data.open(dict(zip(D, files.rows(0, N).split(list(D.values()), 1), strict=True)))


def test_a_run_on_samples_that_lack_streams_is_the_loop_one_would_write_by_hand(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"support_dropout": 0.0, "k_start": 0, "k_ramp": 0.0, "cross_loss_ramp": 0.0}
    settings = {**plain, "validation_rows": 0, "decay": "constant", "warmup": 0.0, "steps": 10, "log_every": 10}
    found = run(tmp_path, joined(), **settings).model.state_dict()
    torch.manual_seed(0)
    model = sf.SPARC(D, 64, 3, auxk=8, dead_after=400)
    with Loader(joined(), 32, seed=0, memory=ALL_ROWS, last="drop") as loader:
        calibrate(model, loader, 500)
        optimizer = sf.SparcAdam(model, lr=1e-2)
        pairs, losses = torch.zeros(2, 2), []
        for _, (x, present) in zip(range(10), loader.batches(), strict=False):
            assert present is not None
            losses.append(optimizer.step(x, present=present))
            pairs += losses[-1].nmse
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["train"]["nmse"]["a -> b"] == pytest.approx(float(pairs[0, 1]) / 10)
    assert record["train"]["loss"] == pytest.approx(sum(float(loss.total) for loss in losses) / 10)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 3}, {"lazy": True}, {"calibrate": False}], ids=str)
def test_zero_rows_train_as_streams_that_are_absent(changes: dict[str, Any], tmp_path: Path) -> None:
    changes = {**changes, "steps": 20}
    said = r"rows measured of '[ab]' are zero \(row .*they count as absent"
    with pytest.warns(UserWarning, match=said) if changes.get("calibrate", True) else nullcontext():
        zeros = run(tmp_path / "zeros", in_that_order(), **changes)
    absent = run(tmp_path / "absent", joined(), **changes)
    for name, tensor in absent.model.state_dict().items():
        assert torch.equal(zeros.model.state_dict()[name], tensor), name
    without_counts = [[strip(r) for r in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("zeros", "absent")]
    assert without_counts[0] == without_counts[1]
    counted = [r["train"]["zero_rows"] for r in read_metrics(tmp_path / "zeros" / "metrics.jsonl") if "train" in r]
    assert sum(counted) > 100


def run(folder: Path, files: AlignedFiles, **changes: Any) -> Trainer:
    return trained(folder, files, memory=ALL_ROWS, **changes)


def strip(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "train": {**record["train"], "zero_rows": 0}} if "train" in record else record


def test_zero_rows_may_be_kept_as_they_are(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="are zero .*: they are trained on"):
        kept = run(tmp_path / "kept", in_that_order(), zero_rows="keep", steps=3)
    train, _ = hold_out(in_that_order(), 100)
    with Loader(train, 32, seed=0, memory=ALL_ROWS, last="drop") as loader:
        measured = torch.cat(list(loader))[:500]
    assert torch.allclose(kept.model.input_mean, measured.mean(0), rtol=1e-5, atol=1e-7)


def test_a_sample_of_nothing_but_zeros_is_left_out(tmp_path: Path) -> None:
    streams = rows(64)
    for stream in streams.values():
        stream[7:40] = 0
    settings = config(batch_size=64, steps=2, validation_rows=0, calibrate=False)
    with Trainer(settings, tmp_path, files=data.open(streams)) as trainer:
        trainer.run()
        found = validate(trainer.model, data.open(streams), 16, 1.0, "absent")
    assert found["rows"] == 31
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]["train"]
    assert record["zero_rows"] == 2 * 2 * 33


def test_calibration_measures_what_is_there() -> None:
    streams, present = lacking()
    model = sf.SPARC(D, 8, 2)
    with Loader(joined(), 64) as loader:
        assert calibrate(model, loader, 10**6) == {}
    for s, (name, mean) in enumerate(zip(D, model.input_mean.split(list(D.values())), strict=True)):
        there = streams[name][present[:, s]].double()
        assert torch.allclose(mean.double(), there.mean(0), rtol=1e-5, atol=1e-6)
        rms = (there - there.mean(0)).square().sum(1).mean().sqrt()
        assert float(model.input_rms[s]) == pytest.approx(float(rms), rel=1e-6)


def test_zero_rows_are_named_where_they_lie(tmp_path: Path) -> None:
    streams = rows(600)
    streams["b"][[3, 17, 21, 590]] = 0
    for i, part in enumerate(streams["b"].split(300)):
        np.save(tmp_path / f"b_{i}.npy", part.numpy())
    np.save(tmp_path / "a.npy", streams["a"].numpy())
    paths = {"a": str(tmp_path / "a.npy"), "b": str(tmp_path / "b_*.npy")}
    message = r"4 of the rows measured of 'b' are zero \(row 3 of .*b_0\.npy, row 17 of .*, row 21 of .*b_0\.npy, …\): they count"
    settings = config(data=paths, steps=1, validation_rows=0, calibration_rows=600, batch_size=30)
    with Trainer(settings, tmp_path / "run") as trainer, pytest.warns(UserWarning, match=message):
        trainer.run()


def test_a_stream_of_nothing_but_zeros_cannot_be_calibrated(tmp_path: Path) -> None:
    files = data.open({"a": torch.randn(100, 300), "b": torch.zeros(100, 200)})
    with (
        Trainer(config(steps=1, validation_rows=0), tmp_path, files=files) as trainer,
        pytest.raises(ValueError, match="data must have rows of 'b' that are not zero to be calibrated, got none"),
    ):
        trainer.run()


@torch.no_grad()
@pytest.mark.parametrize("selection", ["global", "local"])
def test_validation_is_a_mean_over_the_samples_that_have_both_streams(selection: Any) -> None:
    model = sf.SPARC(D, 64, 3, selection=selection)
    files = joined(400)
    x, present = files.rows(0, 400), files.present
    assert present is not None
    model.calibrate(x)
    found = validate(model, files, 70, cross_loss_coef=0.5)
    both = present.all(1)
    model.eval()
    joint = model.loss(x, present=present).nmse
    assert found["cross"] == pytest.approx(float(model.loss(x[both]).cross), rel=1e-5)  # type: ignore[arg-type]
    assert found["self"] == pytest.approx(float(joint.diagonal().mean()), rel=1e-5)
    streams = dict(zip(D, x.split(list(D.values()), 1), strict=True))
    alone = [float(model.loss({name: streams[name][present[:, s]]}).self) for s, name in enumerate(D)]
    assert found["single_self"] == pytest.approx(sum(alone) / 2, rel=1e-5)
    assert found["rows"] == 400


def test_held_out_rows_keep_what_they_lack() -> None:
    files = joined(400)
    train, validation = hold_out(files, 100)
    for part in (train, validation):
        assert part.present is not None
        x = part.rows(0, part.n_rows)
        filled = torch.stack([(x[:, :300] != 0).any(1), (x[:, 300:] != 0).any(1)], 1)
        assert torch.equal(part.present, filled)
        assert part.matched is files.matched
    with Loader(train, 32) as loader:
        for x, present in loader.batches():
            assert present is not None
            assert torch.equal(present[:, 0], (x[:, :300] != 0).any(1))


def test_rows_of_one_sample_stay_on_one_side() -> None:
    images, captions = torch.randn(50, 4), torch.randn(250, 3)
    images[:, 0] = torch.arange(50)
    ids = {"a": range(50), "b": np.repeat(np.arange(50), 5)}
    files = data.open({"a": images, "b": captions}, ids=ids, join="inner", repeated="all")
    train, validation = (set(part.rows(0, part.n_rows)[:, 0].tolist()) for part in hold_out(files, 103))
    assert validation
    assert not train & validation
    chunked = TensorReader(torch.randn(20, 3), "rows")
    chunked.granule = 7
    with pytest.raises(ValueError, match="validation_rows must be at least the rows of a sample"):
        hold_out(AlignedFiles({"a": chunked}, groups=np.array([0, 20])), 8)


def test_one_probe_in_a_row_is_not_enough_to_be_zero() -> None:
    x = torch.zeros(40, 30)
    for n in range(30):
        x[n, n] = 1e-30
    x[30] = -0.0
    present, zero = mark_zero_rows(x, None, {"a": 30})
    assert zero is not None
    assert zero[:, 0].tolist() == [False] * 30 + [True] * 10
    assert torch.equal(present, ~zero)  # type: ignore[arg-type]
    assert mark_zero_rows(x[:30], None, {"a": 30}) == (None, None)


def test_the_command_joins_by_ids_says_what_matched_and_goes_on_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    streams, order = rows(500), torch.randperm(500, generator=torch.Generator().manual_seed(0))[:400]
    np.save(tmp_path / "a.npy", streams["a"].numpy())
    for i in range(2):
        np.save(tmp_path / f"b_{i}.npy", streams["b"][order[i * 200 : (i + 1) * 200]].numpy())
    (tmp_path / "a.txt").write_text("\n".join(f"image {n}" for n in range(500)))
    (tmp_path / "b.txt").write_text("\n".join(f"image {n}" for n in order.tolist()))
    monkeypatch.chdir(tmp_path)
    settings = ["--n-latents", 64, "--k", 3, "--batch-size", 32, "--progress", "none", "--validation-rows", 50]
    given = ["--data", "a=a.npy", "--data", "b=b_*.npy", "--ids", "a=a.txt", "b=b.txt", "--join", "outer", "--steps", 8]
    assert main("--out", "run", *settings, *given) == 0
    printed = capsys.readouterr().out
    assert "500 samples joined by id: 500 of 500 rows of 'a'; 400 of 400 rows of 'b', absent in 100" in printed
    assert main("--out", "inner", *settings, *given, "--join", "inner") == 0
    assert "400 samples joined by id: 400 of 500 rows of 'a'; 400 of 400 rows of 'b'" in capsys.readouterr().out
    kept = read_config(tmp_path / "run" / "config.json")
    assert (kept.join, kept.ids) == ("outer", {"a": str(tmp_path / "a.txt"), "b": str(tmp_path / "b.txt")})
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert main("--out", "../run", "--progress", "none") == 0
    assert main("--out", "../again", *settings, "--steps", 8, "--join", "outer", "--data", "a=../a.npy",
                f"b={tmp_path}/b_0.npy,{tmp_path}/b_1.npy", "--ids", "a=../a.txt", "--ids", "b=../b.txt") == 0  # fmt: skip
    metrics = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("run", "again")]
    assert metrics[0] == metrics[1]


def test_a_run_made_in_python_with_relative_paths_goes_on_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_rows(tmp_path, 300)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = config(data={"a": "a.npy", "b": "b.npy"}, validation_rows=0, steps=6, batch_size=32)
    for folder in ("whole", "run"):
        with Trainer(settings, folder) as trainer:
            if folder == "whole":
                trainer.run()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main("--out", tmp_path / "run", "--progress", "none") == 0
    assert_same_results(tmp_path / "run", tmp_path / "whole")
