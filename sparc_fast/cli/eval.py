"""Print the table of `sparc-fast demo` for models of your own, on samples they have not seen.

Each stream is encoded alone, and jointly where the table says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from sparc_fast import data
from sparc_fast.data import FeatureFolder
from sparc_fast.data.feature_folder import Split, is_feature_folder
from sparc_fast.data.formats import FORMATS
from sparc_fast.data.readers import Source
from sparc_fast.evaluate import as_text, comparison, evaluate
from sparc_fast.evaluate.labels import as_groups, as_labels
from sparc_fast.model import SPARC
from sparc_fast.training import load_model
from sparc_fast.training.config import parse_sources

__all__ = ["add_arguments", "load", "model_file", "run", "sources_of", "untrained"]

MODEL, LABELS = "model.safetensors", "labels.npy"
FEWEST = 5  # samples that must carry a label of the items: a concept of fewer says little


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The models, the samples, and how to print."""
    parser.add_argument(
        "models", nargs="+", metavar="[NAME=]MODEL", help="a finished run's folder, a model file or a checkpoint"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        required=True,
        metavar="FOLDER or STREAM=FILE[#NAME]",
        help="samples the models have not seen: a folder of features (its held-out split), a folder with a file named "
        "after each stream, or the files themselves",
    )
    parser.add_argument(
        "--split", choices=get_args(Split), default="held_out", help="of a folder of features (%(default)s)"
    )
    parser.add_argument(
        "--labels",
        metavar="FILE[:COLUMN]",
        help=f"class ids or names, a row a sample, or truth values, samples × concepts; {LABELS} of the folder where "
        f"there is one, or labels that {FEWEST} items or more of a folder of features have",
    )
    parser.add_argument(
        "--groups",
        metavar="FILE[:COLUMN]",
        help="an id a sample, such as the image of a caption: retrieval counts any sample of the group as right; "
        "otherwise those of a folder of features",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the untrained model's weights (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the table of `sparc-fast demo` for some models and an untrained one of the first one's shape."""
    if not arguments.json and find_spec("rich") is None:
        raise ImportError("the table needs rich: pip install 'sparc_fast[train]', or ask for --json")
    models = _load_all(arguments.models)
    name, first = next(iter(models.items()))
    for other, model in models.items():
        if model.d_streams != first.d_streams:
            raise ValueError(
                f"models must have the same streams, got {first.d_streams} in {name}, {model.d_streams} in {other}"
            )
    inputs = _inputs(arguments.data, first, arguments.split)
    n_samples = len(inputs[first.streams[0]])
    labels = _labels(arguments.labels, arguments.data, n_samples, arguments.split)
    groups = _groups(arguments.groups, arguments.data, n_samples, arguments.split)
    columns = {**models, "untrained (2)" if "untrained" in models else "untrained": untrained(first, arguments.seed)}
    evaluations = {name: evaluate(model, inputs, labels, groups=groups) for name, model in columns.items()}
    if arguments.json:
        print(json.dumps({name: found.to_dict() for name, found in evaluations.items()}, indent=2))
    else:
        from rich.console import Console

        n = next(iter(evaluations.values())).n_samples
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(as_text(comparison(evaluations), f"{n:,} samples"))
    return 0


def _load_all(texts: Sequence[str]) -> dict[str, SPARC]:
    models: dict[str, SPARC] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            path = text
            name = _name(Path(text))
        if name in models:
            raise ValueError(f"models must have names of their own, got two called {name}: give NAME=MODEL")
        models[name] = load(Path(path))
    return models


def _name(path: Path) -> str:
    """A run is called as its folder is."""
    path = path.resolve()
    return path.parent.name if path.name == MODEL else path.stem


def model_file(path: Path) -> Path:
    """The model of a run's folder, or the file itself."""
    if not path.is_dir():
        return path
    if not (path / MODEL).is_file():
        raise FileNotFoundError(
            f"{path} has no {MODEL}, which a run gets when it is finished; a checkpoint in it can be evaluated before"
        )
    return path / MODEL


def load(path: Path) -> SPARC:
    """The model in a run's folder, a model file or a checkpoint."""
    path = model_file(path)
    try:
        return SPARC.load(path)
    except ValueError as no_model:
        try:
            return load_model(path)
        except ValueError:
            raise no_model from None


def untrained(trained: SPARC, seed: int) -> SPARC:
    """Random weights, and the calibration of the model that it stands beside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {**trained.config(), "check_finite": True}
        model = SPARC(**config, dtype=trained.W_enc.dtype)
    model.load_state_dict({name: getattr(trained, name) for name in ("input_mean", "input_rms")}, strict=False)
    return model


def sources_of(texts: Sequence[str], model: SPARC, some: bool = False) -> dict[str, Source]:
    """Where each stream's samples are, in the model's order: in a folder of all, or in files, of `some` maybe."""
    folder = Path(texts[0])
    sources: dict[str, Source]
    if len(texts) == 1 and is_feature_folder(folder):
        there = FeatureFolder(folder).streams
        sources = {stream: (folder, stream) for stream in model.streams if stream in there}
    elif len(texts) == 1 and folder.is_dir():
        sources = {stream: _file(folder, stream) for stream in model.streams}
    else:
        sources = dict(parse_sources(texts, "--data"))
    if set(sources) != set(model.streams) and not (some and set(sources) < set(model.streams) and sources):
        streams = ", ".join(model.streams)
        raise ValueError(
            f"--data must give {'some of ' if some else ''}the streams {streams}, got {', '.join(sources)}"
        )
    return {stream: sources[stream] for stream in model.streams if stream in sources}


def _inputs(texts: Sequence[str], model: SPARC, split: Split) -> dict[str, Tensor]:
    """Every stream's samples, [N, D_s]."""
    sources = sources_of(texts, model)
    with data.open(sources, split=split) as files:
        if files.d_streams != model.d_streams:
            raise ValueError(f"--data must have the widths {model.d_streams}, got {files.d_streams}")
        parts = torch.split(files.rows(0, files.n_rows), list(files.d_streams.values()), dim=1)
    return dict(zip(sources, parts, strict=True))


def _file(folder: Path, stream: str) -> Path:
    for suffix in FORMATS:
        if (path := folder / f"{stream}{suffix}").is_file():
            return path
    raise FileNotFoundError(f"--data must hold a file for each stream, but there is no {stream}.npy in {folder}")


def _labels(given: str | None, texts: Sequence[str], n: int, split: Split) -> Tensor | None:
    """Which concepts each sample carries, bool [N, C]."""
    path = Path(texts[0]) / LABELS
    if given is None and len(texts) == 1 and is_feature_folder(texts[0]):
        folder = FeatureFolder(texts[0])
        found = folder.labels(split, FEWEST)
        return None if found is None else torch.from_numpy(found[0].repeat(n // len(folder.rows(split)), axis=0))
    if given is None and not path.is_file():
        return None
    return as_labels(path if given is None else given, (n,))


def _groups(given: str | None, texts: Sequence[str], n: int, split: Split) -> Tensor | None:
    """A number for the group of each sample, int64 [N]."""
    if given is None and len(texts) == 1 and is_feature_folder(texts[0]):
        groups = FeatureFolder(texts[0]).column("group", split)
        numbers = torch.from_numpy(np.unique(np.array(groups), return_inverse=True)[1].astype(np.int64))
        return numbers.repeat_interleave(n // len(groups))
    return None if given is None else as_groups(given, (n,))
