"""The command line: the demo end to end, and errors in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparc_fast import cli


def test_the_version_names_the_backends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert re.search(r"sparc_fast \d+\.\d+\.\d+, torch .*\ncpu backends: .*reference", capsys.readouterr().out)


def test_a_short_demo_prints_the_table_and_writes_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_settings_out_of_range_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--steps", "0", "--out", str(tmp_path)]) == 1
    assert "steps and batch_size must be >= 1, got 0" in capsys.readouterr().err


def test_the_demo_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "sklearn" else object())
    assert cli.main(["demo"]) == 1
    assert "the demo needs sklearn: pip install 'sparc_fast[demo]'" in capsys.readouterr().err


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--colour", "red"])
    assert "unrecognized arguments: --colour red" in capsys.readouterr().err


def test_bench_passes_its_options_to_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    assert stop.value.code == 0
    assert "--quick" in capsys.readouterr().out
