"""Small runs for the tests of training, and what must be equal when two of them are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparc_fast import SPARC, data
from sparc_fast.data import AlignedFiles
from sparc_fast.training import Config, Sink, Trainer
from sparc_fast.training.progress import Display

D = {"a": 300, "b": 200}
WINDOWED = 9_500_000  # bytes: below what all rows take, so that the loader's windows are several
RUNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "lazy-bfloat16-moments": {"lazy": True, "moments": "bfloat16", "seed": 3},
    "lazy-bfloat16-local": {"lazy": True, "dtype": "bfloat16", "selection": "local", "support_dropout": 0.0},
    "accumulated": {"accumulate": 3},
    "batch": {"selection": "batch", "lazy": True},
    "jumprelu": {"selection": "jumprelu", "accumulate": 2, "moments": "bfloat16"},
    "private": {"private": {"a": 12, "b": 9}, "private_k": 2, "lazy": True, "moments": "bfloat16"},
}


def rows(n: int = 6000) -> dict[str, Tensor]:
    """Two streams that see the same three of 24 concepts, each through directions of its own."""
    generator = torch.Generator().manual_seed(0)
    concepts = torch.rand(n, 24, generator=generator, device="cpu").topk(3).indices
    on = torch.zeros(n, 24, device="cpu").scatter(1, concepts, 1.0)
    return {name: on @ torch.randn(24, width, generator=generator, device="cpu") for name, width in D.items()}


def files(n: int = 6000) -> AlignedFiles:
    return data.open(rows(n))


def config(**changes: Any) -> Config:
    """A run of every schedule there is, in which latents die."""
    settings: dict[str, Any] = {
        "n_latents": 64, "k": 3, "auxk": 8, "dead_after": 400, "steps": 40, "batch_size": 32, "lr": 1e-2,
        "support_dropout": 0.3, "k_start": 6, "k_ramp": 0.5, "cross_loss_ramp": 0.2, "memory": WINDOWED,
        "reading_threads": 1, "calibration_rows": 500, "log_every": 7, "checkpoint_every": 5, "validate_every": 16,
        "validation_rows": 100,
    }  # fmt: skip
    return Config(**{**settings, **changes})


def trained(
    folder: Path,
    given: AlignedFiles | None = None,
    *,
    model: SPARC | None = None,
    sinks: Sequence[Sink] = (),
    **changes: Any,
) -> Trainer:
    """What has made a run with these changes of `config`, on `files()` where none are given."""
    opened = files() if given is None else given
    with Trainer(config(**changes), folder, model=model, files=opened, sinks=sinks) as trainer:
        trainer.run()
    return trainer


def save_rows(folder: Path, n: int) -> None:
    for name, part in rows(n).items():
        np.save(folder / f"{name}.npy", part.numpy())


def save_run(folder: Path, n: int, **changes: Any) -> None:
    """Rows in files, and train.json, the settings of a run on them."""
    save_rows(folder, n)
    settings = {
        "data": {name: f"{name}.npy" for name in D}, "n_latents": 64, "k": 3, "auxk": 8, "dead_after": 400, "lr": 1e-2,
        "steps": 30, "batch_size": 32, "checkpoint_every": 10, "calibration_rows": 500, "device": "cpu",
    }  # fmt: skip
    (folder / "train.json").write_text(json.dumps(settings | changes))


class Said(Display):
    """Keeps what a person would be told."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def say(self, words: str) -> None:
        self.words.append(words)


class Recorder:
    """A sink that keeps records, and may do something at one of them."""

    def __init__(self, at: int = 0, do: Callable[[], object] | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = 0
        self._at, self._do = at, do

    def record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if record["step"] == self._at and self._do is not None:
            self._do()

    def close(self) -> None:
        self.closed += 1


def assert_same_results(folder: Path, expected: Path) -> None:
    """Bit for bit: metrics, the last checkpoint (weights, moments, counters, loader, schedules) and the models."""
    assert (folder / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    last = sorted((expected / "checkpoints").iterdir())[-1].name
    assert sorted((folder / "checkpoints").iterdir())[-1].name == last
    assert (folder / "checkpoints" / last).read_bytes() == (expected / "checkpoints" / last).read_bytes()
    models = [name for name in ("model.safetensors", "best.safetensors") if (expected / name).exists()]
    assert models
    for name in models:
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
