"""`sparc-fast train`: a file, flags over it, and the same command again to go on."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import assert_same_results, rows

import sparc_fast as sf
from sparc_fast import cli
from sparc_fast.cli import train as command
from sparc_fast.training import read_config, read_metrics
from sparc_fast.training.progress import Lines

SETTINGS = """
n_latents = 64
k = 3
steps = 12
batch_size = 32
lr = 1e-2
log_every = 3
checkpoint_every = 4
validation_rows = 50
[data]
a = "a.npy"
b = ["b.npz.h5", "rows"]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    import h5py

    np.save(tmp_path / "a.npy", rows(400)["a"].numpy())
    with h5py.File(tmp_path / "b.npz.h5", "w") as file:
        file.create_dataset("rows", data=rows(400)["b"].numpy(), chunks=(8, 200))
    (tmp_path / "train.toml").write_text(SETTINGS)
    return tmp_path / "train.toml"


def main(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_file_trains_a_model(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "first"
    assert main(config, "--out", out) == 0
    printed = capsys.readouterr()
    assert f"12 steps done; the model is {out / 'model.safetensors'}" in printed.out
    assert "best on held-out rows: " in printed.out
    assert "step 3 of 12" in printed.err
    assert sf.SPARC.load(out / "model.safetensors").d_streams == {"a": 300, "b": 200}
    assert read_config(out / "config.json") == read_config(config)
    assert main("--out", out, "--progress", "none") == 0, "the run's own settings, from its folder"


def test_flags_change_what_the_file_says(config: Path, tmp_path: Path) -> None:
    data = [f"b={tmp_path / 'b.npz.h5'}#rows", f"a={tmp_path / 'a.npy'}"]
    flags = ["--epochs", "0.5", "--lr", "1e-4", "--lazy", "--no-calibrate", "--data", *data, "--dtype", "bfloat16"]
    with pytest.warns(UserWarning, match=r"^a run of 6 steps is short: 352 rows in batches of 32, 0\.5 epochs\. "):
        assert main(config, "--out", tmp_path / "run", "--progress", "none", *flags) == 0
    assert main("--out", tmp_path / "run", "--progress", "none") == 0, "one that goes on is not told again"
    kept = read_config(tmp_path / "run" / "config.json")
    assert (kept.epochs, kept.steps, kept.lr, kept.lazy, kept.calibrate) == (0.5, 0, 1e-4, True, False)
    assert (kept.dtype, kept.k, list(kept.data)) == ("bfloat16", 3, ["b", "a"])
    assert kept.data["b"] == (str(tmp_path / "b.npz.h5"), "rows")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stopped_run_says_so_by_its_status_and_goes_on_with_the_same_command(
    number: signal.Signals, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopping(Lines):
        def record(self, record: dict[str, Any]) -> None:
            if record["step"] == 6:
                os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(command, "Lines", Stopping)
        assert main(config, "--out", tmp_path / "run", "--progress", "lines") == 128 + number
    assert main(config, "--out", tmp_path / "run", "--progress", "lines") == 0
    assert main(config, "--out", tmp_path / "whole", "--progress", "none") == 0
    for folder in ("run", "whole"):  # the configurations differ in nothing, so the checkpoints do not
        assert [r["step"] for r in read_metrics(tmp_path / folder / "metrics.jsonl")] == [3, 6, 9, 12, 12]
    assert_same_results(tmp_path / "run", tmp_path / "whole")


def test_errors_name_the_flag_or_the_setting(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--k must be an integer >= 1, got 'many'"):
        main(config, "--out", tmp_path / "run", "--k", "many")
    with pytest.raises(ValueError, match="k must be an integer >= 1, got 0"):
        main(config, "--out", tmp_path / "run", "--k", "0")
    with pytest.raises(ValueError, match=r"a source must be stream=path or stream=path#name, got 'a\.npy'"):
        main(config, "--out", tmp_path / "run", "--data", "a.npy")
    with pytest.raises(ValueError, match="n_latents and k must be given"):
        main("--out", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        main(tmp_path / "no.toml", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stream_is_given_once_and_a_list_may_be_given_in_parts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = f"a={tmp_path / 'a.npy'}", f"b={tmp_path / 'b.npz.h5'}#rows"
    assert main(config, "--out", tmp_path / "run", "--progress", "none", "--data", a, "--data", b) == 0
    assert list(read_config(tmp_path / "run" / "config.json").data) == ["a", "b"]
    for parts in (["--data", a, a], ["--data", a, "--data", b, "--data", a]):
        with pytest.raises(ValueError, match="--data must give each stream once, got 'a' twice"):
            main(config, "--out", tmp_path / "other", *parts)
    machine = ["--machine-memory", "4GiB", "--copy-rate", "1e10", "--float32-rate", "1e11", "--bfloat16-rate", "1e11"]
    settings = ["--n-latents", "32", "--k", "4", "--steps", "2", "--rows", "9000", "--memory", "64MiB"]
    assert cli.main(["plan", *settings, *machine, "--d-streams", "a=12", "--d-streams", "b=10"]) == 0
    assert "D = 22 (a 12, b 10)" in capsys.readouterr().out
    assert cli.main(["plan", *settings, *machine, "--d-streams", "a=12", "a=10"]) == 1
    assert cli.main(["eval", str(tmp_path / "run"), "--json", "--data", a, "--data", a]) == 1
    errors = capsys.readouterr().err
    assert "--d-streams must give each stream once, got 'a' twice" in errors
    assert "--data must give each stream once, got 'a' twice" in errors


def test_a_diverging_run_is_an_error_in_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(config, "--out", tmp_path / "run", "--lr", "1e38", "--progress", "none") == 1
    error = capsys.readouterr().err
    assert error.startswith("sparc-fast: the loss was NaN or infinite by step ")
    assert error.count("\n") == 1


def test_every_setting_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("--help")
    printed = capsys.readouterr().out
    for words in ("--n-latents", "--cross-loss-ramp", "--no-calibrate", "STREAM=FILE[#NAME]", "rows measured, at most"):
        assert words in printed
    for words in ("--loss {nmse,fvu}", "--selection {global,local,batch,jumprelu,local_jumprelu}"):
        assert words in " ".join(printed.split()), "what may be said is shown"
