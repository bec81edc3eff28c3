"""Train SPARC and independent SAEs on the characters of two typefaces and their names, or on emoji seen by four models.

Prints how well their latents agree across the streams, and writes a page to look through them.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from sparc_fast.data.feature_folder import is_feature_folder
from sparc_fast.files import check_folder
from sparc_fast.training.progress import Display, best_display

from . import extract
from .eval import load, print_table, untrained
from .explain import curves

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the report goes, and the few settings."""
    parser.add_argument(
        "--data", choices=("glyphs", "emoji"), default="glyphs",
        help="characters, which need nothing else, or emoji, which need sparc_fast[train,demo,emoji] (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("sparc_report"), help="folder of the report (%(default)s)")
    parser.add_argument("--steps", type=int, help="training steps of each model")
    parser.add_argument("--seed", type=int, help="of the weights and the shuffling")
    parser.add_argument(
        "--seeds", type=int, default=1,
        help="of glyphs: train with so many seeds, for the mean and its interval in the table (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ablations", action="store_true", help="of glyphs: also global TopK without cross loss, local with"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table, and say where the report is."""
    if missing := [name for name in ("rich", "matplotlib", "sklearn", "jinja2") if find_spec(name) is None]:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install 'sparc_fast[demo]'")
    if arguments.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {arguments.seeds}")
    changed = {name: value for name in ("steps", "seed") if (value := getattr(arguments, name)) is not None}
    if arguments.data == "emoji":
        return _emoji(arguments, changed)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sparc_fast import demo
    from sparc_fast.evaluate import comparison
    from sparc_fast.explain import write_report

    console = Console(width=None if sys.stdout.isatty() else 160)
    settings = demo.Settings(**changed)
    check_folder(arguments.out, "--out")
    with console.status("drawing the glyphs and reading their names", spinner="line"):
        glyphs = demo.glyphs()
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, object] = {}

        def progress(name: str, step: int, steps: int) -> None:
            name = name if arguments.seeds == 1 else f"{name}, seed {seed}"
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=steps)
            bar.update(tasks[name], completed=step)  # type: ignore[arg-type]

        runs = []
        for seed in range(settings.seed, settings.seed + arguments.seeds):
            of_seed = replace(settings, seed=seed)
            runs.append(demo.run(glyphs, of_seed, ablations=arguments.ablations, progress=progress))
    table = comparison({name: [of_seed[name].evaluation for of_seed in runs] for name in runs[0]})
    print_table(console, table, "held-out characters")
    options = [f"--{name} {value}" for name, value in changed.items()]
    options += [f"--seeds {arguments.seeds}"] if arguments.seeds > 1 else []
    command = " ".join(["sparc-fast demo", *options, *(["--ablations"] if arguments.ablations else [])])
    report = replace(demo.report(glyphs, runs[0], settings, command), table=table)
    page = write_report(report, arguments.out)
    console.print(f"open [bold]{page}[/bold] in a browser to look through every latent")
    return 0


def _emoji(arguments: argparse.Namespace, changed: Mapping[str, int]) -> int:
    """Extract, train and explain in folders of `--out`; what is finished there stays as it is."""
    if arguments.ablations:
        raise ValueError("--ablations must be left out with --data emoji, got it")
    if arguments.seeds > 1:
        raise ValueError(f"--seeds must be left out with --data emoji, got {arguments.seeds}")
    if find_spec("pyarrow") is None:
        raise ImportError("the emoji need pyarrow: pip install 'sparc_fast[train,demo,emoji]'")
    from rich.console import Console

    from sparc_fast.demo import emoji
    from sparc_fast.explain import report_of, write_report

    check_folder(arguments.out, "--out")
    console, features = Console(width=None if sys.stdout.isatty() else 160), arguments.out / "features"
    if not is_feature_folder(features) and extract.to_folder("emoji", features) is None:
        return 128 + signal.SIGINT

    def progress(name: str) -> Display:
        print(f"training {name}", file=sys.stderr, flush=True)
        return best_display()

    runs = emoji.train(features, arguments.out, changed, progress)
    if runs is None:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    models = {name: load(folder) for name, folder in runs.items()}
    beside = {
        "independent SAEs, matched": emoji.matched_afterwards(models["independent SAEs"], features),
        "untrained SPARC": untrained(models["SPARC"], arguments.seed or 0),
    }
    settings = {name.replace("_", " "): str(value) for name, value in {**emoji.SETTINGS, **changed}.items()}
    options = "".join(f" --{name} {value}" for name, value in changed.items())
    report = report_of(
        models, features, beside=beside, labels=False,
        first=emoji.CONCEPTS, curves={name: curves(folder) for name, folder in runs.items()},
        settings={"command": f"sparc-fast demo --data emoji{options}", **settings},
    )  # fmt: skip
    print_table(console, report.table, "held-out emoji")
    for name, found in emoji.word_latents(report, features).items():
        print(f"{name}: {found.sum()} latents whose strongest held-out samples share a word in every stream")
    page = write_report(report, arguments.out)
    console.print(f"open [bold]{page}[/bold] in a browser to look through every latent")
    return 0
