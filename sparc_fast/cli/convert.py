"""Turn other people's models into one of sparc_fast, or ours into a checkpoint of the research code."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from sparc_fast.interop.crosscoders import from_crosscoder
from sparc_fast.interop.research_files import from_upstream, to_upstream
from sparc_fast.interop.saelens import from_saelens, is_saelens
from sparc_fast.model import SPARC

__all__ = ["add_arguments", "run"]


def _sae(given: argparse.Namespace) -> SPARC:
    names = given.streams or []
    if len(names) > 1:
        raise ValueError(f"--streams must be one name for a SAE, got {', '.join(names)}")
    return from_saelens(given.source, *names)


def _research(given: argparse.Namespace) -> SPARC:
    if given.streams:
        raise ValueError(f"--streams must not be given for the research code, which names them, got {given.streams}")
    return from_upstream(given.source, given.config)


READERS: Mapping[str, Callable[[argparse.Namespace], SPARC]] = {
    "research": _research,
    "saelens": _sae,
    "crosscoder": lambda given: from_crosscoder(given.source, given.config, topk=given.topk, streams=given.streams),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The models, and what they do not say."""
    parser.add_argument(
        "source", type=Path,
        help="a research-code checkpoint (.pth, .pt), a folder of SAELens, a crosscoder of dictionary_learning (a "
        "folder or .pt), or a .safetensors of ours",
    )  # fmt: skip
    parser.add_argument("target", type=Path, help="what to write: a .safetensors, or a research-code checkpoint")
    parser.add_argument(
        "--from", dest="origin", choices=tuple(READERS),
        help="whose it is (default: saelens of a folder with cfg.json, crosscoder of others, research of a file)",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, help="its run_config.json or config.json (default: the one beside it)")
    parser.add_argument(
        "--streams", nargs="+", metavar="NAME", help="what to call a SAE's inputs, or a crosscoder's layers"
    )
    parser.add_argument(
        "--topk",
        action="store_true",
        help="of a crosscoder the k largest of each sample, not those above its threshold",
    )
    parser.add_argument("--batch-size", type=int, default=256, help="in which its counters count (%(default)s)")
    parser.add_argument("--fold-calibration", action="store_true", help="put a model's calibration into its weights")


def run(arguments: argparse.Namespace) -> int:
    """Write the other kind of model, and say what is in it."""
    source, target = arguments.source, arguments.target
    to_ours = _is_ours(target)
    if to_ours == (arguments.origin is None and _is_ours(source)):
        raise ValueError(
            "source and target must be one checkpoint of the research code (.pth, .pt) and one of sparc_fast "
            f"(.safetensors), or source another's model, got {source} and {target}"
        )
    if to_ours:
        model = READERS[arguments.origin or _origin(source)](arguments)
        model.save(target)
    else:
        model = SPARC.load(source)
        to_upstream(model, target, batch_size=arguments.batch_size, fold_calibration=arguments.fold_calibration)
    widths = ", ".join(f"{name} {width}" for name, width in model.d_streams.items())
    print(f"{target}: {model.n_latents} latents, k {model.k}, {model.selection} TopK, {widths}")
    return 0


def _is_ours(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _origin(source: Path) -> str:
    if not source.is_dir():
        return "research"
    return "saelens" if is_saelens(source) else "crosscoder"
