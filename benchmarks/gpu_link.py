"""Runs a checkout that is not installed: the package's kernels and benchmarks lie beside it there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = "SPARC_FAST_JOINED"


def joined(module: str, argv: Sequence[str] | None, root: Path = ROOT) -> int | None:
    """None where the package is whole; else the exit status of ``sparc_fast.benchmarks.<module>`` run where it is.

    The package is then a folder of links into the checkout, first on the path of the process and of its children.
    """
    if os.environ.get(MARK) or importlib.util.find_spec("sparc_fast.kernels") is not None:
        return None
    arguments = sys.argv[1:] if argv is None else list(argv)
    with tempfile.TemporaryDirectory() as folder:
        join(Path(folder) / "sparc_fast", root)
        # without the second, the current folder would come first, and with it the package in pieces
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONSAFEPATH": "1", MARK: "1"}
        command = [sys.executable, "-m", f"sparc_fast.benchmarks.{module}", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def join(package: Path, root: Path) -> None:
    package.mkdir()
    for path in (*(root / "sparc_fast").iterdir(), root / "kernels", root / "benchmarks"):
        (package / path.name).symlink_to(path)
