"""Write a page to look through a model's latents: in every stream the samples that fire them most, with names.

It is a folder of files that opens without a server, from disk too, and can be shared as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparc_fast import data
from sparc_fast.data.feature_folder import FeatureFolder, is_feature_folder
from sparc_fast.files import check_folder
from sparc_fast.model import SPARC
from sparc_fast.selection import BY_THRESHOLD
from sparc_fast.sizes import counted
from sparc_fast.training.run_folder import RunFolder

from .eval import add_device, load, named, untrained

__all__ = ["add_arguments", "curves", "run"]

CURVES = ("loss", "self", "cross", "dead")
POINTS = 200  # of a curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, what it is compared with, the samples, and where the page goes."""
    model = "[NAME=]RUN"
    parser.add_argument("model", metavar=model, help="a finished run's folder, a model file or a checkpoint")
    parser.add_argument("--before", metavar=model, help="another model of the same streams, such as independent SAEs")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="what sparc-fast extract wrote: features and items"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the page, index.html")
    parser.add_argument(
        "--split", choices=("all", "train", "held_out"), default="all", help="the samples to show (%(default)s)"
    )
    parser.add_argument(
        "--atlas", type=Path, metavar="FILE.parquet", help="also write the samples as embedding-atlas takes them"
    )
    parser.add_argument(
        "--words", type=Path, metavar="extract.toml",
        help="search by what the models of texts that these settings name make of each word; they are run",
    )  # fmt: skip
    parser.add_argument(
        "--show", nargs="+", action="extend", default=[], metavar="CONCEPT", help="concepts whose latents come first"
    )
    parser.add_argument(
        "--no-labels", action="store_true", help="name latents by words of the texts though there are labels"
    )
    looking = parser.add_argument_group(
        "heatmaps", "Instead of the page of all latents: heatmaps.html, where samples' pictures and texts fire latents."
    )
    looking.add_argument(
        "--heatmap", nargs="+", action="extend", metavar="ID", help="samples of the folder, or files of pictures"
    )
    what = looking.add_mutually_exclusive_group()
    what.add_argument(
        "--latent", nargs="+", action="extend", default=[], metavar="NAME",
        help="names or numbers of latents to look for (default: each sample's strongest)",
    )  # fmt: skip
    what.add_argument("--from", dest="source", metavar="STREAM", help="look for what a stream says in the others")
    looking.add_argument(
        "--method", choices=("position", "attention", "gradient"), default="position",
        help="of pictures: the encoder on every position, relevancy through attention, or features times gradients "
        "(%(default)s)",
    )  # fmt: skip
    looking.add_argument(
        "--enlarge", type=float, default=1.0, help="show pictures so many times larger to convolutional models"
    )
    looking.add_argument(
        "--models", type=Path, metavar="extract.toml", help="the settings that name the models, where one is a function"
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the page, and say where it is."""
    needed = {"jinja2": "jinja2", "matplotlib": "matplotlib", "pillow": "PIL", "pyarrow": "pyarrow"}
    if missing := [name for name, module in needed.items() if find_spec(module) is None]:
        raise ImportError(f"the page needs {', '.join(missing)}: pip install 'sparc_fast[explain]'")
    from sparc_fast.explain import report_of, write_report
    from sparc_fast.training.trainer import device_of

    if not is_feature_folder(arguments.data):
        raise ValueError(f"--data must be a folder that sparc-fast extract wrote, got {arguments.data}")
    if arguments.atlas is not None and arguments.atlas.suffix != ".parquet":
        raise ValueError(f"--atlas must be a file that ends in .parquet, got {arguments.atlas}")
    check_folder(arguments.out, "--out")
    if arguments.heatmap:
        return _look(arguments, device_of(arguments.device))
    if arguments.latent or arguments.source:
        raise ValueError("--heatmap must say in which samples --latent or --from is looked for, got none")
    paths = [named(text) for text in (arguments.before, arguments.model) if text is not None]
    if len({name for name, _ in paths}) < len(paths):
        raise ValueError(f"RUN and --before must have names of their own, got two called {paths[0][0]}: give NAME=RUN")
    device = device_of(arguments.device)
    models = {name: load(path).to(device) for name, path in paths}
    after = models[paths[-1][0]]
    report = report_of(
        models,
        arguments.data,
        split=arguments.split,
        beside={"untrained (2)" if "untrained" in models else "untrained": _untrained(after, arguments).to(device)},
        words=_text_encoders(arguments.words, list(after.streams), device),
        curves={name: curves(path) for name, path in paths},
        labels=not arguments.no_labels,
        first=arguments.show,
        settings={"command": _command(arguments), "latents": f"{after.n_latents:,}", "k": str(after.k)},
    )
    page = write_report(report, arguments.out)
    n_named = sum(map(bool, report.after.names))
    print(f"{page}: {counted(len(report.items), 'sample')}, {counted(n_named, 'named latent')}")
    if arguments.atlas is not None:
        from sparc_fast.explain.embedding_atlas import write_atlas

        write_atlas(report, arguments.atlas)
        show = f"embedding-atlas {shlex.quote(str(arguments.atlas))} --x projection_x --y projection_y"
        print(f"{arguments.atlas}: pip install embedding-atlas, then {show}")
    return 0


def _untrained(after: SPARC, arguments: argparse.Namespace) -> SPARC:
    if after.selection not in BY_THRESHOLD or not set(after.streams) <= set(FeatureFolder(arguments.data).streams):
        return untrained(after, 0)
    with data.open({name: (arguments.data, name) for name in after.streams}, split=arguments.split) as files:
        return untrained(after, 0, files)


def _look(arguments: argparse.Namespace, device: str | torch.device) -> int:
    """Write heatmaps.html."""
    from sparc_fast import attribution
    from sparc_fast.explain.folder import codes_of, concepts_of

    folder, model = FeatureFolder(arguments.data), load(named(arguments.model)[1]).to(device)
    if missing := [stream for stream in model.streams if stream not in folder.streams]:
        raise ValueError(f"--data must have the streams {', '.join(model.streams)}, got none called {missing[0]}")
    if arguments.source is not None and arguments.source not in model.streams:
        raise ValueError(f"--from must be one of {', '.join(model.streams)}, got {arguments.source}")
    samples = attribution.samples_of(folder, arguments.heatmap)
    codes = codes_of(model, folder, list(model.streams), "all")
    carried, concepts = concepts_of(folder, "all", labels=not arguments.no_labels)
    names = attribution.Names(codes, carried, concepts, model.n_latents)
    latents = [names.latent(name) for name in arguments.latent]
    encoders = attribution.encoders_of(folder, model.streams, settings=arguments.models, device=device, say=print)
    looked = attribution.look_into(
        model, folder, samples, encoders, codes, names, latents=latents, source=arguments.source,
        method=arguments.method, enlarge=arguments.enlarge, say=print,
    )  # fmt: skip
    about = str(folder.manifest.get("attribution") or "")
    page = attribution.write_heatmaps(looked, arguments.out, attribution=about)
    print(f"{page}: {counted(len(looked), 'sample')}, {counted(len(encoders), 'stream')}")
    return 0


def _text_encoders(
    settings: Path | None, streams: Sequence[str], device: str | torch.device
) -> dict[str, Callable[[Sequence[str]], Tensor]]:
    """The models of texts that settings of an extraction name, of streams that there are."""
    if settings is None:
        return {}
    from sparc_fast.extract import read_extraction
    from sparc_fast.extract.encoders import encoder_of

    extraction = read_extraction(settings)
    texts = {s: about for s, about in extraction.streams.items() if about.modality == "text" and s in streams}
    if not texts:
        raise ValueError(f"--words must name models of texts for one of {', '.join(streams)}, got none in {settings}")
    return {s: encoder_of(about, extraction.folder, torch.device(device)).encode for s, about in texts.items()}


def curves(path: Path) -> dict[str, list[float]]:
    """The means that a run recorded, thinned."""
    metrics = RunFolder(path if path.is_dir() else path.parent).metrics
    if not metrics.is_file():
        return {}
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    trained: list[dict[str, Any]] = [
        {**record["train"], "step": record["step"]} for record in records if "train" in record
    ]
    trained = [*trained[:: math.ceil(len(trained) / POINTS) or 1], *trained[-1:]]
    found = {key: [math.nan if (x := r.get(key)) is None else float(x) for r in trained] for key in ("step", *CURVES)}
    return {key: line for key, line in found.items() if any(x == x for x in line)}


def _command(arguments: argparse.Namespace) -> str:
    """What was asked for, without the folders above."""
    words = ["sparc-fast", "explain", arguments.model]
    words += ["--before", arguments.before] if arguments.before else []
    words += ["--show", *arguments.show] if arguments.show else []
    words += ["--no-labels"] if arguments.no_labels else []
    return shlex.join([*words, "--data", str(arguments.data)])
