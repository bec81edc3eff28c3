"""Print the table of `sparc-fast demo` for models of your own, on samples they have not seen.

Each stream is encoded alone, and jointly where the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparc_fast import data, distributed
from sparc_fast.data import AlignedFiles, FeatureFolder
from sparc_fast.data.absence import present_of
from sparc_fast.data.feature_folder import Split, is_feature_folder
from sparc_fast.data.formats import FORMATS
from sparc_fast.data.ids import as_comparable
from sparc_fast.data.readers import Source
from sparc_fast.evaluate import (
    METRICS,
    Evaluation,
    Hierarchy,
    Row,
    as_text,
    comparison,
    evaluate,
    evaluate_raw,
    matched,
    write_comparison,
    write_plots,
)  # fmt: skip
from sparc_fast.evaluate.formats import FORMATS as TABLE_FORMATS
from sparc_fast.evaluate.formats import check_endings
from sparc_fast.evaluate.labels import as_groups, as_ids, as_labels, as_named_labels
from sparc_fast.evaluate.plots import check_plots
from sparc_fast.evaluate.resampling import RESAMPLES
from sparc_fast.evaluate.table import Evaluated
from sparc_fast.model import SPARC
from sparc_fast.selection import BY_THRESHOLD, LOCAL
from sparc_fast.sizes import as_bytes, counted
from sparc_fast.training import Config, load_model
from sparc_fast.training.config import parse_sources
from sparc_fast.training.trainer import device_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "add_arguments", "add_device", "add_reading", "load", "model_file", "named", "open_joined", "print_table", "run",
    "sources_of", "untrained",
]  # fmt: skip

MODEL, LABELS = "model.safetensors", "labels.npy"
AFTERWARDS = ", matched"
PLACES, SOME = 4, 64  # of the files, and samples at each, from which an untrained model's thresholds are learned
FEWEST = 5  # samples that must carry a label of the items: a concept of fewer says little


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The models, the samples, and how to print."""
    parser.add_argument(
        "models", nargs="*", metavar="[NAME=]MODEL", help="a finished run's folder, a model file or a checkpoint"
    )
    parser.add_argument(
        "--compare", nargs="+", action="extend", default=[], metavar="RUN",
        help="further runs, of which those that differ in nothing but their seed are one column, mean ± interval",
    )  # fmt: skip
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
        "--metrics", nargs="+", action="extend", metavar="NAME",
        help=f"all, or of {', '.join(metric.key for metric in METRICS)} (default: "
        f"{', '.join(metric.key for metric in METRICS if metric.default)})",
    )  # fmt: skip
    parser.add_argument(
        "--train-data", nargs="+", action="extend", metavar="FOLDER or STREAM=FILE[#NAME]",
        help="samples the models were trained on, for metrics that learn something first, and to match the latents of "
        "independent SAEs (of --selection local) afterwards; otherwise the training split of a folder of features",
    )  # fmt: skip
    parser.add_argument(
        "--train-labels", metavar="FILE[:COLUMN]", help=f"of --train-data; {LABELS} of the folder where there is one"
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
    add_reading(
        parser, split="held_out", memory="4GiB", what="samples with a stream of zeros are left out, or evaluated"
    )
    parser.add_argument(
        "--label-ids", metavar="FILE[:COLUMN]",
        help="an id for each row of --labels and --groups, to be matched with --ids (default: they are in the order of "
        "the first stream)",
    )  # fmt: skip
    parser.add_argument("--no-retrieval", action="store_true", help="leave out what compares all pairs of samples")
    parser.add_argument("--seed", type=int, default=0, help="of the untrained model's weights (%(default)s)")
    parser.add_argument(
        "--resamples", type=int, default=RESAMPLES,
        help="how often samples, or groups, are drawn anew for the intervals; 0: none (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--hierarchy", metavar="FILE",
        help="of the labels' names, for metrics by depth: JSON, Open Images' or of the name above each name",
    )  # fmt: skip
    parser.add_argument("--raw", action="store_true", help="also retrieval by the inputs of streams of one width")
    printed = parser.add_mutually_exclusive_group()
    for form, ending, words in (("json", ".json", "all figures as JSON"), ("csv", ".csv", "the table as CSV"),
                                ("latex", ".tex", "the table as LaTeX"),
                                ("markdown", ".md", "the table in Markdown")):  # fmt: skip
        printed.add_argument(
            f"--{form}", dest="form", action="store_const", const=ending, help=f"print {words} instead of a table"
        )
    parser.add_argument(
        "--out", nargs="+", default=[], metavar="FILE", help="also write it to files that end in .json, .csv, .tex, .md"
    )
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw it, as PNG and SVG")


def run(arguments: argparse.Namespace) -> int:
    """Print the table of `sparc-fast demo` for some models and an untrained one of the first one's shape."""
    with distributed.torchrun(), ExitStack() as quiet:
        leads = not distributed.is_running() or distributed.leads()
        if not leads:  # what is said is said once
            quiet.enter_context(redirect_stderr(quiet.enter_context(open(os.devnull, "w"))))
        evaluations, joined, n = _evaluated(arguments)
        if leads:
            _show(_by_settings(evaluations, joined), n, arguments)
    return 0


def _evaluated(arguments: argparse.Namespace) -> tuple[dict[str, Evaluation], dict[str, list[str]], int]:
    """(of each model; which of them are one column; of how many samples)."""
    if arguments.form is None and find_spec("rich") is None:
        raise ImportError("the table needs rich: pip install 'sparc_fast[train]', or ask for --json")
    check_endings(arguments.out)
    if arguments.plots is not None:
        check_plots(arguments.plots)
    if not arguments.models and not arguments.compare:
        raise ValueError("models must be at least one, got none")
    models = _load_all(arguments.models)
    joined = _joined(arguments.compare, models)
    name, first = next(iter(models.items()))
    for other, model in models.items():
        if model.d_streams != first.d_streams:
            raise ValueError(
                f"models must have the same streams, got {first.d_streams} in {name}, {model.d_streams} in {other}"
            )
    memory, device = as_bytes(arguments.memory, "--memory"), device_of(arguments.device)
    evaluations: dict[str, Evaluation] = {}
    with ExitStack() as opened:
        files = opened.enter_context(open_joined(sources_of(arguments.data, first), arguments))
        if files.d_streams != first.d_streams:
            raise ValueError(f"--data must have the widths {first.d_streams}, got {files.d_streams}")
        labels, groups = _known_of_samples(arguments, files)
        if files.matched is not None:
            print(files.matched, file=sys.stderr, flush=True)
        hierarchy = _hierarchy(arguments, files.n_rows)
        train, train_labels = _training_samples(arguments, first, opened)
        columns = _with_baselines(models, joined, train, files, arguments)
        for name, model in columns.items():
            found = evaluate(
                _on_device(model, device), files, labels, metrics=_names(arguments.metrics), groups=groups,
                hierarchy=hierarchy, train=train, train_labels=train_labels, retrieval=not arguments.no_retrieval,
                resamples=arguments.resamples, zero_rows=arguments.zero_rows, memory=memory,
            )  # fmt: skip
            evaluations[name] = replace(found, single_codes={})  # of all models they would be many
        if left_out := files.n_rows - found.n_samples:
            print(f"left out for lack of a stream: {left_out:,} of {counted(files.n_rows, 'sample')}", file=sys.stderr)
        if arguments.raw:
            evaluations["raw features"] = _raw(files, groups, memory, arguments)
    return evaluations, joined, found.n_samples


def _on_device(model: SPARC, device: torch.device) -> SPARC:
    """The model there, or where ranks share it, this one's latents of it."""
    return (distributed.shard(model, distributed.mesh_of(device)) if distributed.is_running() else model).to(device)


def _show(evaluations: Mapping[str, Evaluated], n: int, arguments: argparse.Namespace) -> None:
    """On the terminal, in files, and as pictures."""
    rows = comparison(evaluations)
    if arguments.form is None:
        from rich.console import Console

        print_table(Console(width=None if sys.stdout.isatty() else 160), rows, f"{n:,} samples")
    else:
        sys.stdout.write(TABLE_FORMATS[arguments.form](rows, evaluations))
    write_comparison(rows, evaluations, arguments.out)
    if arguments.plots is not None:
        write_plots(evaluations, arguments.plots)


def print_table(console: Console, rows: Sequence[Row], samples: str) -> None:
    """A comparison, and what is to be said of it."""
    console.print(as_text(rows, samples))
    console.print(*getattr(rows, "notes", ()), sep="\n", highlight=False, markup=False, soft_wrap=True)


def _names(texts: Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Names with commas or spaces between them."""
    if texts is None:
        return None
    if texts == ["all"]:
        return "all"
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def _joined(texts: Sequence[str], models: dict[str, SPARC]) -> dict[str, list[str]]:
    """Load further runs among the models; which of them are one column: those alike in all settings but the seed."""
    by_settings: dict[str, list[str]] = {}
    for text in texts:
        found = _load_all([text], set(models))
        models.update(found)
        (name,) = found
        config = Path(text.partition("=")[2] or text) / "config.json"
        key = name
        if config.is_file():
            settings = json.loads(config.read_text(encoding="utf-8"))
            free = {field.name for field in fields(Config) if field.metadata["free"]}
            key = json.dumps({n: v for n, v in settings.items() if n != "seed" and n not in free}, sort_keys=True)
        by_settings.setdefault(key, []).append(name)
    columns: dict[str, list[str]] = {}
    for names in by_settings.values():
        columns[names[0] if len(names) == 1 else f"{names[0]} ({len(names)} seeds)"] = names
    return columns


def _by_settings(evaluations: Mapping[str, Evaluation], joined: Mapping[str, Sequence[str]]) -> dict[str, Evaluated]:
    """Runs that are alike in one column, at the place of the first."""
    column_of = {name: (column, names) for column, names in joined.items() if len(names) > 1 for name in names}
    columns: dict[str, Evaluated] = {}
    for name, found in evaluations.items():
        base, matched_too, _ = name.partition(AFTERWARDS)
        if base in column_of:
            column, names = column_of[base]
            columns[column + matched_too] = [evaluations[one + matched_too] for one in names]
        else:
            columns[name] = found
    return columns


def _hierarchy(arguments: argparse.Namespace, n: int) -> tuple[Hierarchy, Sequence[str]] | None:
    """It, and the name of each label."""
    if arguments.hierarchy is None:
        return None
    found, path = Hierarchy.read(arguments.hierarchy), Path(arguments.data[0])
    given = arguments.labels or (path / LABELS if (path / LABELS).is_file() and not is_feature_folder(path) else None)
    if given is not None:
        rows = n if arguments.label_ids is None else len(as_ids(arguments.label_ids, "--label-ids"))
        return found, as_named_labels(given, (rows,))[1]
    labels = FeatureFolder(path).labels(arguments.split, FEWEST) if is_feature_folder(path) else None
    if labels is None:
        raise ValueError("--hierarchy must be of --labels that are names, or of a folder's labels, got none")
    return found, labels[1]


def _training_samples(
    arguments: argparse.Namespace, model: SPARC, opened: ExitStack
) -> tuple[AlignedFiles | None, Tensor | None]:
    """Those given, or the training split of the folder of features that is evaluated."""
    given, split = arguments.train_data, arguments.split
    path = Path((given or arguments.data)[0])
    if given is None:
        if len(arguments.data) > 1 or not is_feature_folder(path) or split != "held_out":
            return None, None
        if "train" not in FeatureFolder(path).column("split"):
            return None, None
    files = opened.enter_context(data.open(sources_of(given or arguments.data, model), split="train"))
    if files.d_streams != model.d_streams:
        raise ValueError(f"--train-data must have the widths {model.d_streams}, got {files.d_streams}")
    if arguments.train_labels is not None:
        return files, as_labels(arguments.train_labels, (files.n_rows,), "--train-labels")
    if is_feature_folder(path):
        own, evaluated = FeatureFolder(path).labels("train"), FeatureFolder(path).labels(split, FEWEST)
        if own is None or evaluated is None:
            return files, None
        columns, nobody = dict(zip(own[1], own[0].T, strict=True)), np.zeros(len(own[0]), np.bool_)
        truth = np.stack([columns.get(name, nobody) for name in evaluated[1]], axis=1)  # in the evaluated ones' order
        return files, torch.from_numpy(truth.repeat(files.n_rows // len(truth), axis=0))
    return files, as_labels(path / LABELS, (files.n_rows,), "--train-labels") if (path / LABELS).is_file() else None


def _with_baselines(
    models: Mapping[str, SPARC], joined: Mapping[str, Sequence[str]], train: AlignedFiles | None,
    files: AlignedFiles, arguments: argparse.Namespace,
) -> dict[str, SPARC]:  # fmt: skip
    """Beside independent SAEs the same with their latents matched afterwards, and an untrained model."""
    columns: dict[str, SPARC] = {}
    for name, model in models.items():
        columns[name] = model
        if model.selection not in LOCAL or len(model.streams) < 2:
            continue
        if train is None:
            print(f"give --train-data to see {name} with its latents matched afterwards", file=sys.stderr)
        elif find_spec("scipy") is None:
            print("latents are not matched without SciPy: pip install 'sparc_fast[evaluate]'", file=sys.stderr)
        else:
            columns[name + AFTERWARDS] = matched(model, train, memory=arguments.memory)
    first = next(iter(models.values()))
    columns["untrained (2)" if "untrained" in models else "untrained"] = untrained(
        first, arguments.seed, files if train is None else train
    )
    return columns


def _raw(files: AlignedFiles, groups: Tensor | None, memory: int, arguments: argparse.Namespace) -> Evaluation:
    taken = 4 * files.n_rows * sum(files.d_streams.values())
    if taken > memory // 2:
        raise ValueError(f"--memory must be at least {2 * taken} bytes for --raw, got {arguments.memory}")
    rows, rows_of = files.rows(0, files.n_rows), files.sample_of_rows() if groups is None else groups
    present, _ = present_of(rows, files.present, files.d_streams, arguments.zero_rows)
    complete = torch.ones(len(rows), dtype=torch.bool, device="cpu") if present is None else present.all(dim=1)
    parts = torch.split(rows[complete], list(files.d_streams.values()), dim=1)
    inputs = dict(zip(files.d_streams, parts, strict=True))
    of_complete = None if rows_of is None else torch.as_tensor(rows_of)[complete]
    return evaluate_raw(inputs, groups=of_complete, resamples=arguments.resamples)


def _load_all(texts: Sequence[str], taken: Collection[str] = ()) -> dict[str, SPARC]:
    models: dict[str, SPARC] = {}
    for text in texts:
        name, path = named(text)
        if name in models or name in taken:
            raise ValueError(f"models must have names of their own, got two called {name}: give NAME=MODEL")
        models[name] = load(path)
    return models


def named(text: str) -> tuple[str, Path]:
    """[NAME=]MODEL; a run is called as its folder is."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        return name, Path(path)
    there = Path(text).resolve()
    return (there.parent.name if there.name == MODEL else there.stem), Path(text)


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


def untrained(trained: SPARC, seed: int, files: AlignedFiles | None = None) -> SPARC:
    """Random weights, and the calibration of the model that it stands beside; thresholds are learned from the files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {**trained.config(), "check_finite": True}
        model = SPARC(**config, dtype=trained.W_enc.dtype)
    model.load_state_dict({name: getattr(trained, name) for name in ("input_mean", "input_rms")}, strict=False)
    if files is not None and model.selection in BY_THRESHOLD:
        for start in range(0, files.n_rows, max(SOME, files.n_rows // PLACES)):
            some = slice(start, start + SOME)
            present = None if files.present is None else files.present[some]
            model.learn_thresholds(files.rows(start, min(some.stop, files.n_rows)), present)
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


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where the model computes."""
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:1")


def add_reading(parser: argparse.ArgumentParser, *, split: Split, memory: str, what: str) -> None:
    """Which samples are read, how rows of several files belong together (in the words of `sparc-fast train`), and what
    it may take; `what` is done with rows of zeros."""
    parser.add_argument("--split", choices=get_args(Split), default=split, help="of a folder of features (%(default)s)")
    parser.add_argument(
        "--zero-rows", choices=("absent", "keep"), default="absent", help=f"{what} as they are (%(default)s)"
    )
    parser.add_argument("--memory", default=memory, help="to take beside the model, in bytes or as 4GiB (%(default)s)")
    add_device(parser)
    parser.add_argument(
        "--ids", nargs="+", action="extend", metavar="STREAM=FILE[#NAME] or NAME",
        help="identifiers of the rows, as for train",
    )  # fmt: skip
    parser.add_argument("--join", choices=("inner", "outer"), help="match rows by ids, as for train")
    parser.add_argument("--repeated", choices=("sample", "all"), help="several rows of one id: the first, or all")


def open_joined(sources: Mapping[str, Source], arguments: argparse.Namespace) -> AlignedFiles:
    """The files, their rows joined as the arguments of `add_reading` say."""
    ids = arguments.ids
    if ids is not None:
        ids = ids[0] if len(ids) == 1 and "=" not in ids[0] else parse_sources(ids, "--ids")
    return data.open(sources, split=arguments.split, ids=ids, join=arguments.join, repeated=arguments.repeated)


def _file(folder: Path, stream: str) -> Path:
    for suffix in FORMATS:
        if (path := folder / f"{stream}{suffix}").is_file():
            return path
    raise FileNotFoundError(f"--data must hold a file for each stream, but there is no {stream}.npy in {folder}")


def _known_of_samples(arguments: argparse.Namespace, files: AlignedFiles) -> tuple[Tensor | None, Tensor | None]:
    """Which concepts each sample carries, bool [N, C], and the number of its group, [N]."""
    labels, groups, label_ids = arguments.labels, arguments.groups, arguments.label_ids
    if label_ids is not None:
        if files.ids is None:
            raise ValueError("--label-ids must be matched with --ids, but there are none")
        found = as_ids(label_ids, "--label-ids")
        n, (first, of_samples) = len(found), _rows_of(found, files.ids)
    known: list[Tensor | None] = []
    for name, given, read in (("labels", labels, as_labels), ("groups", groups, as_groups)):
        if given is None or label_ids is None:
            known.append(None if given is None else read(given, (files.n_rows,)))
            continue
        of_rows = read(given, (n,))
        if len(differs := (of_rows != of_rows[first]).reshape(n, -1).any(1).nonzero()):
            raise ValueError(f"{name} must be the same in all rows of one id, got others in row {int(differs[0])}")
        known.append(of_rows[of_samples])
    path = Path(arguments.data[0])
    if is_feature_folder(path) and len(arguments.data) == 1 and files.matched is None:
        return _known_of_folder(FeatureFolder(path), arguments.split, files.n_rows, *known)
    if labels is None and (path / LABELS).is_file():
        known[0] = as_labels(path / LABELS, (files.n_rows,))
    return known[0], known[1]


def _known_of_folder(
    folder: FeatureFolder, split: Split, n: int, labels: Tensor | None, groups: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What is not given is of the folder's items, of each of their tokens."""
    items = len(folder.rows(split))
    if labels is None and (found := folder.labels(split, FEWEST)) is not None:
        labels = torch.from_numpy(found[0].repeat(n // items, axis=0))
    if groups is None:
        number = np.unique(np.array(folder.column("group", split)), return_inverse=True)[1].astype(np.int64)
        groups = torch.from_numpy(number.repeat(n // items))
    return labels, groups


def _rows_of(ids: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    """For each identifier the first row that has it, and for each wanted one the row."""
    ids, wanted = as_comparable([ids, wanted])
    names, first, number = np.unique(ids, return_index=True, return_inverse=True)
    place = np.searchsorted(names, wanted).clip(max=max(len(names) - 1, 0))
    there = names[place] == wanted if len(names) else np.zeros(len(wanted), np.bool_)
    if not there.all():
        missing = wanted[int((~there).argmax())]
        raise ValueError(f"--label-ids must hold the id of every sample, but {str(missing)!r} is missing")
    return torch.from_numpy(first[number]), torch.from_numpy(first[place])
