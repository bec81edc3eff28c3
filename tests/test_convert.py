"""Checkpoints of the research code become ours and back with every bit of their weights, and are never unpickled."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from upstream_dense import train_step

import sparc_fast as sf
from sparc_fast import cli, compat, convert

D = {"dino": 7, "clip_txt": 5}
SETTINGS = {"n_latents": 48, "k": 4, "auxk": 6, "topk_type": "global", "dead_steps_threshold": 3, "batch_size": 9}


def upstream(selection: str = "global", steps: int = 8) -> compat.MultiStreamSparseAutoencoder:
    """A model as the research code leaves it after some steps: biases moved, decoder norms off, latents dead."""
    torch.manual_seed(0)
    model = compat.get_sae_model_class(selection)(D, 48, 4, auxk=6, dead_steps_threshold=3, auxk_threshold=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        train_step(model, optimizer, batch(9), helpers=())
    return model


def batch(n: int) -> dict[str, Tensor]:
    return {s: torch.randn(n, d) for s, d in D.items()}


def write(model: compat.MultiStreamSparseAutoencoder, folder: Path, **changes: object) -> Path:
    """What the research code's main.py writes."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "msae_checkpoint.pth")
    files = {"train_stream_feature_files": {"dino": "d.h5", "clip_txt": "t.h5"}, "dataset": "coco"}
    content = {"args": {**SETTINGS, "lr": 1e-4, "seed": 42, **changes}, "config_file_content": files}
    (folder / "run_config.json").write_text(json.dumps(content, indent=4))
    return folder / "msae_checkpoint.pth"


@pytest.mark.parametrize("selection", ["global", "local"])
def test_a_checkpoint_comes_over_and_back_bit_for_bit(selection: str, tmp_path: Path) -> None:
    theirs = upstream(selection)
    ours = convert.from_upstream(write(theirs, tmp_path / "there", topk_type=selection))
    assert ours.config() == {
        "d_streams": D, "n_latents": 48, "k": 4, "selection": selection, "auxk": 6, "dead_after": 27, "check_finite": True,
    }  # fmt: skip
    ours.save(tmp_path / "model.safetensors")
    convert.to_upstream(sf.SPARC.load(tmp_path / "model.safetensors"), tmp_path / "back" / "m.pth", batch_size=9)
    back = torch.load(tmp_path / "back" / "m.pth", weights_only=True)
    assert list(back) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert back[name].is_contiguous()
        if not name.startswith("stats_"):
            assert torch.equal(back[name].view(torch.int32), tensor.contiguous().view(torch.int32)), name
    again = convert.read_config(tmp_path / "back" / "run_config.json")
    assert (again.k, again.auxk, again.topk_type, again.dead_steps_threshold) == (4, 6, selection, 3)


@pytest.mark.parametrize("selection", ["global", "local"])
def test_both_sides_encode_and_reconstruct_alike(selection: str, tmp_path: Path) -> None:
    theirs = upstream(selection)
    ours = convert.from_upstream(write(theirs, tmp_path, topk_type=selection))
    x = batch(20)
    outputs = theirs(x)
    result = ours(x)
    for s in D:
        torch.testing.assert_close(result.codes.dense(s), outputs[f"sparse_codes_{s}"])
        torch.testing.assert_close(result.recons[s, s], outputs[f"recon_{s}"])
    torch.testing.assert_close(result.recons["dino", "clip_txt"], outputs["cross_recon_clip_txt_from_dino"])


def test_latents_dead_in_every_stream_are_dead_on_both_sides(tmp_path: Path) -> None:
    theirs = upstream()
    dead = torch.stack(list(theirs.get_dead_neurons().values())).all(0)
    assert 0 < dead.sum() < 48
    ours = convert.from_upstream(write(theirs, tmp_path))
    assert torch.equal(ours.dead, dead)
    convert.to_upstream(ours, tmp_path / "back.pth", batch_size=9)
    theirs.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True))
    assert torch.equal(torch.stack(list(theirs.get_dead_neurons().values())).all(0), dead)


