"""Turn a checkpoint of the research code into one of sparc_fast, or back, as the suffixes say."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparc_fast.interop.research_files import from_upstream, to_upstream
from sparc_fast.model import SPARC

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoints, and what they do not say."""
    parser.add_argument("source", type=Path, help="a research-code checkpoint (.pth, .pt), or a .safetensors of ours")
    parser.add_argument("target", type=Path, help="what to write: a .safetensors, or a research-code checkpoint")
    parser.add_argument("--config", type=Path, help="its run_config.json (default: the one beside the checkpoint)")
    parser.add_argument("--batch-size", type=int, default=256, help="in which its counters count (%(default)s)")
    parser.add_argument("--fold-calibration", action="store_true", help="put a model's calibration into its weights")


def run(arguments: argparse.Namespace) -> int:
    """Write the other kind of checkpoint, and say what is in it."""
    source, target = arguments.source, arguments.target
    to_ours = _is_ours(target)
    if to_ours == _is_ours(source):
        raise ValueError(
            "source and target must be one checkpoint of the research code (.pth, .pt) and one of sparc_fast "
            f"(.safetensors), got {source} and {target}"
        )
    if to_ours:
        model = from_upstream(source, arguments.config)
        model.save(target)
    else:
        model = SPARC.load(source)
        to_upstream(model, target, batch_size=arguments.batch_size, fold_calibration=arguments.fold_calibration)
    widths = ", ".join(f"{name} {width}" for name, width in model.d_streams.items())
    print(f"{target}: {model.n_latents} latents, k {model.k}, {model.selection} TopK, {widths}")
    return 0


def _is_ours(path: Path) -> bool:
    return path.suffix == ".safetensors"
