"""`sparc-fast encode`: a data set in files becomes codes in a file, whatever the memory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import sparc_fast as sf
from sparc_fast import checkpoint, cli, data
from sparc_fast.cli import encode

D = {"a": 24, "b": 16}
N = 700


def model_of(**changes: Any) -> sf.SPARC:
    torch.manual_seed(0)
    model = sf.SPARC(D, n_latents=64, k=4, **changes)
    model.calibrate(inputs())
    return model.eval()


def inputs(n: int = N) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(n, width, generator=generator) for name, width in D.items()}


def write(folder: Path, x: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in x.items():
        np.save(folder / f"{name}.npy", rows.numpy())
    return folder


def run(*arguments: object) -> int:
    return cli.main(["encode", *map(str, arguments)])


@torch.no_grad()
@pytest.mark.parametrize("selection", ["global", "local", "batch"])
def test_private_latents_have_room_in_the_file(selection: str, tmp_path: Path) -> None:
    model, x = model_of(selection=selection, private={"a": 9, "b": 7}, private_k={"a": 3, "b": 1}), inputs()
    if selection == "batch":
        model.learn_thresholds(x)
    model.save(tmp_path / "m.safetensors")
    folder = write(tmp_path / "data", x)
    for alone in ((), ("--alone",)):
        assert run(tmp_path / "m.safetensors", "--data", folder, "--out", tmp_path / "codes", *alone) == 0
        found = sf.SparseLatents.load(tmp_path / "codes" / "codes.safetensors")
        for name in D:
            expected = (model.encode({name: x[name]}) if alone else model.encode(x)).dense(name)
            torch.testing.assert_close(found.dense(name), expected)
            assert (expected[:, model.private_latents[name]] > 0).any()


@torch.no_grad()
@pytest.mark.parametrize("selection", ["global", "local"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_what_encode_gives_and_decodes_back(selection: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = model_of(selection=selection).to(dtype), inputs()
    model.save(tmp_path / "m.safetensors")
    folder = write(tmp_path / "data", x)
    out = tmp_path / "new"
    decoded = tmp_path / "b.safetensors"
    assert run(tmp_path / "m.safetensors", "--data", folder, "--out", out, "--decode", f"b={decoded}") == 0
    found, expected = sf.SparseLatents.load(out / "codes.safetensors"), model.encode(x)
    assert (found.streams, found.n_latents) == (("a", "b"), 64)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)
    recons, _ = checkpoint.load(decoded, encode.DECODED)
    for source in D:
        assert torch.equal(recons[source], model.decode(expected, source, "b"))
        with data.open({"b": (decoded, source)}) as files:
            assert torch.equal(files.rows(0, N, dtype), recons[source])
    with safe_open(out / "codes.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["sparc_fast.SparseLatents/1"])
    assert config["model_sha256"] == hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()


@torch.no_grad()
def test_alone_each_stream_has_the_code_it_has_by_itself(tmp_path: Path) -> None:
    model, x = model_of(), inputs(30)
    encode.encode_files(model, data.open(x), tmp_path / "c.safetensors", alone=True)
    found = sf.SparseLatents.load(tmp_path / "c.safetensors")
    for stream in D:
        expected = model.encode({stream: x[stream]}).stream(stream)
        assert all(torch.equal(a, b) for a, b in zip(found.stream(stream), expected, strict=True))


@torch.no_grad()
def test_some_of_the_streams_may_be_given_and_in_any_order(tmp_path: Path) -> None:
    model, x = model_of(), inputs(30)
    encode.encode_files(model, data.open({"b": x["b"]}), tmp_path / "b.safetensors")
    found = sf.SparseLatents.load(tmp_path / "b.safetensors")
    assert found.streams == ("b",)
    assert torch.equal(found.values, model.encode({"b": x["b"]}).values)
    encode.encode_files(model, data.open({"b": x["b"], "a": x["a"]}), tmp_path / "c.safetensors")
    assert torch.equal(sf.SparseLatents.load(tmp_path / "c.safetensors").values, model.encode(x).values)


def test_little_memory_bounds_what_is_read_and_encoded_together_and_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    folder = write(tmp_path / "data", inputs())
    sources = {stream: folder / f"{stream}.npy" for stream in D}
    with data.open(sources) as files:
        encode.encode_files(model, files, tmp_path / "much.safetensors")
        floor = 2 * max(reader.pick_scratch for reader in files.readers.values())
        memory = floor + 100_000
        read, encoded = [], []
        for reader in files.readers.values():
            original = reader.read
            monkeypatch.setattr(
                reader, "read", lambda spans, out, check, f=original: (read.append(out), f(spans, out, check))
            )
        encode_one = model.encode
        monkeypatch.setattr(
            model, "encode", lambda x, present=None: (encoded.append(len(x["a"])), encode_one(x, present))[1]
        )
        encode.encode_files(model, files, tmp_path / "little.safetensors", memory=memory)
        assert len(read) > 4
        assert sum(encoded) == N
        assert max(out.nbytes for out in read) * 2 <= 100_000
        assert max(encoded) * 4 * (sum(D.values()) + model.n_latents) <= 50_000
        with pytest.raises(ValueError, match=r"memory must be at least \d+ bytes here, got 1000"):
            encode.encode_files(model, files, tmp_path / "none.safetensors", memory=1000)
    assert (tmp_path / "little.safetensors").read_bytes() == (tmp_path / "much.safetensors").read_bytes()
    assert not (tmp_path / "none.safetensors").exists()


@torch.no_grad()
@pytest.mark.parametrize("selection", ["global", "local"])
def test_a_row_of_zeros_is_absent_and_a_sample_without_any_stream_has_an_empty_code(
    selection: str, tmp_path: Path
) -> None:
    model, x = model_of(selection=selection), inputs(9)
    x["a"][2] = x["a"][5] = x["b"][5] = 0
    path, decoded = tmp_path / "c.safetensors", tmp_path / "d.safetensors"
    assert encode.encode_files(model, data.open(x), path, decode=("a", decoded)) == {"a": 2, "b": 1}
    found = sf.SparseLatents.load(path)
    rest = [0, 1, 3, 4, 6, 7, 8]
    whole = model.encode({stream: rows[rest] for stream, rows in x.items()})
    assert torch.equal(found[rest].values, whole.values)
    assert torch.equal(found[rest].indices, whole.indices)
    alone = model.encode({"b": x["b"][2:3]}).stream("b")
    assert all(torch.equal(part[2:3], one) for part, one in zip(found.stream("b"), alone, strict=True))
    assert not found.values[2, 0].any()
    assert not found.values[5].any()
    assert (found.indices[5] == -1).all()
    recons, _ = checkpoint.load(decoded, encode.DECODED)
    assert not recons["a"][2].any()
    assert recons["b"][2].any()
    assert encode.encode_files(model, data.open(x), path, zero_rows="keep") == {"a": 0, "b": 0}
    said = torch.ones(9, 2, dtype=torch.bool)
    assert torch.equal(sf.SparseLatents.load(path).values, model.encode(x, said).values)


@torch.no_grad()
def test_rows_in_another_order_are_joined_by_their_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = model_of(), inputs(20)
    model.save(tmp_path / "m.safetensors")
    folder = write(tmp_path / "data", {"a": x["a"], "b": x["b"].flip(0)[:15]})
    (tmp_path / "a.txt").write_text("\n".join(map(str, range(20))))
    (tmp_path / "b.txt").write_text("\n".join(map(str, range(19, 4, -1))))
    ids = ["--ids", f"a={tmp_path / 'a.txt'}", f"b={tmp_path / 'b.txt'}"]
    out = tmp_path / "c.safetensors"
    assert run(tmp_path / "m.safetensors", "--data", folder, "--out", out, *ids, "--join", "outer") == 0
    printed = capsys.readouterr().out
    assert "20 samples joined by id" in printed
    assert "20 samples of a, b, 5 without 'b'" in printed
    present = torch.ones(20, 2, dtype=torch.bool)
    present[:5, 1] = False
    expected = model.encode(x, present)
    found = sf.SparseLatents.load(out)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)


def test_no_samples_are_no_codes(tmp_path: Path) -> None:
    encode.encode_files(model_of(), data.open(inputs(0)), tmp_path / "c.safetensors")
    assert sf.SparseLatents.load(tmp_path / "c.safetensors").values.shape == (0, 2, 4)


def test_an_error_names_the_file_and_row_and_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, x = model_of(), inputs()
    model.save(tmp_path / "m.safetensors")
    folder = write(tmp_path / "data", x)
    out = tmp_path / "c.safetensors"
    assert run(tmp_path / "m.safetensors", "--data", folder, "--out", out) == 0
    before = out.read_bytes()
    x["b"][613, 3] = torch.nan
    write(folder, x)
    other = ["--data", f"a={folder / 'a.npy'}", f"c={folder / 'b.npy'}"]
    for arguments, message in (
        (["--data", folder], f"{folder / 'b.npy'} must be finite, but row 613 is not"),
        (other, "--data must give some of the streams a, b, got a, c"),
        (["--data", f"a={folder / 'b.npy'}"], "files must have the widths {'a': 24}, got {'a': 16}"),
        (["--data", folder, "--memory", "a lot"], "--memory must be an integer >= 1, in bytes, or a size"),
        (["--data", folder, "--decode", "b"], "--decode must be STREAM=FILE, got 'b'"),
        (
            ["--data", folder, "--decode", f"c={tmp_path / 'd'}"],
            "decode must be one of the streams ['a', 'b'], got 'c'",
        ),
        (["--data", folder, "--decode", f"b={out}"], "--decode must name another file than --out"),
        (["--data", folder, "--device", "gpu"], "device must be auto, cpu, cuda or cuda:1, got 'gpu'"),
    ):
        assert run(tmp_path / "m.safetensors", *arguments, "--out", out) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    for flag, path in (("--out", "m.safetensors"), ("--out", "x.safetensors"), ("--decode", "m.safetensors")):
        save_file({"rows": x["a"]}, tmp_path / "x.safetensors")
        written = tmp_path / path
        kept = written.read_bytes()
        arguments = [flag, written] if flag == "--out" else [flag, f"a={written}", "--out", out]
        assert run(tmp_path / "m.safetensors", "--data", f"a={tmp_path / 'x.safetensors'}", *arguments) == 1
        assert f"{flag} must not be a file that is read, got {written}" in capsys.readouterr().err
        assert written.read_bytes() == kept
    (tmp_path / "x.safetensors").unlink()
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "data", "c.safetensors"}


def test_a_file_written_in_parts_is_read_like_any_other_and_must_be_written_whole(tmp_path: Path) -> None:
    rows = torch.arange(12.0).reshape(4, 3)
    shapes = {"x": (torch.float32, (4, 3)), "empty": (torch.int32, (0, 2))}
    with checkpoint.save_in_parts(tmp_path / "f", shapes, {"of": "é"}) as write_rows:
        write_rows("x", rows[:3])
        write_rows("x", rows[3:])
        with pytest.raises(
            ValueError, match=r"rows of x must be torch.float32 \[0, 3\] at most, got torch.float32 \[1, 3\]"
        ):
            write_rows("x", rows[:1])
    found, config = checkpoint.load(tmp_path / "f")
    assert torch.equal(found["x"], rows)
    assert found["empty"].shape == (0, 2)
    assert config == {"of": "é"}
    checkpoint.save(tmp_path / "whole", found, {"of": "é"})
    assert (tmp_path / "f").read_bytes() == (tmp_path / "whole").read_bytes()
    with (
        pytest.raises(ValueError, match=r"rows are missing: \{'x': 1\}"),
        checkpoint.save_in_parts(tmp_path / "g", shapes, {}) as write_rows,
    ):
        write_rows("x", rows[:3])
    assert not (tmp_path / "g").exists()