def test_a_calibration_goes_into_the_weights_when_asked_and_only_then(tmp_path: Path) -> None:
    ours = convert.from_upstream(write(upstream(), tmp_path / "first"))
    ours.calibrate({s: 3 * x + 1 for s, x in batch(50).items()})
    with pytest.raises(ValueError, match=r"model must not be calibrated: .*\(--fold-calibration\)"):
        convert.to_upstream(ours, tmp_path / "second" / "m.pth")
    assert not (tmp_path / "second").exists()
    convert.to_upstream(ours, tmp_path / "second" / "m.pth", fold_calibration=True)
    theirs = compat.MultiStreamSparseAutoencoder(D, 48, 4)
    theirs.load_state_dict(torch.load(tmp_path / "second" / "m.pth", weights_only=True))
    x = {s: 3 * part + 1 for s, part in batch(30).items()}
    outputs, result = theirs(x), ours(x)
    for s in D:
        torch.testing.assert_close(outputs[f"sparse_codes_{s}"], result.codes.dense(s), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs[f"recon_{s}"], result.recons[s, s], rtol=1e-4, atol=1e-4)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("writer", "reason"), [("torch", "mkdir"), ("pickle 2", "mkdir"), ("pickle 4", "Unsupported operand")]
)
def test_a_pickle_that_runs_code_is_refused_without_running_it(writer: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "msae_checkpoint.pth"
    trap = {"encoders.a.weight": Trap(tmp_path / "sprung")}
    if writer == "torch":
        torch.save(trap, path)
    else:
        path.write_bytes(pickle.dumps(trap, protocol=int(writer[-1])))
    with pytest.raises(ValueError, match=rf"path must hold tensors alone, but .* is refused: .*{reason}"):
        convert.from_upstream(path, SETTINGS)
    assert not (tmp_path / "sprung").exists()


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = write(upstream(steps=0), tmp_path)
    whole = path.read_bytes()
    for content in (b"", whole[:10], whole[: len(whole) // 2], b"\x89HDF\r\n\x1a\n" + bytes(100), b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="path must"):
            convert.from_upstream(path)
    for content in ([torch.zeros(2)], {"epoch": 3, "model": {}}, {"weight": torch.zeros(2)}, {}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="path must be a state_dict of the research code"):
            convert.from_upstream(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.pth"):
        convert.from_upstream(tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("decoders.dino.weight", None, r"lacks \['decoders.dino.weight'\] and has nothing besides"),
        ("optimizer", torch.zeros(1), r"lacks nothing and has \['optimizer'\] besides"),
        ("decoders.dino.weight", torch.zeros(48, 7), r"decoders.dino.weight as torch.float32 \[48, 7\], not torch.float32 \[7, 48\]"),
        ("encoders.clip_txt.weight", torch.zeros(47, 5), r"encoders.clip_txt.weight as .* \[47, 5\], not .* \[48, 5\]"),
        ("encoders.dino.weight", torch.zeros(48), r"encoders.dino.weight as .* \[48\], not"),
        ("latent_biases.dino", torch.zeros(48).half(), "latent_biases.dino as torch.float16"),
        ("stats_last_nonzero_dino", torch.zeros(48), "stats_last_nonzero_dino as torch.float32"),
    ],
)  # fmt: skip
def test_a_state_dict_that_does_not_fit_is_named(key: str, tensor: Tensor | None, message: str, tmp_path: Path) -> None:
    path = write(upstream(steps=0), tmp_path)
    tensors = torch.load(path, weights_only=True)
    if tensor is None:
        del tensors[key]
    else:
        tensors[key] = tensor
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=message):
        convert.from_upstream(path)


def test_settings_come_from_the_file_beside_the_checkpoint_or_from_the_caller(tmp_path: Path) -> None:
    path = write(upstream(steps=0), tmp_path, k=5)
    assert convert.from_upstream(path).k == 5
    assert convert.from_upstream(path, {"k": 6, "auxk": None}).auxk == 0
    with pytest.raises(ValueError, match=r"config must say n_latents=48, .* got 64"):
        convert.from_upstream(path, {"n_latents": 64})
    (tmp_path / "run_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*run_config\.json"):
        convert.from_upstream(path)


def test_converting_draws_no_random_numbers(tmp_path: Path) -> None:
    path = write(upstream(steps=0), tmp_path)
    before = torch.get_rng_state()
    convert.from_upstream(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_run_and_data_configurations_are_read_as_they_are(tmp_path: Path) -> None:
    config = convert.read_config(write(upstream(steps=0), tmp_path).with_name("run_config.json"))
    assert (config.n_latents, config.k, config.auxk, config.batch_size) == (48, 4, 6, 9)
    assert config.feature_files == {"train": {"dino": "d.h5", "clip_txt": "t.h5"}}
    assert config.arguments == {"lr": 1e-4, "seed": 42}
    data = {"val_stream_feature_files": {"b": "/x/b.h5", "a": "/x/a.h5"}, "coco_root_folder": "/coco"}
    config = convert.read_config(data)
    assert list(config.feature_files["val"]) == ["b", "a"]
    assert (config.n_latents, config.k, config.topk_type) == (None, 64, "global")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config must be JSON, but .*run.json is not"),
        ("[1]", "config must hold one JSON object, got list"),
        ('{"args": {"k": "64"}}', "config must give k as a positive integer, got '64'"),
        ('{"args": {"k": 0}}', "config must give k as a positive integer, got 0"),
        ('{"args": {"batch_size": true}}', "config must give batch_size as a positive integer, got True"),
        ('{"args": {"auxk": -1}}', "config must give auxk as an integer or null, got -1"),
        ('{"args": {"topk_type": "batch"}}', 'config must give topk_type as "global" or "local", got \'batch\''),
        ('{"args": [], "config_file_content": {}}', "config must hold objects under args"),
        ('{"train_stream_feature_files": ["a.h5"]}', "config must map streams to files in train_stream_feature_files"),
    ],
)
def test_configurations_that_are_none_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        convert.read_config(tmp_path / "run.json")


def test_names_of_streams_are_the_checkpoints_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(upstream(steps=0), tmp_path)
    assert cli.main(["convert", str(path), str(tmp_path / "m.safetensors"), "--streams", "a"]) == 1
    assert "--streams must not be given for the research code, which names them, got ['a']" in capsys.readouterr().err


def test_nothing_is_written_beside_another_models_configuration(tmp_path: Path) -> None:
    path = write(upstream(steps=0), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"path must not be beside another model's configuration: .* k=4, the model has 3"
    ):
        convert.to_upstream(sf.SPARC(D, 48, 3, auxk=6), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    convert.to_upstream(convert.from_upstream(path), path)
    assert (tmp_path / "run_config.json").read_bytes() == before["run_config.json"]


def test_a_stream_name_the_research_code_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stream names without a dot .* got 'v1\.5'"):
        convert.to_upstream(sf.SPARC({"v1.5": 4}, 8, 2), tmp_path / "m.pth")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        convert.to_upstream(sf.SPARC({"a": 4}, 8, 2), tmp_path / "m.pth", batch_size=0)


def test_the_command_goes_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: object) -> int:
        return cli.main(["convert", *map(str, words)])

    path = write(upstream(), tmp_path)
    ours, back = tmp_path / "model.safetensors", tmp_path / "back" / "msae_checkpoint.pth"
    assert command(path, ours) == 0
    assert capsys.readouterr().out == f"{ours}: 48 latents, k 4, global TopK, dino 7, clip_txt 5\n"
    assert command(ours, back, "--batch-size", 9) == 0
    theirs, returned = (torch.load(p, weights_only=True) for p in (path, back))
    assert all(torch.equal(theirs[name], returned[name]) for name in theirs if not name.startswith("stats_"))
    for source, target in ((path, back), (ours, ours)):
        assert command(source, target) == 1
        assert "source and target must be one checkpoint of the research code" in capsys.readouterr().err
