"""The command `sparc-fast train`."""

from sparc_fast.training.command import add_arguments, run

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = (
    "Train SPARC on features in files. The same command goes on where a stopped or killed run was, bit for bit."
)
