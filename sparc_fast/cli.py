"""The command `sparc-fast`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sparc_fast import convert
from sparc_fast.evaluate import command as evaluation
from sparc_fast.files import atomic_path
from sparc_fast.planning import command as plan_command
from sparc_fast.training import command as training
from sparc_fast.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 after a message on standard error, or what the command says."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and arguments.run is not _bench:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        status: int = arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"sparc-fast: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparc-fast",
        description="Concept-aligned sparse autoencoders over several models and modalities.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and the backends built in")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train on the built-in glyphs, print the evaluation and write a report",
        description="Train SPARC and independent SAEs on the characters of two typefaces and their Unicode names; "
        "print how well their latents agree across the three, and write a page to look through them.",
    )
    demo.add_argument("--out", type=Path, default=Path("sparc_report"), help="folder of the report (%(default)s)")
    demo.add_argument("--steps", type=int, help="training steps of each model")
    demo.add_argument("--seed", type=int, help="of the weights and the shuffling")
    demo.add_argument("--ablations", action="store_true", help="also global TopK without, local TopK with, cross loss")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="train on your own features, in a run that survives interruption",
        description="Train SPARC on features in files. The same command goes on where a stopped or killed run was, "
        "bit for bit.",
    )
    training.add_arguments(train)
    train.set_defaults(run=training.run)

    planned = commands.add_parser(
        "plan",
        help="whether a training run fits this machine or another, and how long it takes",
        description="The memory of a training run, part by part, and the time of its steps, before it is begun; what "
        "would make it fit. Exit status 0 if it fits, 3 if it does not, 1 after an error.",
    )
    plan_command.add_arguments(planned)
    planned.set_defaults(run=plan_command.run)

    evaluated = commands.add_parser(
        "eval",
        help="print the evaluation of trained models, beside an untrained one",
        description="Print the table of `sparc-fast demo` for models of your own, on samples they have not seen: "
        "each stream encoded alone, and jointly where it says so.",
    )
    evaluation.add_arguments(evaluated)
    evaluated.set_defaults(run=evaluation.run)

    glyphs = commands.add_parser(
        "glyphs",
        help="write the built-in glyphs as a large data set in files",
        description="Draw the glyphs in several faces and sizes, each time a little differently, into .npy files "
        "that `sparc-fast train` reads; held-out characters in files of their own.",
    )
    glyphs.add_argument("--out", type=Path, default=Path("glyphs"), help="folder of the files (%(default)s)")
    glyphs.add_argument("--rows", type=int, default=200_000, help="rows to train on (%(default)s)")
    glyphs.add_argument("--seed", type=int, default=0, help="of the split and the jitter (%(default)s)")
    glyphs.add_argument("--threads", type=int, help="that draw; as many as there are cores by default")
    glyphs.set_defaults(run=_glyphs)

    converted = commands.add_parser(
        "convert",
        help="turn a checkpoint of the research code into ours, or back",
        description="Turn a checkpoint of the research code into one of sparc_fast, or back, as the suffixes say.",
    )
    convert.add_arguments(converted)
    converted.set_defaults(run=convert.run)

    bench = commands.add_parser(
        "bench", help="time every operator and the whole step against plain PyTorch", add_help=False
    )
    bench.set_defaults(run=_bench)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import torch

        from sparc_fast import available_backends

        print(f"sparc_fast {__version__}, torch {torch.__version__}")
        for device in ("cpu", "cuda"):
            print(f"{device} backends: {', '.join(available_backends(device))}")
        parser.exit()


def _bench(arguments: argparse.Namespace) -> int:
    from sparc_fast.benchmarks.main import main as benchmarks

    status: int = benchmarks(arguments.rest)
    return status


def _demo(arguments: argparse.Namespace) -> int:
    if missing := [name for name in ("rich", "matplotlib", "sklearn", "jinja2") if find_spec(name) is None]:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install 'sparc_fast[demo]'")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sparc_fast import demo
    from sparc_fast.comparison import as_text, comparison
    from sparc_fast.data import glyphs as load_glyphs
    from sparc_fast.report import write_report

    console = Console(width=None if sys.stdout.isatty() else 160)
    changed = {name: value for name in ("steps", "seed") if (value := getattr(arguments, name)) is not None}
    settings = demo.Settings(**changed)
    _check_folder(arguments.out)
    with console.status("drawing the glyphs and reading their names"):
        glyphs = load_glyphs()
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


def _glyphs(arguments: argparse.Namespace) -> int:
    if missing := [name for name in ("rich", "matplotlib", "sklearn") if find_spec(name) is None]:
        raise ImportError(f"the glyphs need {', '.join(missing)}: pip install 'sparc_fast[demo]'")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sparc_fast.data import write_glyphs

    _check_folder(arguments.out)
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=arguments.rows)
        write_glyphs(
            arguments.out, arguments.rows, seed=arguments.seed, threads=arguments.threads,
            progress=lambda done, rows: bar.update(task, completed=done),
        )  # fmt: skip
    print(f"{arguments.rows:,} rows; now: sparc-fast train {arguments.out / 'train.toml'} --out runs/wide")
    return 0


def _check_folder(folder: Path) -> None:
    """Make the folder now: minutes of training must not end in an error about it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / ".writable") as temporary:
            temporary.touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise OSError(f"--out must be a folder that can be written, got {folder}: {error.strerror or error}") from error
