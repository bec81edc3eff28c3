"""Metrics: means since the last record, and the file of records."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparc_fast.files import atomic_path
from sparc_fast.objective import SparcLoss

Record = dict[str, Any]
"""{"step": 50, "train": {...}} or {"step": 1000, "validation": {...}}."""

HEAD = 5  # steps, their total, steps with AuxK, their auxk, steps with a cross term


class Means:
    """Sums of losses since the last record, float64 on the device: nothing waits for it until they are read."""

    def __init__(self, streams: tuple[str, ...], device: torch.device) -> None:
        self.streams = streams
        S = len(streams)
        self.sums = torch.zeros(HEAD + S + S * S, dtype=torch.float64, device=device)

    def add(self, loss: SparcLoss) -> None:
        """One more step."""
        one, none = loss.total.new_ones(()), loss.total.new_zeros(())
        has_auxk, has_cross = (one if part is not None else none for part in (loss.auxk, loss.cross))
        head = torch.stack([one, loss.total, has_auxk, none if loss.auxk is None else loss.auxk, has_cross])
        for at, numbers in ((0, head), (HEAD, loss.zero_rows), (HEAD + len(self.streams), loss.nmse.reshape(-1))):
            self.sums[at : at + len(numbers)] += numbers

    def take(self) -> Record | None:
        """The means as plain numbers, and begin anew; None where no step was made."""
        n, total, n_auxk, auxk, n_cross, *rest = self.sums.tolist()
        self.sums.zero_()
        if n == 0:
            return None
        S = len(self.streams)
        pairs = [(s, t) for s in range(S) for t in range(S)]
        counted = {pair: n if pair[0] == pair[1] else n_cross for pair in pairs}
        sums = dict(zip(pairs, rest[S:], strict=True))
        nmse = {pair: sums[pair] / counted[pair] if counted[pair] else None for pair in pairs}
        cross = [sums[s, t] for s, t in pairs if s != t]
        return {
            "loss": total / n,
            "self": sum(sums[s, s] for s in range(S)) / S / n,
            "cross": sum(cross) / len(cross) / n_cross if n_cross else None,
            "auxk": auxk / n_auxk if n_auxk else None,
            "nmse": {f"{self.streams[s]} -> {self.streams[t]}": nmse[s, t] for s, t in pairs},
            "zero_rows": int(sum(rest[:S])),
        }

    def is_finite(self) -> bool:
        """Whether every loss since the last record was finite; waits for the device."""
        return math.isfinite(float(self.sums[1]))


class MetricsFile:
    """One record a line. Lines of later steps than `step` are of a session that broke off, and will come again."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        _keep_until(path, step)
        self._file = path.open("ab")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a line, at once."""
        try:
            self._file.write(json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror or error}") from error

    def sync(self) -> None:
        """To the disk: a checkpoint must not be there without the lines before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in _whole_lines(Path(path))]


def _keep_until(path: Path, step: int) -> None:
    content = path.read_bytes() if path.exists() else b""
    kept = b"".join(line for line in _whole_lines(path) if json.loads(line)["step"] <= step)
    if kept != content or not path.exists():  # a new file's name goes to the disk with it
        with atomic_path(path) as temporary:
            temporary.write_bytes(kept)


def _whole_lines(path: Path) -> list[bytes]:
    """All lines but a last one without its end."""
    return [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")] if path.exists() else []
