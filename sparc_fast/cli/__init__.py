"""The command `sparc-fast`: each command has a file of its own, which is loaded when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from .terminal import warn_in_a_line, write_anywhere

__all__ = ["main"]

COMMANDS = {
    "demo": "train on the built-in glyphs, print the evaluation and write a report",
    "extract": "turn pictures and texts into features with your own models",
    "train": "train on your own features, in a run that survives interruption",
    "plan": "whether a training run fits this machine or another, and how long it takes",
    "eval": "print the evaluation of trained models, beside an untrained one",
    "explain": "write a page to look through every latent of a model, and share",
    "encode": "turn a data set of any size into sparse codes in a file",
    "glyphs": "write the built-in glyphs as a large data set in files",
    "convert": "turn models of the research code, SAELens and crosscoders into ours, or back",
    "export": "write a model for SAELens or the Hugging Face Hub, or the kernels for theirs",
    "bench": "time every operator and the whole step against plain PyTorch",
}
"""Name, also of the file, whose first words are the description -> what it does, in a line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 after a message on standard error, or what the command says."""
    argv = sys.argv[1:] if argv is None else argv
    write_anywhere()
    warn_in_a_line()
    try:
        if argv[:1] == ["bench"]:  # its options are its own
            from sparc_fast.benchmarks.main import main as bench

            status: int = bench(argv[1:])
            return status
        arguments = _parser(argv[0] if argv else "").parse_args(argv)
        status = arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"sparc-fast: {error}", file=sys.stderr)
        return 1
    return status


def _parser(asked: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sparc-fast", description="Concept-aligned sparse autoencoders over several models and modalities."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and the backends built in")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, words in COMMANDS.items():
        of_command = commands.add_parser(name, help=words)
        if name == asked:
            command = import_module(f"{__name__}.{name}")
            of_command.description = command.__doc__
            command.add_arguments(of_command)
            of_command.set_defaults(run=command.run)
            parser.flags = list(of_command._option_string_actions)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says of a flag that is not known which one may be meant."""

    flags: Sequence[str] = ()
    """Of the command that was asked for."""

    def error(self, message: str) -> NoReturn:
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized") and unknown:
            near = [best for word in unknown for best in get_close_matches(word, self.flags, 1, 0.7)]
            message += f"; did you mean {', '.join(near)}?" if near else ""
        super().error(message)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import torch

        from sparc_fast import __version__, available_backends

        print(f"sparc_fast {__version__}, torch {torch.__version__}")
        for device in ("cpu", "cuda"):
            print(f"{device} backends: {', '.join(available_backends(device))}")
        parser.exit()
