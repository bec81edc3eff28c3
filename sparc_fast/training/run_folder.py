"""The folder of a run: what lies where, that only one process trains in it, and a line for every time one did."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparc_fast import distributed
from sparc_fast.files import as_path, atomic_path
from sparc_fast.version import __version__
from sparc_fast.whole import WHOLE, Whole

from . import checkpoints
from .config import Config

PREFIX, SUFFIX = "step-", ".safetensors"


class RunFolder:
    """config.json, metrics.jsonl, sessions.jsonl, checkpoints/, and in the end model.safetensors."""

    def __init__(self, path: str | Path) -> None:
        self.path = as_path(path, "folder").resolve()
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.sessions = self.path / "sessions.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model.safetensors"
        self.best = self.path / "best.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other processes from training in it; a lock ends with its process."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OSError(f"cannot write to the run's folder {self.path}: {error.strerror or error}") from error
        try:
            lock(handle, self.path)
            for leftover in self.checkpoints.glob(".*"):  # of a process that was killed while it wrote
                _remove(leftover)
            yield
        finally:
            os.close(handle)

    def going_on(self, config: Config) -> Config:
        """The configuration to train by: what a run here began with counts, where a default has changed since."""
        return config.going_on_from(self._there()) if self.config.is_file() else config

    def agree_on(self, config: Config) -> None:
        """Keep the configuration here, or hold it against the one that is; ValueError names what differs."""
        if self.config.is_file():
            there = self._there()
            if different := config.differences(there):
                listed = ", ".join(f"{n} {getattr(there, n)!r}, not {getattr(config, n)!r}" for n in different)
                raise ValueError(f"a run goes on with the settings it began with; {self.path} has {listed}")
            if config == there:
                return
        with atomic_path(self.config) as temporary:
            temporary.write_text(json.dumps(config.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _there(self) -> Config:
        return Config.of(json.loads(self.config.read_text(encoding="utf-8")))

    def steps(self) -> list[int]:
        """The steps of the checkpoints here, ascending."""
        names = (path.name for path in self.checkpoints.glob(f"{PREFIX}*"))
        return sorted({int(n) for name in names if (n := name.removeprefix(PREFIX).removesuffix(SUFFIX)).isdigit()})

    def checkpoint(self, step: int) -> Path:
        """A file, or the folder that ranks have written together."""
        file = self.checkpoints / f"{PREFIX}{step:09d}{SUFFIX}"
        return folder if (folder := file.with_suffix("")).is_dir() else file

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        keep: int,
        best: int,
        shards: Whole = WHOLE,
    ) -> None:
        """Write a checkpoint; then delete all but the newest `keep` and that of step `best`."""
        try:
            file = self.checkpoints / f"{PREFIX}{step:09d}{SUFFIX}"
            if shards.is_whole:
                checkpoints.write(file, tensors, state)
            else:
                distributed.write(file.with_suffix(""), tensors, state, shards)
        except OSError as error:
            steps = self.steps()
            last = f"the last one, {self.checkpoint(steps[-1]).name}, is whole" if steps else "there is none before it"
            left = f"{last}, and the same command {'goes on from it' if steps else 'begins again'}"
            raise OSError(f"{error}; {left}") from error
        for old in self.steps()[:-keep] if shards.leads else ():
            if old != best:
                _remove(self.checkpoint(old))

    def newest(self, shards: Whole = WHOLE) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, state) of the newest checkpoint that is whole; damaged ones are set aside with a warning."""
        for step in reversed(shards.told_by_leader(self.steps())):
            path = self.checkpoint(step)
            try:
                with shards.agreed(f"read {step}"):
                    return checkpoints.read(path, shards)
            except ValueError as error:
                if shards.leads:
                    aside = path.with_suffix(".damaged")
                    path.rename(aside)
                    warnings.warn(f"{error}; it is now {aside.name}, and the one before it is tried", stacklevel=2)
        return None


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink()
        return
    gone = path.with_name(f".{path.name}.gone")  # it must not look whole while it is being deleted
    path.replace(gone)
    shutil.rmtree(gone)


def lock(handle: int, folder: Path, doing: str = "training") -> None:
    """Keep other processes from what this one does in a folder, until the handle is closed or the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock: two processes there are the user's to avoid
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise OSError(f"another process is {doing} in {folder}") from error
        warnings.warn(
            f"the file system of {folder} has no locks ({error.strerror}): see to it that one process works in it",
            stacklevel=2,
        )


class Session:
    """Begun now; `end` adds it to sessions.jsonl. Times are kept apart from metrics.jsonl, which is repeatable."""

    def __init__(self, step: int, device: torch.device, backend: str) -> None:
        self._clock = time.perf_counter()
        self._step = step
        self._about: dict[str, Any] = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": platform.node(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "backend": backend,
            "threads": torch.get_num_threads(),
            "process": os.getpid(),
            "sparc_fast": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "from_step": step,
        }

    def end(self, path: Path, step: int, batch_size: int, how: str) -> None:
        """How it ended: "finished", a signal's name, or an error's."""
        seconds = time.perf_counter() - self._clock
        rows = (step - self._step) * batch_size
        line = {**self._about, "to_step": step, "seconds": round(seconds, 3), "rows_per_second": round(rows / seconds)}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "ended": how}) + "\n")
