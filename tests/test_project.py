"""The project around the code: public names, style, types, and the commands people are told to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sparc_fast as sf
from sparc_fast import backends, reference

ROOT = Path(__file__).parents[1]


def test_public_names() -> None:
    assert sf.__all__ == [
        "SPARC",
        "SparcAdam",
        "SparcLoss",
        "SparcOutput",
        "SparseLatents",
        "__version__",
        "available_backends",
        "functional",
        "fvu",
        "nmse",
    ]
    assert all(hasattr(sf, name) for name in sf.__all__)


def test_the_reference_speaks_the_whole_vocabulary_of_backends() -> None:
    vocabulary = [name for name in vars(backends.Backend) if not name.startswith("_")]
    assert len(vocabulary) > 10
    assert all(callable(getattr(reference, name)) for name in vocabulary)


def test_importing_the_package_needs_only_torch_numpy_and_the_standard_library() -> None:
    optional = ["matplotlib", "sklearn", "skimage", "rich", "safetensors", "jinja2", "triton", "h5py", "pandas"]
    code = (
        "import sys, torch; loaded = set(sys.modules); import sparc_fast; "
        f"print([name for name in {optional} if name in set(sys.modules) - loaded])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_style_and_types_are_clean(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command.endswith(".venv/bin/pytest")
    assert command in (ROOT / "README.md").read_text().splitlines()
