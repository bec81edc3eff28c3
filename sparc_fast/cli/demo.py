"""Train SPARC and independent SAEs on the characters of two typefaces and their Unicode names.

Prints how well their latents agree across the three, and writes a page to look through them.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from sparc_fast.files import check_folder

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the report goes, and the few settings."""
    parser.add_argument("--out", type=Path, default=Path("sparc_report"), help="folder of the report (%(default)s)")
    parser.add_argument("--steps", type=int, help="training steps of each model")
    parser.add_argument("--seed", type=int, help="of the weights and the shuffling")
    parser.add_argument("--ablations", action="store_true", help="also global TopK without cross loss, local with")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, and say where the report is."""
    if missing := [name for name in ("rich", "matplotlib", "sklearn", "jinja2") if find_spec(name) is None]:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install 'sparc_fast[demo]'")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sparc_fast import demo
    from sparc_fast.evaluate import as_text, comparison
    from sparc_fast.explain import write_report

    console = Console(width=None if sys.stdout.isatty() else 160)
    changed = {name: value for name in ("steps", "seed") if (value := getattr(arguments, name)) is not None}
    settings = demo.Settings(**changed)
    check_folder(arguments.out, "--out")
    with console.status("drawing the glyphs and reading their names", spinner="line"):
        glyphs = demo.glyphs()
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, object] = {}

        def progress(name: str, step: int, steps: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=steps)
            bar.update(tasks[name], completed=step)  # type: ignore[arg-type]

        trained = demo.run(glyphs, settings, ablations=arguments.ablations, progress=progress)
    evaluations = {name: result.evaluation for name, result in trained.items()}
    console.print(as_text(comparison(evaluations), "held-out characters"))
    options = [f"--{name} {value}" for name, value in changed.items()]
    command = " ".join(["sparc-fast demo", *options, *(["--ablations"] if arguments.ablations else [])])
    page = write_report(demo.report(glyphs, trained, settings, command), arguments.out)
    console.print(f"open [bold]{page}[/bold] in a browser to look through every latent")
    return 0
