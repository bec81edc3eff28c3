"""Where records go beside metrics.jsonl: TensorBoard, Weights & Biases, or an object of your own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from sparc_fast.files import atomic_path

from .metrics import Record


class Sink(Protocol):
    """Anything that takes records."""

    def record(self, record: Record) -> None:
        """One line of metrics.jsonl, as it is written."""

    def close(self) -> None:
        """The session ends."""


class TensorBoard:
    """Event files in ``folder/tensorboard``; events after `step`, of a session that broke off, are taken back."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            writer = import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboard = true needs tensorboard: pip install 'sparc_fast[tensorboard]'") from error
        self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1)

    def record(self, record: Record) -> None:
        for name, value in flat(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run at Weights & Biases that goes on when this one does; its name there is kept in ``folder/wandb_id``."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            wandb = import_module("wandb")
        except ImportError as error:
            raise ImportError(f"wandb = {project!r} needs wandb: pip install 'sparc_fast[wandb]'") from error
        path = folder / "wandb_id"
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=project, id=path.read_text(), name=folder.name, dir=str(folder), config=dict(config), resume="allow"
        )

    def record(self, record: Record) -> None:
        self._run.log(dict(flat(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def flat(record: Record) -> Iterator[tuple[str, float]]:
    """("train/nmse/a -> b", 0.5) and so on; what is None is left out."""
    for name, value in record.items():
        if name != "step":
            yield from _flat(name, value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(f"{name}/{key}", part)
    elif value is not None:
        yield name, value
