"""Commands that end together with everything they start, at an absolute deadline; and a checkout run uninstalled."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

ROOT = Path(__file__).resolve().parents[1]
MARK = "SPARC_FAST_PROCESSES"
"""The variable by which a process that outlived its parent, in whatever session, is found again."""
JOINED = "SPARC_FAST_JOINED"


class Process:
    """A command and all it starts. What they print goes to a file: nobody ever waits for the end of a pipe."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._mark = f"{os.environ.get(MARK, '')}/{uuid4().hex}"
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self._process = subprocess.Popen(
            command, cwd=ROOT, env={**(os.environ if environment is None else environment), MARK: self._mark},
            stdin=subprocess.PIPE, stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    @property
    def status(self) -> int | None:
        return self._process.returncode

    def tell(self, line: str) -> None:
        """One line to its standard input, which then ends."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: what it printed says why
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.close()

    def wait(self, seconds: float) -> bool:
        """Whether it ended by itself within so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(seconds, 0.0))
        return self._process.returncode is not None

    def end(self) -> str:
        """Kill whatever is left of it and of its children; returns what they printed."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for _ in range(40):
            left = _marked(self._mark)
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)  # one that the driver holds is not waited for
            if not left and self._process.returncode is not None:
                break
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._file.seek(0)
        printed = self._file.read().decode(errors="replace")
        self._file.close()
        return printed


def run_until(seconds: float, command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a command prints, ended with all its children after so many seconds."""
    process = Process(command, environment)
    process.wait(seconds)
    return process.end()


def _marked(mark: str) -> list[int]:
    """Processes that were started with this mark, or by one that was."""
    found = []
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(folder.name) != os.getpid() and wanted in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def left(until: float) -> float:
    """Seconds until a time of `time.monotonic`, which all processes of a machine share."""
    return until - time.monotonic()


def joined(module: str, argv: Sequence[str] | None, root: Path = ROOT) -> int | None:
    """None where the package is whole; else the exit status of ``sparc_fast.benchmarks.<module>`` run where it is.

    The package is then a folder of links into the checkout, first on the path of the process and of its children.
    """
    if os.environ.get(JOINED) or importlib.util.find_spec("sparc_fast.kernels") is not None:
        return None
    arguments = sys.argv[1:] if argv is None else list(argv)
    with tempfile.TemporaryDirectory() as folder:
        join(Path(folder) / "sparc_fast", root)
        # without the second, the current folder would come first, and with it the package in pieces
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONSAFEPATH": "1", JOINED: "1"}
        command = [sys.executable, "-m", f"sparc_fast.benchmarks.{module}", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def join(package: Path, root: Path) -> None:
    package.mkdir()
    for path in (*(root / "sparc_fast").iterdir(), root / "kernels", root / "benchmarks"):
        (package / path.name).symlink_to(path)


def commit() -> str | None:
    """Of the checkout, a + marking uncommitted changes; or SPARC_FAST_COMMIT, for a copy without its history."""
    named = os.environ.get("SPARC_FAST_COMMIT")
    if named or not (ROOT / ".git").exists():
        return named
    try:
        return run_until(10, ["git", "describe", "--always", "--dirty=+", "--exclude=*"]).strip() or None
    except OSError:
        return None
