"""Checkpoints: what is kept, what a full disk leaves, and that a damaged one is never taken for whole."""

from __future__ import annotations

import errno
import pickle
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch
from training_runs import assert_same_results, config, files, trained

from sparc_fast import SPARC
from sparc_fast.training import Trainer, checkpoints, load_model, read_metrics

STATE = {"step": 3, "best": None, "loader": {"d_streams": {"b": 1, "a": 2}}}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        return {
            "x": torch.randn(7, 5, generator=generator),
            "narrow": torch.randn(9, generator=generator).bfloat16(),
            "step": torch.tensor(4.0),
            "none": torch.empty(0, 3),
            "count": torch.arange(6),
        }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return trained(tmp_path_factory.mktemp("run"))


def test_a_checkpoint_comes_back_bit_for_bit_with_its_state_in_order_and_equal_ones_are_equal_files(
    tmp_path: Path,
) -> None:
    for name in ("first", "second"):
        checkpoints.write(tmp_path / name, tensors(), STATE)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    found, state = checkpoints.read(tmp_path / "first")
    assert state == STATE
    assert list(state["loader"]["d_streams"]) == ["b", "a"]
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_large_tensors_are_hashed_in_pieces_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "HASHED_TOGETHER", 16)
    monkeypatch.setattr(checkpoints, "AT_ONCE", 6)
    checkpoints.write(tmp_path / "c", tensors(), STATE)
    checkpoints.read(tmp_path / "c")
    content = bytearray((tmp_path / "c").read_bytes())
    content[-1] ^= 1  # the last piece counts too
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ValueError, match="another hash"):
        checkpoints.read(tmp_path / "c")


def test_any_change_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoints.write(path, tensors(), STATE)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    in_state = whole.index(b'step\\": 3') + len(b'step\\": ')
    assert in_state < 8 + length
    for at in (in_state, 8 + length, len(whole) - 1):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged"):
            checkpoints.read(path)
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or damaged"):
            checkpoints.read(path)


def test_foreign_files_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    safetensors.torch.save_file(tensors(), tmp_path / "other")
    with pytest.raises(ValueError, match=r"must be a checkpoint of a training run \(sparc_fast.training/1\)"):
        checkpoints.read(tmp_path / "other")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(ValueError, match="truncated or damaged"):
        checkpoints.read(tmp_path / "pickle")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        checkpoints.read(tmp_path / "nothing")


def test_whoever_takes_a_run_for_a_model_is_told_what_reads_it_and_its_records_are_found(
    finished: Trainer, tmp_path: Path
) -> None:
    folder = finished.folder
    for path in (folder.path, folder.checkpoint(finished.step)):
        assert load_model(path).n_latents == finished.model.n_latents
        with pytest.raises(
            (ValueError, FileNotFoundError), match=r"load_model reads a run's folder and its checkpoints"
        ):
            SPARC.load(path)
    assert read_metrics(folder.path) == read_metrics(folder.metrics) != []
    with pytest.raises(FileNotFoundError, match=r"path must be a run's folder or its metrics\.jsonl, but there is no"):
        read_metrics(tmp_path / "nowhere")


def test_the_newest_and_the_best_checkpoint_are_kept(finished: Trainer) -> None:
    folder = finished.folder
    records = [record for record in read_metrics(folder.metrics) if "validation" in record]
    figures = {record["step"]: record["validation"]["single_loss"] for record in records}
    assert list(figures) == [16, 32, 40]
    best = min(figures, key=lambda step: figures[step])
    assert finished.best == (best, figures[best])
    assert folder.steps() == sorted({best, 35, 40})
    saved = load_model(folder.checkpoint(best))
    assert torch.equal(saved.W_dec, type(saved).load(folder.best).W_dec)
    assert saved.k == 3
    assert not saved.training


def test_a_best_checkpoint_outlives_newer_ones(tmp_path: Path) -> None:
    trainer = trained(tmp_path, keep=1, lr=30.0, warmup=1.0, validate_every=4)  # it only gets worse
    assert trainer.best is not None
    assert trainer.best[0] < 35
    assert trainer.folder.steps() == [trainer.best[0], 40]


@pytest.mark.parametrize("how", ["a write that the system refuses", "no space left"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_says_so(
    how: str, finished: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = checkpoints.write
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def refused(path: Path, *content: object) -> None:
        if path.name != "step-000000015.safetensors":
            written(path, *content)  # type: ignore[arg-type]
        elif how == "no space left":
            with monkeypatch.context() as patch:
                patch.setattr(safetensors.torch, "save_file", full)
                written(path, *content)  # type: ignore[arg-type]
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            try:
                written(path, *content)  # type: ignore[arg-type]
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    none = r"No space left on device; there is none before it, and the same command begins again"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", full)
        with Trainer(config(), tmp_path / "none", files=files()) as trainer, pytest.raises(OSError, match=none):
            trainer.run()
    monkeypatch.setattr(checkpoints, "write", refused)
    message = (
        r"cannot write the checkpoint .*15.*(File too large|No space left).*; the last one, step-000000010\..* is whole"
    )
    with Trainer(config(), tmp_path / "full", files=files()) as trainer, pytest.raises(OSError, match=message):
        trainer.run()
    assert [path.name for path in trainer.folder.checkpoints.iterdir() if path.name.startswith(".")] == []
    assert trainer.folder.steps() == [5, 10]
    monkeypatch.undo()
    trained(tmp_path / "full")
    assert_same_results(tmp_path / "full", finished.folder.path)


def test_a_checkpoint_holds_bfloat16_moments_and_is_a_third_smaller(tmp_path: Path) -> None:
    exact, narrow = (
        trained(tmp_path / moments, steps=5, moments=moments).folder.checkpoint(5)
        for moments in ("float32", "bfloat16")
    )
    tensors, _ = checkpoints.read(narrow)
    for name, tensor in tensors.items():
        if "exp_avg" in name:
            assert tensor.dtype == (torch.bfloat16 if ".W_" in name else torch.float32), name
    assert narrow.stat().st_size / exact.stat().st_size == pytest.approx(2 / 3, abs=0.03)


def test_the_best_model_is_written_from_file_to_file_as_the_model_itself_would_be(
    finished: Trainer, tmp_path: Path
) -> None:
    checkpoint = finished.folder.checkpoint(finished.step)
    checkpoints.save_model_of(checkpoint, tmp_path / "copied.safetensors")
    load_model(checkpoint).save(tmp_path / "loaded.safetensors")
    assert (tmp_path / "copied.safetensors").read_bytes() == (tmp_path / "loaded.safetensors").read_bytes()


def test_half_written_files_of_a_killed_process_are_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-000000005.safetensors.123-abc").write_bytes(b"half")
    with Trainer(config(), tmp_path, files=files()) as trainer:
        assert list(trainer.folder.checkpoints.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to the run's folder .*file"):
        Trainer(config(), tmp_path / "file", files=files())
