"""The command line: the demo end to end, and errors in one line."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import sparc_fast.demo
from sparc_fast import cli
from sparc_fast.cli import demo
from sparc_fast.planning import process_memory


@pytest.fixture
def drawn(drawn_glyphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparc_fast.demo, "glyphs", drawn_glyphs)


def test_the_version_names_the_backends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert re.search(r"sparc_fast \d+\.\d+\.\d+, torch .*\ncpu backends: .*reference", capsys.readouterr().out)


def test_a_short_demo_prints_the_table_and_writes_the_report(
    tmp_path: Path, drawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--steps", "5", "--ablations", "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    for words in ("SPARC", "independent SAEs", "untrained SPARC", "Concept alignment", "sans → serif", "local, λ = 1"):
        assert words in printed
    page = (tmp_path / "report" / "index.html").read_text()
    assert "sparc-fast demo --steps 5" in page
    assert (tmp_path / "report" / "alignment.png").read_bytes().startswith(b"\x89PNG")


def test_an_unwritable_output_folder_is_one_line_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"sparc-fast: --out must be a folder that can be written, got .*file: .*\n", error)


def test_settings_out_of_range_are_one_line(tmp_path: Path, drawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--steps", "0", "--out", str(tmp_path)]) == 1
    assert "steps and batch_size must be >= 1, got 0" in capsys.readouterr().err


def test_the_demo_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "sklearn" else object())
    assert cli.main(["demo"]) == 1
    assert "the demo needs sklearn: pip install 'sparc_fast[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_and_plan_can_be_read_on_every_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = "--n-latents 64 --k 3 --auxk 3 --steps 9 --d-streams a=9 --rows 9999 --device cpu"
    machine = "--machine-memory 80GB --copy-rate 1e10 --float32-rate 1e11 --bfloat16-rate 1e11"
    monkeypatch.setattr(process_memory, "in_own_process", lambda *_: str(2**28))
    terminals = {}
    for name, errors in (("stdout", "strict"), ("stderr", "backslashreplace")):  # as Python opens them
        terminals[name] = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, write_through=True)
        monkeypatch.setattr(sys, name, terminals[name])
    for command in ([], *([name] for name in cli.COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--help"])
        assert stop.value.code == 0, command
    assert cli.main(f"plan {run} {machine}".split()) == 0
    assert cli.main(["convert", "λ → 漢.pth", "x.pth"]) == 1
    printed, error = (terminal.buffer.getvalue().decode(encoding) for terminal in terminals.values())
    assert "lambda, the weight of the cross-reconstruction loss" in " ".join(printed.split())
    assert "--quick" in printed, "bench passes its options to the benchmarks"
    times = "×" if encoding == "cp1252" else "x"
    assert f"samples {times} concepts" in " ".join(printed.split())
    assert error.endswith("got lambda > \\u6f22.pth and x.pth\n")


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--selction", "; did you mean --selection?"),
        ("--nlatents=3", "; did you mean --n-latents?"),
        ("--colour red", ""),
    ],
)
def test_a_flag_that_is_not_known_is_said_beside_the_one_that_may_be_meant(
    flag: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "train.toml", "--out", "x", *flag.split()])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {flag}{hint}\n")
