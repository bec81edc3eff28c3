"""Metrics: means since the last record, the file of records, and where records go beside it."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparc_fast.files import as_path, atomic_path
from sparc_fast.objective import SparcLoss

Record = dict[str, Any]
"""{"step": 50, "train": {...}} or {"step": 1000, "validation": {...}}."""

HEAD = 5  # steps, their total, steps with AuxK, their auxk, steps with a cross term


class Means:
    """Sums of losses since the last record, float64 on the device: nothing waits for it until they are read."""

    def __init__(self, streams: tuple[str, ...], device: torch.device, sizes: Sequence[int] = ()) -> None:
        """`sizes`: of nested dictionaries, whose losses come last."""
        self.streams, self.sizes = streams, tuple(sizes)
        S = len(streams)
        self.sums = torch.zeros(HEAD + S + 2 * S * S + len(sizes) + 1, dtype=torch.float64, device=device)

    def add(self, loss: SparcLoss, pairs: Tensor | None = None, zero_rows: Tensor | None = None) -> None:
        """One more step; of samples of which so many have both of two streams, [S, S], by default all of them; and how
        many rows of each stream were left out of it as zero."""
        one, none = loss.total.new_ones(()), loss.total.new_zeros(())
        has_auxk, has_cross = (one if part is not None else none for part in (loss.auxk, loss.cross))
        head = torch.stack([one, loss.total, has_auxk, none if loss.auxk is None else loss.auxk, has_cross])
        measured = torch.ones_like(loss.nmse) if pairs is None else (pairs > 0).to(loss.nmse)
        if loss.cross is None:
            measured = measured.diagonal().diag()
        zero = loss.zero_rows if zero_rows is None else loss.zero_rows + zero_rows.to(loss.zero_rows.device)
        prefixes = [] if loss.prefixes is None else [loss.prefixes]
        l0 = none if loss.l0 is None else loss.l0
        self.sums += torch.cat([head, zero, loss.nmse.reshape(-1), measured.reshape(-1), *prefixes, l0[None]])

    def take(self) -> Record | None:
        """The means as plain numbers, and begin anew; None where no step was made."""
        n, total, n_auxk, auxk, _, *rest, l0 = self.sums.tolist()
        self.sums.zero_()
        if n == 0:
            return None
        S = len(self.streams)
        pairs = [(s, t) for s in range(S) for t in range(S)]
        zero_rows, sums, counts = rest[:S], rest[S : S + S * S], rest[S + S * S : S + 2 * S * S]
        nested = {str(size): loss / n for size, loss in zip(self.sizes, rest[S + 2 * S * S :], strict=True)}
        nmse = {pair: total / steps if steps else None for pair, total, steps in zip(pairs, sums, counts, strict=True)}
        return {
            "loss": total / n,
            "self": _mean([nmse[s, t] for s, t in pairs if s == t]),
            "cross": _mean([nmse[s, t] for s, t in pairs if s != t]),
            "auxk": auxk / n_auxk if n_auxk else None,
            "nmse": {f"{self.streams[s]} -> {self.streams[t]}": nmse[s, t] for s, t in pairs},
            "zero_rows": int(sum(zero_rows)),
            **({"prefixes": nested} if nested else {}),
            **({"l0": l0 / n} if l0 else {}),  # where it is not k for each
        }

    def load(self, sums: Tensor) -> None:
        """Go on from those of a checkpoint."""
        self.sums[: len(sums)] = sums
        S = len(self.streams)
        if len(sums) == HEAD + S + S * S:  # of a version that counted no pairs: every step had all
            of_pairs = torch.where(torch.eye(S, dtype=torch.bool, device=sums.device), sums[0], sums[4])
            self.sums[len(sums) : len(sums) + S * S] = of_pairs.reshape(-1)

    def is_finite(self) -> bool:
        """Whether every loss since the last record was finite; waits for the device."""
        return math.isfinite(float(self.sums[1]))


def _mean(parts: list[float | None]) -> float | None:
    """Of those there are."""
    there = [part for part in parts if part is not None]
    return sum(there) / len(there) if there else None


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
    """The records of a run, whose folder or metrics.jsonl this is; none where it has not yet written any."""
    path = as_path(path, "path")
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"path must be a run's folder or its metrics.jsonl, but there is nothing at {path}")
    return [json.loads(line) for line in _whole_lines(file)]


def _keep_until(path: Path, step: int) -> None:
    content = path.read_bytes() if path.exists() else b""
    kept = b"".join(line for line in _whole_lines(path) if json.loads(line)["step"] <= step)
    if kept != content or not path.exists():  # a new file's name goes to the disk with it
        with atomic_path(path) as temporary:
            temporary.write_bytes(kept)


def _whole_lines(path: Path) -> list[bytes]:
    """All lines but a last one without its end."""
    return [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")] if path.exists() else []


@runtime_checkable
class Sink(Protocol):
    """Anything that takes records."""

    def record(self, record: Record) -> None:
        """One line of metrics.jsonl, as it is written."""

    def close(self) -> None:
        """The session ends."""


def summary_writer() -> Any:
    """TensorBoard's class; ImportError says what to install."""
    try:
        return import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard = true needs tensorboard: pip install 'sparc_fast[tensorboard]'") from error


def wandb_for(project: str) -> Any:
    """The library; ImportError says what to install."""
    try:
        return import_module("wandb")
    except ImportError as error:
        raise ImportError(f"wandb = {project!r} needs wandb: pip install 'sparc_fast[wandb]'") from error


class TensorBoard:
    """Event files in ``folder/tensorboard``; events after `step`, of a session that broke off, are taken back."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = summary_writer()(str(folder / "tensorboard"), purge_step=step + 1)

    def record(self, record: Record) -> None:
        for name, value in flat(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run at Weights & Biases that goes on when this one does; its name there is kept in ``folder/wandb_id``."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        path = folder / "wandb_id"
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text(secrets.token_hex(8))
        self._run = wandb_for(project).init(
            project=project, id=path.read_text(), name=folder.name, dir=str(folder), config=dict(config), resume="allow"
        )

    def record(self, record: Record) -> None:
        self._run.log(dict(flat(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def flat(record: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, float]]:
    """("train/nmse/a -> b", 0.5) and so on; what is None is left out."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{within}{name}/")
        elif value is not None and (within or name != "step"):
            yield within + name, value
