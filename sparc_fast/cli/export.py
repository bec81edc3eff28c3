"""Write a model, or the Triton operators, as other people's tools take them.

saelens: one stream as a SAE of SAELens. hub: a folder with a model card, as the Hugging Face Hub shows models. kernels:
the Triton operators as a kernel of the kernels hub, for which no model is needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparc_fast.files import read_object
from sparc_fast.interop.hub import Card, save_pretrained
from sparc_fast.interop.kernel_hub import write_kernel
from sparc_fast.interop.saelens import to_saelens

from .eval import load

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the format, and what it takes."""
    parser.add_argument("model", nargs="?", type=Path, help="a finished run's folder, a model file or a checkpoint")
    parser.add_argument("--to", required=True, choices=("saelens", "hub", "kernels"), help="the format")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="what to write")
    parser.add_argument("--stream", help="saelens: which stream (needed where there are several)")
    parser.add_argument(
        "--metadata", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="saelens: what dashboards ask for, such as model_name, hook_name, context_size, prepend_bos",
    )  # fmt: skip
    parser.add_argument(
        "--unit-norm", action="store_true",
        help="saelens: decoder rows of unit norm, codes times what they had, as SAE Dashboard needs calibrated models",
    )  # fmt: skip
    parser.add_argument("--title", default=Card.title, help="hub: of the card (%(default)s)")
    parser.add_argument("--about", default=Card.data, metavar="TEXT", help="hub: what the model was trained on")
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="hub: what sparc-fast eval --json printed")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="hub: shown below the evaluation's table")
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help="hub: of the training, such as a run's config.json"
    )
    parser.add_argument("--license", metavar="NAME", help="hub: as the Hub names it, such as apache-2.0")


def run(arguments: argparse.Namespace) -> int:
    """Write one of the formats, and say what is there."""
    out = arguments.out
    if arguments.to == "kernels":
        if arguments.model is not None:
            raise ValueError(f"model must not be given with --to kernels: it has none, got {arguments.model}")
        print(f"{out}: the Triton operators as the kernel {write_kernel(out)}; kernels.get_local_kernel loads it")
        return 0
    if arguments.model is None:
        raise ValueError(f"model must be given with --to {arguments.to}, got none")
    model = load(arguments.model)
    if arguments.to == "hub":
        card = Card(
            title=arguments.title,
            data=arguments.about,
            evaluation=_read(arguments.evaluation, "--evaluation"),
            picture=arguments.picture,
            settings=_read(arguments.settings, "--settings"),
            license=arguments.license,
        )
        save_pretrained(model, out, card)
        print(f"{out}: {model.n_latents} latents, and a card to look through; hf upload NAME/{out.name} {out}")
        return 0
    stream = model.streams[0] if arguments.stream is None else arguments.stream
    if arguments.stream is None and len(model.streams) > 1:
        raise ValueError(f"--stream must be one of the streams {model.streams}, got none")
    to_saelens(model, out, stream, _metadata(arguments.metadata), unit_norm=arguments.unit_norm)
    print(f"{out}: {stream}, {model.n_latents} latents, k {model.k}; sae_lens.SAE.load_from_disk loads it")
    return 0


def _metadata(texts: Sequence[str]) -> dict[str, Any]:
    """JSON where it is JSON, otherwise text."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"--metadata must be NAME=VALUE, got {text!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _read(path: Path | None, flag: str) -> dict[str, Any]:
    return {} if path is None else read_object(path, flag)
