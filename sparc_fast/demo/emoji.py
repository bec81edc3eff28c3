"""The demo on emoji: its runs, what they were chosen on, and how many latents are words.

Everything else is what `sparc-fast extract`, `train` and `explain` do with anybody's folder of features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparc_fast import data
from sparc_fast.data import FeatureFolder
from sparc_fast.data.feature_folder import KNOWN, write_items, write_manifest
from sparc_fast.evaluate import Carried, Codes, latents_of_one_concept, matched
from sparc_fast.explain import ModelReport, Report
from sparc_fast.extract.items import held_out_by_name
from sparc_fast.files import atomic_path
from sparc_fast.model import SPARC
from sparc_fast.training import Config, Trainer
from sparc_fast.training.progress import Display

__all__ = ["CONCEPTS", "RUNS", "SETTINGS", "matched_afterwards", "train", "word_latents", "write_choosing"]

SETTINGS: Mapping[str, Any] = {  # docs/demo.md says what was tried, on training emoji alone
    "n_latents": 1536,
    "k": 56,
    "epochs": 40.0,
    "batch_size": 256,
    "lr": 4e-3,
    "dead_after": 20_000,
    "checkpoint_every": 100_000,
}
RUNS: Mapping[str, Mapping[str, Any]] = {
    "independent SAEs": {"selection": "local", "cross_loss_coef": 0.0},
    "SPARC": {"cross_loss_coef": 2.0, "support_dropout": 0.65},
}
CONCEPTS = "cat", "heart", "flag", "train", "hand", "moon"
"""Whose latents the page and the picture begin with, where latents have these names."""


def train(
    features: Path, out: Path, changed: Mapping[str, Any], progress: Callable[[str], Display]
) -> dict[str, Path] | None:
    """Train every run in a folder of `out`; a finished one stays as it is. None where a signal stopped one."""
    folders = {name: out / name.split()[0].lower() for name in RUNS}
    for name, folder in folders.items():
        settings = {**SETTINGS, **RUNS[name], **changed, "data": str(features)}
        if "steps" in changed:
            del settings["epochs"]
        with Trainer(Config.of(settings), folder, progress=progress(name)) as trainer:
            if trainer.run().stopped_by is not None:
                return None
    return folders


def matched_afterwards(alone: SPARC, features: Path) -> SPARC:
    """Independent SAEs with their latents matched by when they fire on the training emoji."""
    with data.open({stream: (features, stream) for stream in alone.streams}, split="train") as files:
        return matched(alone, files)


def word_latents(report: Report, features: Path) -> dict[str, npt.NDArray[np.bool_]]:
    """Of each model, [L]: latents that fire in all streams, and whose 5 strongest held-out samples share a word of
    their English names in 3 of 5, the same in every stream."""
    names = FeatureFolder(features).labels("held_out")
    held = report.items.held_out
    if names is None or held is None:
        return {}
    carried, rows = Carried.from_labels(torch.from_numpy(names[0])), torch.from_numpy(np.flatnonzero(held))

    def of(model: ModelReport) -> npt.NDArray[np.bool_]:
        codes: Codes = {stream: (values[rows], indices[rows]) for stream, (values, indices) in model.codes.items()}
        return latents_of_one_concept(codes, carried, report.n_latents).numpy()

    return {model.name: of(model) for model in report.models}


def write_choosing(features: Path, out: Path, *, seed: int = 1) -> None:
    """A folder of the training samples alone, a fifth of whose groups are held out: to choose settings on.

    No sample that the demo holds out is in it. `seed` is not the extraction's, which left none of its own choice.
    """
    folder = FeatureFolder(features)
    kept = folder.rows("train")
    with data.open({stream: (folder.path, stream) for stream in folder.streams}, split="train") as files:
        for stream, reader in files.readers.items():
            with atomic_path(out / stream / "00000.npy") as path, path.open("wb") as file:
                np.save(file, reader.rows(0, reader.n_rows).float().numpy())
    streams = {stream: {**about, "files": [f"{stream}/00000.npy"]} for stream, about in folder.streams.items()}
    columns = {name: folder.column(name, "train") for name in folder.columns}
    columns["split"] = ["held_out" if held_out_by_name(g, 0.2, seed) else "train" for g in columns["group"]]
    texts = [name for name in columns if name not in KNOWN]
    rows = ({name: column[n] for name, column in columns.items()} for n in range(len(kept)))
    write_items(out, rows, texts, [name for name in columns if name == "thumbnail"])
    write_manifest(out, streams, len(kept))
