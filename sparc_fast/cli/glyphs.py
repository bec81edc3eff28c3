"""Draw the glyphs in several faces and sizes, each time a little differently, into files for `sparc-fast train`.

Held-out characters are in files of their own.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from sparc_fast.files import check_folder
from sparc_fast.sizes import counted
from sparc_fast.training.progress import Bar

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the files go, and what is in them."""
    parser.add_argument("--out", type=Path, default=Path("glyphs"), help="folder of the files (%(default)s)")
    parser.add_argument("--rows", type=int, default=200_000, help="rows to train on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the jitter (%(default)s)")
    parser.add_argument("--threads", type=int, help="that draw; as many as there are cores by default")


def run(arguments: argparse.Namespace) -> int:
    """Write the files, and say how to train on them."""
    if missing := [name for name in ("rich", "matplotlib", "sklearn", "pyarrow") if find_spec(name) is None]:
        raise ImportError(f"the glyphs need {', '.join(missing)}: pip install 'sparc_fast[demo,data]'")
    from sparc_fast.demo import write_glyphs

    check_folder(arguments.out, "--out")
    bar = Bar()
    bar.start(0, arguments.rows, 1)
    try:
        write_glyphs(
            arguments.out, arguments.rows, seed=arguments.seed, threads=arguments.threads,
            progress=lambda done, _: bar.advance(done),
        )  # fmt: skip
    finally:
        bar.close()
    print(f"{counted(arguments.rows, 'row')}; now: sparc-fast train {arguments.out / 'train.toml'} --out runs/wide")
    return 0
