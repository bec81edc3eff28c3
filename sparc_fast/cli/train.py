"""Train SPARC on features in files. The same command goes on where a stopped or killed run was, bit for bit."""

from sparc_fast.training.command import add_arguments, run

__all__ = ["add_arguments", "run"]
