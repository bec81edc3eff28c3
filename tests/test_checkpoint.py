"""A saved model comes back whole, or an error says why not, and nothing that was there is lost."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sparc_fast as sf
from sparc_fast import checkpoint
from sparc_fast.files import atomic_path


def make(dtype: torch.dtype) -> sf.SPARC:
    torch.manual_seed(0)
    model = sf.SPARC({"a": 5, "b": 3}, 16, 4, selection="local", auxk=3, dead_after=7, dtype=dtype)
    model.calibrate(torch.randn(20, 8) * 3 + 1)
    model.loss(torch.randn(6, 8))
    return model


@pytest.fixture
def model() -> sf.SPARC:
    return make(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make(dtype)
    model.save(tmp_path / "new folder" / "model.safetensors")
    loaded = sf.SPARC.load(tmp_path / "new folder" / "model.safetensors")
    assert loaded.config() == model.config()
    assert loaded.is_calibrated
    for (name, tensor), (other_name, other) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other)
    x = torch.randn(4, 8)
    assert torch.equal(loaded.translate(x, "a", "b"), model.translate(x, "a", "b"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.safetensors"):
        sf.SPARC.load(tmp_path / "nothing.safetensors")


def test_a_truncated_file_is_refused_whatever_is_missing(model: sf.SPARC, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model.save(path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or foreign"):
            sf.SPARC.load(path)


def test_equal_models_are_equal_files(model: sf.SPARC, tmp_path: Path) -> None:
    contents = set()
    for n in range(8):
        model.save(tmp_path / f"{n}.safetensors")
        contents.add((tmp_path / f"{n}.safetensors").read_bytes())
    assert len(contents) == 1


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="saved by sparc_fast"):
        sf.SPARC.load(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("not a checkpoint at all")
    with pytest.raises(ValueError, match="truncated or foreign"):
        sf.SPARC.load(tmp_path / "text.safetensors")


def test_a_file_without_a_sound_configuration_is_refused(model: sf.SPARC, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for config in ("", "{"):
        save_file(dict(model.state_dict()), path, metadata={checkpoint.FORMAT: config})
        with pytest.raises(ValueError, match="has no configuration"):
            sf.SPARC.load(path)
    checkpoint.save(path, model.state_dict(), {**model.config(), "d_streams": [5, 3]})
    with pytest.raises(ValueError, match="does not fit"):
        sf.SPARC.load(path)


def test_loading_leaves_the_random_numbers_alone(model: sf.SPARC, tmp_path: Path) -> None:
    model.save(tmp_path / "model.safetensors")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sf.SPARC.load(tmp_path / "model.safetensors")
    assert torch.equal(torch.rand(3), expected)


def test_models_and_optimizers_can_be_copied_and_pickled(model: sf.SPARC) -> None:
    model.train()
    optimizer = sf.SparcAdam(model, lr=1e-2)
    optimizer.step(torch.randn(6, 8))
    x = torch.randn(6, 8)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    assert torch.equal(pickle.loads(pickle.dumps(model)).W_enc, model.W_enc)
    optimizer.step(x)
    for other in copies:
        other.step(x)
        assert torch.equal(other.model.W_enc, model.W_enc)


def test_a_link_stays_a_link(model: sf.SPARC, tmp_path: Path) -> None:
    model.save(tmp_path / "first.safetensors")
    (tmp_path / "latest.safetensors").symlink_to("first.safetensors")
    with torch.no_grad():
        model.pre_bias.add_(1)
    model.save(tmp_path / "latest.safetensors")
    assert (tmp_path / "latest.safetensors").is_symlink()
    assert torch.equal(sf.SPARC.load(tmp_path / "first.safetensors").pre_bias, model.pre_bias)


def test_weights_that_do_not_fit_the_configuration_are_refused(model: sf.SPARC, tmp_path: Path) -> None:
    config = {**model.config(), "n_latents": 17}
    checkpoint.save(tmp_path / "model.safetensors", model.state_dict(), config)
    with pytest.raises(ValueError, match="does not fit"):
        sf.SPARC.load(tmp_path / "model.safetensors")
    checkpoint.save(tmp_path / "model.safetensors", model.state_dict(), {**model.config(), "colour": 1})
    with pytest.raises(ValueError, match="colour"):
        sf.SPARC.load(tmp_path / "model.safetensors")


def test_a_save_that_fails_leaves_the_previous_file_and_no_litter(
    model: sf.SPARC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    model.save(path)
    before = path.read_bytes()

    def full_disk(source: object, destination: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with torch.no_grad():
        model.W_enc.add_(1)
    with pytest.raises(OSError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_interrupted_write_leaves_the_previous_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_folder_is_named(model: sf.SPARC, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(OSError, match=r"cannot write .*model\.safetensors"):
        model.save(tmp_path / "file" / "model.safetensors")
    with pytest.raises(IsADirectoryError, match=r"cannot write .*: Is a directory"):
        model.save(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_a_file_may_be_read_by_whom_the_umask_says(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        make(torch.float32).save(tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
